from __future__ import annotations

import pytest

from equipoise.errors import PlanError
from equipoise.planning.frontier import frontier
from planning.cases import make_profile, skewed

ERRORS = {"int8": 0.01, "int4-g32": 0.08}


@pytest.fixture(scope="module")
def points():
    profile = make_profile(skewed(0, layers=6), error=ERRORS)
    return frontier(profile, bytes_fractions=(1.0, 0.7), error_bounds=(0.0, 0.01, 0.05))


def test_covers_the_grid_in_order(points):
    assert [(p.bytes_fraction, p.error_bound) for p in points] == [(b, e) for b in (0.7, 1.0) for e in (0.0, 0.01, 0.05)]


def test_cells_that_cannot_be_met_say_why(points):
    assert points[0].plan is None
    assert not points[0].efficient
    assert "allow more error or more bytes" in points[0].problem
    assert all(p.plan is not None and not p.problem for p in points[1:])


def test_more_error_or_more_bytes_balance_better(points):
    score = {(p.bytes_fraction, p.error_bound): p.plan.predicted.lis for p in points if p.plan}
    assert score[0.7, 0.05] < score[0.7, 0.01]
    assert score[1.0, 0.05] < score[1.0, 0.01] < score[1.0, 0.0]
    assert score[1.0, 0.01] < score[0.7, 0.01]


def test_efficient_points_are_not_beaten_by_any_other(points):
    plans = [p for p in points if p.plan]
    costs = [(p.plan.predicted.bytes, p.plan.predicted.output_error, p.plan.predicted.lis) for p in plans]
    for point, mine in zip(plans, costs, strict=True):
        beaten = any(o != mine and all(x <= y for x, y in zip(o, mine, strict=True)) for o in costs)
        assert point.efficient == (not beaten)


def test_wrong_options_are_errors_not_points():
    profile = make_profile(skewed(0))
    with pytest.raises(PlanError, match="empty list given"):
        frontier(profile, error_bounds=())
    with pytest.raises(PlanError, match="error_bound: -1 given"):
        frontier(profile, bytes_fractions=(1.0,), error_bounds=(-1,))
    with pytest.raises(PlanError, match="no option 'colour'"):
        frontier(profile, bytes_fractions=(1.0,), error_bounds=(0.1,), colour="red")
