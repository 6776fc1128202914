from __future__ import annotations

import numpy as np
import pytest

from equipoise.artifacts import Plan
from equipoise.errors import PlanError
from equipoise.planning.methods import make_plan
from equipoise.planning.ranks import moved_slots, phase_load, rank_load, rank_plan, slots_of, target
from planning.cases import make_profile, skewed

PROFILE = make_profile(skewed(0, layers=2, experts=8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 0}, r"ranks: 0 given"),
        ({"ranks": 2.0}, r"ranks: 2.0 given"),
        ({"ranks": 4, "nodes": 3}, r"nodes: 3 given, which does not divide 4 ranks"),
        ({"ranks": 3}, r"slots: 8 are the default, which 3 ranks do not divide; give 9\."),
        ({"ranks": 4, "slots": 10}, r"slots: 10 given, which 4 ranks do not divide; give 8 or 12"),
        ({"ranks": 4, "slots": 4}, r"slots: 4 given, but layer 0 has 8 experts; give at least 8"),
        ({"ranks": 2, "slots": 18}, r"slots: 18 given.*serves nothing; give at most 16"),
        ({"ranks": 4, "slots": [8]}, r"slots: 1 numbers given for 2 MoE layers"),
        ({"ranks": 4, "slots": [8, True]}, r"slots: True given"),
    ],
)
def test_targets_that_cannot_be_are_refused(options, message: str):
    with pytest.raises(PlanError, match=message):
        target(PROFILE, **options)


def test_the_default_target_has_no_copies():
    assert target(PROFILE, 4).slots == (8, 8)
    assert target(PROFILE, 4, 12, 2).per_rank == (3, 3)


def test_rank_load_splits_evenly_over_slots_duplicates_included():
    physical = np.array([0, 0, 0, 1, 2, 1])
    load = np.array([[6.0, 4.0, 1.0], [3.0, 0.0, 0.0]])
    assert rank_load(physical, load, 2).tolist() == [[6.0, 5.0], [3.0, 0.0]]
    assert rank_load(physical, load, 3).tolist() == [[4.0, 4.0, 3.0], [2.0, 1.0, 0.0]]


def test_a_plan_gives_its_placement_back_also_from_its_file(tmp_path):
    physical = [np.array([3, 0, 1, 7, 2, 4, 5, 6]), np.array([0, 1, 2, 3, 4, 5, 6, 7, 0, 2, 4, 1])]
    plan = rank_plan(PROFILE, physical, ranks=4, nodes=2, method="robust", options={"x": 1}, note="why")
    plan.save(tmp_path / "a.plan.json")
    read = Plan.load_file(tmp_path / "a.plan.json")
    assert read == plan
    for given, back in zip(physical, slots_of(read), strict=True):
        np.testing.assert_array_equal(given, back)
    assert (read.units, read.nodes, read.exactness, read.predicted.note) == (4, 2, "exact", "why")
    for layer, slots in enumerate(physical):
        np.testing.assert_allclose(read.unit_load(PROFILE.load)[layer], rank_load(slots, PROFILE.load[layer], 4))


def test_forecasts_and_bytes():
    physical = [np.arange(8), np.arange(8)[::-1].copy()]
    before = rank_plan(PROFILE, [np.arange(8)] * 2, ranks=4, method="contiguous", options={})
    plan = rank_plan(PROFILE, physical, ranks=4, method="x", options={}, current=before, out_of_sample_L=[1.5, None])
    first, second = plan.predicted.layers
    load = rank_load(physical[0], PROFILE.load[0], 4)
    assert first.in_sample == pytest.approx(load.max() / load.mean())
    assert (first.out_of_sample, second.out_of_sample) == (1.5, None)
    assert (first.moved, second.moved) == (0, 8)
    assert all(1.0 <= f.lower_bound <= f.in_sample * (1 + 1e-9) for f in plan.predicted.layers)
    assert plan.predicted.bytes == plan.bytes_by_unit().sum()
    assert (plan.bytes_by_unit() == plan.unit_bytes).all()


def test_a_model_of_unknown_sizes_can_be_placed():
    profile = make_profile(skewed(0), matrices=())
    assert not profile.model.sized
    assert make_plan(profile, "eplb", units=4).predicted.bytes == 0


def test_moved_slots_are_those_that_a_rank_must_receive():
    assert moved_slots(np.array([1, 0, 2, 3]), np.array([0, 1, 2, 3]), 2) == 0
    assert moved_slots(np.array([2, 1, 0, 3]), np.array([0, 1, 2, 3]), 2) == 2
    assert moved_slots(np.array([0, 1, 2, 2, 3, 0]), np.array([0, 1, 2, 3]), 2) == 2


def test_a_current_plan_must_match():
    current = make_plan(PROFILE, "contiguous", units=4)
    with pytest.raises(PlanError, match=r"current: that plan is for 4 ranks, the new one for 2"):
        make_plan(PROFILE, "contiguous", units=2, current=current)
    with pytest.raises(PlanError, match=r"layer 0 of this 'rq' plan does not have equally many slots"):
        slots_of(make_plan(make_profile(skewed(0)), "rq", units=3))


def test_phases():
    profile = make_profile(skewed(0))
    np.testing.assert_array_equal(phase_load(profile, "prefill"), phase_load(profile))
    with pytest.raises(PlanError, match=r"nothing was recorded in phase 'decode'"):
        phase_load(profile, "decode")
    with pytest.raises(PlanError, match=r"phase: 'train' given; allowed are all, prefill, decode"):
        make_plan(profile, "contiguous", units=4, phase="train")


def test_a_layer_that_served_nothing_is_in_balance():
    windows = skewed(0, layers=2)
    windows[:, 1] = 0
    plan = make_plan(make_profile(windows), "eplb", units=4)
    assert plan.predicted.layers[1].in_sample == 1.0
    assert np.isfinite(plan.predicted.lis_paper)
