"""Placement by affinity: pair counts against brute force, the search against exact optima, held-out gains, plans."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from equipoise.artifacts import LayerFacts, ModelFacts, Profile, Source
from equipoise.errors import PlanError
from equipoise.planning.affinity.exact import by_layers, by_program
from equipoise.planning.affinity.exflow import exflow, frontier, place, rename_alike
from equipoise.planning.affinity.pairs import affinity, chance_crossings, count_pairs, crossings, load_ratio, splits, traffic
from equipoise.planning.affinity.resplit import resplit
from equipoise.planning.affinity.search import random, search, sweep
from equipoise.planning.affinity.task import Task, keep_apart, make_task
from equipoise.planning.ranks import rank_plan, slots_of

Ids = NDArray[np.int64]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "affinity.py"
    spec = importlib.util.spec_from_file_location("benchmark_affinity", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent))  # it imports its neighbours
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def trace(layers: int, experts: int, k: int, tokens: int, seed: int, skew: float = 1.0) -> Ids:
    """[L, T, K] experts of tokens of a few kinds, so that layers depend on each other and loads differ."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 4, tokens)
    taste = rng.normal(0, 1.5, (layers, 4, experts)) + skew * rng.normal(0, 1, (layers, 1, experts))
    return (taste[:, kind] + rng.gumbel(size=(layers, tokens, experts))).argsort(2)[:, :, -k:]


def small_task(layers: int, experts: int, ranks: int, k: int, seed: int, mu: float = 0.0, together: float = 0.0) -> Task:
    pairs = affinity(*count_pairs(trace(layers, experts, k, 120, seed), experts))
    return make_task(pairs, [np.arange(experts)] * layers, ranks, mu=mu, together=together)


def profile_of(ids: Ids, experts: int, *, pairs: bool = True, top_k: int | None = None) -> Profile:
    """A profile of a trace, half prefill and half decode."""
    layers, tokens, k = ids.shape
    transitions, coactivation = count_pairs(ids, experts)
    counts = np.stack(
        [np.stack([np.bincount(row.ravel(), minlength=experts) for row in part]) for part in np.array_split(ids, 2, 1)]
    )
    facts = tuple(
        LayerFacts(path=f"layers.{i}", model_layer=i, num_experts=experts, top_k=top_k or k, matrices=()) for i in range(layers)
    )
    return Profile(
        model=ModelFacts(name="toy", model_type="toy", dtype="bf16", fingerprint="f", layers=facts),
        source=Source(origin="test", scenarios=("all",)),
        counts=counts[None],
        gate_mass=counts.sum(0)[None].astype(np.float64),
        tokens=np.array([tokens]),
        windows=counts.sum(0)[None],
        window_scenario=np.array([0]),
        **({"transitions": transitions, "coactivation": coactivation} if pairs else {}),
    )


# Pair counts and what a placement makes of them


def test_pairs_are_counted_as_by_hand():
    ids = trace(3, 5, 2, 40, 0)
    ids[1, 7, 1] = -1  # a token that chose one expert only
    transitions, coactivation = count_pairs(ids, 5)
    for layer in range(3):
        for i, j in itertools.product(range(5), repeat=2):
            both = sum((i in row) and (j in row) for row in ids[layer].tolist())
            assert coactivation[layer, i, j] == both
            if layer < 2:
                here, there = ids[layer].tolist(), ids[layer + 1].tolist()
                assert transitions[layer, i, j] == sum((i in a) and (j in b) for a, b in zip(here, there, strict=True))


def test_shares_add_up_and_load_is_read_off_the_transitions():
    ids = trace(4, 6, 2, 200, 1)
    transitions, coactivation = count_pairs(ids, 6)
    pairs, own = affinity(transitions, coactivation), affinity(transitions, coactivation, np.einsum("lee->le", coactivation))
    for i in range(4):
        assert pairs.load[i] == pytest.approx(own.load[i])
        assert pairs.together[i].sum() == pytest.approx(1)
        assert not pairs.together[i].diagonal().any()
    assert all(p.sum() == pytest.approx(1) for p in pairs.across)


