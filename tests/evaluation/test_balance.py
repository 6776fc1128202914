from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.evaluation.balance import measure, unit_load
from equipoise.models.recorder import record


def test_unit_load_lays_experts_on_units_in_order() -> None:
    assert unit_load([5, 1, 2, 7], 4).tolist() == [5, 1, 2, 7]
    assert unit_load([5, 1, 2, 7], 2).tolist() == [6, 9]
    assert unit_load([5, 1, 2, 7, 4], 2).tolist() == [8, 11]
    assert unit_load([5, 1], 4).tolist() == [5, 0, 1, 0]


@given(st.lists(st.integers(0, 100), min_size=1, max_size=12), st.integers(1, 12))
def test_unit_load_loses_no_token_and_spreads_experts_evenly(load: list[int], units: int) -> None:
    assert unit_load(load, units).sum() == sum(load)
    experts = unit_load(np.ones(len(load)), units)
    assert experts.max() - experts.min() <= 1


@pytest.mark.parametrize("units", [8, 2])
def test_a_model_as_it_is_is_scored_by_its_selections(model: Any, units: int) -> None:
    ids = torch.arange(2, 40)[None]
    with record(model) as recorder:
        model(input_ids=ids)
    with measure(model, None, units) as balance:
        model(input_ids=ids)
    load_LE = recorder.counts.sum((0, 1))
    unit_LU = load_LE.reshape(2, units, -1).sum(-1)
    assert balance.lis == pytest.approx(np.mean(units * unit_LU.max(1) / unit_LU.sum(1)))
    assert balance.lis_paper == pytest.approx(np.mean(8 * load_LE.max(1) / load_LE.sum(1)))
    assert balance.lis > 1
