from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from scipy.optimize import linprog

from equipoise.planning.load import Slots, contiguous, outlook
from equipoise.planning.replicate import balance_shares, copies, copy_order, drop_idle, level
from equipoise.planning.spread import place
from planning.cases import loads, make_profile, skewed


def slots_of(look, extra: int) -> Slots:
    n = look.load.shape[1]
    d = copies(copy_order(look, extra), np.full(len(look.load), extra), look.widths, n)
    return place(look, d, -(-d.sum(1) // look.units))


def least_peak(slots: Slots, look, layer: int) -> float:
    """The least load of the fullest unit over all shares on these slots (linear program)."""
    rows = slots.layer == layer
    expert, unit = slots.expert[rows], slots.unit[rows]
    n, width = len(expert), look.load.shape[1]
    held = np.zeros((look.units, n + 1))
    held[unit, np.arange(n)] = look.load[layer, expert]
    held[:, n] = -1.0
    whole = np.zeros((width, n + 1))
    whole[expert, np.arange(n)] = 1.0
    present = whole.sum(1) > 0
    found = linprog(np.eye(n + 1)[n], held, np.zeros(look.units), whole[present], np.ones(present.sum()))
    return float(found.fun)


@given(loads())
@settings(max_examples=60, deadline=None)
def test_copies_are_nested_and_within_units(windows):
    look = outlook(make_profile(windows), windows.shape[2])
    n_layers, n = look.load.shape
    order = copy_order(look, 2 * n)
    before = None
    for extra in range(2 * n + 1):
        d = copies(order, np.full(n_layers, extra), look.widths, n)
        assert (d >= 1).all()
        assert (d <= look.units).all()
        assert (d.sum(1) == np.minimum(n + extra, n * look.units)).all()
        assert before is None or (d >= before).all()
        before = d


def test_no_copy_serves_more_than_a_unit_once_there_are_enough():
    look = outlook(make_profile(skewed(3, 6, 16)), 16)
    d = copies(copy_order(look, 16), np.full(6, 16), look.widths, 16)
    assert (look.load / d <= 1 + 1e-9).all()


def test_volatile_experts_get_more_copies_than_steady_ones_of_the_same_load():
    windows = np.full((4, 1, 8), 100)
    windows[::2, 0, 3] += 90
    windows[1::2, 0, 3] -= 90
    look = outlook(make_profile(windows), 8)
    d = copies(copy_order(look, 4), np.array([4]), look.widths, 8)[0]
    assert d.argmax() == 3
    assert d[3] >= 3


@pytest.mark.parametrize("seed", range(6))
def test_balanced_shares_reach_the_linear_program(seed: int):
    look = outlook(make_profile(skewed(seed, 2, 8)), 8)
    slots = balance_shares(slots_of(look, 8), look, rounds=2000)
    peak = slots.unit_load(look.load, 8).max(1)
    for layer in range(2):
        assert peak[layer] <= least_peak(slots, look, layer) + 0.05
        assert peak[layer] >= least_peak(slots, look, layer) - 1e-9


def test_even_shares_that_balance_already_are_left_as_they_are():
    look = outlook(make_profile(np.full((2, 1, 4), 10)), 4)
    slots = slots_of(look, 4)
    assert balance_shares(slots, look).share == pytest.approx(slots.share)


@given(loads())
@settings(max_examples=60, deadline=None)
def test_shares_always_add_up(windows):
    look = outlook(make_profile(windows), windows.shape[2])
    n_layers, n = look.load.shape
    slots = balance_shares(slots_of(look, n), look)
    for final in (slots, drop_idle(slots, look, 0.3), level(slots, look, 0.01, np.full(n_layers, 3))):
        total = np.bincount(final.layer * n + final.expert, final.share, n_layers * n)
        assert total == pytest.approx(np.ones(n_layers * n))
        keys = set(zip(final.layer.tolist(), final.expert.tolist(), final.unit.tolist(), strict=True))
        assert len(keys) == len(final.layer)


def test_idle_copies_go_and_the_largest_stays():
    look = outlook(make_profile(np.array([[[90, 10]], [[90, 10]]])), 2)
    slots = Slots(np.zeros(4, int), np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]), np.array([0.999, 0.001, 0.5, 0.5]))
    kept = drop_idle(slots, look, 0.2)
    assert kept.expert.tolist() == [0, 1]
    assert kept.unit.tolist() == [0, 0]
    assert kept.share.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("seed", range(5))
def test_leveling_balances_any_layer_with_at_most_one_copy_per_unit(seed: int):
    """McNaughton's bound: E + U - 1 slots always suffice."""
    look = outlook(make_profile(skewed(seed, 5, 8)), 8)
    start = contiguous(look.widths, 8)
    slots = level(start, look, 0.01, np.full(5, 24))
    assert (slots.unit_load(look.load, 8).max(1) < 1.011).all()
