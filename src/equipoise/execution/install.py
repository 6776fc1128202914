"""Slots put in the place of a model's expert weights, filled from them or left to be loaded into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from equipoise.artifacts import LayerPlan, Plan
from equipoise.execution.families import IMPLEMENTATION, experts_forward, family_of
from equipoise.execution.slot_group import SlotGroup
from equipoise.execution.slots import ExpertSlots, canonical
from equipoise.models.layers import MoELayer, expert_matrices, expert_vectors
from equipoise.models.tokens import TokenTracker
from equipoise.precisions import precision
from equipoise.quantization.formats import QuantizedMatrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRACKER = "_equipoise_tracker"
"""Attribute of a model: its `SharedTracker`."""

Ready = Mapping[tuple[int, str], tuple[QuantizedMatrix, QuantizedMatrix]]
"""Up and down of an expert by (expert, name of the precision), rounded already."""


def install(
    model: PreTrainedModel,
    plan: Plan,
    layers: Sequence[MoELayer],
    *,
    method: str | None,
    int8_activations: bool,
    rotated: bool = False,
) -> None:
    """Put slots in the place of every layer's weights, and the hooks that know the tokens on the model.

    Args:
        model: a model of the plan.
        plan: its slots.
        layers: the model's MoE layers, in the order of the plan.
        method: rounding of integer formats; None leaves the slots empty, to be loaded into.
        int8_activations: as for `apply.apply_plan`.
        rotated: whether what is loaded was rounded rotated.
    """
    tracker = begin_install(model, layers)
    for layer in layers:
        slots = build_slots(layer, plan, rotated)
        if method is not None:
            fill_slots(layer, slots, method)
        put_slots(layer, slots, plan, tracker, int8_activations=int8_activations)


def begin_install(model: PreTrainedModel, layers: Sequence[MoELayer]) -> SharedTracker:
    """Make a model run those of its layers from slots that have them, and put on it the hooks that know the tokens."""
    tracker = shared_tracker(model, layers)
    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ExpertsInterface.register(IMPLEMENTATION, experts_forward)
    model.set_experts_implementation(IMPLEMENTATION)
    return tracker


def shared_tracker(model: PreTrainedModel, layers: Sequence[MoELayer]) -> SharedTracker:
    """The tracker of a model, put on it for good when it has none: slots and routing policies go by the same tokens."""
    tracker: SharedTracker | None = getattr(model, TRACKER, None)
    if tracker is None:
        tracker = SharedTracker(model, layers)
        tracker.__enter__()
        setattr(model, TRACKER, tracker)
    return tracker


class SharedTracker(TokenTracker):
    """The tracker of a model with slots or a routing policy. Its hooks refer to it: deep copies of the model share it."""

    def __deepcopy__(self, memo: Any) -> SharedTracker:
        return self


def build_slots(layer: MoELayer, plan: Plan, rotated: bool = False) -> ExpertSlots:
    """Empty slots of one layer, on the device of its weights; quantized ones for rotated experts if told."""
    columns: LayerPlan = plan.layers[layer.index]
    sample = expert_matrices(layer, 0)
    shapes = [(sum(m.shape[0] for m in sample[:-1]), sample[0].shape[1]), tuple(sample[-1].shape)]
    groups = {}
    for name in dict.fromkeys(canonical(p) for p in columns.precisions):
        number = sum(canonical(p) == name for p in columns.precisions)
        groups[name] = SlotGroup(
            precision(name),
            number,
            shapes,
            native=name == plan.model.dtype,
            biases=bool(expert_vectors(layer, 0)),
            dtype=sample[0].dtype,
            device=sample[0].device,
            rotated=rotated,
        )
    return ExpertSlots(columns, layer.index, layer.stack, plan.units, groups)


def fill_slots(layer: MoELayer, slots: ExpertSlots, method: str, ready: Ready | None = None) -> None:
    """Copy or round each slot's expert into its storage.

    Args:
        layer: the layer, with its weights.
        slots: its slots.
        method: rounding of what is not ready.
        ready: experts that are rounded already.
    """
    places = iter(slots.order)
    for group in slots.groups:
        for index in range(len(group)):
            expert = slots.plan.experts[next(places)]
            matrices = (ready or {}).get((expert, group.form.name)) or _up_and_down(layer, expert)
            group.write(index, matrices, expert_vectors(layer, expert), method)


def put_slots(layer: MoELayer, slots: ExpertSlots, plan: Plan, tracker: TokenTracker, *, int8_activations: bool) -> None:
    """Put a layer's slots in the place of its weights, which are freed."""
    slots.dispatch, slots.batches = plan.dispatch, tracker.batch
    set_int8_activations([slots], int8_activations)
    family_of(layer).bind(layer, slots)


def set_int8_activations(layers: Sequence[ExpertSlots], on: bool) -> None:
    """Choose for some layers whether 8-bit experts also round their inputs to 8 bits, where that is faster."""
    for slots in layers:
        for group in slots.groups:
            group.int8_activations = on


def _up_and_down(layer: MoELayer, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    *ups, down = expert_matrices(layer, expert)
    return (ups[0] if len(ups) == 1 else torch.cat(ups), down)
