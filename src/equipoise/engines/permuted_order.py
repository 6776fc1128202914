"""The orders of experts whose linear placement is a plan: what an engine without a way to load a map can be given.

Such an engine puts physical slot j of P on rank j // (P / R). Slot j < E holds expert j of the checkpoint, and vLLM's redundant
slot E + i holds a copy of expert i % E. The order of the experts in the checkpoint is all that can be chosen. Without redundant
slots every placement is such an order; with them the first P - E experts have a second copy on the last ranks.
Group-limited routing sees experts in groups of neighbours, so groups must stay together: they may change places as a whole,
and experts within their group.

Shapes: S scenarios, L MoE layers, E experts, P physical slots, R ranks, G groups, C candidate swaps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from equipoise.planning.ranks import rank_load

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
STEPS = 400
"""Most swaps that improve one layer."""

SCENARIOS = 16
"""Scenarios that the search looks at; more are joined, evenly by their number."""


def linear_slots(order_E: Ints, slots: int) -> Ints:
    """[P] the expert of each slot when a checkpoint has its experts in this order.

    Args:
        order_E: [E] the original expert at each place of the checkpoint.
        slots: P, from E up.
    """
    experts = len(order_E)
    return np.concatenate([order_E, order_E[np.arange(slots - experts) % experts]])


def order_of(physical_P: Ints, experts: int, groups: int) -> Ints | None:
    """The order of experts whose linear placement equals a placement, or None when there is none.

    Ranks, and slots within a rank, are interchangeable for a placement without copies; with copies the slots themselves must
    be vLLM's.

    Args:
        physical_P: [P] the expert of each slot, rank-major.
        experts: E.
        groups: G of group-limited routing; 1 = none.
    """
    order = physical_P[:experts]
    if len(np.unique(order)) != experts or not np.array_equal(linear_slots(order, len(physical_P)), physical_P):
        return None
    return order if keeps_groups(order, groups) else None


def keeps_groups(order_E: Ints, groups: int) -> bool:
    """Whether each stretch of E / G places holds the experts of one group."""
    group = order_E.reshape(groups, -1) // (len(order_E) // groups)
    return bool((group == group[:, :1]).all())


def find_order(load_SE: Floats, slots: int, ranks: int, groups: int = 1) -> Ints:
    """An order of experts whose linear placement balances the ranks over scenarios: hottest first, then swaps.

    Starts from the experts (or groups) in descending load, dealt to the ranks in turn, then does the swap that lowers the mean
    over scenarios of the largest rank load most, until none does. Groups swap with groups, experts within their group.

    Args:
        load_SE: [S, E] load of each expert in each scenario.
        slots: P, a multiple of ranks; at most 2 E.
        ranks: R.
        groups: G, a divisor of E; 1 = none.

    Returns:
        [E] the original expert at each place.
    """
    load = _weighted(load_SE)
    starts = [np.arange(load.shape[1]), _hottest_first(load.sum(0), slots, ranks, groups)]
    found = [_descend(start, load, slots, ranks, groups) for start in starts]
    return min(found, key=lambda order: _aim(order, load, slots, ranks))


def _weighted(load_SE: Floats) -> Floats:
    """At most `SCENARIOS` scenarios of equal weight; empty ones are left out."""
    load = np.asarray(load_SE, np.float64)
    load = load[load.sum(1) > 0]
    if not len(load):
        return np.ones((1, load_SE.shape[1]))
    load = np.asarray(load / load.sum(1, keepdims=True))
    if len(load) <= SCENARIOS:
        return load
    edges = np.linspace(0, len(load), SCENARIOS, endpoint=False).astype(int)
    return np.asarray(np.add.reduceat(load, edges, axis=0) / np.diff([*edges, len(load)])[:, None])


def _hottest_first(load_E: Floats, slots: int, ranks: int, groups: int) -> Ints:
    """The hottest experts on the places that have copies, the others dealt so that each rank's load stays low."""
    experts = len(load_E)
    size = experts // groups
    by_group = np.argsort(-load_E.reshape(groups, size).sum(1), kind="stable")
    within = np.argsort(-load_E.reshape(groups, size), axis=1, kind="stable")
    order = np.concatenate([group * size + within[group] for group in by_group])
    if groups > 1:
        return order
    copied = min(slots - experts, experts)
    placed = order.copy()
    rank_of = np.arange(slots) // (slots // ranks)
    load_R = np.zeros(ranks)
    for place in range(copied):
        for slot in (place, experts + place):
            load_R[rank_of[slot]] += load_E[order[place]] / 2
    free = [list(np.flatnonzero(rank_of[copied:experts] == r) + copied) for r in range(ranks)]
    for expert in order[copied:]:
        rank = min((r for r in range(ranks) if free[r]), key=lambda r: load_R[r])
        placed[free[rank].pop(0)] = expert
        load_R[rank] += load_E[expert]
    return placed


