"""One host for every active expert, so that no rank reads the weights of more replicas than it must (METRO).

In small decode batches a rank's time follows the replicas that at least one token reaches. Some optimal dispatch sends all
tokens of an expert to one of its copies (METRO Lemma 1), so the task is to pick a host per active expert such that the
most chosen rank is chosen least: unit jobs on restricted machines.
Source: METRO (arXiv:2512.09277) sections 4 and 5, Algorithm 1; the orders "copies" and "expected" are Equipoise's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_flow

Ints = NDArray[np.int64]
Order = Literal["copies", "expected", "id"]


def greedy_hosts(
    active: Sequence[int],
    hosts: Sequence[Sequence[int]],
    ranks: int,
    order: Order = "copies",
    cost_ER: NDArray[np.integer[Any]] | None = None,
) -> Ints:
    """A host for each active expert: the one of its hosts that would then have the least to read.

    Args:
        active: experts with at least one token.
        hosts: ranks that have a copy of each expert.
        ranks: R.
        order: "id" visits experts by number, as one thread of Algorithm 1 would; "copies" those with the fewest hosts first,
            since they have the least choice; "expected" too, and counts an expert that is still to come as an equal part on
            each of its hosts.
        cost_ER: [E, R] what an expert costs on a rank, such as the bytes of its copy there: unrelated machines; with equally
            many hosts the dearer expert goes first. 1 when omitted, which minimises activated replicas. Not with "expected".

    Returns:
        [len(active)] ranks.
    """
    if cost_ER is not None:
        return _cheapest_hosts(active, hosts, ranks, order, cost_ER)
    given = [0.0] * ranks
    chosen = dict.fromkeys(active, 0)
    if order == "expected":
        for expert in active:
            for rank in hosts[expert]:
                given[rank] += 1 / len(hosts[expert])
    for expert in active if order == "id" else sorted(active, key=lambda e: len(hosts[e])):
        if order == "expected":
            for rank in hosts[expert]:
                given[rank] -= 1 / len(hosts[expert])
        rank = min(hosts[expert], key=given.__getitem__)
        given[rank] += 1
        chosen[expert] = rank
    return np.fromiter(chosen.values(), np.int64, len(chosen))


def _cheapest_hosts(
    active: Sequence[int], hosts: Sequence[Sequence[int]], ranks: int, order: Order, cost_ER: NDArray[np.integer[Any]]
) -> Ints:
    assert order != "expected", "experts still to come are counted in replicas"
    given = [0] * ranks
    chosen = dict.fromkeys(active, 0)
    cost = {e: {rank: int(cost_ER[e, rank]) for rank in hosts[e]} for e in active}
    for expert in active if order == "id" else sorted(active, key=lambda e: (len(hosts[e]), -min(cost[e].values()))):
        rank = min(hosts[expert], key=lambda r: given[r] + cost[expert][r])
        given[rank] += cost[expert][rank]
        chosen[expert] = rank
    return np.fromiter(chosen.values(), np.int64, len(chosen))


def exact_hosts(active: Sequence[int], hosts: Sequence[Sequence[int]], ranks: int) -> Ints:
    """A host for each active expert such that the largest number of experts on a rank is the smallest possible.

    Bisects that number; one is reachable if and only if a flow from experts (capacity 1) over their hosts to ranks
    (capacity of that number) carries every expert.

    Args:
        active: experts with at least one token.
        hosts: ranks that have a copy of each expert.
        ranks: R.

    Returns:
        [len(active)] ranks.
    """
    n = len(active)
    if not n:
        return np.zeros(0, np.int64)
    best = greedy_hosts(active, hosts, ranks)
    high = int(np.bincount(best, minlength=ranks).max())
    low = -(-n // ranks)
    rows = np.repeat(np.arange(n), [len(hosts[e]) for e in active])
    columns = np.array([rank for e in active for rank in hosts[e]])
    source, sink = n + ranks, n + ranks + 1
    tail = np.concatenate([np.full(n, source), rows, n + np.arange(ranks)])
    head = np.concatenate([np.arange(n), n + columns, np.full(ranks, sink)])
    while low < high:
        middle = (low + high) // 2
        capacity = np.concatenate([np.ones(n + len(rows)), np.full(ranks, middle)]).astype(np.int32)
        result = maximum_flow(csr_matrix((capacity, (tail, head)), shape=(sink + 1, sink + 1)), source, sink)
        if result.flow_value == n:
            high = middle
            used = np.asarray(result.flow[rows, n + columns]).ravel() > 0
            best = np.zeros(n, np.int64)
            best[rows[used]] = columns[used]
        else:
            low = middle + 1
    return best
