"""How many bits each expert has, and which unit plays which role: least error under the bytes of every unit.

Either all copies of an expert have one precision, so that it does not matter which copy serves a token ("alike"), or each
copy has its own. Alike, one choice takes bytes of several units; see `coupled`.
Shapes: L MoE layers, U units, N slots of all layers together, X experts that have slots, Q precisions from most to fewest
bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from equipoise.planning.budget import Budget
from equipoise.planning.coupled import choose_coupled
from equipoise.planning.knapsack import Choice, choose
from equipoise.planning.load import Floats, Ints, Slots

NAMINGS = 3
"""How often units are named anew for the bits just chosen; the even bytes of a name's last choice rarely change more."""
SWAPS = 4
"""Swaps of names per unit at most; they end sooner as a rule."""


@dataclass(frozen=True, eq=False)
class Bits:
    """The precision of every slot.

    Attributes:
        option: [N] index into the budget's precisions.
        cost: sum over layers of the relative squared error.
        lower_bound: proven: with these copies and shares, no precisions that fit the bytes of all units together, however
            units are named, have less.
        excess: bytes by which the fullest unit exceeds what it holds, with the fewest bytes everywhere; 0 when all fit.
    """

    option: Ints
    cost: float
    lower_bound: float
    excess: int


def slot_errors(slots: Slots, errors_LEQ: Floats) -> Floats:
    """[N, Q] error that each slot brings in each precision: its share of its expert's error.

    Errors of different slots are taken as independent, so squares add up; the tokens of a copy are taken as typical of
    its expert's.
    """
    return np.asarray(slots.share[:, None] * errors_LEQ[slots.layer, slots.expert])


def pooled_bits(slots: Slots, budget: Budget, alike: bool) -> Bits:
    """Precisions with all units as one pool: what any naming of the units can at best reach."""
    if not alike:
        everywhere = np.zeros(len(slots.unit), np.int64)
        found = choose(budget.sizes[slots.layer], slot_errors(slots, budget.errors), everywhere, budget.total_bytes, 1)
        return Bits(found.option, found.cost, found.lower_bound, found.excess)
    item_N, layer_X, expert_X = experts_of(slots)
    copies_X = np.bincount(item_N)
    found = choose(
        budget.sizes[layer_X] * copies_X[:, None],
        budget.errors[layer_X, expert_X],
        np.zeros(len(layer_X), np.int64),
        budget.total_bytes,
        1,
    )
    return Bits(found.option[item_N], found.cost, found.lower_bound, found.excess)


def assign_bits(slots: Slots, budget: Budget, alike: bool) -> tuple[Slots, Bits]:
    """Precisions that minimise the total error within each unit's bytes, and the units' names that let them fit best.

    Args:
        slots: with units as each layer numbered them for itself; renaming them within a layer changes no load.
        budget: sizes and errors.
        alike: one precision for all copies of an expert.

    Returns:
        The slots with units named, and the best bits found; `excess` tells what is missing where nothing fits.
    """
    pooled = pooled_bits(slots, budget, alike)
    option_N, best = pooled.option, None
    for _ in range(NAMINGS):
        named = even_bytes(slots, budget, option_N)
        found = _per_unit(named, budget, alike)
        if best is None or (found.excess, found.cost) < (best[1].excess, best[1].cost):
            best = named, found
        if found.excess or np.array_equal(found.option, option_N):
            break
        option_N = found.option
    assert best is not None, "at least one naming is tried"
    bits = best[1]
    # The relaxation that forgets units bounds every naming; that of one naming bounds only itself.
    return best[0], Bits(bits.option, bits.cost, min(pooled.lower_bound, bits.cost), bits.excess)


def _per_unit(slots: Slots, budget: Budget, alike: bool) -> Choice:
    """The bits of slots whose units are named; the options are of slots, whatever the items are."""
    if not alike:
        cost = slot_errors(slots, budget.errors)
        return choose(budget.sizes[slots.layer], cost, slots.unit, budget.unit_bytes, budget.units)
    item_N, layer_X, expert_X = experts_of(slots)
    found = choose_coupled(
        budget.sizes[layer_X], budget.errors[layer_X, expert_X], item_N, slots.unit, budget.unit_bytes, budget.units
    )
    return Choice(found.option[item_N], found.cost, found.lower_bound, found.excess)


def experts_of(slots: Slots) -> tuple[Ints, Ints, Ints]:
    """[N] which of the experts that have slots each slot holds, and their [X] layers and [X] numbers."""
    key = slots.layer * (int(slots.expert.max(initial=0)) + 1) + slots.expert
    _, first, item_N = np.unique(key, return_index=True, return_inverse=True)
    return item_N.astype(np.int64), slots.layer[first], slots.expert[first]


def even_bytes(slots: Slots, budget: Budget, option_N: Ints) -> Slots:
    """Rename the units within each layer so that bytes over all layers come out even; no load changes.

    Layers with the most uneven bytes first; in each, the unit that holds most takes the name of the one with the
    fewest bytes so far. Then the fullest unit of all swaps its part of a layer with another unit, as long as that helps.

    Args:
        slots: with units as each layer numbered them for itself.
        budget: sizes.
        option_N: [N] precision of each slot.
    """
    n_layers = len(budget.sizes)
    at_unit = slots.layer * budget.units + slots.unit
    held = np.bincount(at_unit, budget.sizes[slots.layer, option_N], n_layers * budget.units)
    held_LU = np.asarray(held, np.float64).reshape(n_layers, budget.units)
    total_U = np.zeros(budget.units)
    name_LU = np.empty(held_LU.shape, np.int64)
    for layer in np.argsort(-held_LU.std(1), kind="stable"):
        fullest, emptiest = np.argsort(-held_LU[layer], kind="stable"), np.argsort(total_U, kind="stable")
        name_LU[layer, fullest] = emptiest
        total_U[emptiest] += held_LU[layer, fullest]
    _swap_names(held_LU, name_LU, total_U)
    return Slots(slots.layer, slots.expert, name_LU[slots.layer, slots.unit], slots.share)


def _swap_names(held_LU: Floats, name_LU: Ints, total_U: Floats) -> None:
    """Lower the fullest unit, in place, by the swap with another unit in one layer after which the fuller of both is least."""
    under_LU = np.empty_like(held_LU)  # bytes by name instead of by the layer's own number
    np.put_along_axis(under_LU, name_LU, held_LU, 1)
    for _ in range(SWAPS * len(total_U)):
        fullest = int(total_U.argmax())
        given_LU = under_LU[:, [fullest]] - under_LU
        fuller_LU = np.maximum(total_U[fullest] - given_LU, total_U + given_LU)
        layer, other = np.unravel_index(fuller_LU.argmin(), fuller_LU.shape)
        if fuller_LU[layer, other] >= total_U[fullest]:
            break
        given = given_LU[layer, other]
        total_U[[fullest, other]] += (-given, given)
        pair = [fullest, int(other)]
        under_LU[layer, pair] = under_LU[layer, pair[::-1]]
        mine = [int((name_LU[layer] == name).argmax()) for name in pair]
        name_LU[layer, mine] = pair[::-1]
