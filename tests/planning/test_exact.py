from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import linprog

from equipoise.errors import PlanError
from equipoise.planning.bound import lower_bound
from equipoise.planning.budget import Budget, UnreachableError, make_budget
from equipoise.planning.exact import optimum
from equipoise.planning.load import scaled
from equipoise.planning.methods import make_plan
from planning.cases import make_profile, skewed

ERRORS = {"int8": 0.01, "int4-g32": 0.08}


def least_fullest(load_E, held_EU) -> float:
    """The smallest possible largest unit load when experts' loads flow to the units that hold them."""
    experts, units = held_EU.shape
    pairs = np.argwhere(held_EU)
    cost = np.zeros(len(pairs) + 1)
    cost[-1] = 1.0
    upper = np.zeros((units, len(pairs) + 1))
    upper[pairs[:, 1], np.arange(len(pairs))] = 1.0
    upper[:, -1] = -1.0
    equal = np.zeros((experts, len(pairs) + 1))
    equal[pairs[:, 0], np.arange(len(pairs))] = 1.0
    return float(linprog(cost, A_ub=upper, b_ub=np.zeros(units), A_eq=equal, b_eq=load_E).fun)


def by_enumeration(p_LE, budget: Budget, error_bound: float) -> tuple[float, float]:
    """Least mean LIS of one or two layers, and the least error with it: every placement and every choice of bits."""
    n_layers, experts = p_LE.shape
    options = len(budget.precisions)
    held = (np.array(b).reshape(experts, budget.units) for b in itertools.product((0, 1), repeat=experts * budget.units))
    patterns = [one for one in held if one.any(1).all()]
    fullest = [{i: least_fullest(load, held) for i, held in enumerate(patterns)} for load in p_LE]
    bits = [np.array(b) for b in itertools.product(range(options), repeat=experts)]
    best = (np.inf, np.inf)
    for places in itertools.product(range(len(patterns)), repeat=n_layers):
        score = float(np.mean([fullest[layer][i] for layer, i in enumerate(places)]))
        if score > best[0] + 1e-6:
            continue
        for chosen in itertools.product(bits, repeat=n_layers):
            held = sum(budget.sizes[layer][b] @ patterns[i] for layer, (b, i) in enumerate(zip(chosen, places, strict=True)))
            error = sum(budget.errors[layer, np.arange(experts), b].sum() for layer, b in enumerate(chosen))
            fits = held.max() <= budget.unit_bytes and error <= n_layers * error_bound**2 + 1e-12
            if fits and (score < best[0] - 1e-6 or error < best[1]):
                best = (min(score, best[0]), error)
    return best


CASES = [(0, 1, 3, 0.05), (1, 1, 3, 0.01), (2, 1, 4, 0.2), (3, 2, 2, 0.05)]


@pytest.mark.parametrize(("seed", "layers", "experts", "bound"), CASES)
def test_agrees_with_enumeration(seed: int, layers: int, experts: int, bound: float):
    profile = make_profile(skewed(seed, layers=layers, experts=experts), error=ERRORS)
    budget = make_budget(profile, 2, ("bf16", "int8", "int4-g32"), 1.0)
    p_LE = scaled(profile.load, 2)
    score, error = by_enumeration(p_LE, budget, bound)
    if np.isinf(score):
        with pytest.raises(UnreachableError, match="no plan meets both"):
            optimum(p_LE, profile.widths, budget, bound)
        return
    found = optimum(p_LE, profile.widths, budget, bound)
    assert found.lis == pytest.approx(score, abs=1e-5)
    assert found.lower_bound == pytest.approx(score, abs=1e-4)
    cost = budget.errors[found.slots.layer, found.slots.expert, found.option] * found.slots.share
    assert cost.sum() == pytest.approx(error, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_the_search_lies_between_the_optimum_and_nothing(seed: int):
    profile = make_profile(skewed(seed, layers=1, experts=4), error=ERRORS)
    best = make_plan(profile, "rq-exact", units=2, error_bound=0.012)
    found = make_plan(profile, "rq", units=2, error_bound=0.012)
    assert found.predicted.lower_bound <= best.predicted.lis + 1e-6
    assert best.predicted.lis <= found.predicted.lis + 1e-5
    assert best.bytes_by_unit().max() <= best.unit_bytes
    assert best.predicted.output_error <= 0.012 + 1e-9
    assert best.predicted.gap < 1e-3
    for layer in best.layers:
        names = dict(zip(layer.experts, layer.precisions, strict=True))
        assert all(names[e] == q for e, q in zip(layer.experts, layer.precisions, strict=True))


def test_the_relaxation_never_exceeds_the_optimum():
    profile = make_profile(skewed(5, layers=1, experts=4), error=ERRORS)
    budget = make_budget(profile, 2, ("bf16", "int8", "int4-g32"), 1.0)
    for bound in (0.004, 0.02, 0.1):
        best = optimum(scaled(profile.load, 2), profile.widths, budget, bound).lis
        assert lower_bound(scaled(profile.load, 2), profile.widths, budget, bound) <= best + 1e-6


def test_large_models_are_referred_to_the_search():
    with pytest.raises(PlanError, match=r"rq-exact: this model has \d+ choices .* Use rq"):
        make_plan(make_profile(skewed(0, layers=20, experts=32)), "rq-exact")
