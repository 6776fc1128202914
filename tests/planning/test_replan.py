from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import PlanError
from equipoise.planning.methods import make_plan
from equipoise.planning.ranks import moved_slots, rank_load, slots_of
from equipoise.planning.replan import path
from planning.cases import make_facts, make_profile, skewed
from planning.test_redundancy import profile_of


def aim(physical: np.ndarray, load_SE: np.ndarray, ranks: int) -> float:
    """Mean over scenarios of max over mean rank load, from its definition."""
    load = rank_load(physical, load_SE, ranks)
    return float((load.max(1) / load.mean(1)).mean())


@st.composite
def starts(draw: st.DrawFn):
    """Loads of several scenarios and a placement with copies, duplicates on a rank included."""
    ranks, per_rank = draw(st.sampled_from([(2, 3), (3, 3), (4, 4)]))
    experts = draw(st.integers(per_rank, ranks * per_rank))
    scenarios = draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    physical = np.concatenate([np.arange(experts), rng.integers(0, experts, ranks * per_rank - experts)])
    return rng.integers(1, 100, (scenarios, experts)), rng.permutation(physical), ranks


@given(starts(), st.integers(0, 10))
@settings(max_examples=80, deadline=None)
def test_every_stop_is_a_placement_better_than_the_last_within_the_bound(start, most: int):
    load, current, ranks = start
    stops = path(load, current, ranks, most)
    np.testing.assert_array_equal(stops[0].physical, current)
    for stop in stops:
        assert set(stop.physical.tolist()) == set(range(load.shape[1]))
        assert stop.moved == moved_slots(stop.physical, current, ranks) <= most
        assert stop.aim == pytest.approx(aim(stop.physical, load, ranks))
    assert all(a.aim > b.aim for a, b in itertools.pairwise(stops))


def one_step_best(load: np.ndarray, current: np.ndarray, ranks: int) -> float:
    """The best that any swap of two slots, or any change of one slot, can do."""
    rank = np.arange(len(current)) * ranks // len(current)
    best = aim(current, load, ranks)
    for i, j in itertools.combinations(range(len(current)), 2):
        changed = current.copy()
        changed[[i, j]] = changed[[j, i]]
        if rank[i] != rank[j] and all(len(set(held)) == len(held) for held in changed.reshape(ranks, -1).tolist()):
            best = min(best, aim(changed, load, ranks))
    for i, x in itertools.product(range(len(current)), range(load.shape[1])):
        changed = current.copy()
        changed[i] = x
        whole = len(set(changed.tolist())) == load.shape[1]
        if whole and all(len(set(held)) == len(held) for held in changed.reshape(ranks, -1).tolist()):
            best = min(best, aim(changed, load, ranks))
    return best


@pytest.mark.parametrize("seed", range(30))
def test_ends_where_no_single_step_gains(seed: int):
    """With one scenario every step that gains touches the fullest rank, so looking there only misses none."""
    rng = np.random.default_rng(seed)
    load = rng.integers(1, 100, (1, 6))
    stop = path(load, np.array([0, 1, 2, 3, 4, 5, 0, 1]), 4, 100)[-1]
    assert one_step_best(load, stop.physical, 4) >= stop.aim - 2e-6


def test_moves_are_spent_over_layers_where_they_gain_most():
    load = np.full((3, 2, 8), 100)
    load[:, 0, :2] = 1000  # both hot experts of layer 0 share a rank; layer 1 is level
    profile = profile_of(load)
    current = make_plan(profile, "contiguous", units=4)
    plan = make_plan(profile, "incremental", units=4, current=current, most_moves=2)
    assert [f.moved for f in plan.predicted.layers] == [2, 0]
    assert plan.predicted.layers[0].in_sample == pytest.approx(1100 / 650)


@pytest.mark.parametrize("most", [0, 1, 2, 5, 20])
def test_the_bound_on_moves_holds_and_more_moves_are_never_worse(most: int):
    profile = profile_of(skewed(5, layers=4, experts=8, windows=4))
    current = make_plan(profile, "eplb", units=4, slots=12)

    def mean_aim(plan) -> float:
        return float(np.mean([plan.lis(load) for load in profile.scenario_load]))

    plan, more = (make_plan(profile, "incremental", units=4, current=current, most_moves=m) for m in (most, most + 4))
    assert sum(f.moved for f in plan.predicted.layers) <= most
    assert mean_aim(more) <= mean_aim(plan) + 1e-9 <= mean_aim(current) + 2e-9
    if most == 0:
        assert all(moved_slots(new, old, 4) == 0 for new, old in zip(slots_of(plan), slots_of(current), strict=True))


def test_experts_stay_on_their_node_where_groups_are_packed_onto_nodes():
    profile = profile_of(skewed(6, layers=3, experts=8, windows=3))
    object.__setattr__(profile, "model", make_facts([8] * 3).model_copy(update={"expert_groups": 4}))
    current = make_plan(profile, "eplb", units=4, nodes=2, slots=12)
    plan = make_plan(profile, "incremental", units=4, nodes=2, current=current, most_moves=100)
    for new, old in zip(slots_of(plan), slots_of(current), strict=True):
        assert [set(half) for half in new.reshape(2, -1).tolist()] == [set(half) for half in old.reshape(2, -1).tolist()]


def test_refusals():
    profile = make_profile(skewed(0))
    with pytest.raises(PlanError, match=r"current: none given.*--current"):
        make_plan(profile, "incremental", units=4)
    current = make_plan(profile, "eplb", units=4)
    with pytest.raises(PlanError, match=r"slots: other numbers given"):
        make_plan(profile, "incremental", units=4, current=current, slots=12)
    with pytest.raises(PlanError, match=r"most_moves: -1 given"):
        make_plan(profile, "incremental", units=4, current=current, most_moves=-1)
