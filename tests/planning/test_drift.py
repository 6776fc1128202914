from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import PlanError
from equipoise.planning.streaming.drift import Window, js_noise, js_ratio, scatter


def draws(rng: np.random.Generator, share_LE: np.ndarray, size: int) -> np.ndarray:
    return np.stack([rng.multinomial(size, share) for share in share_LE])


def test_the_noise_of_independent_draws_is_what_the_formula_says():
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.ones(32) * 3, 1)
    found = []
    from equipoise.metrics import jensen_shannon

    for _ in range(400):
        a, b = draws(rng, share, 2000), draws(rng, share, 5000)
        found.append(float(jensen_shannon(a, b)[0]))
    expected = float(js_noise(a, b, (np.array([2000.0]), np.array([5000.0])))[0])
    assert np.mean(found) == pytest.approx(expected, rel=0.05)


def test_a_stationary_stream_shows_no_change_and_a_shift_shows_one_at_its_step():
    rng = np.random.default_rng(1)
    first, second = rng.dirichlet(np.ones(16), 3), rng.dirichlet(np.ones(16), 3)
    window = Window(prior_scatter=1.5)
    changes = [window.add(draws(rng, first if step < 60 else second, 1000)) for step in range(80)]
    assert [step for step, changed in enumerate(changes) if changed] == [60]
    assert len(window.loads) == 20
    assert window.drift(first * 1e6)[1] > 5 > 1.5 > window.drift(second * 1e6)[1]


def test_bursty_text_is_not_taken_for_change_once_its_scatter_is_known():
    rng = np.random.default_rng(2)
    share = rng.dirichlet(np.ones(16) * 4, 2)

    def step() -> np.ndarray:  # each document has a load of its own around the common one
        return sum(draws(rng, np.stack([rng.dirichlet(40 * s + 0.01) for s in share]), 100) for _ in range(5))

    window = Window(prior_scatter=scatter(np.stack([step() for _ in range(20)])))
    assert window.scatter > 2
    assert sum(window.add(step()) for _ in range(100)) <= 2


def test_weights_fade_and_memory_is_bounded():
    window = Window(decay=0.5, most_steps=4)
    for step in range(10):
        window.add(np.full((1, 2), 10 * 2**step if step == 9 else 10))
    assert window.loads.shape == (4, 1, 2)
    np.testing.assert_allclose(window.weights, [0.125, 0.25, 0.5, 1.0])
    np.testing.assert_allclose(window.load, (window.weights[:, None, None] * window.loads).sum(0))
    assert window.steps == 10


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=4, max_size=4), st.integers(1, 20))
def test_the_size_of_a_window_is_between_its_last_step_and_its_sum(counts, steps):
    load = np.array([counts])
    if load.sum() == 0:
        return
    window = Window()
    for _ in range(steps):
        window.add(load)
    assert load.sum() - 1e-9 <= window.size[0] <= steps * load.sum() + 1e-9


def test_a_layer_that_serves_nothing_says_nothing():
    empty, full = np.zeros((2, 4), np.int64), np.array([[5, 5, 0, 0], [0, 0, 0, 0]])
    assert js_ratio(full, full, (full.sum(1) * 1.0, full.sum(1) * 1.0)) == 0
    assert js_ratio(empty, empty, (empty.sum(1) * 1.0, empty.sum(1) * 1.0)) == 0


@pytest.mark.parametrize("wrong", [{"decay": 0}, {"decay": 1.1}, {"most_steps": 1}, {"change": 1}])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(PlanError, match="given; allowed are"):
        Window(**wrong)


def test_an_empty_window_has_no_load():
    with pytest.raises(PlanError, match="empty"):
        Window().load  # noqa: B018


def test_scatter_counts_neighbours_within_a_scenario_alone():
    rng = np.random.default_rng(3)
    a, b = rng.dirichlet(np.ones(8), 2)
    windows = np.stack([rng.multinomial(500, p)[None] for p in (a, b, a, b)])
    assert scatter(windows) > 10
    assert scatter(windows, np.array([0, 1, 0, 1])) is None
    assert scatter(windows[[0, 2, 1, 3]], np.array([0, 0, 1, 1])) < 4
