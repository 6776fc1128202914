"""A real vLLM engine and its worker on CPU: the plug-in loads in both, and recorded routing is what our recorder sees."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from equipoise.artifacts import LayerFacts, ModelFacts, Profile, Source
from equipoise.engines import read_records
from equipoise.planning.methods import make_plan

pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    return tmp_path_factory.mktemp("routed")


@pytest.fixture(scope="module")
def generated(run, tiny_moe, routed):
    """One generation without plan or policy."""
    return run("vllm_generate.py", tiny_moe, routed / "plain.npz")


@pytest.fixture(scope="module")
def plan():
    """For the probe's model: 3 layers of 8 experts, 10 slots, 2 ranks."""
    counts = np.random.default_rng(1).integers(1, 1000, (1, 2, 3, 8))
    facts = tuple(LayerFacts(path=f"l{i}", model_layer=i, num_experts=8, top_k=2, matrices=()) for i in range(3))
    profile = Profile(
        model=ModelFacts(name="tiny", model_type="olmoe", dtype="fp32", fingerprint="f", layers=facts),
        source=Source(scenarios=("a",)),
        counts=counts,
        gate_mass=np.zeros((1, 3, 8)),
        tokens=np.array([1]),
        windows=np.zeros((0, 3, 8), np.int64),
        window_scenario=np.zeros(0, np.int64),
    )
    return make_plan(profile, "eplb", units=2, slots=10)


def recorded_here(model, sequences, prompts):
    """Our recorder on the same tokens: each request's prompt in one forward call, then one token at a time."""
    from transformers import AutoModelForCausalLM

    from equipoise.models.recorder import record

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with record(network, scenarios=("a",), transitions=True, coactivation=True) as recorder, torch.no_grad():
        for sequence, prompt in zip(sequences, prompts, strict=True):
            tokens = torch.tensor([sequence])
            past = network(input_ids=tokens[:, :prompt], use_cache=True).past_key_values
            for position in range(prompt, len(sequence) - 1):  # the last token was never run
                past = network(
                    input_ids=tokens[:, position : position + 1], past_key_values=past, use_cache=True
                ).past_key_values
    return recorder


@pytest.mark.parametrize("form", ["outputs", "responses"])
def test_routing_of_a_real_generation_equals_our_recorder(generated, tiny_moe, routed, form, tmp_path):
    recorder = recorded_here(tiny_moe, generated["sequences"], generated["prompts"])
    assert generated["cached"] == [0, 0, 0]
    path = routed / "plain.npz"
    if form == "responses":
        path = tmp_path / "responses.jsonl"
        path.write_text("".join(json.dumps(response) + "\n" for response in generated["responses"]))
    profile = read_records("vllm", [path], config=tiny_moe / "config.json")
    assert np.array_equal(profile.counts, recorder.counts)
    assert np.array_equal(profile.tokens, recorder.tokens)
    assert np.array_equal(profile.transitions, recorder.transitions)
    assert np.array_equal(profile.coactivation, recorder.coactivation)
    assert profile.counts[0, 1].sum() == 3 * 11 * 2 * 3  # 3 requests, 11 tokens run in decode, top-2, 3 layers


def test_without_variables_nothing_is_changed(generated):
    (worker,) = generated["workers"]
    assert worker["policy"] == "DefaultEplbPolicy"
    assert worker["pid"] != generated["pid"]
    assert "Equipoise" not in generated["log"]


def test_the_plan_is_in_place_in_engine_and_worker(run, generated, plan, tiny_moe, routed, tmp_path):
    plan.save(tmp_path / "a.plan.json")
    found = run("vllm_generate.py", tiny_moe, routed / "plan.npz", tmp_path / "a.plan.json")
    (worker,) = found["workers"]
    assert worker["policy"].endswith("EquipoisePlan")
    assert worker["abstract"]
    assert (worker["device"], worker["dtype"]) == ("cpu", "torch.int64")
    assert worker["answer"] == [list(layer.experts) for layer in plan.layers]
    said = [line for line in found["log"].splitlines() if "Equipoise: vLLM's expert load balancer uses plan" in line]
    assert any("EngineCore" in line for line in said), said
    assert any("Worker" in line for line in said), said
    assert found["sequences"] == generated["sequences"]


def test_a_plan_without_load_balancing_is_refused_before_the_engine_starts(run, plan, tiny_moe, tmp_path):
    plan.save(tmp_path / "a.plan.json")
    log = run("vllm_start.py", tiny_moe, "{}", ok=False, EQUIPOISE_PLAN=str(tmp_path / "a.plan.json"))
    assert "EQUIPOISE_PLAN is set, but vLLM's expert load balancing is off" in log
    assert "--enable-expert-parallel --enable-eplb --eplb-config" in log


def test_vllm_itself_refuses_load_balancing_on_cpu(run, plan, tiny_moe, tmp_path):
    """Why the rest is tested on ranks made by hand; when this fails, test the whole server."""
    plan.save(tmp_path / "a.plan.json")
    arguments = {"enable_expert_parallel": True, "enable_eplb": True, "tensor_parallel_size": 2}
    log = run("vllm_start.py", tiny_moe, json.dumps(arguments), ok=False, EQUIPOISE_PLAN=str(tmp_path / "a.plan.json"))
    assert "only supported on" in log


def test_a_missing_plan_ends_vllm(run, tiny_moe):
    log = run("vllm_start.py", tiny_moe, "{}", ok=False, EQUIPOISE_PLAN="/nowhere/a.plan.json")
    assert "cannot read plan '/nowhere/a.plan.json'" in log


def test_a_permuted_checkpoint_generates_the_same_tokens_in_vllm(run, generated, tiny_moe, routed, tmp_path):
    from equipoise.engines.permuted import ORDER_FILE, write_permuted

    profile = read_records("vllm", [routed / "plain.npz"], config=tiny_moe / "config.json")
    write_permuted(make_plan(profile, "eplb", units=2, slots=8), tmp_path / "permuted", model=tiny_moe)
    found = run("vllm_generate.py", tmp_path / "permuted", routed / "permuted.npz")
    assert found["sequences"] == generated["sequences"]
    order = json.loads((tmp_path / "permuted" / ORDER_FILE).read_text())["experts_at_place"]
    assert any(row != sorted(row) for row in order.values())
    again = read_records("vllm", [routed / "permuted.npz"], config=tiny_moe / "config.json")
    for before, after, row in zip(profile.load, again.load, order.values(), strict=True):
        assert np.array_equal(before[row], after)
