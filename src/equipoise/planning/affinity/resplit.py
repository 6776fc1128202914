"""Re-splitting two ranks over all layers at once: what changing one layer at a time cannot find.

The experts of two ranks are pooled in every layer and dealt out again. Experts on other ranks meet neither, so only pairs
inside the pool count, and layers are coupled only to their neighbours: the best dealing is a shortest path through the
layers, whose nodes are the ways to deal one layer. With few experts a rank these are all ways; else the present one, the two
ranks exchanged, and either with one swap where a rank has no more than 16.
Shapes: L MoE layers, E places of a layer, M places of a pool, A ways to deal a pool.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations
from math import comb

import numpy as np

from equipoise.planning.affinity.pairs import Floats, Ints
from equipoise.planning.affinity.task import TINY, Placement, Task

_MOST_WAYS = 300
"""Up to so many ways to deal a pool are all gone through."""
_MOST_SWAPPED = 16
"""Experts of a rank above which single swaps are left to the sweep: their number grows with the square."""


def resplit(task: Task, start: Placement, rounds: int = 8) -> Placement:
    """Re-split all pairs of ranks of a block in turn until a whole round brings nothing.

    Args:
        task: what counts.
        start: a valid placement.
        rounds: most rounds.

    Returns:
        A placement that costs no more.
    """
    placement = [rank.copy() for rank in start]
    per_block = task.ranks // task.blocks
    stale = np.ones((task.ranks, task.ranks), np.bool_)  # pairs of which one has changed since they were last split
    for _ in range(rounds):
        better = False
        for first in range(task.ranks):
            for second in range(first + 1, (first // per_block + 1) * per_block):
                if not stale[first, second]:
                    continue
                if _resplit_two(task, placement, first, second):
                    better = True
                    stale[[first, second]] = stale[:, [first, second]] = True
                stale[first, second] = False
        if not better:
            break
    return placement


def _resplit_two(task: Task, placement: Placement, first: int, second: int) -> bool:
    """Deal the experts of two ranks out again at least cost, in place; whether that lowered the cost."""
    pools = [np.flatnonzero((rank == first) | (rank == second)) for rank in placement]
    ways = [_ways((rank[pool] == first).tobytes()) for rank, pool in zip(placement, pools, strict=True)]
    best = _inner(task, 0, placement[0], pools[0], ways[0])
    present, back = float(best[0]), []
    for i in range(1, len(pools)):
        step = best[:, None] - _together(task.pairs.across[i - 1][np.ix_(pools[i - 1], pools[i])], ways[i - 1], ways[i])
        inner = _inner(task, i, placement[i], pools[i], ways[i])
        present += float(step[0, 0] - best[0] + inner[0])
        back.append(step.argmin(0))
        best = step.min(0) + inner
    if best.min() >= present - TINY:
        return False
    at = int(best.argmin())
    for i in range(len(pools) - 1, -1, -1):
        placement[i][pools[i]] = np.where(ways[i][at] > 0, first, second)
        at = int(back[i - 1][at]) if i else at
    return True


def _together(pairs_MM: Floats, before_AM: Floats, after_AM: Floats) -> Floats:
    """[A, A] pairs of which both are on the first rank, or neither."""
    both = before_AM @ pairs_MM @ after_AM.T
    return np.asarray(
        2 * both + pairs_MM.sum() - (before_AM @ pairs_MM.sum(1))[:, None] - (after_AM @ pairs_MM.sum(0))[None, :]
    )


def _inner(task: Task, layer: int, rank_E: Ints, pool_M: Ints, ways_AM: Floats) -> Floats:
    """[A] what each way to deal a layer costs by itself, up to a constant."""
    cost = np.zeros(len(ways_AM))
    if task.together:
        both = task.pairs.together[layer][np.ix_(pool_M, pool_M)]
        other = 1 - ways_AM
        cost -= task.together * (((ways_AM @ both) * ways_AM).sum(1) + ((other @ both) * other).sum(1))
    if task.mu:
        load = task.pairs.load[layer]
        held = np.bincount(rank_E, load, task.ranks)
        held[rank_E[pool_M]] = 0.0  # the two ranks themselves
        on_first = ways_AM @ load[pool_M]
        largest = np.maximum(np.maximum(on_first, load[pool_M].sum() - on_first), held.max())
        cost += task.mu * task.ranks * largest
    return cost


@lru_cache(maxsize=512)
def _ways(present: bytes) -> Floats:
    """[A, M] ways to deal a pool, 1 for the first rank and 0 for the second; the present one first."""
    now = np.frombuffer(present, np.bool_)
    size, mine = len(now), np.flatnonzero(now)
    if comb(size, len(mine)) <= _MOST_WAYS:
        chosen = [mine.tolist(), *(c for c in combinations(range(size), len(mine)))]
        ways = np.zeros((len(chosen), size))
        np.put_along_axis(ways, np.array(chosen, np.int64).reshape(len(chosen), -1), 1.0, 1)
        return ways
    theirs = np.flatnonzero(~now)
    if len(mine) > _MOST_SWAPPED:
        mine = mine[:0]
    swapped = np.repeat(now[None].astype(np.float64), len(mine) * len(theirs), 0)
    at = np.arange(len(swapped))
    swapped[at, np.repeat(mine, len(theirs))] = 0.0
    swapped[at, np.tile(theirs, len(mine))] = 1.0
    half = np.concatenate([now[None].astype(np.float64), swapped])
    return np.concatenate([half, 1.0 - half])
