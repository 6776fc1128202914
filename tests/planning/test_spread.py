from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from equipoise.planning.load import Slots, outlook
from equipoise.planning.replicate import copies, copy_order
from equipoise.planning.spread import BALANCE, exchange, place
from planning.cases import loads, make_profile, skewed


def start(windows, units: int, extra: int):
    look = outlook(make_profile(windows), units)
    d = copies(copy_order(look, extra), np.full(len(look.load), extra), look.widths, look.load.shape[1])
    return look, d, -(-d.sum(1) // units)


def cost(slots: Slots, look) -> float:
    """The sum of squares that placement lowers, from its definition."""
    n_layers, n = look.load.shape
    single = np.bincount(slots.layer * n + slots.expert, minlength=n_layers * n).reshape(n_layers, n) == 1
    axes = [BALANCE * look.load, BALANCE * look.load * single, *look.deviations.transpose(1, 0, 2)]
    return float(sum((slots.unit_load(axis, look.units) ** 2).sum() for axis in axes))


def check(slots: Slots, look, d, room) -> None:
    n_layers, n = d.shape
    key = (slots.layer * n + slots.expert) * look.units + slots.unit
    assert len(np.unique(key)) == len(key), "two copies of an expert on one unit"
    assert (np.bincount(slots.layer * n + slots.expert, minlength=n_layers * n) == d.ravel()).all()
    on = np.bincount(slots.layer * look.units + slots.unit, minlength=n_layers * look.units).reshape(n_layers, -1)
    assert (on.max(1) <= room + 1).all()


@given(loads())
@settings(max_examples=60, deadline=None)
def test_every_copy_has_a_unit_of_its_own(windows):
    for units in (1, 3, windows.shape[2]):
        look, d, room = start(windows, units, windows.shape[2])
        slots = place(look, d, room)
        check(slots, look, d, room)
        check(exchange(slots, look, room), look, d, room)


@pytest.mark.parametrize("seed", range(4))
def test_exchange_lowers_what_it_says(seed: int):
    look, d, room = start(skewed(seed, 3, 12, 5), 12, 12)
    slots = place(look, d, room)
    better = exchange(slots, look, room)
    assert cost(better, look) < cost(slots, look)
    again = better
    for _ in range(20):
        again = exchange(again, look, room)
    assert cost(again, look) <= cost(better, look) * (1 + 1e-6)
    settled = exchange(again, look, room)
    assert settled.unit.tolist() == again.unit.tolist()


def test_a_settled_placement_has_no_better_swap():
    look, d, room = start(skewed(9, 1, 6, 4), 6, 6)
    slots = place(look, d, room)
    for _ in range(20):
        slots = exchange(slots, look, room)
    best = cost(slots, look)
    for i in range(len(slots.unit)):
        for j in range(i):
            unit = slots.unit.copy()
            unit[[i, j]] = unit[[j, i]]
            if len(set(zip(slots.expert.tolist(), unit.tolist(), strict=True))) == len(unit):
                assert cost(Slots(slots.layer, slots.expert, unit, slots.share), look) >= best * (1 - 1e-5)


def test_experts_that_are_hot_together_are_put_apart():
    """Experts 0 and 1 rise together while 2 and 3 fall: pairs of one of each leave every unit steady."""
    windows = np.full((6, 1, 4), 100)
    windows[::2, 0, :2] += 60
    windows[1::2, 0, :2] -= 60
    windows[::2, 0, 2:] -= 60
    windows[1::2, 0, 2:] += 60
    look, d, room = start(windows, 2, 0)
    slots = exchange(place(look, d, room), look, room)
    pair = {frozenset(slots.expert[slots.unit == u].tolist()) for u in range(2)}
    assert frozenset({0, 1}) not in pair


def test_equal_loads_fill_units_equally():
    look, d, room = start(np.full((2, 2, 12), 7), 4, 0)
    assert (place(look, d, room).unit_load(look.load, 4) == 1.0).all()
