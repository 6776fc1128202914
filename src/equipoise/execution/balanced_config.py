"""A plan in the configuration of a balanced model, as transformers saves and loads it."""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from equipoise.artifacts import Plan
from equipoise.artifacts.plan import Dispatch
from equipoise.artifacts.routing import RoutingPolicy
from equipoise.errors import CheckpointError, EquipoiseError, PlanError

METHOD = "equipoise"
WEIGHTS, WEIGHTS_INDEX = "equipoise.safetensors", "equipoise.safetensors.index.json"


class EquipoiseConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a balanced model.

    Attributes:
        quant_method: "equipoise".
        plan: the plan's JSON, compressed and in base64, since a configuration is printed with every number on a line of its
            own; `equipoise.plan.json` beside the weights is for reading.
        weights: name of the weights file or of its index.
        int8_activations: whether 8-bit experts round their inputs to 8 bits too.
        rounding: how the experts were rounded: method and, on calibration text, its hash, tokens and options.
        policy: the routing policy, packed like the plan; empty where the model's own router decides.
    """

    def __init__(
        self,
        plan: str | Plan = "",
        weights: str = WEIGHTS,
        int8_activations: bool = True,
        rounding: Mapping[str, Any] | None = None,
        policy: str | RoutingPolicy = "",
        quant_method: str = METHOD,
        **_: Any,
    ) -> None:
        self.quant_method = quant_method
        self.plan = packed(plan) if isinstance(plan, Plan) else plan
        self.policy = packed(policy) if isinstance(policy, RoutingPolicy) else policy
        self.weights = weights
        self.int8_activations = int8_activations
        self.rounding = dict(rounding or {})
        self.read_plan()

    @property
    def rotated(self) -> bool:
        """Whether the last matrices of quantized experts are stored rotated."""
        return bool(self.rounding.get("options", {}).get("rotate"))

    def read_plan(self) -> Plan:
        """The plan.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        return _unpacked(self.plan)

    def read_policy(self) -> RoutingPolicy | None:
        """The routing policy; None for the model's own router.

        Raises:
            CheckpointError: it is damaged.
        """
        return _unpacked_policy(self.policy) if self.policy else None

    def change_dispatch(self, dispatch: Dispatch) -> None:
        """Keep the plan with another dispatch."""
        self.plan = packed(self.read_plan().model_copy(update={"dispatch": dispatch}))


def plan_of(model: Any) -> Plan | None:
    """The plan that a model carries; None when it is not balanced."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return config.read_plan() if isinstance(config, EquipoiseConfig) else None


def packed(value: Plan | RoutingPolicy) -> str:
    """A plan or policy as a configuration holds it: JSON, compressed, in base64."""
    text = json.dumps(value.model_dump(mode="json", by_alias=True), separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def _text(value: str) -> bytes:
    return zlib.decompress(base64.b64decode(value, validate=True))


@lru_cache(maxsize=8)
def _unpacked(text: str) -> Plan:
    try:
        return Plan.from_json(_text(text), "quantization_config.plan")
    except (binascii.Error, zlib.error, PlanError) as error:
        raise CheckpointError(f"config.json holds no whole plan ({error}); save the balanced model again.") from error


@lru_cache(maxsize=8)
def _unpacked_policy(text: str) -> RoutingPolicy:
    try:
        return RoutingPolicy.from_json(_text(text), "quantization_config.policy")
    except (binascii.Error, zlib.error, EquipoiseError) as error:
        raise CheckpointError(f"config.json holds no whole routing policy ({error}); save the balanced model again.") from error
