"""Against vLLM's own load balancer: equal plans, and our policies in its place on two ranks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from engines.test_vllm import a_plan
from equipoise.artifacts import LayerFacts, ModelFacts, Profile, Source
from equipoise.engines.vllm_policy import online_policy
from equipoise.planning.eplb import eplb_placement
from equipoise.planning.methods import make_plan

pytestmark = pytest.mark.engines

LAYERS, EXPERTS, REDUNDANT, RANKS = 2, 6, 2, 2
"""As in vllm_ranks.py."""


@pytest.fixture(scope="module")
def default_policy():
    from vllm.distributed.eplb.policy import DefaultEplbPolicy

    return DefaultEplbPolicy


def cases(number: int):
    rng = np.random.default_rng(7)
    for _ in range(number):
        nodes = int(rng.choice([1, 1, 2, 4]))
        ranks = nodes * int(rng.choice([1, 2, 4, 8]))
        groups = int(rng.choice([1, 2, 4, 8]))
        experts = groups * int(rng.choice([1, 2, 4, 8, 16]))
        if groups % nodes == 0 and experts % nodes:
            continue
        per_rank = -(-experts // ranks) + int(rng.integers(0, 3))
        layers = int(rng.integers(1, 5))
        load = rng.permutation(
            rng.gamma(0.3, 1e4, layers * experts * 3).astype(np.int64) * 1000 + np.arange(layers * experts * 3)
        )
        yield load[: layers * experts].reshape(layers, experts), per_rank * ranks, ranks, nodes, groups


def test_eplb_equals_vllms_default_policy_on_random_cases(default_policy):
    tried = 0
    for load, slots, ranks, nodes, groups in cases(600):
        theirs = default_policy.rebalance_experts(torch.from_numpy(load), slots, groups, nodes, ranks).numpy()
        assert np.array_equal(eplb_placement(load, slots, ranks, nodes, groups), theirs), (
            load.shape,
            slots,
            ranks,
            nodes,
            groups,
        )
        tried += 1
    assert tried > 400


def test_eplb_equals_vllms_default_policy_at_deepseek_size(default_policy):
    """Where two loads are equal, vLLM's order is that of an unstable sort; ours is the lower id first."""
    load = np.random.default_rng(0).gamma(0.5, 1e5, (58, 256)).astype(np.float32)
    for nodes in (1, 4):
        theirs = default_policy.rebalance_experts(torch.from_numpy(load), 288, 8, nodes, 32).numpy()
        assert np.array_equal(eplb_placement(load, 288, 32, nodes, 8), theirs)


@pytest.fixture(scope="module")
def plan():
    counts = np.random.default_rng(0).integers(1, 1000, (1, 2, LAYERS, EXPERTS))
    facts = tuple(LayerFacts(path=f"l{i}", model_layer=i, num_experts=EXPERTS, top_k=2, matrices=()) for i in range(LAYERS))
    profile = Profile(
        model=ModelFacts(name="tiny", model_type="x", dtype="bf16", fingerprint="f", layers=facts),
        source=Source(scenarios=("a",)),
        counts=counts,
        gate_mass=np.zeros((1, LAYERS, EXPERTS)),
        tokens=np.array([1]),
        windows=np.zeros((0, LAYERS, EXPERTS), np.int64),
        window_scenario=np.zeros(0, np.int64),
    )
    return make_plan(profile, "eplb", units=RANKS, slots=EXPERTS + REDUNDANT)


def check_weights(ranks) -> None:
    """Each rank holds exactly the experts that the map says, in every round."""
    per_rank = (EXPERTS + REDUNDANT) // RANKS
    for number, found in enumerate(ranks):
        assert found["maps"] == ranks[0]["maps"]
        for maps, weights, counts in zip(found["maps"], found["weights"], found["counts"], strict=True):
            for layer in range(LAYERS):
                mine = maps[layer][number * per_rank : (number + 1) * per_rank]
                assert weights[layer] == [100.0 * layer + expert for expert in mine]
                assert counts[layer] == np.bincount(maps[layer], minlength=EXPERTS).tolist()


