"""`robust`: its covariances, its placements against EPLB, its cross-validation and its guard."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.artifacts import Profile, Source
from equipoise.errors import PlanError
from equipoise.metrics import balancedness
from equipoise.planning.eplb import eplb, eplb_placement
from equipoise.planning.placement_bound import placement_bound
from equipoise.planning.ranks import slots_of
from equipoise.planning.robust.method import robust
from equipoise.planning.robust.placement import rank_loads, robust_placement, without_duplicates
from equipoise.planning.robust.risk import covariance, risk, scaled_load, token_covariance
from planning.cases import make_facts


def topics(seed: int, scenarios: int, layers: int = 6, experts: int = 32, kinds: int = 8):
    """[S, L, E] counts in which groups of experts rise and fall together, scenario by scenario."""
    rng = np.random.default_rng(seed)
    kind = np.stack([rng.permutation(experts) % kinds for _ in range(layers)])
    base = rng.lognormal(0.0, 0.5, (layers, experts))
    heat = np.random.default_rng(seed + 1000).lognormal(0.0, 1.0, (scenarios, layers, kinds))
    return rng.poisson(500 * base * np.take_along_axis(heat, np.broadcast_to(kind, (scenarios, layers, experts)), 2))


def profile_of(load_SLE, windows=None, owner=None, groups: int = 1, phase: int = 0) -> Profile:
    s, n_layers, experts = load_SLE.shape
    counts = np.zeros((s, 2, n_layers, experts), np.int64)
    counts[:, phase] = load_SLE
    return Profile(
        model=make_facts([experts] * n_layers).model_copy(update={"expert_groups": groups}),
        source=Source(scenarios=tuple(f"s{i}" for i in range(s))),
        counts=counts,
        gate_mass=np.zeros(load_SLE.shape),
        tokens=load_SLE[:, 0].sum(1),
        windows=np.zeros((0, n_layers, experts), np.int64) if windows is None else windows,
        window_scenario=np.zeros(0, np.int64) if owner is None else owner,
    )


def no_duplicates(physical_LP, ranks: int) -> bool:
    return all(len(set(held)) == len(held) for layer in physical_LP for held in np.reshape(layer, (ranks, -1)).tolist())


def ratio(physical_LP, load_LE, ranks: int):
    load_LR = rank_loads(physical_LP, np.asarray(load_LE, float)[None], ranks)[0]
    return load_LR.max(1) / load_LR.mean(1)


def test_covariance_is_numpy_s():
    load = topics(0, 9)
    found = covariance(load)
    for layer in range(load.shape[1]):
        np.testing.assert_allclose(found[layer], np.cov(scaled_load(load)[:, layer].T, bias=True), atol=1e-4)


def test_covariance_of_tokens_from_pairs_is_that_of_tokens_as_windows():
    rng = np.random.default_rng(0)
    chosen = np.zeros((200, 1, 8), np.int64)
    for token in chosen[:, 0]:
        token[rng.choice(8, 3, replace=False, p=np.arange(1, 9) / 36)] = 1
    pairs = np.einsum("wle,wlf->lef", chosen, chosen)
    np.testing.assert_allclose(token_covariance(pairs), covariance(chosen), atol=1e-4)


def test_silent_layers_have_no_covariance():
    load = topics(0, 4)
    load[:, 2] = 0
    assert not covariance(load)[2].any()
    assert np.isfinite(risk(scaled_load(load.sum(0)), [(covariance(load), 0.5)])).all()
    assert not token_covariance(np.zeros((1, 4, 4)))[0].any()


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(16, 4, 16), (16, 4, 20), (8, 8, 16), (12, 4, 24), (8, 4, 32)]),
    skew=st.sampled_from([0.3, 1.0, 2.5]),
)
def test_never_worse_than_eplb_in_sample_and_no_duplicates(seed, shape, skew):
    experts, ranks, slots = shape
    load = np.random.default_rng(seed).lognormal(0.0, skew, (3, 2, experts)) * 1000
    physical = robust_placement(load, ranks=ranks, slots=slots)
    assert no_duplicates(physical, ranks)
    assert all(set(row) == set(range(experts)) for row in physical.tolist())
    theirs = eplb_placement(load.sum(0), slots, ranks)
    mine = ratio(physical, load.sum(0), ranks)
    # Two copies on one rank split an expert's tokens unevenly between ranks, which placements without duplicates cannot.
    even = np.array([no_duplicates(row[None], ranks) for row in theirs])
    allowed = ratio(theirs, load.sum(0), ranks)
    assert (mine <= np.where(even, 1.0, 1.06) * allowed + 1e-5).all()


def test_every_expert_on_every_rank():
    physical = robust_placement(np.arange(1.0, 9.0)[None, None], ranks=4, slots=32)
    assert sorted(physical[0].reshape(4, 8)[2].tolist()) == list(range(8))


def test_close_to_the_bound_where_slots_allow():
    load = topics(3, 8)
    physical = robust_placement(load, ranks=4, slots=40)
    bound = [placement_bound(row, 40, 4) for row in load.sum(0)]
    assert (ratio(physical, load.sum(0), 4) <= 1.01 * np.array(bound) + 1e-5).all()


def test_holds_on_scenarios_not_seen_better_than_eplb():
    load = topics(5, 48)
    profile, held = profile_of(load[:40]), load[40:]
    plans = robust(profile, units=8, seed=0), eplb(profile, units=8, seed=0)
    mine, theirs = (np.mean([balancedness(plan.unit_load(x)) for x in held]) for plan in plans)
    assert mine > theirs + 0.03
    told = 1 / np.mean([layer.out_of_sample for layer in plans[0].predicted.layers])
    assert told == pytest.approx(mine, abs=0.05), "cross-validation tells about what then happens"


def test_short_windows_tell_what_rises_together():
    load = topics(7, 60)
    alone = profile_of(load[:50].sum(0)[None])
    rich = profile_of(load[:50].sum(0)[None], load[:50], np.zeros(50, np.int64))
    mine, blind = (np.mean([balancedness(robust(p, units=8, seed=0).unit_load(x)) for x in load[50:]]) for p in (rich, alone))
    assert mine > blind + 0.02


def test_the_default_is_kept_where_nothing_is_gained():
    profile = profile_of(np.full((4, 2, 16), 100))
    plan = robust(profile, units=4, seed=0)
    assert plan.predicted.note.startswith("the engine's default placement is kept")
    assert [row.tolist() for row in slots_of(plan)] == [list(range(16))] * 2
    assert plan.options["emitted"] == "default"
    assert robust(profile, units=4, seed=0, guard=False).options["emitted"] != "default"


def test_says_when_nothing_can_be_held_out():
    plan = robust(profile_of(topics(0, 1)), units=4, seed=0)
    assert "not cross-validated" in plan.predicted.note
    assert plan.predicted.layers[0].out_of_sample is None


def test_same_input_and_seed_same_plan():
    profile = profile_of(topics(2, 6))
    assert robust(profile, units=4, seed=3, slots=36).layers == robust(profile, units=4, seed=3, slots=36).layers


def test_copies_go_to_different_nodes():
    load = topics(4, 6)
    physical = robust_placement(load, ranks=8, slots=40, nodes=2)
    assert no_duplicates(physical, 8)
    together = sum(len(half) - len(set(half)) for row in physical.reshape(-1, 2, 20).tolist() for half in row)
    one = robust_placement(load, ranks=8, slots=40)
    before = sum(len(half) - len(set(half)) for row in one.reshape(-1, 2, 20).tolist() for half in row)
    assert together < before


def test_expert_groups_stay_on_their_node():
    profile = profile_of(topics(6, 6), groups=4)
    plan = robust(profile, units=4, seed=0, slots=40, nodes=2, hierarchical=True)
    for row in slots_of(plan):
        first, second = ({expert // 8 for expert in half} for half in row.reshape(2, -1).tolist())
        assert not first & second
    theirs = eplb(profile, units=4, seed=0, slots=40, nodes=2)
    pairs = zip(plan.predicted.layers, theirs.predicted.layers, strict=True)
    assert all(mine.in_sample <= other.in_sample + 1e-5 for mine, other in pairs)
    with pytest.raises(PlanError, match="hierarchical"):
        robust(profile_of(topics(6, 6), groups=3), units=4, seed=0, nodes=2, hierarchical=True)


def test_slots_by_layer():
    plan = robust(profile_of(topics(6, 6, layers=3)), units=4, seed=0, slots=[32, 36, 32])
    assert [layer.num_slots for layer in plan.layers] == [32, 36, 32]


def test_moves_are_bounded_and_counted():
    first, then = profile_of(topics(8, 6)), profile_of(topics(8, 6)[:, :, ::-1])
    current = eplb(first, units=4, seed=0)
    plan = robust(then, units=4, seed=0, current=current, keep=4)
    assert max(layer.moved for layer in plan.predicted.layers) <= 4
    assert plan.predicted.lis < current.lis(then.load).mean()
    free = robust(then, units=4, seed=0, current=current)
    assert max(layer.moved for layer in free.predicted.layers) > 4


@pytest.mark.parametrize("wrong", [{"keep": 3}, {"keep": -1}, {"keep": 1.5}])
def test_refuses_a_bound_without_a_plan_in_force(wrong):
    with pytest.raises(PlanError, match="keep"):
        robust(profile_of(topics(0, 3)), units=4, seed=0, **wrong)


def test_decode_alone():
    prefill, decode = topics(1, 4), topics(2, 4)
    profile = profile_of(decode, phase=1)
    counts = profile.counts.copy()
    counts[:, 0] = prefill
    both = Profile(**{name: getattr(profile, name) for name in profile.__dataclass_fields__} | {"counts": counts})
    assert robust(both, units=4, seed=0, phase="decode").layers == robust(profile, units=4, seed=0, phase="decode").layers
    with pytest.raises(PlanError, match="nothing was recorded"):
        robust(profile, units=4, seed=0, phase="prefill")


def test_duplicates_are_swapped_away():
    physical = np.array([[0, 0, 1, 2, 3, 3], [0, 1, 2, 3, 0, 1]])
    apart = without_duplicates(physical, 3)
    assert no_duplicates(apart, 3)
    assert (np.sort(apart, 1) == np.sort(physical, 1)).all()
    assert (apart[1] == physical[1]).all()


@pytest.mark.parametrize(("ranks", "slots"), [(16, 256), (32, 288)])
def test_real_loads_of_deepseek_r1(shared_data: Path, ranks: int, slots: int):
    file = shared_data / "routing" / "dsr1_srt_slurm" / "logical_count.npz"
    if not file.is_file():
        pytest.skip(f"no recorded loads at {file}")
    with np.load(file) as data:
        load = np.stack([data[key][3::19] for key in sorted(data.files)])  # every 19th MoE layer
    physical = robust_placement(load, ranks=ranks, slots=slots)
    theirs = eplb_placement(load.sum(0), slots, ranks)
    assert no_duplicates(physical, ranks)
    assert (ratio(physical, load.sum(0), ranks) <= ratio(theirs, load.sum(0), ranks) + 1e-5).all()
    if slots > 256:
        bound = np.array([placement_bound(row, slots, ranks) for row in load.sum(0)])
        assert (ratio(physical, load.sum(0), ranks) <= 1.01 * bound + 1e-5).all()


def test_the_benchmark_runs_on_a_trace(shared_data: Path):
    if not (shared_data / "routing" / "dsv2lite_esft").is_dir():
        pytest.skip(f"no routing trace below {shared_data}")
    path = Path(__file__).parents[2] / "benchmarks" / "placement_out_of_sample.py"
    spec = importlib.util.spec_from_file_location("placement_out_of_sample", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    trace = module.deepseek(shared_data / "routing", 16)
    row = module.compare(trace, "task", 8, 1, (module.RICH,))
    assert row.robust[module.RICH] > row.eplb + 0.03
    assert row.robust[module.RICH] > row.contiguous
    assert row.worst_in_sample_against_eplb <= 1e-5
    assert row.duplicates == 0


def test_slack_is_checked_and_never_lets_eplb_be_better():
    profile = profile_of(topics(9, 6))
    theirs = eplb(profile, units=4, seed=0)
    plan = robust(profile, units=4, seed=0, slack=0.5)
    pairs = zip(plan.predicted.layers, theirs.predicted.layers, strict=True)
    assert all(mine.in_sample <= other.in_sample + 1e-5 for mine, other in pairs)
    with pytest.raises(PlanError, match="slack"):
        robust(profile, units=4, seed=0, slack=-1.0)


def test_groups_on_their_node_hold_only_so_many_copies():
    with pytest.raises(PlanError, match="at most 64"):
        robust(profile_of(topics(6, 3), groups=4), units=4, seed=0, slots=68, nodes=2, hierarchical=True)
