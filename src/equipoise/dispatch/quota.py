"""Exact-load quotas: for one batch, the tokens that overloaded ranks hand to copies in a few spare slots (UltraEP).

Every rank has some spare slots beside its standing ones. Given the batch's exact counts, the smallest threshold is searched
to which every rank can be brought by making copies in spare slots, never two of an expert on one rank.
Source: UltraEP's published solver (github.com/Dots-Infra/UltraEP, csrc/kernels/placement.cu), rewritten from its rules.
Different here: an expert may have several standing copies, which take tokens before a spare slot is spent; the last resort
is a plain bisection of the greedy test, which need not be monotone, so the result is reachable but not proven least.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
FAST_TRIES = 3
"""Thresholds that are tried just above the mean before the search."""
BISECTIONS = 12


@dataclass(frozen=True, eq=False)
class Quotas:
    """Tokens of every expert on every rank for one batch.

    Attributes:
        quota_ER: [E, R] tokens; rows add up to the experts' loads.
        added: (expert, from, to) copies made in spare slots for this batch.
        threshold: the rank load that the search reached.
    """

    quota_ER: Ints
    added: tuple[tuple[int, int, int], ...]
    threshold: int


def exact_load_quotas(
    load_E: Sequence[int],
    hosts: Sequence[Sequence[int]],
    ranks: int,
    *,
    spare: int = 2,
    threshold: float = 1.0,
    slack: float = 0.01,
    least: int = 1,
) -> Quotas:
    """Quotas that bring every rank to a threshold close to the mean.

    Args:
        load_E: [E] tokens of each expert in the batch.
        hosts: ranks that have a standing copy of each expert; the first is its master, which keeps at least one token.
        ranks: R.
        spare: most copies that a rank can take for one batch.
        threshold: wanted largest over mean rank load; at least 1.
        slack: relative room above the threshold; without it the last few tokens of a rank cost a copy each.
        least: fewest tokens of a copy in the last resort (q_min; the source's default is 1024, which presumes large batches).

    Returns:
        The quotas of the first threshold that is reached, or of no change when none is.
    """
    total = int(sum(load_E))
    start_ER = np.zeros((len(load_E), ranks), np.int64)
    for e, load in enumerate(load_E):
        for i, rank in enumerate(hosts[e]):
            start_ER[e, rank] = load // len(hosts[e]) + (i < load % len(hosts[e]))
    largest = int(start_ER.sum(0).max(initial=0))
    unchanged = Quotas(start_ER, (), largest)
    first = math.ceil(math.ceil(total / ranks * threshold) * (1 + slack))
    if largest <= first:
        return unchanged
    for attempt in range(FAST_TRIES):
        found = _reach(start_ER, hosts, first + math.ceil(attempt * 0.01 * largest), spare, None)
        if found is not None:
            return found
    low, high, best = first, largest, unchanged
    for _ in range(BISECTIONS):
        if low >= high:
            break
        middle = (low + high) // 2
        found = _reach(start_ER, hosts, middle, spare, least)
        if found is None:
            low = middle + 1
        else:
            best, high = found, middle
    return best


def _reach(start_ER: Ints, hosts: Sequence[Sequence[int]], t: int, spare: int, floor: int | None) -> Quotas | None:
    """Quotas under which no rank exceeds t, or None; a floor of None is chosen anew for each part to be exported."""
    load = start_ER.sum(0)
    excess, slack = np.maximum(load - t, 0).tolist(), np.maximum(t - load, 0).tolist()
    left, room = sum(excess), sum(slack)
    if left > room:
        return None
    quota_ER = start_ER.copy()
    free = [spare] * start_ER.shape[1]
    hosting = [set(row) for row in hosts]
    added: list[tuple[int, int, int]] = []
    for source in np.argsort(-load, kind="stable").tolist():
        need = excess[source]
        column = quota_ER[:, source]
        for e in np.argsort(-column, kind="stable").tolist() if need else ():
            keep = 1 if hosts[e][0] == source else 0
            available = int(column[e]) - keep
            while need > 0 and available > 0:
                wanted = min(need, available)
                target, standing = _target(slack, free, hosting[e], hosts[e], source)
                part = min(wanted, slack[target]) if target >= 0 else 0
                if part <= 0 or (not standing and part < (floor or _dynamic_floor(need, slack, free))):
                    break
                if not standing:
                    free[target] -= 1
                    hosting[e].add(target)
                    added.append((e, source, target))
                quota_ER[e, target] += part
                quota_ER[e, source] -= part
                slack[target] -= part
                need -= part
                available -= part
                left -= part
                room -= part
        if need > 0 or left > room:
            return None
    return Quotas(quota_ER, tuple(added), t)


def _target(slack: list[int], free: list[int], hosting: set[int], standing: Sequence[int], source: int) -> tuple[int, bool]:
    """The rank with most room: a standing copy's if any has room, else one with a spare slot; -1 when there is none."""
    best = max((r for r in standing if r != source and slack[r] > 0), key=slack.__getitem__, default=-1)
    if best >= 0:
        return best, True
    spares = (r for r in range(len(slack)) if free[r] > 0 and slack[r] > 0 and r not in hosting)
    return max(spares, key=slack.__getitem__, default=-1), False


def _dynamic_floor(need: int, slack: list[int], free: list[int]) -> int:
    usable = sum(1 for s, f in zip(slack, free, strict=True) if s > 0 and f > 0)
    return -(-need // max(usable, 1))
