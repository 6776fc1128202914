"""Exchange of slots: what it keeps, what it lowers, and the limits it obeys. L layers, E experts, P slots, R ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.planning.local_search import Limits, exchange
from equipoise.planning.robust.placement import without_duplicates

LAYERS, EXPERTS, RANKS = 3, 12, 4


def case(seed: int, slots: int):
    rng = np.random.default_rng(seed)
    load = rng.lognormal(0.0, 0.6, (LAYERS, EXPERTS, 20))
    pairs = load @ load.transpose(0, 2, 1)
    mean = load.mean(2)
    mean *= RANKS / mean.sum(1, keepdims=True)
    base = np.tile(np.arange(slots) % EXPERTS, (LAYERS, 1))
    return without_duplicates(rng.permuted(base, axis=1), RANKS), pairs / pairs.mean(), mean


def objective(physical_LP, pairs, mean, limits, power):
    """The objective from its definition, one rank after the other."""
    result = []
    for physical, g, load, cap in zip(physical_LP, pairs, mean, limits.cap_L, strict=True):
        copies, total = np.bincount(physical, minlength=EXPERTS), 0.0
        for held in physical.reshape(RANKS, -1):
            part = 1.0 / copies[held]
            total += (part @ g[np.ix_(held, held)] @ part) ** power
            total += limits.penalty * max(0.0, (load[held] * part).sum() - cap) ** 2
        result.append(total)
    return np.array(result)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), slots=st.sampled_from([12, 16, 20]), power=st.sampled_from([1.0, 4.0]))
def test_swaps_keep_the_slots_lower_the_objective_and_make_no_duplicates(seed, slots, power):
    start, pairs, mean = case(seed, slots)
    limits = Limits(np.full(LAYERS, 1.05), 10.0)
    after, value = exchange(start, pairs, mean, RANKS, limits, power=power, seed=seed)
    assert (np.sort(after, 1) == np.sort(start, 1)).all()
    assert all(len(set(held)) == len(held) for layer in after.reshape(LAYERS, RANKS, -1) for held in layer.tolist())
    before = objective(start, pairs, mean, limits, power)
    assert (value <= before * (1 + 1e-4)).all()
    np.testing.assert_allclose(value, objective(after, pairs, mean, limits, power), rtol=1e-3)


def test_ends_where_no_swap_helps():
    start, pairs, mean = case(1, EXPERTS)
    limits = Limits(np.full(LAYERS, np.inf), 0.0)
    after, _ = exchange(start, pairs, mean, RANKS, limits, sweeps=50)
    least = objective(after, pairs, mean, limits, 1.0)
    per_rank = EXPERTS // RANKS
    for i in range(EXPERTS):
        for j in range(i):
            if i // per_rank != j // per_rank:
                other = after.copy()
                other[:, [i, j]] = other[:, [j, i]]
                assert (objective(other, pairs, mean, limits, 1.0) > least - 1e-3).all()


def test_parts_what_varies_together():
    pairs = np.eye(4)[None] + np.kron(np.eye(2), np.ones((2, 2)))[None]
    after, _ = exchange(np.arange(4)[None], pairs, np.full((1, 4), 0.5), 2, Limits(np.array([2.0])))
    assert [sorted(held) for held in after.reshape(2, 2).tolist()] != [[0, 1], [2, 3]]
    assert all(min(held) < 2 <= max(held) for held in after.reshape(2, 2).tolist())


@pytest.mark.parametrize("keep", [0, 2, 5])
def test_no_more_slots_move_than_allowed(keep):
    start, pairs, mean = case(2, 16)
    rank = np.arange(16) // 4
    home = np.zeros((LAYERS, EXPERTS, RANKS), bool)
    home[np.arange(LAYERS)[:, None], start, rank] = True
    after, _ = exchange(start, pairs, mean, RANKS, Limits(np.full(LAYERS, 1.0), 1e3, home_LER=home, keep=keep))
    moved = (~home[np.arange(LAYERS)[:, None], after, rank]).sum(1)
    assert (moved <= keep).all()
    assert keep == 0 or moved.any()


def test_slots_stay_on_their_node():
    start, pairs, mean = case(3, EXPERTS)
    after, _ = exchange(start, pairs, mean, RANKS, Limits(np.full(LAYERS, 1.0), 1e3, same_node=True, nodes=2))
    assert (np.sort(after.reshape(LAYERS, 2, -1), 2) == np.sort(start.reshape(LAYERS, 2, -1), 2)).all()
    assert (after != start).any()
