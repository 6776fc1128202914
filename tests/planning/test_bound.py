from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, milp

from equipoise.planning.bound import lower_bound
from equipoise.planning.budget import make_budget
from equipoise.planning.load import scaled
from equipoise.planning.methods import make_plan
from planning.cases import make_profile

NAMES = ("bf16", "int8", "int4")
ERRORS = {"int8": 0.01, "int4-g32": 0.08}


def optimum(profile, budget, error_bound: float) -> float:
    """Least mean LIS over units of any plan, by mixed-integer programming over every slot, format, unit and share."""
    p = scaled(profile.load, budget.units)
    n_layers, n = p.shape
    q, u = len(budget.precisions), budget.units
    shape = (n_layers, n, u, q)
    size = int(np.prod(shape))
    slot, share, peak = np.arange(size).reshape(shape), size + np.arange(size).reshape(shape), 2 * size + np.arange(n_layers)
    width = 2 * size + n_layers
    rows, low, high = [], [], []

    def constrain(terms, at_least: float, at_most: float) -> None:
        row = np.zeros(width)
        for index, factor in terms:
            np.add.at(row, np.ravel(index), np.broadcast_to(factor, np.shape(index)).ravel())
        rows.append(row), low.append(at_least), high.append(at_most)

    for index, where in zip(slot.ravel(), share.ravel(), strict=True):
        constrain([(where, 1.0), (index, -1.0)], -np.inf, 0.0)
    for layer in range(n_layers):
        for e in range(n):
            constrain([(share[layer, e], 1.0)], 1.0, 1.0)
            for unit in range(u):
                constrain([(slot[layer, e, unit], 1.0)], -np.inf, 1.0)
        for unit in range(u):
            constrain([(share[layer, :, unit], p[layer][:, None]), (peak[layer], -1.0)], -np.inf, 0.0)
    for unit in range(u):
        constrain([(slot[:, :, unit], budget.sizes[:, None, :] / budget.unit_bytes)], -np.inf, 1.0)
    if np.isfinite(error_bound):
        weight = 1 / max(error_bound**2 * n_layers, 1e-9)
        constrain([(share, budget.errors[:, :, None, :] * weight)], -np.inf, error_bound**2 * n_layers * weight)
    cost = np.zeros(width)
    cost[peak] = 1.0 / n_layers
    integral = np.zeros(width)
    integral[slot.ravel()] = 1
    limit = np.ones(width)
    limit[peak] = np.inf
    found = milp(cost, integrality=integral, bounds=(0, limit), constraints=LinearConstraint(np.array(rows), low, high))
    return float(found.fun) if found.success else np.inf


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("error_bound", "fraction"), [(0.0, 1.0), (0.01, 1.0), (0.03, 1.0), (0.05, 0.7), (np.inf, 0.5)])
def test_bound_is_below_the_optimum_and_the_optimum_below_the_plan(seed: int, error_bound: float, fraction: float):
    rng = np.random.default_rng(seed)
    windows = rng.poisson(40 * rng.lognormal(0, 1.2, (1, 1 + seed % 2, 3)) * np.ones((2, 1, 1)))
    profile = make_profile(windows, error=ERRORS)
    budget = make_budget(profile, 3, NAMES, fraction)
    best = optimum(profile, budget, error_bound)
    bound = lower_bound(scaled(profile.load, 3), profile.widths, budget, error_bound)
    assert 1.0 <= bound <= best + 1e-6
    if np.isfinite(best):
        plan = make_plan(profile, error_bound=error_bound, bytes_fraction=fraction)
        assert plan.predicted.lower_bound == pytest.approx(bound)
        assert plan.predicted.lis >= best - 1e-6


def test_without_error_or_bytes_to_spare_the_bound_is_the_raw_score():
    rng = np.random.default_rng(0)
    profile = make_profile(rng.poisson(50 * rng.lognormal(0, 1, (1, 4, 8)) * np.ones((3, 1, 1))), error=ERRORS)
    p = scaled(profile.load, 8)
    assert lower_bound(p, profile.widths, make_budget(profile, 8, NAMES, 1.0), 0.0) == pytest.approx(p.max(1).mean(), rel=1e-4)
    assert lower_bound(p, profile.widths, make_budget(profile, 8, NAMES, 1.0), np.inf) == pytest.approx(1.0)


@given(st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_more_bytes_or_more_error_never_raise_the_bound(seed: int):
    rng = np.random.default_rng(seed)
    profile = make_profile(rng.poisson(30 * rng.lognormal(0, 1.2, (1, 2, 6)) * np.ones((2, 1, 1))), error=ERRORS)
    p = scaled(profile.load, 6)
    tight, wide = (make_budget(profile, 6, NAMES, f) for f in (0.6, 0.9))
    values = [lower_bound(p, profile.widths, b, e) for b, e in ((tight, 0.02), (tight, 0.06), (wide, 0.06))]
    assert values[0] >= values[1] - 1e-4 >= values[2] - 2e-4


def test_layers_that_served_nothing_do_not_count():
    profile = make_profile(np.array([[[30, 10], [0, 0]], [[30, 10], [0, 0]]]), error=ERRORS)
    budget = make_budget(profile, 2, NAMES, 1.0)
    assert lower_bound(scaled(profile.load, 2), profile.widths, budget, 0.0) == pytest.approx(1.5)
    assert lower_bound(np.zeros((2, 2)), profile.widths, budget, 0.0) == 1.0
