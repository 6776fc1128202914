from __future__ import annotations

import subprocess
import sys

import pytest

from equipoise.errors import EquipoiseError, PlanError
from equipoise.planning.methods import METHODS, make_plan, option_names
from planning.cases import make_profile, skewed


def test_the_methods_are_listed_with_their_source():
    assert METHODS.names() == ["rq", "rq-paper"]
    assert all(entry.summary and entry.source for entry in METHODS)
    assert option_names("rq") == ["dispatch", "error_bound", "bytes_fraction", "precisions", "tolerance"]


def test_unknown_method_answers_with_the_nearest():
    with pytest.raises(EquipoiseError, match=r"unknown planning method 'rq-papr'.*rq-paper"):
        make_plan(make_profile(skewed(0)), "rq-papr")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eror_bound": 0.1}, r"method 'rq' has no option 'eror_bound'; it has: dispatch, error_bound.*mean 'error_bound'"),
        ({"units": 0}, r"units: 0 given; allowed is a whole number from 1"),
        ({"units": 2.0}, r"units: 2.0 given"),
        ({"seed": -1}, r"seed: -1 given; allowed is a whole number from 0"),
        ({"dispatch": "random"}, r"dispatch: .*even.*least_loaded.*gate_aware.*given: 'random'"),
        ({"precisions": ["int3"]}, r"unknown precision 'int3'"),
    ],
)
def test_refusals_say_what_is_allowed(options, message: str):
    with pytest.raises(EquipoiseError, match=message):
        make_plan(make_profile(skewed(0)), **options)


def test_one_unit_needs_no_plan():
    plan = make_plan(make_profile(skewed(0)), units=1)
    assert plan.predicted.lis == 1.0
    assert plan.exactness == "exact"


def test_planning_needs_no_torch():
    code = "import sys, equipoise.planning.methods, equipoise.planning.frontier; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plan_errors_are_plan_errors():
    with pytest.raises(PlanError):
        make_plan(make_profile(skewed(0)), units=True)
