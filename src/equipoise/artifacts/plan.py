"""Plan: what was decided, layer by layer; the physical slots, their precision, their unit and their share of tokens.

A layer's slots live on `units` parallel units of equal bytes; a unit's load is the tokens that its slots serve.
Shapes: L MoE layers, E logical experts, P slots of a layer, U units.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from equipoise.artifacts.json_file import JsonFile
from equipoise.artifacts.model_facts import LayerFacts, ModelFacts
from equipoise.artifacts.profile import Profile
from equipoise.errors import EquipoiseError, PlanError
from equipoise.metrics import lis
from equipoise.precisions import precision

PLAN_FILE = "equipoise.plan.json"
"""A balanced model's plan, in its directory."""
SCHEMA = "equipoise.plan/1"
Dispatch = Literal["even", "least_loaded", "gate_aware"]
Exactness = Literal["exact", "weights", "routing", "capacity"]
"""What a plan promises, from the strongest promise to the weakest."""
Floats = NDArray[np.float64]


class LayerPlan(BaseModel):
    """The physical slots of one MoE layer, as columns of equal length P.

    Attributes:
        experts: logical expert that each slot holds (the physical_to_logical map).
        precisions: storage format of each slot.
        units: parallel unit that each slot lives on.
        shares: fraction of its expert's tokens that each slot serves; the shares of one expert add up to 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    experts: tuple[int, ...] = Field(min_length=1)
    precisions: tuple[str, ...]
    units: tuple[int, ...]
    shares: tuple[float, ...]

    @property
    def num_slots(self) -> int:
        """Physical slots of the layer."""
        return len(self.experts)

    @property
    def duplicates(self) -> int:
        """Slots beyond the first of an expert on one unit; they serve nothing that the first could not."""
        return self.num_slots - len(set(zip(self.experts, self.units, strict=True)))

    def slot_load(self, load_E: NDArray[Any]) -> Floats:
        """[..., P] tokens that each slot serves when its expert's tokens are split by the shares."""
        return np.asarray(np.asarray(load_E, np.float64)[..., list(self.experts)] * np.asarray(self.shares))

    def unit_load(self, slot_load_P: NDArray[Any], units: int) -> Floats:
        """[..., U] tokens that each unit serves, from the load of each slot."""
        on_unit = np.zeros((self.num_slots, units))
        on_unit[np.arange(self.num_slots), list(self.units)] = 1.0
        return np.asarray(np.asarray(slot_load_P, np.float64) @ on_unit)

    def slot_bytes(self, facts: LayerFacts) -> NDArray[np.int64]:
        """[P] bytes of each slot, scales counted."""
        size = {name: facts.expert_bytes(precision(name)) for name in set(self.precisions)}
        return np.array([size[name] for name in self.precisions], np.int64)


class LayerForecast(BaseModel):
    """What is expected of one layer's placement on ranks; ratios of the largest rank load to the mean, so 1 is balance.

    Attributes:
        in_sample: on the whole profile that the plan was made from.
        out_of_sample: mean over scenarios (or windows) that the layer's plan was made without; None when not cross-validated.
        lower_bound: proven: no placement of as many slots has a lower `in_sample`.
        duplicates: slots beyond the first of an expert on one rank, which serve nothing.
        moved: slots whose expert was not on their rank in the current plan; None when there is none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    in_sample: float
    out_of_sample: float | None = None
    lower_bound: float
    duplicates: int = 0
    moved: int | None = None


class Predicted(BaseModel):
    """What the planner computed for its plan on the profile it was made from; predicted, not measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lis_raw: float = Field(description="mean over layers of the score without a plan, over units")
    lis: float = Field(description="mean over layers of U * max unit load / total load")
    lis_max: float = Field(description="worst layer")
    lis_paper: float = Field(description="mean over layers of m * max slot load / total load: the copy on a unit of its own")
    lower_bound: float = Field(description="proven: no plan within these bytes and this error has a lower `lis`")
    output_error: float | None = Field(
        description="relative root-mean-square error of the layers' routed output, weighted by the experts' sensitivity where "
        "the profile measured it; null when it did not measure the error"
    )
    least_error: float | None = Field(
        default=None, description="proven: no precisions of these copies in the same bytes have a smaller `output_error`"
    )
    kl: float | None = Field(
        default=None,
        description="KL divergence in nats per token that the error comes to; null when the profile did not measure "
        "the experts' sensitivity",
    )
    bytes: int = Field(description="bytes of all slots, scales counted")
    budget_bytes: int = Field(description="bytes of all units together")
    overrun_bytes: int = Field(description="bytes by which the fullest unit exceeds its share; 0 when the plan fits")
    layers: tuple[LayerForecast, ...] = Field(default=(), description="each layer's forecast; rank placements alone have it")
    note: str = Field(default="", description="what the planner wants read, such as why it kept the engine's default")

    @property
    def gap(self) -> float:
        """How far `lis` can at most be from the best possible."""
        return self.lis - self.lower_bound


