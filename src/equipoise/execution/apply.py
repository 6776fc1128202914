"""A plan put onto a model: its layers' weights become slots, in place, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from equipoise.artifacts import Plan
from equipoise.artifacts.routing import require_policy
from equipoise.errors import EquipoiseError, ModelError, PlanError, unknown_name
from equipoise.execution.families import family_of
from equipoise.execution.hf_quantizer import mark_balanced
from equipoise.execution.install import install
from equipoise.execution.layerwise import Batch, Calibration, Progress, quantize_model
from equipoise.execution.slots import ExpertSlots, slots_of
from equipoise.models.fingerprint import check_weights
from equipoise.models.layers import MoELayer, expert_matrices, expert_vectors, find_moe_layers, model_facts, name_of
from equipoise.models.policy_marks import policy_id
from equipoise.models.streamed import streamed_of
from equipoise.precisions import precision
from equipoise.quantization.formats import to_float
from equipoise.quantization.methods import METHODS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DISPATCHES = ("even", "least_loaded", "gate_aware")


def apply_plan(
    model: PreTrainedModel,
    plan: Plan,
    *,
    method: str = "rtn",
    batches: Sequence[Batch] | None = None,
    options: Mapping[str, Any] | None = None,
    workers: int = 1,
    resume_dir: str | Path | None = None,
    int8_activations: bool = True,
    progress: Progress = lambda done, total: None,
) -> PreTrainedModel:
    """Balance a model: its experts are stored and run as the plan's slots.

    Layers are converted one after the other, so that beside the model at most one layer's slots are held extra. With text,
    each layer is rounded on what reaches it when all layers before it are rounded already (`execution.layerwise`).

    Args:
        model: the model that the plan was made for, unquantized, running under the plan's routing policy (`attach_policy`),
            with which it is then saved.
        plan: what to do.
        method: rounding of the quantized formats (`quantization.methods.METHODS`).
        batches: calibration text, such as `profiling.sequences.make_batches` gives; methods that use Hessians need it, and
            what a method does not use is left alone.
        options: of the rounding on text: damp, shrink, refit, rotate (`quantization.layer.quantize_experts`).
        workers: groups of experts that are rounded at the same time; no effect on the result.
        resume_dir: directory of finished layers, which an interrupted run on text goes on from; delete it afterwards.
        int8_activations: also round the inputs of 8-bit experts to 8 bits, per token, where the CPU multiplies bytes
            faster than floats (VNNI): several times the speed of float experts, where weights in 8 bits alone only save
            memory. The price is an error of the size of the weights' own; see docs for what it did to a real model.
        progress: told after each layer that is rounded on text.

    Returns:
        the same model, changed in place; it saves, loads and generates like any other.

    Raises:
        PlanError: the plan belongs to another model or routing policy, or the model carries a plan already.
        ModelError: the model has no MoE layers, is quantized or sharded otherwise, or has NaN or infinite experts.
        EquipoiseError: unknown method or option, or a method that needs text and got none.
    """
    if slots_of(model):
        raise PlanError("this model carries a plan already; load the original again to apply another.")
    if getattr(model, "hf_quantizer", None) is not None or getattr(model.config, "quantization_config", None) is not None:
        raise ModelError("the model is quantized already; plans are applied to 16- or 32-bit models.")
    if streamed_of(model) is not None:
        raise ModelError("the model is read from its files layer by layer; carry the plan out with apply_streamed.")
    require_policy(plan.routing_policy, policy_id(model), "applied")
    plan.require_all_experts("carried out by slots")
    plan.check_model(model_facts(model, name_of(model)))
    layers = find_moe_layers(model)
    _check(model, plan, layers, method, batches is not None)
    if batches is not None and METHODS.get(method).reads_hessian:
        calibration = Calibration(batches, method, options or {}, workers)
        quantize_model(model, plan, calibration, resume_dir=resume_dir, int8_activations=int8_activations, progress=progress)
        mark_balanced(model, plan, int8_activations, calibration.record())
    else:
        install(model, plan, layers, method=method, int8_activations=int8_activations)
        mark_balanced(model, plan, int8_activations, {"method": method})
    return model


def set_dispatch(model: PreTrainedModel, dispatch: str) -> None:
    """Choose how a balanced model splits tokens among copies: "even", "least_loaded" or "gate_aware".

    Raises:
        EquipoiseError: unknown name.
        ModelError: the model is not balanced.
    """
    if dispatch not in DISPATCHES:
        raise unknown_name("dispatch", dispatch, DISPATCHES)
    for slots in _slots_or_error(model):
        slots.dispatch = dispatch
    model.config.quantization_config.change_dispatch(dispatch)


def set_int8_activations(model: PreTrainedModel, on: bool) -> None:
    """Choose whether 8-bit experts also round their inputs to 8 bits, where the CPU is faster that way.

    Raises:
        ModelError: the model is not balanced.
    """
    for slots in _slots_or_error(model):
        for group in slots.groups:
            group.int8_activations = on
    model.config.quantization_config.int8_activations = on


def expert_bytes(model: PreTrainedModel) -> int:
    """Bytes of all routed experts, measured from the tensors of a model, balanced or not; scales and biases counted.

    Raises:
        ModelError: the model has no MoE layers.
    """
    slots = slots_of(model)
    if slots:
        return sum(group.nbytes for layer in slots for group in layer.groups)
    return sum(
        tensor.nbytes
        for layer in find_moe_layers(model)
        for expert in range(layer.num_experts)
        for tensor in (*expert_matrices(layer, expert), *expert_vectors(layer, expert))
    )


def _slots_or_error(model: nn.Module) -> list[ExpertSlots]:
    slots = slots_of(model)
    if not slots:
        raise ModelError("the model is not balanced; apply a plan first.")
    return slots


def _check(model: PreTrainedModel, plan: Plan, layers: Sequence[MoELayer], method: str, has_text: bool) -> None:
    """Everything that could stop the conversion, before the first layer is touched."""
    if METHODS.get(method).needs_hessian and not has_text:
        raise EquipoiseError(f"quantization method '{method}' needs calibration text; give `batches`, or use 'rtn'.")
    check_weights(model)
    for layer, columns in zip(layers, plan.layers, strict=True):
        family_of(layer)
        if "fp16" in columns.precisions and layer.dtype != "fp16":
            for expert, name in zip(columns.experts, columns.precisions, strict=True):
                if name == "fp16":
                    for tensor in (*expert_matrices(layer, expert), *expert_vectors(layer, expert)):
                        to_float(tensor, precision("fp16"))
