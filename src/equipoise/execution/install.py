"""Slots put in the place of a model's expert weights, filled from them or left to be loaded into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from equipoise.artifacts import LayerPlan, Plan
from equipoise.execution.families import IMPLEMENTATION, experts_forward, family_of
from equipoise.execution.slots import ExpertSlots, SlotGroup, canonical
from equipoise.models.layers import MoELayer, expert_matrices, expert_vectors
from equipoise.models.tokens import TokenTracker
from equipoise.precisions import precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def install(
    model: PreTrainedModel, plan: Plan, layers: Sequence[MoELayer], *, method: str | None, int8_activations: bool
) -> None:
    """Put slots in the place of every layer's weights, and the hooks that know the tokens on the model.

    Args:
        model: a model of the plan.
        plan: its slots.
        layers: the model's MoE layers, in the order of the plan.
        method: rounding of integer formats; None leaves the slots empty, to be loaded into.
        int8_activations: as for `apply.apply_plan`.
    """
    tracker = SharedTracker(model, layers)
    for layer, columns in zip(layers, plan.layers, strict=True):
        slots = _build(layer, columns, plan)
        if method is not None:
            _fill(layer, slots, method)
        slots.dispatch, slots.batches = plan.dispatch, tracker.batch
        for group in slots.groups:
            group.int8_activations = int8_activations
        family_of(layer).bind(layer, slots)
    tracker.__enter__()
    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ExpertsInterface.register(IMPLEMENTATION, experts_forward)
    model.set_experts_implementation(IMPLEMENTATION)


class SharedTracker(TokenTracker):
    """The tracker of a balanced model. Its hooks know it by reference, so a deep copy of the model shares it."""

    def __deepcopy__(self, memo: Any) -> SharedTracker:
        return self


def _build(layer: MoELayer, columns: LayerPlan, plan: Plan) -> ExpertSlots:
    """Empty slots of one layer, on the device of its weights."""
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
        )
    return ExpertSlots(columns, layer.index, layer.stack, plan.units, groups)


def _fill(layer: MoELayer, slots: ExpertSlots, method: str) -> None:
    """Copy or round each slot's expert into its storage."""
    places = iter(slots.order)
    for group in slots.groups:
        for index in range(len(group)):
            expert = slots.plan.experts[next(places)]
            *ups, down = expert_matrices(layer, expert)
            up = ups[0] if len(ups) == 1 else torch.cat(ups)
            group.write(index, (up, down), expert_vectors(layer, expert), method)
