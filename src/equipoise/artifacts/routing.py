"""RoutingPolicy: another rule than the model's own for which experts a token is sent to, with the numbers fitted for a model.

Shapes: L MoE layers, E logical experts, K top-k.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from equipoise.artifacts.json_file import JsonFile
from equipoise.artifacts.model_facts import ModelFacts
from equipoise.errors import PlanError

SCHEMA = "equipoise.policy/1"
NATIVE = "native"
"""Name of the policy under which the model's own router decides."""


class LayerRouting(BaseModel):
    """What a policy knows of one MoE layer: how its router was read, and the numbers that were fitted for it.

    Attributes:
        path: module path of the layer's experts.
        scores: where an expert's score is read: the router's "softmax" or "sigmoid"; "choice", what it ranks experts by;
            "logits", the softmax of that; or "none", for a router that does not go by scores and is left alone.
        weights: whether the model divides the gate weights of the chosen experts by their sum ("renormalised"), or not ("raw");
            "unknown" where neither explains them.
        mass: where the mass of a chosen expert is read: from its gate weight, or from its score.
        threshold: mass that `top_p` keeps, or from which `laser_style` leaves a token alone.
        bias: [E] added to what the router ranks by.
        histogram: [K + 1] share of tokens that are sent to 0, 1, ..., K experts.
        mean_k: experts of a token on the text of the fit, measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    scores: Literal["softmax", "sigmoid", "choice", "logits", "none"]
    weights: Literal["renormalised", "raw", "unknown"]
    mass: Literal["weights", "scores"] = "weights"
    threshold: float | None = None
    bias: tuple[float, ...] | None = None
    histogram: tuple[float, ...] | None = None
    mean_k: float | None = None


class RoutingPolicy(JsonFile):
    """A policy of the registry `execution.routing.policies.POLICIES`, fitted for one model.

    Attributes:
        name, options: which policy, and every option of it.
        model, fingerprint: the model it was fitted for.
        text_sha256, tokens: the text of the fit.
        layers: fitted numbers of each MoE layer.
    """

    kind: ClassVar[str] = "routing policy"

    schema_version: str = Field(default=SCHEMA, alias="schema")
    name: str
    options: dict[str, Any] = Field(default_factory=dict)
    model: str
    fingerprint: str
    text_sha256: str = ""
    tokens: int = 0
    equipoise_version: str = ""
    layers: tuple[LayerRouting, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> RoutingPolicy:
        if self.schema_version != SCHEMA:
            raise ValueError(f"schema is '{self.schema_version}'; this version reads '{SCHEMA}'")
        return self

    @property
    def id(self) -> str:
        """Name and options for people, and a hash of everything that decides the routing: what profiles and plans carry."""
        deciding = {
            "name": self.name,
            "options": self.options,
            "fingerprint": self.fingerprint,
            "layers": [layer.model_dump(mode="json", exclude={"mean_k"}) for layer in self.layers],
        }
        digest = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:12]
        told = ",".join(f"{key}={value}" for key, value in sorted(self.options.items()) if value is not None)
        return f"{self.name}({told})@{digest}"

    @property
    def mean_k(self) -> float | None:
        """Experts of a token, mean over layers, on the text of the fit; None when it was not measured."""
        known = [layer.mean_k for layer in self.layers if layer.mean_k is not None]
        return sum(known) / len(known) if known else None

    def check_model(self, model: ModelFacts) -> None:
        """Raise `PlanError` when a model is not the one this policy was fitted for."""
        if model.fingerprint != self.fingerprint:
            raise PlanError(
                f"the policy was fitted for '{self.model}' ({self.fingerprint[:12]}), not for '{model.name}' "
                f"({model.fingerprint[:12]}); fit it on this model (equipoise policy fit)."
            )

    def to_json(self) -> str:
        """The policy as JSON text, a layer a line."""
        data = self.model_dump(mode="json", by_alias=True)
        layers = ",\n".join(f"    {json.dumps(layer)}" for layer in data.pop("layers"))
        return f'{json.dumps(data, indent=2)[:-2]},\n  "layers": [\n{layers}\n  ]\n}}\n'


def require_policy(wanted: str, given: str, purpose: str) -> None:
    """Raise `PlanError` when the routing policy in force is not the one that a plan was made for.

    Args:
        wanted: policy of the plan.
        given: policy of the model.
        purpose: what was to be done, as in "to be applied".
    """
    if wanted == given:
        return
    if wanted == NATIVE:
        hint = "profile the model with that policy (profile --policy FILE) and plan from that"
    elif given == NATIVE:
        hint = "give that policy's file (--policy)"
    else:
        hint = "give the policy that the profile was made under, or profile and plan again under this one"
    raise PlanError(
        f"the plan is for routing policy '{wanted}', the model runs under '{given}', so it is not {purpose}; {hint}."
    )
