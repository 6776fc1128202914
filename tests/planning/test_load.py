from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.metrics import lis
from equipoise.planning.load import contiguous, expected_lis, outlook, scaled
from planning.cases import make_profile, skewed


def test_scaled_load_gives_lis():
    load = skewed(0).sum(0)
    assert scaled(load, 8).max(1) == pytest.approx(lis(load))
    assert (scaled(np.zeros((2, 4)), 4) == 0).all()


@pytest.mark.parametrize(("windows", "experts"), [(3, 8), (20, 8), (10, 40), (60, 16)])
def test_deviations_have_the_windows_variance(windows: int, experts: int):
    profile = make_profile(skewed(1, 2, experts, windows))
    look = outlook(profile, experts, rank=experts)
    part = profile.windows.sum(2) / profile.windows.sum((0, 2))
    apart = scaled(profile.windows, experts) - scaled(profile.load, experts)
    covariance = np.einsum("wl,wle,wlf->lef", part, apart, apart)
    kept = np.einsum("lbe,lbf->lef", look.deviations, look.deviations)
    if min(windows, experts) <= experts and windows <= experts:
        assert kept == pytest.approx(covariance, abs=1e-9)
    assert look.variance == pytest.approx(np.einsum("lee->le", covariance))
    assert (np.linalg.eigvalsh(covariance - kept) > -1e-8).all()


def test_a_single_window_deviates_nowhere():
    look = outlook(make_profile(skewed(1, windows=1)), 8)
    assert look.deviations.shape[1] == 0
    slots = contiguous(look.widths, 8)
    assert expected_lis(slots, look) == pytest.approx(lis(skewed(1, windows=1)[0]))


@given(st.integers(1, 12), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_the_model_as_it_is_has_contiguous_blocks_of_nearly_equal_size(experts: int, units: int):
    slots = contiguous(np.array([experts, 3]), units)
    first = slots.unit[slots.layer == 0]
    assert (np.diff(first) >= 0).all()
    assert first.min() == 0
    assert first.max() < units
    if units <= experts:
        assert np.ptp(np.bincount(first, minlength=units)) <= 1
    else:
        assert len(set(first.tolist())) == experts


def test_expected_lis_grows_with_what_deviates():
    calm, wild = (make_profile(np.random.default_rng(0).poisson(rates)) for rates in (
        np.full((30, 1, 8), 400.0), 400.0 * np.random.default_rng(1).lognormal(0, 0.5, (30, 1, 8))))  # fmt: skip
    slots = contiguous(np.array([8]), 8)
    excess = [float(expected_lis(slots, outlook(p, 8))[0] - lis(p.load)[0]) for p in (calm, wild)]
    assert 0 <= excess[0] < excess[1]


def test_expected_lis_predicts_other_text():
    rng = np.random.default_rng(5)
    base = rng.lognormal(0, 0.7, (1, 24, 16))
    drawn = rng.poisson(200 * base * rng.lognormal(0, 0.4, (2, 40, 24, 16)))
    profile = make_profile(drawn[0])
    expected = expected_lis(contiguous(profile.widths, 16), outlook(profile, 16)).mean()
    # Expected on another draw, given this one: unit loads scatter by twice the variance of a mean of 40 windows.
    assert expected == pytest.approx(lis(drawn[1].sum(0)).mean(), rel=0.05)
