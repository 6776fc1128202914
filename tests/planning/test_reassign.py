from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from equipoise.planning.streaming.reassign import LayerTask, path


def task(experts, units, n_units, loads, kinds=None, shares=None, **options) -> LayerTask:
    experts, loads = np.array(experts), np.atleast_2d(np.array(loads))
    copies = np.bincount(experts)[experts]
    return LayerTask(
        experts=experts,
        shares=1.0 / copies if shares is None else np.array(shares),
        units_P=np.array(units),
        kinds=np.zeros(len(experts), np.int64) if kinds is None else np.array(kinds),
        units=n_units,
        loads=loads,
        weights=np.ones(len(loads)),
        **options,
    )


def least_peak(experts, units, n_units, load) -> float:
    """The smallest fullest unit with free shares, by linear programming."""
    slots, e = len(experts), len(load)
    cost = np.r_[np.zeros(slots), 1.0]
    upper = np.zeros((n_units, slots + 1))
    upper[units, np.arange(slots)] = 1
    upper[:, -1] = -1
    equal = np.zeros((e, slots + 1))
    equal[experts, np.arange(slots)] = 1
    done = linprog(cost, upper, np.zeros(n_units), equal, np.asarray(load, float), method="highs")
    return float(done.fun)


def test_shares_alone_level_what_they_can_and_move_nothing():
    given_ = task([0, 1, 2, 0], [0, 1, 2, 1], 3, [90, 10, 20], shares=[0.9, 1, 1, 0.1])
    stops = path(given_, 0)
    assert [stop.moved for stop in stops] == [(), ()]
    assert stops[-1].peaks[0] == pytest.approx(50, rel=0.01)


def test_the_copy_goes_to_the_expert_that_became_heavy():
    # A copy of expert 0 on unit 3; now expert 1 is heavy.
    given_ = task([0, 1, 2, 3, 0], [0, 1, 2, 3, 3], 4, [10, 80, 10, 4])
    stops = path(given_, 8)
    assert np.bincount(stops[-1].experts).tolist() == [1, 2, 1, 1]
    assert len(stops[-1].moved) == 1
    assert stops[-1].peaks[0] == pytest.approx(40, rel=0.02)  # beside expert 3 it would be 42


def test_without_copies_slots_change_places_only_where_their_precision_is_equal():
    alike = task([0, 1, 2, 3], [0, 0, 1, 1], 2, [50, 40, 5, 5])
    assert path(alike, 8)[-1].peaks[0] <= 55
    apart = task([0, 1, 2, 3], [0, 0, 1, 1], 2, [50, 40, 5, 5], kinds=[0, 0, 1, 1])
    assert len(path(apart, 8)) == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_every_stop_is_valid_and_better_than_the_last(seed, least_loaded):
    rng = np.random.default_rng(seed)
    e, units = int(rng.integers(3, 8)), int(rng.integers(2, 6))
    at = [(x, int(rng.integers(units))) for x in range(e)]
    rest = [pair for pair in itertools.product(range(e), range(units)) if pair not in at]
    extra = [rest[i] for i in rng.permutation(len(rest))[: int(rng.integers(0, 4))]]
    experts, place = zip(*(at + extra), strict=True)
    given_ = task(experts, place, units, rng.poisson(rng.lognormal(3, 1, (3, e))), kinds=rng.integers(0, 2, len(experts)),
                  least_loaded=least_loaded)  # fmt: skip
    most = int(rng.integers(0, 5))
    stops = path(given_, most)
    for before, after in itertools.pairwise(stops):
        assert after.peaks.sum() < before.peaks.sum()
    for stop in stops:
        assert len(stop.moved) <= most
        assert set(stop.experts) == set(experts)
        assert len({*zip(stop.experts.tolist(), place, strict=True)}) == len(experts), "two slots of one expert on a unit"
        np.testing.assert_allclose(np.bincount(stop.experts, stop.shares, e), 1, atol=1e-9)
        assert sorted(np.flatnonzero(stop.experts != given_.experts)) == list(stop.moved)


def test_shares_come_near_the_linear_program():
    rng = np.random.default_rng(5)
    for _ in range(20):
        e, units = 8, 8
        experts = np.r_[np.arange(e), rng.permutation(e)[:3]]
        place = np.r_[np.arange(e), [(x + 1 + int(rng.integers(e - 1))) % units for x in experts[e:]]]
        load = rng.poisson(rng.lognormal(4, 0.7, e))
        stop = path(task(experts, place, units, load), 0)[-1]
        assert stop.peaks[0] <= 1.03 * least_peak(experts, place, units, load)


def test_a_layer_that_served_nothing_is_left_alone():
    assert len(path(task([0, 1, 0], [0, 1, 1], 2, [0, 0]), 4)) == 1
