"""Batches drawn from counts: distinct experts, chosen as often as counted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.simulation.draw import draw_batches, inclusion, systematic
from planning.cases import make_profile, skewed


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=20).filter(any), st.integers(1, 6))
def test_inclusion_probabilities(load: list[int], top_k: int):
    top_k = min(top_k, len(load))
    chance = inclusion(np.array([load], float), top_k)[0]
    assert chance.sum() == pytest.approx(top_k)
    assert (chance >= 0).all()
    assert (chance <= 1).all()
    free = chance < 1 - 1e-9
    some = free & (np.array(load) > 0)
    if some.sum() > 1:  # below the cap, in proportion to what was counted
        ratio = chance[some] / np.array(load)[some]
        assert ratio == pytest.approx(np.full(len(ratio), ratio[0]), rel=1e-4)


def test_experts_are_distinct_and_as_frequent_as_asked():
    chance = inclusion(np.random.default_rng(0).lognormal(0, 1.5, (1, 24)), 4)[0]
    ids = systematic(chance, 40_000, 4, np.random.default_rng(1))
    ordered = np.sort(ids, axis=1)
    assert (ordered[:, 1:] > ordered[:, :-1]).all()
    assert np.bincount(ids.ravel(), minlength=24) / 40_000 == pytest.approx(chance, abs=0.01)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_batches_follow_the_profile(phase: str):
    profile = make_profile(skewed(0, layers=3, experts=16, windows=12))
    ids = draw_batches(profile, 256, phase, 60, seed=0)
    assert [a.shape for a in ids] == [(60, 256, 2)] * 3
    for layer, drawn in enumerate(ids):
        share = np.bincount(drawn.ravel(), minlength=16) / drawn.size
        wanted = inclusion(profile.load[layer][None].astype(float), 2)[0] / 2
        assert share == pytest.approx(wanted, abs=0.03)
    again = draw_batches(profile, 256, phase, 60, seed=0)
    assert all((a == b).all() for a, b in zip(ids, again, strict=True))


def test_prefill_batches_differ_more_than_decode_batches():
    """Few windows fill a prefill batch, many a decode batch; so its load varies more from batch to batch."""
    rng = np.random.default_rng(0)
    hot = rng.integers(0, 16, 40)
    windows = rng.poisson(2, (40, 1, 16)) + 60 * (np.arange(16) == hot[:, None])[:, None, :]

    def scatter(phase: str) -> float:
        drawn = draw_batches(make_profile(windows), 64, phase, 80, seed=0)[0]
        counts = np.array([np.bincount(batch.ravel(), minlength=16) for batch in drawn])
        return float(counts.std(0).mean())

    assert scatter("prefill") > 1.5 * scatter("decode")


def test_a_layer_that_saw_nothing_is_drawn_evenly():
    windows = skewed(0, layers=2, experts=8, windows=4)
    windows[:, 1] = 0
    drawn = draw_batches(make_profile(windows), 400, "prefill", 8, seed=0)[1]
    assert np.bincount(drawn.ravel(), minlength=8) / drawn.size == pytest.approx(np.full(8, 1 / 8), abs=0.02)
