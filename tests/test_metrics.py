from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from equipoise.metrics import METRICS, balancedness, coefficient_of_variation, cumulative_lis, gini, lis, maxvio

loads = arrays(np.int64, st.integers(1, 9), elements=st.integers(0, 1000)).filter(lambda a: a.sum() > 0)


def test_lis_of_the_papers_definition():
    # Four experts, top-1, ten tokens, five of them on one expert: 4 * 5 / 10.
    assert lis([5, 3, 2, 0]) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("name", "balanced", "worst"),
    [("lis", 1, 4), ("maxvio", 0, 3), ("balancedness", 1, 0.25), ("gini", 0, 0.75), ("cv", 0, np.sqrt(3))],
)
def test_extremes(name, balanced, worst):
    assert METRICS[name]([7, 7, 7, 7]) == pytest.approx(balanced)
    assert METRICS[name]([0, 0, 9, 0]) == pytest.approx(worst)


@given(loads)
def test_gini_is_the_mean_absolute_difference(load):
    mean_difference = np.abs(load[:, None] - load[None, :]).mean()
    assert gini(load) == pytest.approx(mean_difference / (2 * load.mean()))


@given(loads, st.integers(1, 4))
def test_absent_experts_change_nothing(load, extra):
    padded = np.concatenate([load, np.zeros(extra, np.int64)])
    for name, metric in METRICS.items():
        assert metric(padded, len(load)) == pytest.approx(metric(load), abs=1e-12), name


@given(loads)
def test_relations_between_metrics(load):
    assert maxvio(load) == pytest.approx(lis(load) - 1)
    assert balancedness(load) * lis(load) == pytest.approx(1)
    assert coefficient_of_variation(load) == pytest.approx(load.std() / load.mean())
    assert lis(load) >= 1 - 1e-12
    assert lis(load) <= len(load) + 1e-9


def test_nothing_served_is_not_balanced():
    assert np.isnan(lis([0, 0])).all()
    assert np.isnan(lis([[0, 0], [1, 1]])).tolist() == [True, False]


def test_a_cold_expert_counts_in_the_mean():
    assert lis([10, 10, 0, 0]) == pytest.approx(2.0)


def test_cumulative_lis_ends_with_the_whole_and_begins_with_the_first_window():
    windows = np.array([[[8, 0]], [[0, 8]], [[4, 4]]])
    np.testing.assert_allclose(cumulative_lis(windows)[:, 0], [2.0, 1.0, 1.0])
    np.testing.assert_allclose(lis(windows)[:, 0], [2.0, 2.0, 1.0])


def test_large_counts_do_not_saturate():
    assert lis(np.array([3 * 10**12, 10**12])) == pytest.approx(1.5)


def test_no_entries_is_an_error():
    with pytest.raises(ValueError, match="at least one entry"):
        lis([])
