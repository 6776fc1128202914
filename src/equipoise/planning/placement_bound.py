"""What no placement on ranks can beat: a proven lower bound on the largest rank load, for a number of slots.

A layer of P slots on R ranks, K = P / R each; expert e has c_e >= 1 slots, all of load w_e / c_e (an even split, as engines
do it). The mean rank load is the bound of the fractional relaxation, in which an expert's tokens may go anywhere. Four facts
about whole slots raise it. Suppose that no rank has more than T.

(1) Copies. A slot of e shares its rank with K - 1 others. If these weigh at least f, then w_e / c_e <= T - f, so e has at
    least a_e = ceil(w_e / (T - f)) copies. All a_e together may not exceed P; what is left, P - sum(a), is how many more
    copies any expert can have, so e has at most b_e = min(a_e + left, most) copies, and its slots weigh at least w_e / b_e.
    The K - 1 smallest of these are a new f.
(2) Company. Any m slots lie on some number q of ranks, whose q K slots weigh at least what the m weigh and the q K - m
    smallest others; so some rank has at least a q-th of that. The m are taken as the heaviest that (1) guarantees.
(3) Pigeonhole. One of those q ranks holds at least ceil(m / q) of the m, and K - ceil(m / q) others.
(4) Meeting. Each of the q ranks holds one of the m. The largest of the q K - m others weighs at least what the (q K - m)-th
    smallest of all slots does, and has one of the m beside it. With K = 2 and one slot per expert, (3) and (4) are exact.

For each m the least over q of the largest of (2), (3) and (4) must not exceed T. With one slot per expert all sizes are known
and no T is needed: bounds of k-partitioning, as in Babel, Kellerer and Kotov (1998) and Dell'Amico and Martello (2001).
Shapes: E logical experts, M numbers of slots 1..P, Q numbers of ranks 1..R.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CLOSE = 1e-7
"""Relative width at which the search for the largest T that is proven impossible ends."""
ROUNDING = 1e-12
"""Relative error of sums in float64 that a proof must not rest on."""
ROUNDS = 3
"""How often fact (1) is applied to its own result; further rounds change little."""


def placement_bound(load_E: ArrayLike, slots: int, ranks: int, *, duplicates: bool = False) -> float:
    """Max over mean rank load that no placement of so many slots on so many ranks can be below.

    Args:
        load_E: [E] load of each logical expert.
        slots: P, a multiple of ranks, from E up; at most E R without duplicates.
        ranks: R.
        duplicates: also hold for placements with two copies of an expert on one rank, which split its load unevenly.

    Returns:
        A ratio from 1; 1 for a layer that served nothing.

    Raises:
        ValueError: there is no such placement (a mistake of the programmer).
    """
    load = np.sort(np.asarray(load_E, np.float64))[::-1]
    if slots < len(load) or slots % ranks or (slots > len(load) * ranks and not duplicates):
        raise ValueError(f"{slots} slots cannot hold {len(load)} experts evenly on {ranks} ranks")
    total = float(load.sum())
    if total <= 0:
        return 1.0
    mean = total / ranks
    if slots == len(load):
        return max(1.0, _partition_bound(load, load, slots // ranks, ranks) / mean)
    low, high = mean, float(load[: slots // ranks].sum() + load[0])
    if not _impossible(load, low * (1 + CLOSE), slots, ranks, duplicates):
        return 1.0
    while high > low * (1 + CLOSE):
        middle = (low + high) / 2
        if _impossible(load, middle, slots, ranks, duplicates):
            low = middle
        else:
            high = middle
    return low / mean


def _impossible(load_E: Floats, most_load: float, slots: int, ranks: int, duplicates: bool) -> bool:
    """Whether it is proven that no placement keeps every rank at or below a load."""
    per_rank = slots // ranks
    most_copies = slots - len(load_E) + 1
    if not duplicates:
        most_copies = min(most_copies, ranks)
    company_E = np.zeros(len(load_E))
    for _ in range(ROUNDS):
        room_E = most_load - company_E
        if (room_E < -ROUNDING * most_load).any() or ((room_E <= 0) & (load_E > 0)).any():
            return True
        least_E = np.maximum(np.ceil(load_E / np.maximum(room_E, 1e-300) * (1 - ROUNDING)), 1.0)
        left = slots - float(least_E.sum())
        if left < 0 or least_E.max() > most_copies:
            return True
        most_E = np.minimum(least_E + left, most_copies)
        size_E = load_E / most_E
        company_E = _company(size_E, most_E.astype(np.int64), per_rank, duplicates) * (1 - ROUNDING)
    certain = np.sort(np.repeat(size_E, least_E.astype(np.int64)))[::-1]
    possible = np.repeat(size_E, most_E.astype(np.int64))
    return _partition_bound(certain, possible, per_rank, ranks) > most_load


def _company(size_E: Floats, most_E: Ints, per_rank: int, duplicates: bool) -> Floats:
    """[E] least load of the other slots on a rank that holds a slot of each expert."""
    others = per_rank - 1
    if others == 0:
        return np.zeros(len(size_E))
    order = np.argsort(size_E, kind="stable")
    if duplicates:
        smallest = np.repeat(size_E[order], np.minimum(most_E[order], others))[:others]
        return np.full(len(size_E), float(smallest.sum()))
    # K - 1 different other experts: the smallest, and one further for an expert that is among them.
    company = np.full(len(size_E), float(size_E[order[:others]].sum()))
    company[order[:others]] += size_E[order[others]] - size_E[order[:others]]
    return company


def _partition_bound(certain_M: Floats, possible_N: Floats, per_rank: int, ranks: int) -> float:
    """Load that some rank has at least, by facts (2), (3) and (4).

    Args:
        certain_M: slots known to exist, heaviest first, none heavier than it is for certain.
        possible_N: all slots that may exist, none heavier than it is for certain; at least as many as there are.
        per_rank: K.
        ranks: R.
    """
    top = np.concatenate([[0.0], np.cumsum(certain_M)])
    smallest = np.concatenate([[0.0], np.sort(possible_N)])
    bottom = np.cumsum(smallest)
    m = np.arange(1, len(certain_M) + 1)[:, None]
    q = np.arange(1, ranks + 1)[None, :]
    fits = (q * per_rank >= m) & (q <= m)
    others = np.where(fits, q * per_rank - m, 0)
    company = (top[m] + bottom[others]) / q
    together = -(-m // q)
    pile = top[m] - top[m - together] + bottom[np.where(fits, per_rank - together, 0)]
    meeting = np.where(others > 0, certain_M[m - 1] + smallest[others] + bottom[max(per_rank - 2, 0)], 0.0)
    at_least = np.where(fits, np.maximum.reduce([company, pile, meeting]), np.inf).min(1)
    return float(at_least.max()) * (1 - ROUNDING * len(certain_M))
