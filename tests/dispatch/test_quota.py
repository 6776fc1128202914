"""Exact-load quotas: add up to the load, spare slots within their limit, no expert twice on a rank."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatch.cases import placements
from equipoise.dispatch.placement import LayerMap
from equipoise.dispatch.quota import exact_load_quotas


@st.composite
def cases(draw: st.DrawFn) -> tuple[LayerMap, list[int]]:
    layer = draw(placements())
    load = draw(st.lists(st.integers(0, 400), min_size=layer.experts, max_size=layer.experts))
    return layer, load


@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(0, 3), st.integers(1, 64))
def test_quotas_hold_their_promises(case: tuple[LayerMap, list[int]], spare: int, least: int):
    layer, load = case
    found = exact_load_quotas(load, layer.hosts, layer.ranks, spare=spare, least=least)
    assert (found.quota_ER >= 0).all()
    assert found.quota_ER.sum(1).tolist() == load
    assert found.quota_ER.sum(0).max(initial=0) <= found.threshold
    targets = [target for _, _, target in found.added]
    assert np.bincount(targets, minlength=layer.ranks).max(initial=0) <= spare
    pairs = [(expert, target) for expert, _, target in found.added]
    assert len(set(pairs)) == len(pairs)
    assert not any(layer.hosts_ER[expert, target] for expert, target in pairs)
    serving = np.argwhere(found.quota_ER > 0)
    assert all(layer.hosts_ER[e, r] or (e, r) in pairs for e, r in serving.tolist())
    for expert, tokens in enumerate(load):  # the master keeps one, so that its rank always knows its expert is in use
        assert tokens == 0 or found.quota_ER[expert, layer.hosts[expert][0]] >= 1


@settings(max_examples=75, deadline=None)
@given(cases(), st.integers(0, 3))
def test_never_worse_than_without(case: tuple[LayerMap, list[int]], spare: int):
    layer, load = case
    found = exact_load_quotas(load, layer.hosts, layer.ranks, spare=spare)
    before = exact_load_quotas(load, layer.hosts, layer.ranks, spare=spare, threshold=1e9)
    assert before.added == ()
    assert found.quota_ER.sum(0).max(initial=0) <= before.quota_ER.sum(0).max(initial=0)


def test_two_spare_slots_level_a_skewed_batch():
    """128 experts on 8 ranks, 524,288 assignments of a Dirichlet 0.3: within 2 % of the mean, as the source reports."""
    ratios, before, copies = [], [], []
    for seed in range(10):
        share = np.random.default_rng(seed).dirichlet(np.full(128, 0.3))
        load = np.floor(share * 524_288).astype(int)
        hosts = [[e // 16] for e in range(128)]
        mean = load.sum() / 8
        before.append(load.reshape(8, 16).sum(1).max() / mean)
        found = exact_load_quotas(load.tolist(), hosts, 8, spare=2)
        ratios.append(found.quota_ER.sum(0).max() / mean)
        copies.append(len(found.added))
    assert np.mean(before) > 1.5
    assert np.mean(ratios) < 1.03
    assert max(ratios) < 1.08
    assert np.mean(copies) < 16


def test_standing_copies_are_used_before_spare_slots():
    found = exact_load_quotas([100, 0, 0, 0], [[0, 1], [1], [2], [3]], 4, spare=0)
    assert found.quota_ER[0].tolist() == [50, 50, 0, 0]
    assert found.added == ()
    spare = exact_load_quotas([100, 0, 0, 0], [[0, 1], [1], [2], [3]], 4, spare=1)
    assert spare.quota_ER.sum(0).max() <= 26


def test_spare_slots_run_out():
    """Forty small experts on one rank, and few spare slots on three others: more copies would level better."""
    load, hosts = [10] * 40 + [1, 1, 1], [[0]] * 40 + [[1], [2], [3]]
    for spare in (1, 2):
        found = exact_load_quotas(load, hosts, 4, spare=spare)
        taken = np.bincount([target for _, _, target in found.added], minlength=4)
        assert taken.max() <= spare
        assert found.quota_ER.sum(0)[0] == 400 - 9 * len(found.added)
    assert exact_load_quotas(load, hosts, 4, spare=40).quota_ER.sum(0).max() < 110
