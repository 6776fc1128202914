"""Replaying against plain loops over tokens."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dispatch.cases import EXPERT_BYTES, WIDTH, make_model, make_plan, random_ids
from equipoise.dispatch.choice import RULES, choose
from equipoise.dispatch.placement import layer_maps
from equipoise.planning.cost import ActivatedCost, PairCost
from equipoise.simulation import replay as module
from equipoise.simulation.replay import Replay, replay, result

RANKS, NODES, BATCHES, TOKENS, TOP_K = 4, 2, 3, 12, 2
SLOTS = [[0, 1, 2, 3, 4, 5, 0, 2], [5, 4, 3, 3, 2, 1, 0, 5]]
MODEL = make_model(2, 6, TOP_K)
PLAN = make_plan(
    MODEL,
    SLOTS,
    RANKS,
    nodes=NODES,
)
IDS = [random_ids(np.random.default_rng(i), BATCHES, TOKENS, TOP_K, 6) for i in range(2)]


def test_figures_equal_those_of_loops():
    happened = replay(PLAN, IDS, "vllm", {}, 0)
    maps = layer_maps(PLAN)
    chosen = [choose("vllm", m, ids, np.random.default_rng(0)).instance_BTK for m, ids in zip(maps, IDS, strict=True)]
    other_rank = other_node = 0
    for b in range(BATCHES):
        for layer in range(2):
            ranks = maps[layer].rank_P[chosen[layer][b]]
            for r in range(RANKS):
                assert happened.tokens_LBR[layer, b, r] == (ranks == r).sum()
                slots = {int(s) for s in chosen[layer][b].ravel() if maps[layer].rank_P[s] == r}
                assert happened.activated_LBR[layer, b, r] == len(slots)
                assert happened.bytes_LBR[layer, b, r] == len(slots) * EXPERT_BYTES
            home = [t * RANKS // TOKENS for t in range(TOKENS)]
            assert happened.rank_sends_LB[layer, b] == sum(len(set(ranks[t]) - {home[t]}) for t in range(TOKENS))
            nodes = [{r // 2 for r in ranks[t]} - {home[t] // 2} for t in range(TOKENS)]
            assert happened.node_sends_LB[layer, b] == sum(map(len, nodes))
        first, second = (maps[i].rank_P[chosen[i][b]] for i in range(2))
        for t, i, j in itertools.product(range(TOKENS), range(TOP_K), range(TOP_K)):
            other_rank += first[t, i] != second[t, j]
            other_node += first[t, i] // 2 != second[t, j] // 2
    pairs = BATCHES * TOKENS * TOP_K**2
    assert happened.rank_hops == pytest.approx(other_rank / pairs)
    assert happened.node_hops == pytest.approx(other_node / pairs)


@pytest.mark.parametrize("rule", RULES.names())
def test_nothing_is_lost_under_any_rule(rule: str):
    happened = replay(PLAN, IDS, rule, {"least": 1, "gate": 0.0} if rule == "llep" else {}, 0)
    assert (happened.tokens_LBR.sum(2) == TOKENS * TOP_K).all()
    assert (happened.activated_LBR <= np.maximum(happened.tokens_LBR, 0)).all()
    for layer, ids in enumerate(IDS):
        for b in range(BATCHES):
            assert happened.activated_LBR[layer, b].sum() >= len(np.unique(ids[b]))
    if rule.startswith("metro"):
        assert [happened.activated_LBR[0, b].sum() for b in range(BATCHES)] == [len(np.unique(row)) for row in IDS[0]]


def test_goes_do_not_change_what_leaves_nothing_to_chance(monkeypatch: pytest.MonkeyPatch):
    whole = replay(PLAN, IDS, "vllm", {}, 0)
    monkeypatch.setattr(module, "CELLS", 1)
    parts = replay(PLAN, IDS, "vllm", {}, 0)
    for name in Replay.__dataclass_fields__:
        assert np.array_equal(getattr(whole, name), getattr(parts, name))


def summary(cost, *, link: float | None = None, rule: str = "even", model=MODEL, drawn: bool = False):
    plan = make_plan(model, SLOTS, RANKS, nodes=NODES)
    happened = replay(plan, IDS, rule, {"least": 1, "gate": 0.0} if rule == "llep" else {}, 0)
    return happened, result("p", plan, happened, TOKENS, cost, "in", drawn=drawn, link_gbs=link)


def test_summary_of_a_replay():
    happened, found = summary(PairCost())
    pairs = happened.tokens_LBR
    assert found.imbalance.mean == pytest.approx((pairs.max(2) / pairs.mean(2)).mean())
    assert found.balancedness == pytest.approx((pairs.mean(2) / pairs.max(2)).mean())
    assert found.step.mean == pytest.approx(pairs.max(2).sum(0).mean())
    assert found.waiting == pytest.approx(1 - pairs.mean(2).sum() / pairs.max(2).sum())
    assert found.ranks.tokens == pytest.approx(pairs.sum(0).mean(0))
    assert found.ranks.bytes == pytest.approx(np.array(found.ranks.activated) * EXPERT_BYTES)
    assert found.bytes_moved == pytest.approx(2 * happened.rank_sends_LB.sum(0).mean() * WIDTH * 2)
    assert sum(found.rank_profile) == pytest.approx(RANKS)
    assert found.uncovered == 0
    activated = summary(ActivatedCost())[1]
    assert activated.step.mean == pytest.approx(happened.activated_LBR.max(2).sum(0).mean())


def test_weights_sent_take_time_and_bytes():
    cost = PairCost(unit="ms")
    happened, free = summary(cost, rule="llep")
    assert happened.received_LBR.sum() > 0
    assert free.weights_moved == pytest.approx(happened.received_LBR.sum() / BATCHES)
    paid = summary(cost, rule="llep", link=1e-3)[1]  # 1 MB/s: a copy of 3 KiB takes 3 ms
    wait = happened.received_LBR * EXPERT_BYTES / 1e3
    assert paid.step.mean == pytest.approx((happened.tokens_LBR + wait).max(2).sum(0).mean())
    assert free.bytes_moved > 2 * happened.rank_sends_LB.sum(0).mean() * WIDTH * 2


def test_unknown_sizes_and_drawn_batches_leave_figures_out():
    found = summary(PairCost(), model=make_model(2, 6, TOP_K, sized=False), drawn=True)[1]
    assert found.max_bytes is None
    assert found.ranks.bytes is None
    assert found.bytes_moved is None
    assert found.rank_hops is None
    assert found.node_hops is None
