"""The best split of one batch's tokens among the copies of their experts.

Shapes: E logical experts, C copies of the most copied expert, U units.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

Ints = NDArray[np.int64]
SWEEPS = 8
"""Most rounds over all experts in which units below the largest are leveled; two or three usually suffice."""


def spread_evenly(count_E: Ints, units_EC: Ints, number_E: Ints, units: int) -> Ints:
    """Split whole tokens among copies so that the largest unit load is the smallest possible, and level the others.

    A bound on the unit load is met if and only if a flow from experts over their copies to units carries every token.
    When it does not, the minimal cut names experts whose tokens have nowhere else to go, and their mean load per
    reachable unit is a higher bound that every split must meet (Newton's method on the parametric cut): the first
    bound that is met is the optimum, usually after one to four flows. The flow says nothing of the units below the
    bound; over many batches the same of them would be left behind. So each expert in turn then levels the units of its
    copies, which never raises the largest.

    Args:
        count_E: tokens of each expert.
        units_EC: unit of each copy.
        number_E: copies of each expert; later columns of `units_EC` are ignored.
        units: number of units U.

    Returns:
        [E, C] tokens of each copy; rows add up to `count_E`.
    """
    split_EC = np.zeros_like(units_EC)
    several = np.flatnonzero((number_E > 1) & (count_E > 0))
    single = number_E == 1
    split_EC[single, 0] = count_E[single]
    fixed_U = np.bincount(units_EC[single, 0], weights=count_E[single], minlength=units).astype(np.int64)
    if not len(several):
        return split_EC

    rows = np.repeat(np.arange(len(several)), number_E[several])
    columns = np.concatenate([np.arange(number_E[e]) for e in several])
    at_unit = units_EC[several[rows], columns]
    need = count_E[several]
    source, sink = len(several) + units, len(several) + units + 1
    tail = np.concatenate([np.full(len(several), source), rows, len(several) + np.arange(units)])
    head = np.concatenate([np.arange(len(several)), len(several) + at_unit, np.full(units, sink)])
    total = int(need.sum())
    reached = np.unique(at_unit)
    bound = max(int(fixed_U.max()), _mean_up(total + int(fixed_U[reached].sum()), len(reached)))
    while True:
        capacity = np.concatenate([need, need[rows], bound - fixed_U])
        graph = csr_matrix((capacity.astype(np.int32), (tail, head)), shape=(sink + 1, sink + 1))
        result = maximum_flow(graph, source, sink)
        if result.flow_value == total:
            break
        # On the source side of the cut: experts that cannot place all their tokens, and every unit they reach.
        residual = graph - result.flow
        residual.data[residual.data < 0] = 0
        residual.eliminate_zeros()
        side = np.zeros(sink + 1, bool)
        side[breadth_first_order(residual, source, return_predecessors=False)] = True
        stuck, full = side[: len(several)], side[len(several) : source]
        higher = _mean_up(int(need[stuck].sum() + fixed_U[full].sum()), int(full.sum()))
        assert higher > bound, "a violated cut must raise the bound"
        bound = higher
    flow = np.asarray(result.flow[rows, len(several) + at_unit]).ravel()
    split_EC[several[rows], columns] = flow
    _level(split_EC, units_EC, number_E, several, units)
    return split_EC


def _level(split_EC: Ints, units_EC: Ints, number_E: Ints, several: Ints, units: int) -> None:
    """Even out, in place, the units of each expert's copies in turn (coordinate descent on the sum of squares)."""
    held = np.zeros(units, np.int64)
    valid = np.arange(split_EC.shape[1]) < number_E[:, None]
    np.add.at(held, units_EC[valid], split_EC[valid])
    load = held.tolist()  # plain numbers: numpy costs more than it does on two or three copies
    flows = {int(e): split_EC[e, : number_E[e]].tolist() for e in several}
    homes = {e: units_EC[e, : len(flow)].tolist() for e, flow in flows.items()}
    for _ in range(SWEEPS):
        moved = False
        for e, flow in flows.items():
            others = [load[unit] - tokens for unit, tokens in zip(homes[e], flow, strict=True)]
            new = _fill(others, sum(flow))
            if new != flow:
                flows[e], moved = new, True
                for unit, other, tokens in zip(homes[e], others, new, strict=True):
                    load[unit] = other + tokens
        if not moved:
            break
    for e, flow in flows.items():
        split_EC[e, : len(flow)] = flow


def _fill(levels: list[int], amount: int) -> list[int]:
    """Whole tokens poured onto each of several levels so that the result is as level as can be."""
    order = sorted(range(len(levels)), key=levels.__getitem__)
    filled, reached = 0, 0
    for reached, i in enumerate(order, 1):
        filled += levels[i]
        if reached == len(order) or amount + filled <= reached * levels[order[reached]]:
            break
    level, rest = divmod(amount + filled, reached)
    poured = [0] * len(levels)
    for rank, i in enumerate(order[:reached]):
        poured[i] = level - levels[i] + (rank < rest)
    return poured


def _mean_up(total: int, parts: int) -> int:
    """The mean, rounded up: some part has at least this much."""
    return -(-total // parts)
