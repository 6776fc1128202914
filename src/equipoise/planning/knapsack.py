"""Multiple-choice knapsacks: one option per item, least cost, every group of items within its capacity.

Solved on the lower convex hull of each item's (size, cost): take the reductions that cost least per size saved until
the group fits, then spend what the last one left over. The same greedy solves the linear relaxation exactly when the
last reduction is taken in part (Sinha and Zoltners 1979), so the distance to the optimum is proven.
Shapes: N items, Q options from largest to smallest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Scalar = TypeVar("Scalar", np.int64, np.float64)


@dataclass(frozen=True, eq=False)
class Choice:
    """One option per item.

    Attributes:
        option: [N] chosen options.
        cost: their total cost.
        lower_bound: proven: no choice that fits costs less.
        excess: size by which the fullest group exceeds its capacity with the smallest options everywhere; 0 when all fit.
    """

    option: Ints
    cost: float
    lower_bound: float
    excess: int


def choose(size_NQ: Ints, cost_NQ: Floats, group_N: Ints, capacity: int, groups: int) -> Choice:
    """The cheapest option of every item such that each group fits.

    Args:
        size_NQ: [N, Q] size of each option, decreasing along Q.
        cost_NQ: [N, Q] cost of each option, not negative.
        group_N: [N] group of each item.
        capacity: size that each group may have.
        groups: number of groups.

    Returns:
        The choice; where a group cannot fit, its smallest options and how much is missing.
    """
    item, option, saved, cost = _reductions(size_NQ, cost_NQ)
    order = np.lexsort((option, item, cost / saved, group_N[item]))
    item, option, saved, cost = item[order], option[order], saved[order], cost[order]
    group = group_N[item]
    need = (np.bincount(group_N, size_NQ[:, 0], groups) - capacity)[group]  # what a group must save in all
    before = np.cumsum(saved) - saved
    first = np.searchsorted(group, group)
    before -= before[first]  # what a group has saved before this reduction
    take = (before < need) | (cost < 0)
    chosen = np.zeros(len(size_NQ), np.int64)
    np.maximum.at(chosen, item[take], option[take])
    part = np.where(cost < 0, 1.0, np.clip((need - before) / saved, 0.0, 1.0))
    bound = float(cost_NQ[:, 0].sum() + (part * cost).sum())
    spare = capacity - np.bincount(group_N, _pick(size_NQ, chosen), groups).astype(np.int64)
    if (spare >= 0).all():
        chosen = _spend(chosen, size_NQ, cost_NQ, group_N, spare)
    total = float(_pick(cost_NQ, chosen).sum())
    return Choice(chosen, total, min(bound, total), max(0, -int(spare.min(initial=0))))


def _pick(values_NQ: NDArray[Scalar], option_N: Ints) -> NDArray[Scalar]:
    return np.take_along_axis(values_NQ, option_N[:, None], 1)[:, 0]


def _reductions(size_NQ: Ints, cost_NQ: Floats) -> tuple[Ints, Ints, Floats, Floats]:
    """Steps along each item's hull: item, option reached, size saved, cost added; cost per size rises along an item."""
    n, q = size_NQ.shape
    rows, at = np.arange(n), np.zeros(n, np.int64)
    steps = [(rows[:0], at[:0], np.zeros(0), np.zeros(0))]
    for _ in range(q - 1):
        saved = (size_NQ[rows, at][:, None] - size_NQ[rows]).astype(np.float64)
        cost = cost_NQ[rows] - cost_NQ[rows, at][:, None]
        slope = np.where(saved > 0, cost / np.maximum(saved, 1.0), np.inf)
        # Of options on one line the last, so that every step leads to a corner of the hull.
        best = (q - 1) - slope[:, ::-1].argmin(1)
        going = np.isfinite(slope.min(1))
        rows, best = rows[going], best[going]
        steps.append((rows, best, saved[going, best], cost[going, best]))
        at = best
    item, option, saved, cost = (np.concatenate(column) for column in zip(*steps, strict=True))
    return item, option, saved, cost


def _spend(option_N: Ints, size_NQ: Ints, cost_NQ: Floats, group_N: Ints, spare: Ints) -> Ints:
    """Use spare size: in each round and group the change that lowers cost most among those that fit."""
    chosen, spare = option_N.copy(), spare.copy()
    rows = np.arange(len(chosen))
    more = size_NQ - _pick(size_NQ, chosen)[:, None]
    gain = _pick(cost_NQ, chosen)[:, None] - cost_NQ
    open_rows = np.flatnonzero(((more <= spare[group_N][:, None]) & (gain > 0)).any(1))
    while len(open_rows):
        rows = open_rows
        more = size_NQ[rows] - size_NQ[rows, chosen[rows]][:, None]
        gain = cost_NQ[rows, chosen[rows]][:, None] - cost_NQ[rows]
        gain = np.where(more <= spare[group_N[rows]][:, None], gain, 0.0)
        option = gain.argmax(1)
        best = gain[np.arange(len(rows)), option]
        usable = best > 0
        rows, option, best, more = rows[usable], option[usable], best[usable], more[usable]
        order = np.lexsort((rows, -best, group_N[rows]))
        _, first = np.unique(group_N[rows[order]], return_index=True)
        winner = order[first]
        spare[group_N[rows[winner]]] -= more[winner, option[winner]].astype(np.int64)
        chosen[rows[winner]] = option[winner]
        open_rows = rows
    return chosen


def choose_exactly(size_NQ: Ints, cost_NQ: Floats, capacity: int) -> Ints:
    """The cheapest option of every item such that all fit together, the smallest of equal ones: the proven optimum.

    Dynamic programming over items that keeps the undominated (size, cost) pairs only (Nemhauser and Ullmann 1969), so the
    effort grows with the number of distinct total sizes: small where sizes are multiples of a few numbers.

    Args:
        size_NQ: [N, Q] size of each option, whole numbers from 0, in any order.
        cost_NQ: [N, Q] cost of each option, of any sign.
        capacity: size that all items may have together.

    Returns:
        [N] chosen options.

    Raises:
        ValueError: not even the smallest options fit.
    """
    size, cost = np.zeros(1, np.int64), np.zeros(1)
    history = []
    rest = np.concatenate([np.cumsum(size_NQ.min(1)[::-1])[::-1], [0]])  # the least that this and later items need
    for item in range(len(size_NQ)):
        sizes = (size[:, None] + size_NQ[item]).ravel()
        costs = (cost[:, None] + cost_NQ[item]).ravel()
        kept = np.flatnonzero(sizes + rest[item + 1] <= capacity)
        if not len(kept):
            raise ValueError(f"the smallest options need {rest[0]}, more than {capacity}")
        kept = kept[np.lexsort((costs[kept], sizes[kept]))]
        least = np.minimum.accumulate(costs[kept])
        kept = kept[np.concatenate([[True], costs[kept][1:] < least[:-1]])]
        history.append(kept)
        size, cost = sizes[kept], costs[kept]
    state, chosen = int(cost.argmin()), np.zeros(len(size_NQ), np.int64)
    for item in range(len(size_NQ) - 1, -1, -1):
        state, chosen[item] = divmod(int(history[item][state]), size_NQ.shape[1])
    return chosen
