"""A change of plan on a running model: new slots are made beside the old, then all layers change at once between forwards.

Every step can fail and leaves the plan in force as it is. What is staged beside it never exceeds a bound: a change that would
need more is made in rounds, each of which ends with a plan in its own right.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from equipoise.artifacts import LayerPlan, Plan
from equipoise.errors import PlanError
from equipoise.execution.balanced_config import packed
from equipoise.execution.rebalance.gate import Gate
from equipoise.execution.rebalance.store import ExpertStore
from equipoise.execution.slot_group import SlotGroup
from equipoise.execution.slots import ExpertSlots, canonical
from equipoise.precisions import precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Staged:
    """A plan made ready beside the one in force.

    Attributes:
        plan: to change to.
        packed: the plan as the model's configuration holds it.
        slots: new slots by layer; storage that stays is shared with the old ones.
        staged_bytes: of storage that is not shared.
        moved_bytes: of slots that hold another expert or format than before.
        seconds: taken to make them.
        copying: of those, for slots that hold another expert or format.
    """

    plan: Plan
    packed: str
    slots: Mapping[int, ExpertSlots]
    staged_bytes: int
    moved_bytes: int
    seconds: float
    copying: float


def check_change(before: Plan, after: Plan) -> None:
    """Raise `PlanError` when a running model cannot change from one plan to another."""
    before.check_model(after.model)
    if (before.units, before.dispatch, before.routing_policy) != (after.units, after.dispatch, after.routing_policy):
        raise PlanError(
            "a running model keeps its units, dispatch and routing policy; change them with a plan that is applied anew."
        )
    size, room = (int(plan.bytes_by_unit().sum()) for plan in (after, before))
    if size > max(room, before.units * before.unit_bytes):
        raise PlanError(f"the new plan takes {size} bytes, more than the {room} that the model has; plan within them.")


def rounds(before: Plan, after: Plan, most_bytes: int) -> list[Plan]:
    """The plans on the way from one to another, the last one included, each of which stages at most so many bytes.

    Args:
        before: in force.
        after: to get to.
        most_bytes: that may be staged at once.

    Raises:
        PlanError: one layer alone needs more.
    """
    plans: list[Plan] = []
    layers, used = list(before.layers), 0
    pending = False
    for index, (old, new) in enumerate(zip(before.layers, after.layers, strict=True)):
        if old == new:
            continue
        size = staging_bytes(before, index, new)
        if size > most_bytes:
            raise PlanError(
                f"staging_bytes: {most_bytes} given, but the new slots of layer {index} alone take {size}; allow that many."
            )
        if used + size > most_bytes:
            plans.append(_with(before, layers, after))
            used = 0
        layers[index], used, pending = new, used + size, True
    return [*plans, _with(before, layers, after)] if pending else plans


def largest_layer(plan: Plan) -> int:
    """Bytes of all slots of the layer that has most."""
    return max(int(c.slot_bytes(facts).sum()) for c, facts in zip(plan.layers, plan.model.layers, strict=True))


def staging_bytes(before: Plan, layer: int, after: LayerPlan) -> int:
    """Bytes of the storage that has to be made anew for a layer: that of every format in which some slot changes."""
    facts = before.model.layers[layer]
    old, new = _by_format(before.layers[layer]), _by_format(after)
    size = dict(zip(map(canonical, after.precisions), after.slot_bytes(facts).tolist(), strict=True))
    return sum(len(experts) * size[form] for form, experts in new.items() if old.get(form) != experts)


def stage(layers: Sequence[ExpertSlots], before: Plan, after: Plan, store: ExpertStore) -> Staged:
    """Make the slots of another plan ready, while forwards go on under the one in force.

    An expert that is stored in the format already is copied from the slot that has it, any other from the store.

    Args:
        layers: the model's slots.
        before: the plan in force.
        after: the plan to change to.
        store: of the model's experts.

    Raises:
        PlanError: the plans do not go together.
        CheckpointError: the store lacks a format, or is damaged.
    """
    begun = time.perf_counter()
    check_change(before, after)
    store.check(after)
    made: dict[int, ExpertSlots] = {}
    staged = moved = 0
    copying = 0.0
    for index, (old, new) in enumerate(zip(before.layers, after.layers, strict=True)):
        if old != new:
            made[index], of_storage, of_slots, seconds = _stage_layer(layers[index], new, store)
            staged, moved, copying = staged + of_storage, moved + of_slots, copying + seconds
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # nothing of it may still be on its way when forwards begin to use it
    return Staged(after, packed(after), made, staged, moved, time.perf_counter() - begun, copying)


def commit(model: PreTrainedModel, layers: Sequence[ExpertSlots], staged: Staged, gate: Gate, patience: float) -> float:
    """Change to a staged plan between two forwards: all layers or none.

    Args:
        model: whose configuration tells the plan.
        layers: its slots.
        staged: what to change to; it holds the old slots afterwards and is to be dropped.
        gate: that forwards pass.
        patience: seconds to wait for pinned requests and a running forward.

    Returns:
        Seconds for which forwards were held back.

    Raises:
        SwapPostponedError: requests did not end in time; nothing has changed.
    """
    with gate.closed(patience):
        begun = time.perf_counter()
        config = model.config.quantization_config
        done: list[int] = []
        before = config.plan
        try:
            for index, slots in staged.slots.items():
                layers[index].exchange(slots)
                done.append(index)
            config.plan = staged.packed
        except BaseException:
            for index in done:
                layers[index].exchange(staged.slots[index])
            config.plan = before
            raise
        return time.perf_counter() - begun


def restage(layers: Sequence[ExpertSlots], plan: Plan) -> None:
    """What every change costs besides its bytes, done for nothing so that it can be timed: tables and the packed plan."""
    for slots in layers:
        ExpertSlots(slots.plan, slots.layer, slots.stack, slots.units, {group.form.name: group for group in slots.groups})
    packed(plan)


def _stage_layer(slots: ExpertSlots, columns: LayerPlan, store: ExpertStore) -> tuple[ExpertSlots, int, int, float]:
    """New slots of one layer, the bytes of storage made for them, those of slots whose contents are new, and their seconds."""
    old_groups = {group.form.name: group for group in slots.groups}
    old, new = _by_format(slots.plan), _by_format(columns)
    some = next(iter(old_groups.values()))
    groups: dict[str, SlotGroup] = {}
    staged = moved = 0
    copying = 0.0
    for form, experts in new.items():
        if form in old_groups and old[form] == experts:
            groups[form] = old_groups[form]
            continue
        held = {expert: index for index, expert in enumerate(old.get(form, ()))}
        contents = old_groups[form].contents() if held else {}
        if held:
            group = old_groups[form].like(len(experts))
        else:
            group = some.like(len(experts), precision(form), store.native)
            group.rotated = store.rotated and not group.form.is_float
        for index, expert in enumerate(experts):
            if expert in held:
                with torch.no_grad():
                    for name, target in (*group.named_parameters(), *group.named_buffers()):
                        target[index].copy_(contents[name][held[expert]])
            else:
                begun = time.perf_counter()
                store.copy_into(group, index, slots.layer, expert)
                copying += time.perf_counter() - begun
                moved += group.nbytes // len(group)
        staged += group.nbytes
        groups[form] = group.train(some.training)
    return ExpertSlots(columns, slots.layer, slots.stack, slots.units, groups), staged, moved, copying


def _by_format(columns: LayerPlan) -> dict[str, list[int]]:
    """The experts of each format's slots, in the order in which they are stored."""
    experts: dict[str, list[int]] = {}
    for expert, name in zip(columns.experts, columns.precisions, strict=True):
        experts.setdefault(canonical(name), []).append(expert)
    return experts


def _with(before: Plan, layers: Sequence[LayerPlan], after: Plan) -> Plan:
    return after if tuple(layers) == after.layers else before.model_copy(update={"layers": tuple(layers), "predicted": None})
