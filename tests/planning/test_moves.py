from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import PlanError
from equipoise.planning.methods import make_plan
from equipoise.planning.moves import keep_slots, pay_back, rename_ranks, step_seconds, traffic
from equipoise.planning.ranks import moved_slots, rank_plan
from planning.cases import MATRICES, make_profile, skewed

EXPERT_BYTES = sum(rows * columns for rows, columns in MATRICES) * 2


@st.composite
def two_placements(draw: st.DrawFn):
    """Two placements of 8 experts on 4 ranks, in 1, 2 or 4 nodes."""
    orders = [draw(st.permutations(range(8))) for _ in range(2)]
    return *(np.array(order) for order in orders), draw(st.sampled_from([1, 2, 4]))


def names(ranks: int, nodes: int):
    """All ways to name ranks anew that keep each node's ranks together."""
    per = ranks // nodes
    for order in itertools.permutations(range(nodes)):
        for inner in itertools.product(itertools.permutations(range(per)), repeat=nodes):
            yield [order[n] * per + i for n in range(nodes) for i in inner[n]]


@given(two_placements())
@settings(max_examples=40, deadline=None)
def test_ranks_are_named_so_that_fewest_slots_move(case):
    new, old, nodes = case
    renamed = rename_ranks(new, old, 4, nodes)
    best = min(moved_slots(new.reshape(4, 2)[name].ravel(), old, 4) for name in names(4, nodes))
    assert moved_slots(renamed, old, 4) == best
    assert by_node(renamed, nodes) == by_node(new, nodes)


def by_node(physical: np.ndarray, nodes: int) -> list[list[list[int]]]:
    """What nodes hold, rank by rank, in an order that does not depend on names."""
    return sorted(sorted(sorted(rank) for rank in node) for node in physical.reshape(nodes, -1, 2).tolist())


@given(two_placements())
def test_experts_that_stay_keep_their_slots(case):
    new, old, _ = case
    kept = keep_slots(new, old, 4)
    for now, before, wanted in zip(kept.reshape(4, 2), old.reshape(4, 2), new.reshape(4, 2), strict=True):
        assert sorted(now) == sorted(wanted)
        assert all(now[i] == e for i, e in enumerate(before) if e in wanted)


def test_traffic_counts_what_ranks_must_fetch_and_who_sends_it():
    profile = make_profile(np.ones((1, 1, 4), np.int64))
    before = rank_plan(profile, [np.array([0, 1, 1, 2, 1, 3])], ranks=3, method="a", options={})
    after = rank_plan(profile, [np.array([1, 0, 3, 2, 0, 3])], ranks=3, method="b", options={})
    received, sent = traffic(before, after)
    assert received.tolist() == [0, EXPERT_BYTES, EXPERT_BYTES]
    assert sent.tolist() == [EXPERT_BYTES, 0, EXPERT_BYTES]
    assert traffic(before, before)[0].sum() == 0


def test_pay_back_is_gain_times_steps_against_the_busiest_rank():
    profile = make_profile(skewed(0, layers=2))
    before, after = (make_plan(profile, method, units=4) for method in ("contiguous", "eplb"))
    received, sent = traffic(before, after)
    busiest = max(received.max(), sent.max())
    found = pay_back(before, after, seconds_before=0.03, seconds_after=0.02, steps=100, bytes_per_second=busiest / 0.5)
    assert found.seconds_to_move == pytest.approx(0.5)
    assert found.net_seconds == pytest.approx(0.5)
    assert found.break_even_steps == pytest.approx(50)
    assert found.pays
    assert str(found).startswith("changing pays")
    few = pay_back(before, after, seconds_before=0.03, seconds_after=0.02, steps=40, bytes_per_second=busiest / 0.5)
    assert not few.pays
    worse = pay_back(before, after, seconds_before=0.02, seconds_after=0.03, steps=40, bytes_per_second=1e9)
    assert worse.break_even_steps == np.inf
    assert "does not pay" in str(worse)


def test_step_time_follows_the_slowest_rank():
    profile = make_profile(skewed(0))
    plan = make_plan(profile, "contiguous", units=4)
    assert step_seconds(plan, profile.scenario_load, 0.01) == pytest.approx(0.01 * plan.lis(profile.load).mean())


def test_what_cannot_be_compared_is_refused():
    profile = make_profile(skewed(0))
    plan = make_plan(profile, "eplb", units=4)
    with pytest.raises(PlanError, match="4 and 2 ranks"):
        traffic(plan, make_plan(profile, "eplb", units=2))
    with pytest.raises(PlanError, match="bytes_per_second 0 given"):
        pay_back(plan, plan, seconds_before=1, seconds_after=1, steps=1, bytes_per_second=0)
    bare = make_plan(make_profile(skewed(0), matrices=()), "eplb", units=4)
    with pytest.raises(PlanError, match="--config"):
        traffic(bare, bare)
