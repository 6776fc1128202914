"""A plan of one precision per layer, as near as there is to one that mixes precisions within layers.

What most readers of quantized checkpoints can hold: each expert once, and all experts of a layer alike.
Shapes: L MoE layers, E logical experts, Q precisions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from equipoise.artifacts import LayerPlan, Plan, Profile
from equipoise.errors import PlanError
from equipoise.planning.budget import Floats, Ints, assumed_error, make_budget
from equipoise.planning.knapsack import choose_exactly
from equipoise.precisions import Precision, precision

MOST = 64.0
"""Part of the original bytes that any format stays below."""


@dataclass(frozen=True, eq=False)
class PerLayer:
    """A rounded plan, and what the rounding costs.

    Attributes:
        plan: every expert once, one precision per layer.
        rounded: how many layers were mixed.
        bytes_before: of the experts without their copies, in the precisions of the plan that was rounded.
        bytes_after: of the rounded plan.
        error_before: predicted relative root-mean-square error of the layers' routed output, copies left out.
        error_after: the same of the rounded plan.
        measured: whether the errors stand on a profile's measurement; else they are assumed from the bits.
    """

    plan: Plan
    rounded: int
    bytes_before: int
    bytes_after: int
    error_before: float
    error_after: float
    measured: bool

    def __str__(self) -> str:
        """One line for people."""
        basis = "measured" if self.measured else "assumed from the bits"
        return (
            f"{self.rounded} of {len(self.plan.layers)} layers rounded to one precision: experts {self.bytes_before:,} -> "
            f"{self.bytes_after:,} bytes, predicted error of the routed output {self.error_before:.4f} -> "
            f"{self.error_after:.4f} ({basis})"
        )


def main_slots(columns: LayerPlan) -> list[int]:
    """[E] the slot that stands for each expert when copies are left out: that of the most bits, the first of several."""
    first: dict[int, int] = {}
    for slot in sorted(range(columns.num_slots), key=lambda slot: (-precision(columns.precisions[slot]).bits, slot)):
        first.setdefault(columns.experts[slot], slot)
    return [first[expert] for expert in range(len(first))]


def round_per_layer(plan: Plan, profile: Profile | None = None) -> PerLayer:
    """Leave out the copies and give every layer one precision: the least predicted error within the bytes of the plan.

    Layers that have one precision keep it. The others choose among all precisions that mixed layers hold, together and
    exactly (`choose_exactly`), in no more bytes than their experts have in the plan.

    Args:
        plan: any plan of a model whose experts' sizes are known.
        profile: of the plan, for errors as measured; without it all experts of a layer count alike and their errors are
            assumed from the bits.

    Raises:
        PlanError: the sizes of the experts are not known, or the profile is of another model.
    """
    if not plan.model.sized:
        raise PlanError(f"the sizes of the experts of '{plan.model.name}' are not known; plan again from the model itself.")
    chosen = [main_slots(columns) for columns in plan.layers]
    names = [[columns.precisions[slot] for slot in slots] for columns, slots in zip(plan.layers, chosen, strict=True)]
    forms = sorted({precision(name) for layer in names for name in layer}, key=lambda form: (-form.bits, form.name))
    index = {form: q for q, form in enumerate(forms)}
    option = [np.array([index[precision(name)] for name in layer]) for layer in names]
    sizes_LQ = np.array([[facts.expert_bytes(form) for form in forms] for facts in plan.model.layers], np.int64)
    errors_LEQ, measured = _errors(plan, profile, forms)
    mixed = [i for i, layer in enumerate(option) if len(set(layer.tolist())) > 1]
    after = [np.array(layer) for layer in option]
    if mixed:
        used = sorted({int(q) for i in mixed for q in option[i]})
        size = sizes_LQ[mixed][:, used] * np.array([[len(option[i])] for i in mixed])
        cost = np.array([[errors_LEQ[i, : len(option[i]), q].sum() for q in used] for i in mixed])
        capacity = int(sum(sizes_LQ[i, option[i]].sum() for i in mixed))
        for i, choice in zip(mixed, choose_exactly(size, cost, capacity), strict=True):
            after[i][:] = used[choice]
    layers = tuple(
        LayerPlan(
            experts=tuple(range(len(slots))),
            precisions=tuple(forms[q].name for q in after[i]),
            units=tuple(columns.units[slot] for slot in slots),
            shares=(1.0,) * len(slots),
        )
        for i, (columns, slots) in enumerate(zip(plan.layers, chosen, strict=True))
    )
    exact = {name for layer in layers for name in layer.precisions} == {plan.model.dtype}
    changes = {"layers": layers, "predicted": None, "exactness": "exact" if exact else "weights"}
    rounded = plan.model_copy(update=changes | {"method": f"{plan.method}, per layer"})
    return PerLayer(
        plan=rounded,
        rounded=len(mixed),
        bytes_before=_bytes(sizes_LQ, option),
        bytes_after=_bytes(sizes_LQ, after),
        error_before=_error(errors_LEQ, option),
        error_after=_error(errors_LEQ, after),
        measured=measured,
    )


def _errors(plan: Plan, profile: Profile | None, forms: list[Precision]) -> tuple[Floats, bool]:
    """[L, E, Q] error that each expert brings in each form, and whether all of it was measured."""
    if profile is None:
        model = plan.model
        of_layer = np.array(
            [
                [0.0 if form.name == model.dtype else assumed_error(form, facts.matrices[0][1]) for form in forms]
                for facts in model.layers
            ]
        )
        widths = np.array([facts.num_experts for facts in model.layers])
        spread = (np.arange(model.max_experts) < widths[:, None]) / widths[:, None]
        return np.asarray(spread[:, :, None] * of_layer[:, None, :]), False
    plan.check_profile(profile)
    budget = make_budget(profile, plan.units, [form.name for form in forms], MOST)
    order = [next(q for q, form in enumerate(budget.precisions) if form == wanted) for wanted in forms]
    return budget.errors[:, :, order], all(budget.measured[q] for q in order)


def _bytes(sizes_LQ: Ints, option: list[Ints]) -> int:
    return int(sum(sizes_LQ[i, layer].sum() for i, layer in enumerate(option)))


def _error(errors_LEQ: Floats, option: list[Ints]) -> float:
    squared = sum(errors_LEQ[i, np.arange(len(layer)), layer].sum() for i, layer in enumerate(option))
    return float(np.sqrt(squared / len(option)))
