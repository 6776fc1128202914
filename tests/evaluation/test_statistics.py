from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.errors import TextError
from equipoise.evaluation.statistics import (
    clusters,
    mean_per_token,
    paired_difference,
    perplexity_change,
    proportion_interval,
    ratio_interval,
)

RUNS = 1500


def test_clusters_are_documents_or_rows_of_the_only_document() -> None:
    assert clusters([3, 3, 7, 3]).tolist() == [0, 0, 1, 0]
    assert clusters([5, 5, 5]).tolist() == [0, 1, 2]
    with pytest.raises(TextError, match="single sequence"):
        clusters([0])


def test_perplexity_change_is_the_ratio_of_perplexities() -> None:
    base, other, tokens = np.array([10.0, 30.0, 20.0]), np.array([11.0, 29.0, 22.0]), np.array([5.0, 10.0, 9.0])
    interval = perplexity_change(base, other, tokens)
    assert interval.value == pytest.approx(np.exp(other.sum() / 24) / np.exp(base.sum() / 24) - 1)
    assert interval.low < interval.value < interval.high


def test_perplexity_change_of_equal_models_is_exactly_zero() -> None:
    interval = perplexity_change([10.0, 30.0], [10.0, 30.0], [5, 10])
    assert (interval.low, interval.value, interval.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("documents", [4, 12])
def test_perplexity_change_covers_the_truth(documents: int) -> None:
    rng, truth, hits = np.random.default_rng(documents), 0.01, 0
    for _ in range(RUNS):
        tokens = rng.integers(50, 500, documents)
        base = rng.gamma(9.0, 0.3, documents) * tokens  # documents differ far more than the two models do
        other = base + tokens * rng.normal(truth, 0.02, documents)
        interval = perplexity_change(base, other, tokens)
        hits += interval.low <= np.expm1(truth) <= interval.high
    assert 0.925 <= hits / RUNS <= 0.985


def test_ratio_interval_matches_student_for_documents_of_equal_length() -> None:
    from scipy import stats

    y = np.array([1.0, 2.0, 4.0, 3.5])
    interval = ratio_interval(y * 10, np.full(4, 10))
    low, high = stats.t.interval(0.95, 3, y.mean(), stats.sem(y))
    assert (interval.low, interval.high) == (pytest.approx(low), pytest.approx(high))


def test_mean_per_token_is_never_negative() -> None:
    interval = mean_per_token([0.0, 0.0, 3.0], [10, 10, 10])
    assert interval.low == 0.0
    assert interval.value == pytest.approx(0.1)


@pytest.mark.parametrize("p", [0.9, 0.995])
def test_proportion_covers_the_truth_in_clustered_text(p: float) -> None:
    rng, hits = np.random.default_rng(1), 0
    for _ in range(RUNS):
        tokens = rng.integers(50, 200, 10)
        share = rng.beta(p * 60, (1 - p) * 60, 10)  # documents of their own difficulty
        interval = proportion_interval(rng.binomial(tokens, share), tokens)
        hits += interval.low <= p <= interval.high
    assert hits / RUNS >= 0.92


def test_proportion_of_full_agreement_has_width_but_contains_one() -> None:
    interval = proportion_interval([50, 60, 70], [50, 60, 70])
    assert interval.value == interval.high == 1.0
    assert 0.5 < interval.low < 1.0
    assert proportion_interval([0, 0], [9, 9]).low == 0.0


@pytest.mark.parametrize(("items", "gain", "loss"), [(20, 0.05, 0.05), (40, 0.02, 0.10), (200, 0.01, 0.01)])
def test_paired_difference_covers_the_truth(items: int, gain: float, loss: float) -> None:
    rng, hits = np.random.default_rng(items), 0
    for _ in range(RUNS):
        kind = rng.choice(4, items, p=[gain, loss, 0.4, 0.6 - gain - loss])
        interval = paired_difference(np.isin(kind, [1, 2]), np.isin(kind, [0, 2]))
        hits += interval.low <= gain - loss <= interval.high
    assert hits / RUNS >= 0.94


def test_no_differing_item_is_no_proof_of_no_difference() -> None:
    few, many = paired_difference([0, 1, 1], [0, 1, 1]), paired_difference(np.ones(300), np.ones(300))
    assert few.value == many.value == 0.0
    assert few.high - few.low > 1.0
    assert many.high == pytest.approx(2.77 / 302, rel=0.01)
    assert many.low == -many.high


def test_unbounded_scores_take_students_interval() -> None:
    interval = paired_difference([10.0, 12.0, 9.0], [11.0, 12.5, 9.0])
    assert interval.value == pytest.approx(0.5)
    assert interval.high - interval.value == pytest.approx(4.302653 * 0.5 / np.sqrt(3))


def test_paired_scores_must_be_of_the_same_items() -> None:
    with pytest.raises(ValueError, match="same items"):
        paired_difference([1, 0], [1])


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=30))
def test_paired_difference_contains_its_value_and_turns_with_the_sides(pairs: list[tuple[float, float]]) -> None:
    base, other = np.array(pairs).T
    forth, back = paired_difference(base, other), paired_difference(other, base)
    assert -1 <= forth.low <= forth.value <= forth.high <= 1
    assert forth.high > forth.low
    assert (back.low, back.high) == (pytest.approx(-forth.high), pytest.approx(-forth.low))
