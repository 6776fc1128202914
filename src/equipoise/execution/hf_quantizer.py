"""The balanced model in transformers' own quantizer interface: what makes `from_pretrained` and `save_pretrained` work.

The plan travels in the model's configuration. The weights lie in files that only this quantizer names
("equipoise.safetensors"): transformers without Equipoise merely warns of an unknown quantization method and would fill the
experts with random numbers, but finding no weights under the usual names it stops.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

# From the modules, not from the package `transformers.quantizers`, which may still be importing when this is needed.
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from equipoise.artifacts import Plan
from equipoise.errors import CheckpointError
from equipoise.execution.balanced_config import METHOD, EquipoiseConfig, plan_of
from equipoise.models.policy_marks import policy_of

__all__ = ["EquipoiseQuantizer", "mark_balanced", "plan_of"]


class EquipoiseQuantizer(HfQuantizer):  # type: ignore[misc]
    """Builds slots before weights are loaded into them, and names the files that hold the weights."""

    requires_calibration = False

    def update_attn_implementation(self, config: Any) -> Any:
        """The one hook that sees the configuration before the weights are looked for: say where they are."""
        if self.pre_quantized:
            config.transformers_weights = self.quantization_config.weights
        return config

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Balanced models are saved ones: a plan is applied to a model by `apply_plan`, not at load time."""
        if not self.pre_quantized:
            raise CheckpointError("this directory holds no balanced model; load it as it is and call equipoise.apply on it.")

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from equipoise.execution.install import install
        from equipoise.models.layers import find_moe_layers

        config = self.quantization_config
        plan = config.read_plan()
        layers = _matching(find_moe_layers(model), plan)
        install(model, plan, layers, method=None, int8_activations=config.int8_activations, rotated=config.rotated)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Transformers only warns of missing tensors; an expert without its weights must not answer."""
        from equipoise.execution.slots import slots_of

        for slots in slots_of(model):
            for name, tensor in slots.state_dict(keep_vars=True).items():
                if not getattr(tensor, "_is_hf_initialized", False):
                    raise CheckpointError(f"MoE layer {slots.layer} is not whole: its tensor '{name}' is missing; save again.")
        config = self.quantization_config
        policy, plan = config.read_policy(), config.read_plan()
        if policy is not None:
            from equipoise.execution.routing.attach import attach_policy

            policy.check_model(plan.model)
            attach_policy(model, policy, check=False)
        mark_balanced(model, plan, config.int8_activations)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Yes; see `checkpoint.save_balanced`."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Integer slots have no gradients."""
        return False


def mark_balanced(model: Any, plan: Plan, int8_activations: bool, rounding: Mapping[str, Any] | None = None) -> None:
    """Tell transformers that a model carries a plan, so that it saves as one.

    Args:
        model: a model with slots.
        plan: what they are.
        int8_activations: as for `apply.apply_plan`.
        rounding: the record of how its experts were rounded, when that is known anew.
    """
    from equipoise.execution.checkpoint import save_pretrained

    config = getattr(model.config, "quantization_config", None)
    if not isinstance(config, EquipoiseConfig):
        config = EquipoiseConfig(plan, int8_activations=int8_activations, rounding=rounding, policy=policy_of(model) or "")
    model.config.quantization_config = config
    if hasattr(model.config, "transformers_weights"):
        del model.config.transformers_weights
    model.hf_quantizer = EquipoiseQuantizer(config, pre_quantized=True)
    model.quantization_method = METHOD
    model.save_pretrained = MethodType(save_pretrained, model)


def _matching(layers: Any, plan: Plan) -> Any:
    """The layers of a model that is about to be loaded, checked against the plan.

    A base model without its head has the same layers under paths without the head's prefix.
    """
    wanted = [facts.path for facts in plan.model.layers]
    found = [layer.path for layer in layers]
    same_tail = len(wanted) == len(found) and all(
        a == b or a.endswith(f".{b}") or b.endswith(f".{a}") for a, b in zip(wanted, found, strict=True)
    )
    if not same_tail:
        raise CheckpointError(
            f"the plan's layers ({wanted[0]}, ... {len(wanted)} in all) are not those of this model class "
            f"({found[0]}, ... {len(found)} in all); load the directory with the class that config.json names."
        )
    return layers


register_quantization_config(METHOD)(EquipoiseConfig)
register_quantizer(METHOD)(EquipoiseQuantizer)
