"""The dispatch rules against plain loops, and what all of them must hold."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatch.cases import expert_of, make_map, placements, random_ids
from equipoise.dispatch.choice import RULES, choose
from equipoise.dispatch.placement import LayerMap
from equipoise.dispatch.split import least_split, order_in_expert
from equipoise.errors import EquipoiseError

TEMPORARY = {"quota", "llep"}


@pytest.mark.parametrize("rule", RULES.names())
@settings(max_examples=40, deadline=None)
@given(placements(duplicates=True), st.integers(1, 3), st.integers(1, 24), st.integers(1, 4), st.integers(0, 2**31))
def test_every_pair_is_served_by_its_own_expert(rule: str, layer: LayerMap, batches: int, tokens: int, top_k: int, seed: int):
    ids = random_ids(np.random.default_rng(seed), batches, tokens, min(top_k, layer.experts), layer.experts)
    options = {"llep": {"least": 1, "gate": 0.0}}.get(rule, {})
    choice = choose(rule, layer, ids, np.random.default_rng(seed), options)
    assert choice.instance_BTK.shape == ids.shape
    assert (expert_of(layer, choice.instance_BTK) == ids).all()
    again = choose(rule, layer, ids, np.random.default_rng(seed), options)
    assert (again.instance_BTK == choice.instance_BTK).all()
    temporary = choice.instance_BTK >= len(layer.expert_P)
    if rule not in TEMPORARY:
        assert not temporary.any()
        assert not choice.received_BR.any()
    for b in range(batches):  # weights are sent exactly for the copies that did not stand
        new = np.unique(choice.instance_BTK[b][temporary[b]])
        assert np.bincount(layer.instance_rank[new], minlength=layer.ranks).tolist() == choice.received_BR[b].tolist()


def test_vllm_counts_positions_on_each_rank():
    layer = make_map([0, 1, 2, 0, 1, 0], 2)  # expert 0 has slots 0, 3, 5; expert 1 has 1, 4
    ids = random_ids(np.random.default_rng(0), 2, 10, 2, 3)
    choice = choose("vllm", layer, ids, np.random.default_rng(0))
    slots = {0: [0, 3, 5], 1: [1, 4], 2: [2]}
    for b, t, k in itertools.product(range(2), range(10), range(2)):
        position = (t % 5) * 2 + k  # 5 tokens on each of 2 ranks
        held = slots[int(ids[b, t, k])]
        assert choice.instance_BTK[b, t, k] == held[position % len(held)]


def test_vllm_hash_takes_the_token_alone():
    layer = make_map([0, 1, 2, 0, 1, 0], 2)
    ids = random_ids(np.random.default_rng(0), 1, 12, 2, 3)
    choice = choose("vllm-hash", layer, ids, np.random.default_rng(0))
    slots = {0: [0, 3, 5], 1: [1, 4], 2: [2]}
    for t, k in itertools.product(range(12), range(2)):
        held = slots[int(ids[0, t, k])]
        assert choice.instance_BTK[0, t, k] == held[(t % 6) * 2654435769 % 2**32 % len(held)]


def test_vllm_splits_two_copies_by_column_when_top_k_is_even():
    layer = make_map([0, 1, 0, 2], 2)
    ids = np.array([[[0, 1], [2, 0], [0, 2], [0, 1]]])
    chosen = choose("vllm", layer, ids, np.random.default_rng(0)).instance_BTK[0]
    assert [chosen[t][k] for t, k in ((0, 0), (1, 1), (2, 0), (3, 0))] == [0, 2, 0, 0]


def test_sglang_prefers_rank_then_node_then_a_fixed_fair_copy():
    layer = make_map([0, 1, 2, 3, 0, 4, 5, 6], 4, nodes=2)  # expert 0 on ranks 0 and 2; ranks 0, 1 are node 0
    ids = np.zeros((1, 8, 1), int)
    ranks = layer.instance_rank[choose("sglang-static", layer, ids, np.random.default_rng(0)).instance_BTK[0, :, 0]]
    assert ranks.tolist() == [0, 0, 0, 0, 2, 2, 2, 2]
    flat = make_map([0, 1, 2, 3, 0, 4, 5, 6], 4)
    ranks = flat.instance_rank[choose("sglang-static", flat, ids, np.random.default_rng(0)).instance_BTK[0, :, 0]]
    assert ranks[[0, 1, 4, 5]].tolist() == [0, 0, 2, 2]
    assert sorted(ranks[[2, 6]].tolist()) == [0, 2]  # the two ranks without a copy are dealt one each
    assert ranks[2] == ranks[3]
    assert ranks[6] == ranks[7]


def test_sglang_dynamic_is_random_where_no_copy_is_near():
    layer = make_map([0, 1, 2, 3, 0, 4, 5, 6], 4)
    ids = np.zeros((1, 4_000, 1), int)
    chosen = layer.instance_rank[choose("sglang-dynamic", layer, ids, np.random.default_rng(0)).instance_BTK[0, :, 0]]
    home = layer.home_of(4_000)
    assert (chosen[home == 0] == 0).all()
    assert (chosen[home == 2] == 2).all()
    assert 0.45 < (chosen[home == 1] == 0).mean() < 0.55
    everywhere = choose("sglang-dynamic", layer, ids, np.random.default_rng(0), {"nearest": False}).instance_BTK[0, :, 0]
    assert 0.45 < (layer.instance_rank[everywhere][home == 0] == 0).mean() < 0.55


def test_even_deals_each_expert_in_turn():
    layer = make_map([0, 1, 0, 2, 0, 1], 2)
    ids = random_ids(np.random.default_rng(3), 4, 50, 2, 3)
    chosen = choose("even", layer, ids, np.random.default_rng(0)).instance_BTK
    for b in range(4):
        for slots in ([0, 2, 4], [1, 5], [3]):
            counts = [(chosen[b] == slot).sum() for slot in slots]
            assert max(counts) - min(counts) <= 1


@settings(max_examples=60, deadline=None)
@given(placements(most_experts=5, most_ranks=3), st.lists(st.integers(0, 6), min_size=5, max_size=5))
def test_the_linear_program_is_the_least_split(layer: LayerMap, load: list[int]):
    counts = np.array(load[: layer.experts])
    split, worst = least_split(layer, counts)
    assert np.bincount(layer.expert_P, split, layer.experts) == pytest.approx(counts)
    assert np.bincount(layer.rank_P, split, layer.ranks).max() == pytest.approx(worst)
    # By the cut: experts whose hosts lie within a set of ranks cannot leave it, and some set is exactly full.
    bound = max(
        sum(counts[e] for e in range(layer.experts) if set(layer.hosts[e]) <= set(some)) / len(some)
        for n in range(1, layer.ranks + 1)
        for some in itertools.combinations(range(layer.ranks), n)
    )
    assert worst == pytest.approx(bound, abs=1e-6)


def test_lp_beats_even_and_rounds_to_whole_tokens():
    layer = make_map([0, 1, 0, 2, 0, 3], 3)
    ids = random_ids(np.random.default_rng(5), 6, 200, 2, 4, skew=1.5)

    def fullest(rule: str) -> np.ndarray:
        rank = layer.instance_rank[choose(rule, layer, ids, np.random.default_rng(0)).instance_BTK]
        return np.array([np.bincount(row.ravel(), minlength=3).max() for row in rank])

    least = [least_split(layer, np.bincount(row.ravel(), minlength=4))[1] for row in ids]
    assert (fullest("lp") <= np.array(least) + 3).all()
    assert (fullest("lp") <= fullest("even") + 3).all()


def test_order_in_expert_counts_earlier_tokens():
    ids = np.array([[[0, 1], [1, 0], [0, 2]], [[1, 0], [1, 2], [1, 0]]])
    assert order_in_expert(ids, 3).tolist() == [[[0, 0], [1, 1], [2, 0]], [[0, 0], [1, 0], [2, 1]]]


def test_unknown_rule_and_option():
    layer = make_map([0, 1], 2)
    with pytest.raises(EquipoiseError, match="Did you mean 'metro'"):
        choose("metr", layer, np.zeros((1, 2, 1), int), np.random.default_rng(0))
    with pytest.raises(EquipoiseError, match=r"no option 'alpa'.*alpha, least, gate"):
        choose("llep", layer, np.zeros((1, 2, 1), int), np.random.default_rng(0), {"alpa": 1})