def test_a_static_plan_is_in_force_after_the_first_step_on_two_ranks(run, plan, tmp_path):
    plan.save(tmp_path / "a.plan.json")
    ranks = run("vllm_ranks.py", 6, EQUIPOISE_PLAN=str(tmp_path / "a.plan.json"), VLLM_USE_V2_MODEL_RUNNER="0")["ranks"]
    assert all("EquipoisePlan" in found["policy"] for found in ranks)
    assert all(maps == [list(layer.experts) for layer in plan.layers] for maps in ranks[0]["maps"])
    check_weights(ranks)


@pytest.mark.parametrize("method", ["robust", "eplb"])
def test_online_planning_gives_both_ranks_one_placement(run, method):
    ranks = run("vllm_ranks.py", 9, EQUIPOISE_POLICY=method, VLLM_USE_V2_MODEL_RUNNER="0")["ranks"]
    assert all("EquipoiseOnline" in found["policy"] for found in ranks)
    default = [i % EXPERTS for i in range(EXPERTS + REDUNDANT)]
    assert any(maps != [default] * LAYERS for maps in ranks[0]["maps"])
    check_weights(ranks)


def test_without_its_variables_vllm_balances_as_ever(run):
    ranks = run("vllm_ranks.py", 5, VLLM_USE_V2_MODEL_RUNNER="0")["ranks"]
    assert all(found["policy"] == "DefaultEplbPolicy" for found in ranks)
    check_weights(ranks)


def test_a_plan_for_another_model_ends_vllm_with_its_reason(run, tmp_path):
    a_plan(20).save(tmp_path / "other.plan.json")
    log = run("vllm_ranks.py", 1, ok=False, EQUIPOISE_PLAN=str(tmp_path / "other.plan.json"), VLLM_USE_V2_MODEL_RUNNER="0")
    assert (
        "the plan is for 3 MoE layers of 16 experts in 20 slots on 4 ranks, vLLM balances 'tiny' with 2 of 6 in 8 on 2" in log
    )


@pytest.mark.parametrize("method", ["robust", "eplb"])
def test_policies_pass_vllms_own_map_code(default_policy, method):
    """The answers go through vLLM's `compute_logical_maps` and commit, which check shapes."""
    from vllm.distributed.eplb.eplb_state import compute_logical_maps

    rng = np.random.default_rng(3)
    policy = online_policy(method, default_policy)
    old = torch.arange(20).remainder(16).expand(4, -1).contiguous()
    for _ in range(3):
        answer = policy.rebalance_experts(torch.from_numpy(rng.gamma(0.5, 1e3, (4, 16)).astype(np.int32)), 20, 1, 1, 4, old)
        logical, count = compute_logical_maps(answer, 16)
        assert int(count.sum()) == 4 * 20
        assert int(count.min()) >= 1
        assert torch.equal(logical[:, :, 0] >= 0, torch.ones(4, 16, dtype=torch.bool))
        old = answer


def test_mapping_files_pass_the_rules_that_vllms_proposal_tests(plan, tmp_path):
    """The proposal's parser is in no release; what its tests demand of a record is demanded here."""
    from equipoise.engines import write_plan

    write_plan(plan, "vllm", tmp_path / "m.jsonl")
    lines = (tmp_path / "m.jsonl").read_text().splitlines()
    record = json.loads(lines[0])
    assert len(lines) == 1
    assert (record["record_type"], record["version"]) == ("eplb_initial_mapping", 1)
    assert (record["num_redundant_experts"], record["num_slots"]) == (REDUNDANT, EXPERTS + REDUNDANT)
    assert list(record["initial_global_assignments"].items()) == [(str(i), list(p.experts)) for i, p in enumerate(plan.layers)]