def _aim(order_E: Ints, load_SE: Floats, slots: int, ranks: int) -> float:
    return float(rank_load(linear_slots(order_E, slots), load_SE, ranks).max(-1).mean())


def _descend(order_E: Ints, load_SE: Floats, slots: int, ranks: int, groups: int) -> Ints:
    """Swap while that lowers the aim; one of the two swapped lies on the rank that is largest most often."""
    experts = len(order_E)
    share_ER = _share(experts, slots, ranks)
    order, size = order_E.copy(), experts // groups
    for _ in range(STEPS):
        load_SR = load_SE[:, order] @ share_ER
        before = load_SR.max(-1).mean()
        hot = int(np.bincount(load_SR.argmax(-1), weights=load_SR.max(-1), minlength=ranks).argmax())
        mine = np.flatnonzero(share_ER[:, hot])
        swaps = [(a, b) for a in mine for b in range(a // size * size, a // size * size + size) if b != a]
        best, best_aim = _best_swap(np.array(swaps, np.int64).reshape(-1, 2), order, load_SE, load_SR, share_ER)
        trial = order.copy()
        if best is not None:
            trial[list(best)] = order[list(best[::-1])]
        if groups > 1:
            blocks, blocks_aim = _best_block(order, load_SE, share_ER, groups)
            if blocks_aim < best_aim:
                trial, best_aim = blocks, blocks_aim
        if best_aim >= before * (1 - 1e-9):
            return order
        order = trial
    return order


def _share(experts: int, slots: int, ranks: int) -> Floats:
    """[E, R] the part of the load of the expert at each place that each rank carries."""
    slot_rank, place = np.arange(slots) // (slots // ranks), linear_slots(np.arange(experts), slots)
    share = np.zeros((experts, ranks))
    np.add.at(share, (place, slot_rank), 1.0 / np.bincount(place)[place])
    return share


def _best_swap(
    swaps_C2: Ints, order_E: Ints, load_SE: Floats, load_SR: Floats, share_ER: Floats
) -> tuple[tuple[int, int] | None, float]:
    """The pair of places whose swap has the lowest aim, and that aim."""
    best, best_aim = None, np.inf
    for start in range(0, len(swaps_C2), 512):
        a_C, b_C = swaps_C2[start : start + 512].T
        more_SC = load_SE[:, order_E[b_C]] - load_SE[:, order_E[a_C]]  # what place a gains and place b loses
        change_SCR = more_SC[:, :, None] * (share_ER[a_C] - share_ER[b_C])
        aim_C = (load_SR[:, None] + change_SCR).max(-1).mean(0)
        c = int(aim_C.argmin())
        if aim_C[c] < best_aim:
            best, best_aim = (int(a_C[c]), int(b_C[c])), float(aim_C[c])
    return best, best_aim


def _best_block(order_E: Ints, load_SE: Floats, share_ER: Floats, groups: int) -> tuple[Ints, float]:
    """The order after the best swap of two whole groups, and its aim."""
    blocks = order_E.reshape(groups, -1)
    best, best_aim = order_E, np.inf
    for a in range(groups):
        for b in range(a + 1, groups):
            turned = np.arange(groups)
            turned[[a, b]] = b, a
            order = blocks[turned].reshape(-1)
            aim = float((load_SE[:, order] @ share_ER).max(-1).mean())
            if aim < best_aim:
                best, best_aim = order, aim
    return best, best_aim
