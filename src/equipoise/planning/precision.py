"""How many bits each slot has, and which unit plays which role: least error under the bytes of every unit.

Shapes: L MoE layers, U units, N slots of all layers together, Q precisions from most to fewest bytes.
"""

from __future__ import annotations

import numpy as np

from equipoise.planning.budget import Budget
from equipoise.planning.knapsack import Choice, choose
from equipoise.planning.load import Floats, Ints, Slots


def slot_errors(slots: Slots, budget: Budget) -> Floats:
    """[N, Q] error that each slot brings in each precision: its share of its expert's error.

    Errors of different slots are taken as independent, so squares add up; the tokens of a copy are taken as typical of
    its expert's.
    """
    return slots.share[:, None] * budget.errors[slots.layer, slots.expert]


def assign_bits(slots: Slots, budget: Budget) -> Choice:
    """Precision of every slot that minimises the total error within each unit's bytes; `excess` tells what is missing."""
    return choose(budget.sizes[slots.layer], slot_errors(slots, budget), slots.unit, budget.unit_bytes, budget.units)


def pooled_bits(slots: Slots, budget: Budget) -> Choice:
    """As `assign_bits` with all units as one pool: what any assignment of roles to units can at best reach."""
    everywhere = np.zeros(len(slots.unit), np.int64)
    return choose(budget.sizes[slots.layer], slot_errors(slots, budget), everywhere, budget.total_bytes, 1)


def even_bytes(slots: Slots, budget: Budget, option_N: Ints) -> Slots:
    """Rename the units within each layer so that bytes over all layers come out even; no load changes.

    Layers with the most uneven bytes first; in each, the unit that holds most takes the name of the one with the
    fewest bytes so far.

    Args:
        slots: with units as each layer numbered them for itself.
        budget: sizes.
        option_N: [N] precision of each slot.
    """
    n_layers = len(budget.sizes)
    held_LU = np.bincount(
        slots.layer * budget.units + slots.unit, budget.sizes[slots.layer, option_N], n_layers * budget.units
    ).reshape(n_layers, budget.units)
    total_U = np.zeros(budget.units)
    name_LU = np.empty(held_LU.shape, np.int64)
    for layer in np.argsort(-held_LU.std(1), kind="stable"):
        fullest, emptiest = np.argsort(-held_LU[layer], kind="stable"), np.argsort(total_U, kind="stable")
        name_LU[layer, fullest] = emptiest
        total_U[emptiest] += held_LU[layer, fullest]
    return Slots(slots.layer, slots.expert, name_LU[slots.layer, slots.unit], slots.share)