class Plan(JsonFile):
    """Slots of every MoE layer, with the policy that splits tokens among copies.

    Attributes:
        method, options, seed: how it was made; the same profile, options and seed give the same plan.
        units: parallel units U of every layer; the ranks of a placement.
        nodes: machines that the units are divided among in equal, contiguous parts.
        allows_duplicates: two slots of one expert on one unit are let through, as published placement algorithms make them.
        unit_bytes: what one unit holds at most, over all layers together.
        dispatch: which copy serves which token (`even` = by shares, deterministic in a token's own position).
        exactness: `exact` when every slot keeps the model's own precision, else `weights`; `routing` when another policy than
            the model's own chooses experts; `capacity` when experts are left out.
        kept: experts that each layer keeps, in rising order; None keeps them all.
    """

    kind: ClassVar[str] = "plan"
    problem: ClassVar[type[EquipoiseError]] = PlanError

    schema_version: str = Field(default=SCHEMA, alias="schema")
    method: str
    options: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0
    equipoise_version: str = ""
    profile_sha256: str = Field(default="", description="hash of the text that the profile was measured on")
    routing_policy: str = "native"
    model: ModelFacts
    units: int = Field(ge=1)
    nodes: int = Field(default=1, ge=1)
    allows_duplicates: bool = False
    unit_bytes: int = Field(ge=1)
    dispatch: Dispatch = "even"
    exactness: Exactness
    kept: tuple[tuple[int, ...], ...] | None = None
    layers: tuple[LayerPlan, ...]
    predicted: Predicted | None = None

    @model_validator(mode="after")
    def _check(self) -> Plan:
        if self.schema_version != SCHEMA:
            raise ValueError(f"schema is '{self.schema_version}'; this version reads '{SCHEMA}'")
        if len(self.layers) != len(self.model.layers):
            raise ValueError(f"layers: the plan has {len(self.layers)} layers, its model has {len(self.model.layers)}")
        if self.units % self.nodes:
            raise ValueError(f"nodes: {self.units} units cannot be divided among {self.nodes} nodes evenly")
        if self.kept is not None and len(self.kept) != len(self.layers):
            raise ValueError(f"kept: the plan has {len(self.layers)} layers, kept has {len(self.kept)}")
        for index, (layer, facts) in enumerate(zip(self.layers, self.model.layers, strict=True)):
            kept = None if self.kept is None else self.kept[index]
            problem = _problem(layer, facts.num_experts, self.units, self.allows_duplicates, kept)
            if problem:
                raise ValueError(f"layers.{index}.{problem}")
        if self.exactness != self._promise():
            raise ValueError(f"exactness: '{self.exactness}' does not match what the plan does, which is '{self._promise()}'")
        return self

    def _promise(self) -> Exactness:
        """The strongest promise that holds for all that the plan does."""
        if self.prunes:
            return "capacity"
        if self.routing_policy != "native":
            return "routing"
        native = {self.model.dtype}
        return "weights" if any(set(layer.precisions) != native for layer in self.layers) else "exact"

    @property
    def prunes(self) -> bool:
        """Whether experts are left out."""
        if self.kept is None:
            return False
        return any(len(kept) < facts.num_experts for kept, facts in zip(self.kept, self.model.layers, strict=True))

    def require_native_routing(self, purpose: str) -> None:
        """Raise `PlanError` when the plan was made for another routing policy than the model's own.

        Args:
            purpose: what the plan was to be used for, as in "a placement for vllm".
        """
        if self.routing_policy != "native":
            raise PlanError(
                f"this plan was made under the routing policy '{self.routing_policy}', which {purpose} does not carry out; "
                "profile without --policy and plan from that."
            )

    def require_all_experts(self, purpose: str) -> None:
        """Raise `PlanError` when the plan leaves out experts, which is done by writing a smaller model, not by slots.

        Args:
            purpose: what the plan was to be used for, as in "to be applied".
        """
        if self.prunes:
            raise PlanError(
                f"the plan leaves out experts, so it is not {purpose}; prune the model with it (equipoise prune), then profile "
                "and plan the pruned model."
            )

    def unit_load(self, load_LE: NDArray[Any]) -> Floats:
        """[L, U] tokens that each unit serves when an expert's tokens are split by the shares.

        Args:
            load_LE: [L, E] selections of each logical expert.
        """
        load = np.asarray(load_LE)
        return np.stack([p.unit_load(p.slot_load(load[i]), self.units) for i, p in enumerate(self.layers)])

    def lis(self, load_LE: NDArray[Any]) -> Floats:
        """[L] LIS over units: U * max unit load / total load."""
        return lis(self.unit_load(load_LE))

    def lis_paper(self, load_LE: NDArray[Any], *, count_copies: bool = False) -> Floats:
        """[L] the paper's reading: m * max slot load / total load, as if every copy had a unit of its own.

        Args:
            load_LE: [L, E] selections of each logical expert.
            count_copies: take m as the number of slots instead of the number of experts (the paper leaves it open).
        """
        load = np.asarray(load_LE)
        scores = []
        for i, (layer, facts) in enumerate(zip(self.layers, self.model.layers, strict=True)):
            m = layer.num_slots if count_copies else facts.num_experts
            slots = layer.slot_load(load[i])
            scores.append(m * slots.max() / slots.sum() if slots.sum() > 0 else math.nan)
        return np.array(scores)

    def bytes_by_unit(self) -> NDArray[np.int64]:
        """[U] bytes that each unit holds over all layers, scales counted."""
        total = np.zeros(self.units, np.int64)
        for layer, facts in zip(self.layers, self.model.layers, strict=True):
            np.add.at(total, list(layer.units), layer.slot_bytes(facts))
        return total

    def check_profile(self, profile: Profile) -> None:
        """Raise `PlanError` when a profile is of another model or another routing policy than this plan's."""
        self.check_model(profile.model)
        if profile.source.routing_policy != self.routing_policy:
            raise PlanError(
                f"the plan is for routing policy '{self.routing_policy}', the profile was made under "
                f"'{profile.source.routing_policy}'; profile again under the plan's policy."
            )

    def check_model(self, model: ModelFacts) -> None:
        """Raise `PlanError` when a model is not the one this plan was made for."""
        mine, other = self.model, model
        if mine.fingerprint != other.fingerprint:
            raise PlanError(
                f"the plan was made for '{mine.name}' ({mine.model_type}, {len(mine.layers)} MoE layers, "
                f"{mine.fingerprint[:12]}), not for '{other.name}' ({other.model_type}, "
                f"{len(other.layers)} MoE layers, {other.fingerprint[:12]}); "
                "profile this model and plan again."
            )

    def to_json(self) -> str:
        """The plan as JSON text: one line per column of a layer, so that two plans diff well."""
        data = self.model_dump(mode="json", by_alias=True)
        kept = data.pop("kept")
        columns = []
        for layer in data.pop("layers"):
            lines = ",\n".join(f"      {json.dumps(k)}: {json.dumps(v)}" for k, v in layer.items())
            columns.append("    {\n" + lines + "\n    }")
        head = json.dumps(data, indent=2, sort_keys=False)[:-2]
        if kept is not None:
            head += ',\n  "kept": [\n    ' + ",\n    ".join(map(json.dumps, kept)) + "\n  ]"
        return f'{head},\n  "layers": [\n' + ",\n".join(columns) + "\n  ]\n}\n"


