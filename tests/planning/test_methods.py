from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from equipoise.errors import EquipoiseError, PlanError
from equipoise.planning.methods import METHODS, make_plan, option_names, rank_methods
from planning.cases import make_profile, skewed


def test_the_methods_are_listed_with_their_source():
    assert METHODS.names()[:3] == ["rq", "rq-exact", "rq-paper"]
    assert {"robust", "contiguous", "round_robin", "eplb", "exflow", "incremental"} <= set(rank_methods())
    assert not {"rq", "rq-exact", "rq-paper", "uniform"} & set(rank_methods())
    assert all(entry.summary and entry.source for entry in METHODS)
    options = ["dispatch", "error_bound", "bytes_fraction", "precisions", "tolerance", "alike", "bits_by"]
    assert option_names("rq") == options


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
        ({"precisions": ["int5"]}, r"unknown precision 'int5'"),
        ({"bits_by": "luck"}, r"bits_by: 'luck' given; allowed are 'error' and 'frequency'"),
        (
            {"slots": 8},
            r"method 'rq' has no option 'slots'.*Methods that place on ranks have it: robust, contiguous, round_robin, eplb",
        ),
        ({"method": "eplb"}, r"units: none given; method 'eplb' places experts on ranks.*--ranks"),
        ({"method": "eplb", "units": 4, "bytes_fraction": 1.0}, r"method 'eplb' has no option 'bytes_fraction'; it has: slots"),
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


@pytest.mark.parametrize("method", ["rq", "rq-paper"])
def test_bits_are_not_chosen_where_sizes_are_not_known(method: str):
    profile = make_profile(skewed(0), matrices=(), importance={"wanda": np.ones((4, 8))})
    with pytest.raises(PlanError, match=r"does not know the sizes of its experts.*config.json \(--config\)"):
        make_plan(profile, method, units=4)


def test_rq_chooses_copies_bits_and_ranks_together_within_the_bytes_of_the_ranks():
    profile = make_profile(skewed(0, experts=32), error={"int8": 0.01, "int4-g32": 0.05})
    plan = make_plan(profile, "rq", units=4)
    assert plan.units == 4
    assert plan.bytes_by_unit().max() <= plan.unit_bytes
    assert plan.predicted.lis < make_plan(profile, "contiguous", units=4).predicted.lis


@pytest.mark.parametrize("method", ["robust", "contiguous", "round_robin", "eplb", "exflow"])
def test_rank_methods_take_the_same_options_and_keep_to_their_forecast(method: str):
    windows = skewed(1)
    before = make_plan(make_profile(windows), "contiguous", units=4, slots=8)
    profile = make_profile(windows)
    object.__setattr__(profile, "transitions", np.ones((3, 8, 8), np.int64))
    object.__setattr__(profile, "coactivation", np.ones((4, 8, 8), np.int64))
    plan = make_plan(profile, method, units=4, slots=8, nodes=2, current=before, phase="all", seed=1)
    assert (plan.method, plan.units, plan.nodes) == (method, 4, 2)
    for layer, forecast in enumerate(plan.predicted.layers):
        assert forecast.in_sample == pytest.approx(plan.lis(profile.load)[layer])
        assert 1.0 <= forecast.lower_bound <= forecast.in_sample * (1 + 1e-9)
        assert forecast.moved is not None
