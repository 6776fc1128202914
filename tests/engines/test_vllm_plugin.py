"""The plug-in's own logic, without vLLM; `make test-engines` runs it inside vLLM."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engines.test_vllm import EXPERTS, a_plan
from equipoise.engines import vllm_plugin
from equipoise.engines.vllm_policy import HISTORY, online_policy, plan_online, static_policy
from equipoise.errors import EquipoiseError, PlanError
from equipoise.planning.ranks import rank_load, slots_of


class Default:
    """The part of vLLM's default policy that ours build on."""

    @classmethod
    def rebalance_experts(cls, weight, num_replicas, num_groups, num_nodes, num_ranks, old_global_expert_indices=None):
        return torch.arange(num_replicas).remainder(weight.shape[1]).expand(len(weight), -1).clone()

    @classmethod
    def preserve_intragpu_slots(cls, phy2log, num_ranks, old_phy2log):
        return phy2log


def test_without_its_variables_it_does_not_even_look_at_vllm():
    code = (
        "import sys, os; os.environ.pop('EQUIPOISE_PLAN', None); os.environ.pop('EQUIPOISE_POLICY', None)\n"
        "from equipoise.engines.vllm_plugin import register; register()\n"
        "print([m for m in ('vllm', 'torch', 'scipy', 'equipoise.planning.methods') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_both_variables_contradict_each_other(monkeypatch):
    monkeypatch.setenv("EQUIPOISE_PLAN", "a")
    monkeypatch.setenv("EQUIPOISE_POLICY", "eplb")
    with pytest.raises(EquipoiseError, match="both set"):
        vllm_plugin.register()


def test_variables_reach_workers_that_ray_starts(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EQUIPOISE_PLAN", "a.plan.json")
    monkeypatch.setenv(vllm_plugin.RAY_PREFIXES, "MINE_")
    for _ in range(2):
        vllm_plugin._carry_to_ray()
        assert os.environ[vllm_plugin.RAY_PREFIXES] == "MINE_,EQUIPOISE_"
        assert os.environ["EQUIPOISE_PLAN"] == str(tmp_path / "a.plan.json")


def test_another_version_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("EQUIPOISE_POLICY", "eplb")
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.19.1"))
    with pytest.raises(EquipoiseError, match=r"tested with vLLM 0\.32\.x, this is 0\.19\.1"):
        vllm_plugin.register()


def test_another_interface_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("EQUIPOISE_POLICY", "eplb")
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.32.0"))
    with pytest.raises(EquipoiseError, match="not built as the Equipoise plug-in needs it"):
        vllm_plugin.register()


@pytest.mark.parametrize("slots", [16, 20])
def test_the_static_policy_returns_the_plan_whatever_the_load(slots):
    plan = a_plan(slots)
    policy = static_policy(plan, Default)
    for load in (torch.zeros(3, EXPERTS), torch.rand(3, EXPERTS)):
        answer = policy.rebalance_experts(load, slots, 1, 1, 4, None)
        assert answer.dtype == torch.int64
        assert np.array_equal(answer.numpy(), np.stack(slots_of(plan)))
    answer[:] = 0  # vLLM may write into it
    assert np.array_equal(policy.rebalance_experts(load, slots, 1, 1, 4).numpy(), np.stack(slots_of(plan)))


@pytest.mark.parametrize(
    ("layers", "experts", "slots", "ranks"), [(2, 16, 20, 4), (3, 15, 20, 4), (3, 16, 24, 4), (3, 16, 20, 2)]
)
def test_the_static_policy_refuses_another_model(layers, experts, slots, ranks):
    with pytest.raises(PlanError, match="the plan is for 3 MoE layers of 16 experts in 20 slots on 4 ranks"):
        static_policy(a_plan(20), Default).rebalance_experts(torch.ones(layers, experts), slots, 1, 1, ranks)


def test_the_online_policy_plans_from_its_history():
    policy = online_policy("eplb", Default)
    rng = np.random.default_rng(0)
    old = torch.arange(20).remainder(EXPERTS).expand(2, -1)
    assert torch.equal(policy.rebalance_experts(torch.zeros(2, EXPERTS), 20, 1, 1, 4, old), old)
    assert not policy.history
    for call in range(HISTORY + 3):
        load = torch.from_numpy(rng.gamma(0.4, 100, (2, EXPERTS)).astype(np.int32))
        answer = policy.rebalance_experts(load, 20, 1, 1, 4, old)
        assert answer.shape == (2, 20)
        assert answer.dtype == torch.int64
        assert all(len(set(row.tolist())) == EXPERTS for row in answer)
        assert len(policy.history[2, EXPERTS]) == min(call + 1, HISTORY)
        old = answer


def test_the_online_policy_keeps_what_is_good_and_improves_what_is_not():
    rng = np.random.default_rng(1)
    load = rng.gamma(0.4, 1000, (4, 3, EXPERTS)).astype(np.int64)
    default = np.arange(20) % EXPERTS
    current = np.stack([default] * 3)
    planned = plan_online("eplb", load, 20, 1, 1, 4, current)
    for layer in range(3):
        worst = [rank_load(p[layer], load[:, layer], 4).max(-1).sum() for p in (current, planned)]
        assert worst[1] <= worst[0]
    assert np.array_equal(plan_online("eplb", load, 20, 1, 1, 4, planned), planned)


def test_planning_online_is_the_same_on_every_call():
    load = np.random.default_rng(2).gamma(0.4, 1000, (3, 2, EXPERTS)).astype(np.int64)
    first, second = (plan_online("robust", load, 20, 1, 1, 4) for _ in range(2))
    assert np.array_equal(first, second)
    assert all(len(set(layer[r * 5 : r * 5 + 5])) == 5 for layer in first.tolist() for r in range(4))


@pytest.mark.parametrize("method", ["rq", "exflow"])
def test_methods_that_cannot_plan_from_loads_alone_are_refused_at_once(method):
    with pytest.raises(EquipoiseError, match=r"EQUIPOISE_POLICY|unknown"):
        online_policy(method, Default)


def configuration(**changes):
    parallel = {
        "enable_eplb": True, "enable_elastic_ep": False, "pipeline_parallel_size": 1, "tensor_parallel_size": 2,
        "prefill_context_parallel_size": 1, "data_parallel_size": 2, "eplb_config": SimpleNamespace(num_redundant_experts=4),
    }  # fmt: skip
    return SimpleNamespace(parallel_config=SimpleNamespace(**(parallel | changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"enable_eplb": False}, "--enable-expert-parallel --enable-eplb"),
        ({"enable_elastic_ep": True}, "elastic"),
        ({"pipeline_parallel_size": 2}, "pipeline"),
        ({"tensor_parallel_size": 4}, "is for 4 ranks, vLLM has 8"),
        ({"eplb_config": SimpleNamespace(num_redundant_experts=0)}, "has 4 redundant experts, vLLM is given 0"),
    ],
)
def test_a_configuration_under_which_the_plan_has_no_effect_is_refused(changes, message):
    vllm_plugin.check_configuration(configuration(), a_plan(20))
    with pytest.raises(EquipoiseError, match=message):
        vllm_plugin.check_configuration(configuration(**changes), a_plan(20))


def test_planning_online_needs_load_balancing_only():
    vllm_plugin.check_configuration(configuration(tensor_parallel_size=8, pipeline_parallel_size=2), None)
    with pytest.raises(EquipoiseError, match="EQUIPOISE_POLICY is set, but"):
        vllm_plugin.check_configuration(configuration(enable_eplb=False), None)