def _problem(
    layer: LayerPlan, num_experts: int, units: int, allows_duplicates: bool, kept: tuple[int, ...] | None = None
) -> str | None:
    """What is wrong with one layer's slots, starting with the column's name; None when nothing is."""
    sizes = {name: len(getattr(layer, name)) for name in ("experts", "precisions", "units", "shares")}
    if len(set(sizes.values())) != 1:
        return f"experts: columns differ in length: {sizes}"
    for expert in layer.experts:
        if not 0 <= expert < num_experts:
            return f"experts: expert id {expert} is out of range 0..{num_experts - 1}"
    if kept is not None and (list(kept) != sorted(set(kept)) or set(kept) != set(layer.experts)):
        return f"experts: the slots hold experts {sorted(set(layer.experts))}, kept are {list(kept)}; they must be the same"
    present = range(num_experts) if kept is None else kept
    missing = sorted(set(present) - set(layer.experts))
    if missing:
        return f"experts: expert {missing[0]} has no slot ({len(missing)} missing); every expert needs at least one"
    for unit in layer.units:
        if not 0 <= unit < units:
            return f"units: unit {unit} is out of range 0..{units - 1}"
    (expert, unit), often = Counter(zip(layer.experts, layer.units, strict=True)).most_common(1)[0]
    if often > 1 and not allows_duplicates:
        return f"experts: expert {expert} has {often} slots on unit {unit}; a second copy there serves nothing"
    for name in sorted(set(layer.precisions)):
        try:
            precision(name)
        except EquipoiseError as error:
            return f"precisions: {error}"
    shares = np.asarray(layer.shares)
    if not np.isfinite(shares).all() or (shares < 0).any():
        return "shares: must be finite and not negative"
    total = np.bincount(layer.experts, weights=shares, minlength=num_experts)[list(present)]
    if (np.abs(total - 1) > 1e-6).any():
        worst = int(np.abs(total - 1).argmax())
        return f"shares: the shares of expert {present[worst]} add up to {total[worst]:.6g}, must be 1"
    return None
