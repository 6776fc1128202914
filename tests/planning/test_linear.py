from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.planning.linear import contiguous_placement, round_robin_placement
from equipoise.planning.methods import make_plan
from planning.cases import make_profile, skewed


@given(st.integers(1, 40), st.integers(1, 12), st.data())
def test_every_expert_has_its_part_and_none_is_twice_on_a_rank(experts: int, ranks: int, data: st.DataObject):
    per_rank = data.draw(st.integers(-(-experts // ranks), experts))
    slots = ranks * per_rank
    for place in (contiguous_placement, round_robin_placement):
        physical = place(experts, slots, ranks)
        copies = np.bincount(physical, minlength=experts)
        assert copies.min() >= 1
        assert copies.max() - copies.min() <= 1
        assert all(len(set(rank.tolist())) == per_rank for rank in physical.reshape(ranks, -1))


def test_without_copies_they_are_what_engines_do():
    assert contiguous_placement(8, 8, 4).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert contiguous_placement(8, 12, 4).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    assert round_robin_placement(8, 8, 4).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


@pytest.mark.parametrize("method", ["contiguous", "round_robin"])
def test_the_forecast_is_of_the_phase_asked_for(method: str):
    profile = make_profile(skewed(0))
    plan = make_plan(profile, method, units=4, phase="prefill")
    assert plan.method == method
    assert plan.predicted.lis == pytest.approx(plan.lis(profile.load).mean())
    if method == "contiguous":
        assert plan.predicted.lis == pytest.approx(plan.predicted.lis_raw)
