"""One host for each active expert: valid, exact where claimed, and close to exact where greedy."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatch.cases import placements
from equipoise.dispatch.metro import exact_hosts, greedy_hosts
from equipoise.dispatch.placement import LayerMap


def largest(chosen: np.ndarray, ranks: int) -> int:
    return int(np.bincount(chosen, minlength=ranks).max(initial=0))


def brute_force(active: list[int], hosts: list[list[int]], ranks: int) -> int:
    return min(largest(np.array(pick), ranks) for pick in itertools.product(*(hosts[e] for e in active)))


@settings(max_examples=120, deadline=None)
@given(placements(most_experts=7, most_ranks=4), st.data())
def test_exact_is_the_least_possible(layer: LayerMap, data: st.DataObject):
    active = sorted(data.draw(st.sets(st.integers(0, layer.experts - 1), min_size=1)))
    if np.prod([len(layer.hosts[e]) for e in active]) > 4_000:
        active = active[:5]
    best = exact_hosts(active, layer.hosts, layer.ranks)
    assert all(rank in layer.hosts[e] for e, rank in zip(active, best.tolist(), strict=True))
    assert largest(best, layer.ranks) == brute_force(active, layer.hosts, layer.ranks)


@settings(max_examples=120, deadline=None)
@given(placements(), st.data(), st.sampled_from(["copies", "expected", "id"]))
def test_greedy_gives_each_active_expert_one_of_its_hosts(layer: LayerMap, data: st.DataObject, order: str):
    active = sorted(data.draw(st.sets(st.integers(0, layer.experts - 1))))
    chosen = greedy_hosts(active, layer.hosts, layer.ranks, order)
    assert len(chosen) == len(active)
    assert all(rank in layer.hosts[e] for e, rank in zip(active, chosen.tolist(), strict=True))
    assert largest(chosen, layer.ranks) >= largest(exact_hosts(active, layer.hosts, layer.ranks), layer.ranks)


def test_the_order_of_fewest_copies_is_better_where_order_matters():
    # By number, the copied expert takes rank 0 first, and expert 1, which lives only there, must follow.
    hosts = [[0, 1], [0]]
    assert largest(greedy_hosts([0, 1], hosts, 2, "id"), 2) == 2
    assert largest(greedy_hosts([0, 1], hosts, 2), 2) == 1


def test_no_active_expert():
    assert greedy_hosts([], [[0]], 1).tolist() == []
    assert exact_hosts([], [[0]], 1).tolist() == []


def test_exact_improves_on_greedy_where_that_is_not_the_least():
    rng = np.random.default_rng(0)
    improved = 0
    for _ in range(300):
        hosts = [sorted(rng.choice(4, int(rng.integers(1, 4)), replace=False).tolist()) for _ in range(7)]
        active = list(range(7))
        best = largest(exact_hosts(active, hosts, 4), 4)
        assert best == brute_force(active, hosts, 4)
        improved += best < largest(greedy_hosts(active, hosts, 4), 4)
    assert improved >= 5
