from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, milp

from equipoise.planning.coupled import choose_coupled


def instance(seed: int, items: int, options: int, groups: int):
    """Items in one to three groups each, sizes falling and costs rising along the options as a rule."""
    rng = np.random.default_rng(seed)
    size = -np.sort(-rng.integers(1, 40, (items, options)), axis=1)
    cost = np.sort(rng.random((items, options)), axis=1) if rng.random() < 0.7 else rng.random((items, options))
    places = [np.sort(rng.choice(groups, rng.integers(1, min(3, groups) + 1), replace=False)) for _ in range(items)]
    item = np.repeat(np.arange(items), [len(p) for p in places])
    return size, cost, item, np.concatenate(places)


def held(size, option, item, group, groups: int):
    return np.bincount(group, size[item, option[item]], groups)


def by_enumeration(size, cost, item, group, capacity: int, groups: int) -> float:
    rows = np.arange(len(size))
    best = np.inf
    for chosen in map(np.array, itertools.product(range(size.shape[1]), repeat=len(size))):
        if held(size, chosen, item, group, groups).max() <= capacity:
            best = min(best, float(cost[rows, chosen].sum()))
    return best


def by_milp(size, cost, item, group, capacity: int, groups: int) -> float:
    n, q = size.shape
    held_rows = np.zeros((groups, n * q))
    for i, g in zip(item, group, strict=True):
        held_rows[g, i * q : (i + 1) * q] += size[i]
    rules = [LinearConstraint(np.kron(np.eye(n), np.ones(q)), 1, 1), LinearConstraint(held_rows, -np.inf, capacity)]
    found = milp(cost.ravel(), integrality=np.ones(n * q), bounds=(0, 1), constraints=rules)
    return float(found.fun) if found.success else np.inf


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 3), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_between_its_bound_and_the_best_of_all_choices(seed: int, items: int, options: int, groups: int):
    size, cost, item, group = instance(seed, items, options, groups)
    capacity = int(np.random.default_rng(seed).integers(1, 40 * items))
    found = choose_coupled(size, cost, item, group, capacity, groups)
    best = by_enumeration(size, cost, item, group, capacity, groups)
    now = held(size, found.option, item, group, groups)
    if np.isinf(best):
        assert found.excess == int(now.max()) - capacity > 0
        return
    assert found.excess == 0
    assert now.max() <= capacity
    assert found.cost == pytest.approx(cost[np.arange(items), found.option].sum())
    assert found.lower_bound <= best + 1e-9 <= found.cost + 2e-9


@pytest.mark.parametrize("seed", range(3))
def test_is_near_the_optimum_of_the_integer_program(seed: int):
    size, cost, item, group = instance(seed, 36, 4, 5)
    cost = np.sort(cost, axis=1)
    capacity = int(held(size, np.full(36, 1), item, group, 5).mean() * 0.8)
    best = by_milp(size, cost, item, group, capacity, 5)
    found = choose_coupled(size, cost, item, group, capacity, 5)
    assert found.lower_bound <= best + 1e-9
    assert best - 1e-9 <= found.cost <= 1.05 * best


def test_takes_the_free_choice_when_everything_fits():
    size, cost, item, group = instance(3, 8, 3, 3)
    found = choose_coupled(size, cost, item, group, int(size.sum()), 3)
    assert found.cost == pytest.approx(cost.min(1).sum())
    assert found.lower_bound == pytest.approx(found.cost)


def test_thousands_of_items_are_near_their_bound():
    rng = np.random.default_rng(0)
    items, groups = 4000, 64
    size = np.tile([1000, 520, 290, 225, 162], (items, 1))
    cost = rng.lognormal(0, 1.5, (items, 1)) * np.array([0.0, 1e-4, 5e-3, 2e-2, 1e-1])
    copies = rng.integers(1, 4, items)
    item = np.repeat(np.arange(items), copies)
    group = (np.repeat(rng.integers(0, groups, items), copies) + np.concatenate([np.arange(c) for c in copies]) * 7) % groups
    found = choose_coupled(size, cost, item, group, int(0.45 * len(item) * 1000 / groups), groups)
    assert found.excess == 0
    assert held(size, found.option, item, group, groups).max() <= int(0.45 * len(item) * 1000 / groups)
    assert found.cost <= 1.02 * found.lower_bound
