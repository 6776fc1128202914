"""The best split of one batch's tokens among the copies of their experts.

Shapes: E logical experts, C copies of the most copied expert, U units.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

Ints = NDArray[np.int64]


def spread_evenly(count_E: Ints, units_EC: Ints, number_E: Ints, units: int) -> Ints:
    """Split whole tokens among copies so that the largest unit load is the smallest possible.

    A bound on the unit load is met if and only if a flow from experts over their copies to units carries every token.
    When it does not, the minimal cut names experts whose tokens have nowhere else to go, and their mean load per
    reachable unit is a higher bound that every split must meet (Newton's method on the parametric cut): the first
    bound that is met is the optimum, usually after one to four flows.

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
    return split_EC


def _mean_up(total: int, parts: int) -> int:
    """The mean, rounded up: some part has at least this much."""
    return -(-total // parts)
