from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, milp

from equipoise.planning.knapsack import choose, choose_exactly


def by_milp(size, cost, group, capacity, groups) -> float:
    """The exact optimum; inf when nothing fits."""
    n, q = size.shape
    one = np.kron(np.eye(n), np.ones(q))
    held = np.zeros((groups, n * q))
    for i in range(n):
        held[group[i], i * q : (i + 1) * q] = size[i]
    found = milp(
        cost.ravel(),
        integrality=np.ones(n * q),
        bounds=(0, 1),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(held, -np.inf, capacity)],
    )
    return float(found.fun) if found.success else np.inf


def instance(seed: int, n: int, q: int, groups: int):
    rng = np.random.default_rng(seed)
    size = -np.sort(-rng.integers(1, 40, (n, q)), axis=1)
    cost = np.sort(rng.random((n, q)), axis=1) if rng.random() < 0.7 else rng.random((n, q))
    return size, cost, rng.integers(0, groups, n)


@pytest.mark.parametrize("seed", range(40))
def test_between_its_bound_and_the_milp_optimum(seed: int):
    groups = 1 + seed % 3
    size, cost, group = instance(seed, 8, 2 + seed % 3, groups)
    capacity = int(size.mean() * 8 / groups)
    result, best = choose(size, cost, group, capacity, groups), by_milp(size, cost, group, capacity, groups)
    if np.isinf(best):
        assert result.excess > 0
        return
    assert result.excess == 0
    assert result.lower_bound <= best + 1e-9 <= result.cost + 2e-9
    # The greedy differs from the relaxation in at most one item per group.
    assert result.cost - result.lower_bound <= groups * (cost.max() - cost.min()) + 1e-9


def test_is_near_the_optimum_on_many_items():
    size, cost, group = instance(1, 400, 3, 2)
    result = choose(size, cost, group, int(size[:, 1].sum() / 2), 2)
    assert result.cost <= 1.001 * result.lower_bound


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_groups_fit_or_the_excess_is_what_is_missing(seed: int, n: int, q: int):
    size, cost, group = instance(seed, n, q, 2)
    capacity = int(np.random.default_rng(seed).integers(1, 40 * n))
    result = choose(size, cost, group, capacity, 2)
    held = np.bincount(group, size[np.arange(n), result.option], 2)
    least = np.bincount(group, size[:, -1], 2)
    assert result.excess == max(0, int(least.max()) - capacity)
    assert result.excess or (held <= capacity).all()


def test_takes_the_free_choice_when_everything_fits():
    size, cost, group = instance(3, 6, 3, 1)
    result = choose(size, cost, group, int(size.sum()), 1)
    best = min(sum(cost[i, o] for i, o in enumerate(c)) for c in itertools.product(range(3), repeat=6))
    assert result.cost == pytest.approx(best)
    assert result.lower_bound == pytest.approx(best)


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_the_exact_choice_is_the_cheapest_and_then_the_smallest(seed: int, n: int, q: int):
    rng = np.random.default_rng(seed)
    size, cost = rng.integers(0, 12, (n, q)), rng.integers(-5, 12, (n, q)).astype(float)
    capacity = int(rng.integers(0, 12 * n + 1))
    rows = np.arange(n)
    fits = [(cost[rows, o].sum(), size[rows, o].sum()) for o in map(list, itertools.product(range(q), repeat=n))]
    fits = [pair for pair in fits if pair[1] <= capacity]
    if not fits:
        with pytest.raises(ValueError, match="the smallest options need"):
            choose_exactly(size, cost, capacity)
        return
    option = choose_exactly(size, cost, capacity)
    assert (cost[rows, option].sum(), size[rows, option].sum()) == min(fits)


def test_the_exact_choice_is_quick_for_many_items():
    rng = np.random.default_rng(0)
    size = np.tile([0, 3, 6, 12], (61, 1)) * 1_000_003
    cost = -np.cumsum(rng.random((61, 4)), axis=1)
    group = np.zeros(61, np.int64)
    option = choose_exactly(size, cost, 200 * 1_000_003)
    greedy = choose(size[:, ::-1], cost[:, ::-1] + 5, group, 200 * 1_000_003, 1)
    reached = cost[np.arange(61), option].sum()
    assert greedy.lower_bound - 5 * 61 <= reached + 1e-9
    assert reached <= greedy.cost - 5 * 61 + 1e-9
