from __future__ import annotations

import numpy as np
import pytest

from equipoise.dispatch.flow import spread_evenly
from equipoise.planning.dispatched import dispatched_lis, improve
from equipoise.planning.load import Slots, outlook
from equipoise.planning.methods import make_plan
from equipoise.planning.replicate import copies, copy_order
from equipoise.planning.spread import place
from planning.cases import make_profile, skewed

ERRORS = {"int8": 0.01, "int4-g32": 0.08}


def exact_lis(slots: Slots, look, layer: int) -> float:
    """Mean over windows of the largest unit load that the dispatch itself finds, on loads scaled up to whole tokens."""
    mine = slots.layer == layer
    expert, unit = slots.expert[mine], slots.unit[mine]
    width = int(look.widths[layer])
    number = np.bincount(expert, minlength=width)
    units = np.array([np.resize(unit[expert == e], number.max()) for e in range(width)])
    scores = []
    for load in look.samples[:, layer, :width]:
        count = np.round(load * 10_000).astype(np.int64)
        split = spread_evenly(count, units, number, look.units)
        held = np.zeros(look.units)
        for e in range(width):
            np.add.at(held, units[e, : number[e]], split[e, : number[e]])
        scores.append(held.max() / 10_000)
    return float(np.mean(scores))


def placed(seed: int, extra: int, units: int = 8):
    profile = make_profile(skewed(seed, layers=3, experts=8, windows=8))
    look = outlook(profile, units)
    order = copy_order(look, extra)
    d_LE = copies(order, np.full(3, extra), look.widths, 8)
    room = -(-d_LE.sum(1) // units)
    return place(look, d_LE, room), look, room


@pytest.mark.parametrize("seed", range(3))
def test_comes_close_to_what_the_dispatch_does_from_above(seed: int):
    slots, look, _ = placed(seed, 8)
    fitted = dispatched_lis(slots, look)
    for layer in range(3):
        exact = exact_lis(slots, look, layer)
        assert exact - 1e-3 <= fitted[layer] <= exact + 0.05


@pytest.mark.parametrize("seed", range(3))
def test_the_search_improves_what_the_dispatch_does(seed: int):
    slots, look, room = placed(seed, 6)
    better = improve(slots, look, room, 40, 0)
    before = np.mean([exact_lis(slots, look, layer) for layer in range(3)])
    after = np.mean([exact_lis(better, look, layer) for layer in range(3)])
    assert after - 1 < 0.8 * (before - 1)
    assert len(better.unit) == len(slots.unit)
    for layer in range(3):
        mine = better.layer == layer
        pairs = list(zip(better.expert[mine].tolist(), better.unit[mine].tolist(), strict=True))
        assert len(set(pairs)) == len(pairs)
        assert set(better.expert[mine].tolist()) == set(range(8))
        assert np.bincount(better.unit[mine]).max() <= room[layer]
    shares = np.bincount(better.layer * 8 + better.expert, better.share)
    assert shares == pytest.approx(np.ones(24))


def test_is_deterministic():
    slots, look, room = placed(4, 6)
    first, second = (improve(slots, look, room, 20, 7) for _ in range(2))
    assert np.array_equal(first.unit, second.unit)
    assert np.array_equal(first.expert, second.expert)


def test_plans_for_the_dispatch_balance_batches_better_than_plans_for_shares():
    windows = skewed(5, layers=4, experts=12, windows=24)
    profile = make_profile(windows[::2], error=ERRORS)
    other = outlook(make_profile(windows[1::2]), 12)
    scores = {}
    for dispatch in ("even", "least_loaded"):
        plan = make_plan(profile, error_bound=0.02, dispatch=dispatch)
        columns = [(i, e, u) for i, layer in enumerate(plan.layers) for e, u in zip(layer.experts, layer.units, strict=True)]
        layer, expert, unit = np.array(columns).T
        slots = Slots(layer, expert, unit, np.ones(len(layer)))
        scores[dispatch] = np.mean([exact_lis(slots, other, i) for i in range(4)])
    assert scores["least_loaded"] < scores["even"]