@pytest.mark.parametrize("k", [1, 3])
def test_counted_crossings_are_those_of_the_tokens(k):
    ids, rng = trace(4, 8, k, 150, 2), np.random.default_rng(0)
    pairs = affinity(*count_pairs(ids, 8))
    physical = [rng.permutation(8) for _ in range(4)]
    rank_LE = np.stack([np.argsort(row) // 2 for row in physical])
    rank = np.take_along_axis(rank_LE[:, None], ids.transpose(0, 2, 1).reshape(4, 1, -1), 2).reshape(4, k, -1)
    apart = (rank[:-1, :, None] != rank[1:, None, :]).mean((1, 2, 3))
    assert crossings(pairs, physical, 4) == pytest.approx(apart)
    assert crossings(pairs, physical, 2) == pytest.approx((rank[:-1, :, None] // 2 != rank[1:, None, :] // 2).mean((1, 2, 3)))
    met = traffic(ids, physical, 4, 2)
    assert met.crossings == pytest.approx(apart.mean())
    assert met.node_crossings == pytest.approx(crossings(pairs, physical, 2).mean())
    assert met.fan_out == pytest.approx(np.mean([len(set(column)) for row in rank for column in row.T.tolist()]))
    assert met.load_ratio == pytest.approx(load_ratio(pairs, physical, 4).mean())
    if k > 1:
        ways = [(a, b) for a, b in itertools.permutations(range(k), 2)]
        assert splits(pairs, physical, 4) == pytest.approx([np.mean([row[a] != row[b] for a, b in ways]) for row in rank])


def test_copies_split_evenly():
    ids = trace(3, 4, 1, 4000, 3)
    pairs = affinity(*count_pairs(ids, 4))
    physical = [np.array([0, 1, 2, 0, 3, 1])] * 3  # experts 0 and 1 on both of two ranks
    met = traffic(ids, physical, 2)
    assert load_ratio(pairs, physical, 2).mean() == pytest.approx(met.load_ratio, abs=0.02)
    whole = [np.array([0, 1, 2, 3, 3, 2])] * 3  # the same experts twice on a rank: one share
    assert crossings(pairs, whole, 2) == pytest.approx(crossings(pairs, [np.array([0, 1, 2, 3])] * 3, 2), abs=1)
    everywhere = [np.tile(np.arange(4), 2)] * 3
    assert crossings(pairs, everywhere, 2) == pytest.approx([0.5, 0.5])
    assert load_ratio(pairs, everywhere, 2) == pytest.approx([1, 1, 1])


def test_independent_routing_crosses_by_chance_alone():
    rng = np.random.default_rng(0)
    ids = rng.choice(6, (3, 60000, 1), p=[0.3, 0.3, 0.1, 0.1, 0.1, 0.1])
    pairs = affinity(*count_pairs(ids, 6))
    physical = [np.arange(6)] * 3
    assert crossings(pairs, physical, 3) == pytest.approx(chance_crossings(pairs, physical, 3), abs=0.01)
    assert chance_crossings(pairs, physical, 3) == pytest.approx(1 - (0.6**2 + 0.2**2 + 0.2**2), abs=0.01)


def test_a_layer_that_served_nothing_crosses_nothing():
    transitions = np.zeros((2, 4, 4), np.int64)
    transitions[0, 0, 1] = 5
    pairs = affinity(transitions)
    assert crossings(pairs, [np.arange(4)] * 3, 2).tolist() == [0.0, 0.0]
    found = place(pairs, ranks=2, mu=0.5)
    assert all(sorted(row.tolist()) == [0, 1, 2, 3] for row in found)
    assert load_ratio(pairs, found, 2)[2] == 1.0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: count_pairs(np.zeros((2, 3)), 4), "ids"),
        (lambda: count_pairs(np.full((2, 3, 1), 4), 4), "allowed are 0..3"),
        (lambda: count_pairs(np.full((2, 3, 1), -2), 4), "-1 for no expert"),
        (lambda: affinity(np.zeros((2, 3, 4))), "transitions"),
        (lambda: affinity(np.full((2, 4, 4), -1)), "negative"),
        (lambda: affinity(np.full((2, 4, 4), np.nan)), "non-finite"),
        (lambda: affinity(np.zeros((2, 4, 4)), np.zeros((2, 4, 4))), "coactivation"),
        (lambda: affinity(np.zeros((2, 4, 4)), None, np.zeros((3, 5))), "load"),
        (lambda: traffic(np.zeros((2, 0, 1), np.int64), [np.arange(4)] * 2, 2), "at least one token"),
        (lambda: traffic(np.full((1, 3, 1), 7), [np.arange(4)], 2), "no slot"),
    ],
)
def test_wrong_arrays_are_refused(call, says):
    with pytest.raises(PlanError, match=says):
        call()


# The search against exact optima


def all_placements(layers: int, experts: int, ranks: int) -> list[list[Ids]]:
    labels = sorted(set(itertools.permutations(np.repeat(np.arange(ranks), experts // ranks).tolist())))
    return [[np.array(row) for row in rows] for rows in itertools.product(labels, repeat=layers)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("mu", "together"), [(0.0, 0.0), (0.4, 1.0)])
def test_search_and_both_exact_methods_find_the_best_of_all(seed, mu, together):
    task = small_task(3, 4, 2, 2, seed, mu, together)
    least = min(task.cost(p) for p in all_placements(3, 4, 2))  # 216 placements
    assert by_layers(task).cost == pytest.approx(least)
    program = by_program(task, seconds=120)
    assert program.proven
    assert program.cost == pytest.approx(least)
    assert program.bound <= least + 1e-6
    assert task.cost(search(task, restarts=3, seed=0)[0]) == pytest.approx(least)


@pytest.mark.parametrize(("layers", "experts", "ranks", "k"), [(4, 6, 3, 1), (4, 6, 2, 2), (6, 8, 2, 3)])
def test_search_reaches_the_proven_optimum(layers, experts, ranks, k):
    for seed in range(4):
        task = small_task(layers, experts, ranks, k, seed, 0.3 * (seed % 2), float(k > 1))
        exact = by_layers(task)
        assert task.cost(search(task, restarts=6, seed=0)[0]) == pytest.approx(exact.cost, abs=1e-9)
        assert exact.cost == pytest.approx(exact.bound)


def test_program_agrees_with_layers_under_nodes_and_copies():
    pairs = affinity(*count_pairs(trace(3, 6, 2, 150, 5), 6))
    places = [np.array([0, 0, 1, 2, 3, 3, 4, 5])] * 3
    task = keep_apart(make_task(pairs, places, 4, mu=0.2, together=1.0), places, 1)
    task = Task(task.pairs, 4, [np.array([0, 1, 0, 1, 0, 1, 0, 1])] * 3, 2, task.mu, task.together)
    program, layers = by_program(task, seconds=120), by_layers(task)
    assert program.proven
    assert program.cost == pytest.approx(layers.cost)
    for rank in layers.placement:
        assert (rank // 2).tolist() == [0, 1] * 4
        assert len(set(zip(places[0].tolist(), rank.tolist(), strict=True))) == 8


def test_exact_over_layers_refuses_what_it_cannot_enumerate():
    with pytest.raises(PlanError, match="at most 4000"):
        by_layers(small_task(2, 12, 4, 1, 0))


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 4),
    st.sampled_from([(4, 2), (6, 3), (8, 4), (12, 2), (20, 2)]),
    st.integers(1, 3),
    st.integers(0, 99),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from([0.0, 1.0]),
)
def test_no_step_makes_a_placement_worse_or_invalid(layers, size, k, seed, mu, together):
    experts, ranks = size
    task = small_task(layers, experts, ranks, k, seed, mu, together)
    start = random(task, np.random.default_rng(seed))
    after = sweep(task, start)
    last = resplit(task, after)
    assert task.cost(last) <= task.cost(after) + 1e-9 <= task.cost(start) + 2e-9
    assert all((np.bincount(rank, minlength=ranks) == experts // ranks).all() for rank in (*after, *last))


# Held out


def test_planted_groups_are_recovered(bench):
    for seed, (stay, k) in enumerate([(0.8, 1), (0.5, 1), (0.8, 2)]):
        ids, group = bench.markov(8, 16, 4, stay, 4000, k, seed)
        fit, held = ids[:, :2000], ids[:, 2000:]
        found = traffic(held, place(affinity(*count_pairs(fit, 16)), ranks=4, mu=0.0), 4).crossings
        assert found <= 1.01 * traffic(held, bench.physical_of(group), 4).crossings
        assert found < 0.8 * traffic(held, [np.arange(16)] * 8, 4).crossings


@pytest.mark.parametrize(("experts", "ranks", "k"), [(8, 4, 1), (32, 8, 4)])
def test_no_gain_where_layers_are_independent(bench, experts, ranks, k):
    ids = bench.independent(6, experts, 16000, k, 0)
    found = place(affinity(*count_pairs(ids[:, :8000], experts)), ranks=ranks, mu=0.0, restarts=1)
    plain = traffic(ids[:, 8000:], [np.arange(experts)] * 6, ranks).crossings
    assert abs(1 - traffic(ids[:, 8000:], found, ranks).crossings / plain) < 0.02


def test_real_traces_held_out(bench, shared_data):
    traces = bench.load_traces(shared_data)
    if not traces:
        pytest.skip(f"no routing traces below {shared_data}")
    for name, gain in (("DeepSeek-V2-Lite", 0.04), ("gpt-oss-20b", 0.08)):
        data = traces[name]
        fit = next(bench.halves(data, 1))
        few = data["ids"][6:12, ::2]  # six layers and every second token, to be quick
        on, off = few[:, fit[::2]], few[:, ~fit[::2]]
        found = place(affinity(*count_pairs(on, data["experts"])), ranks=8, restarts=0)
        before, after = (traffic(off, p, 8) for p in ([np.arange(data["experts"])] * 6, found))
        assert after.crossings < (1 - gain) * before.crossings
        assert after.fan_out < before.fan_out
        assert after.load_ratio < before.load_ratio


# Copies, nodes, prices


def test_copies_go_to_heavy_experts_and_never_twice_to_a_rank():
    ids = trace(5, 12, 2, 800, 0, skew=2.0)
    pairs = affinity(*count_pairs(ids, 12))
    found = place(pairs, ranks=4, nodes=2, slots=[12, 16, 20, 24, 48], restarts=2)
    for load, row, size in zip(pairs.load, found, [12, 16, 20, 24, 48], strict=True):
        copies = np.bincount(row, minlength=12)
        assert len(row) == size
        assert copies.min() >= 1
        assert all(len(set(part)) == len(part) for part in row.reshape(4, -1).tolist())
        assert copies[load.argmax()] == copies.max()


def test_copies_lower_the_largest_load():
    pairs = affinity(*count_pairs(trace(4, 8, 2, 600, 4), 8), [[10, 6, 1, 1, 1, 1, 1, 1]] * 4)
    load = [load_ratio(pairs, place(pairs, ranks=4, slots=slots, mu=5.0, restarts=2), 4).mean() for slots in (8, 12, 16)]
    assert load[0] > load[1] > load[2] - 1e-9


def test_nodes_come_first():
    ids = trace(6, 16, 2, 1500, 0)
    pairs = affinity(*count_pairs(ids, 16))
    flat, two = (place(pairs, ranks=8, nodes=n, mu=0.0) for n in (1, 2))
    assert crossings(pairs, two, 2).sum() <= crossings(pairs, flat, 2).sum() + 1e-9
    assert crossings(pairs, two, 8).sum() < crossings(pairs, [np.arange(16)] * 6, 8).sum()


def test_frontier_trades_crossings_for_balance():
    pairs = affinity(*count_pairs(trace(5, 12, 2, 800, 6), 12))
    points = frontier(pairs, [5.0, 0.0, 0.3, 1.0], ranks=4, restarts=2)
    assert [p.mu for p in points] == [0.0, 0.3, 1.0, 5.0]
    locality = [len(pairs.across) * p.crossings + 5 * p.splits for p in points]
    assert locality == sorted(locality)
    assert [p.load_ratio for p in points] == sorted((p.load_ratio for p in points), reverse=True)
    assert points[0].load_ratio > points[-1].load_ratio
    for p in points:
        assert p.crossings == pytest.approx(crossings(pairs, p.physical, 4).mean())


def test_renaming_ranks_undoes_a_renaming():
    rng = np.random.default_rng(0)
    current = [rng.permutation(16) for _ in range(3)]
    order = np.array([6, 7, 5, 4, 1, 0, 2, 3])  # nodes exchanged, ranks within them too
    renamed = [row.reshape(8, 2)[order].reshape(-1) for row in current]
    back = rename_alike(renamed, current, [16] * 3, 8, 2)
    assert all((a == b).all() for a, b in zip(back, current, strict=True))


@pytest.mark.parametrize(
    "wrong",
    [{"mu": -1.0}, {"mu": float("nan")}, {"coactivation": -0.5}, {"restarts": -1}, {"nodes": 3}, {"slots": 10}, {"slots": 4},
     {"slots": 36}, {"slots": [8, 8]}],
)  # fmt: skip
def test_wrong_options_are_refused(wrong):
    pairs = affinity(*count_pairs(trace(3, 8, 2, 50, 0), 8))
    with pytest.raises(PlanError, match=next(iter(wrong))):
        place(pairs, ranks=4, **wrong)


# The method


def test_plan_of_a_profile():
    ids = trace(5, 12, 2, 900, 0)
    profile = profile_of(ids, 12)
    plan = exflow(profile, units=4, seed=0, nodes=2, restarts=2)
    physical = slots_of(plan)
    before, after = traffic(ids, [np.arange(12)] * 5, 4, 2), traffic(ids, physical, 4, 2)
    assert after.crossings < before.crossings
    assert after.node_crossings < before.node_crossings
    assert (plan.method, plan.exactness, plan.nodes) == ("exflow", "exact", 2)
    assert [row.in_sample for row in plan.predicted.layers] == pytest.approx(plan.lis(profile.load).tolist())
    assert all(row.in_sample >= row.lower_bound - 1e-9 and row.duplicates == 0 for row in plan.predicted.layers)
    assert "cross ranks" in plan.predicted.note
    assert plan == exflow(profile, units=4, seed=0, nodes=2, restarts=2)


def test_current_plan_keeps_its_names():
    profile = profile_of(trace(4, 8, 2, 700, 1), 8)
    first = exflow(profile, units=4, seed=0, restarts=2)
    order = np.array([2, 0, 3, 1])
    renamed = [np.array(layer.experts).reshape(4, 2)[order].reshape(-1) for layer in first.layers]
    current = rank_plan(profile, renamed, ranks=4, method="test", options={})
    again = exflow(profile, units=4, seed=0, restarts=2, current=current)
    assert sum(row.moved for row in again.predicted.layers) == 0


def test_phase_decides_whose_load_is_balanced():
    half = [trace(4, 8, 2, 600, seed, skew=2.0) for seed in (0, 1)]
    profile = profile_of(np.concatenate(half, 1), 8)
    for phase, index in (("prefill", 0), ("decode", 1)):
        plan = exflow(profile, units=4, seed=0, phase=phase, mu=20.0, restarts=2)
        here, there = (plan.lis(profile.counts[0, i]).mean() for i in (index, 1 - index))
        assert here < there


def test_layers_of_different_width():
    ids = trace(3, 8, 2, 400, 0)
    ids[1] = ids[1] % 4  # a narrower layer in the middle; a token may then choose one expert twice
    ids[1, :, 1] = np.where(ids[1, :, 0] == ids[1, :, 1], -1, ids[1, :, 1])
    transitions, coactivation = count_pairs(ids, 8)
    pairs = affinity(transitions, coactivation, None, [8, 4, 8])
    found = place(pairs, ranks=2)
    assert [len(row) for row in found] == [8, 4, 8]
    assert [sorted(row.tolist()) for row in found] == [list(range(n)) for n in (8, 4, 8)]


def test_profiles_without_pairs_are_refused():
    ids = trace(4, 8, 2, 200, 0)
    with pytest.raises(PlanError, match=r"no transitions.*robust"):
        exflow(profile_of(ids, 8, pairs=False), units=4, seed=0)
    whole = profile_of(ids, 8)
    fields = {
        name: getattr(whole, name)
        for name in ("model", "source", "counts", "gate_mass", "tokens", "windows", "window_scenario")
    }
    alone = Profile(**fields, transitions=whole.transitions.copy())
    with pytest.raises(PlanError, match="coactivation=0"):
        exflow(alone, units=4, seed=0)
    assert exflow(alone, units=4, seed=0, coactivation=0, restarts=1).predicted is not None
    with pytest.raises(PlanError, match="one MoE layer"):
        exflow(profile_of(ids[:1], 8), units=4, seed=0)
