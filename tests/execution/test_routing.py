"""Routing policies on models."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from equipoise.artifacts.routing import RoutingPolicy
from equipoise.errors import EquipoiseError, ModelError, PlanError
from equipoise.execution.apply import apply_plan
from equipoise.execution.checkpoint import load, save_balanced
from equipoise.execution.routing.attach import attach_policy, detach_policy, routed
from equipoise.execution.routing.fit import fit_policy
from equipoise.execution.routing.policies import make_policy
from equipoise.models.choice import ChoiceTap
from equipoise.models.layers import find_moe_layers, model_facts, observe
from equipoise.models.policy_marks import policy_id, policy_of
from equipoise.models.recorder import record
from execution.helpers import make_plan
from execution.routing_cases import ACTIVE, IDENTITY, Text, batch_for, fitted, output
from models.architectures import ARCHITECTURES, tiny

FAMILIES = [
    "mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "gemma4", "minimax_m2", "dbrx", "llama4", "jetmoe",
    "switch_transformers", "zaya", "longcat_flash", "deepseek_v4",
]  # fmt: skip
REFUSED = {
    "nllb_moe": "transformers computes its experts wrongly",
    "ernie4_5_vl_moe": "text and vision tokens are routed apart",
    "phimoe": "no router of PhimoeForCausalLM ranks its experts by scores",
}
"""Architectures that no policy can be put on, and why."""
NOT_DROPPED = {
    "dbrx": "no id for none",
    "jetmoe": "no id for none",
    "llama4": "no id for none",
    "openai_privacy_filter": "Class values must be smaller",
    "inkling": "by no rule known here",
    "kolibri1": "by no rule known here",
    "switch_transformers": "k_max = 1",
    "zaya": "k_max = 1",
}
"""Architectures whose tokens cannot be sent fewer experts, and why."""


def with_numbers(policy: RoutingPolicy, **numbers: object) -> RoutingPolicy:
    return policy.model_copy(update={"layers": tuple(layer.model_copy(update=numbers) for layer in policy.layers)})


@pytest.mark.parametrize("name", FAMILIES)
def test_what_changes_no_choice_changes_no_bit(name: str) -> None:
    model = tiny(name)
    batch = batch_for(model)
    before = output(model, batch)
    policy = fitted(model, "bias", {"strength": 0})
    constant = with_numbers(policy, bias=(0.25,) * find_moe_layers(model)[0].num_experts)
    changed = with_numbers(policy, bias=(0.0, 9.0) + (0.0,) * (find_moe_layers(model)[0].num_experts - 2))
    with routed(model, policy):
        assert torch.equal(output(model, batch), before)
    if name not in ("zaya", "longcat_flash"):  # a constant for experts alone is none beside their classes of no expert
        with routed(model, constant):
            assert torch.equal(output(model, batch), before)
    with routed(model, changed):
        assert not torch.equal(output(model, batch), before)
    assert torch.equal(output(model, batch), before)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("policy", IDENTITY)
def test_the_identity_setting_of_every_policy_is_the_model(name: str, policy: str) -> None:
    model = tiny(name)
    batch = batch_for(model)
    before = output(model, batch)
    with routed(model, fitted(model, policy, IDENTITY[policy])):
        assert torch.equal(output(model, batch), before)
    with routed(model, fitted(model, policy, ACTIVE[policy])):
        assert not torch.equal(output(model, batch), before)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, spec in ARCHITECTURES.items() if not spec.skip])
def test_every_architecture_takes_policies_or_says_why_not(name: str) -> None:
    model = tiny(name)
    batch = batch_for(model)
    before = output(model, batch)
    if name in REFUSED:
        with pytest.raises(ModelError, match=REFUSED[name]):
            fitted(model, "bias")
        return
    for policy in ("bias", "top_p"):
        if policy == "top_p" and name in NOT_DROPPED:
            with pytest.raises(EquipoiseError, match=NOT_DROPPED[name]):
                fitted(model, policy)
            continue
        with routed(model, fitted(model, policy)), record(model):
            after = output(model, batch)
            assert torch.isfinite(after).all()
            assert not torch.equal(after, before)
        with routed(model, fitted(model, policy, IDENTITY[policy])):
            assert torch.equal(output(model, batch), before)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe", "olmoe"])
def test_static_k_is_the_model_with_a_smaller_k(name: str) -> None:
    model = tiny(name)
    batch = batch_for(model)
    policy = fitted(model, "static_k", {"k": 1})
    with routed(model, policy):
        ours = output(model, batch)
    for layer in find_moe_layers(model):
        layer.ancestors[-1].get_submodule(layer.router_path.rpartition(".")[2]).top_k = 1  # type: ignore[union-attr]
    assert torch.equal(ours, output(model, batch))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gemma4", "deepseek_v3"])
def test_fewer_experts_weigh_what_the_model_would_give_them(name: str) -> None:
    """Dropping all but the first is what the model computes with top-1."""
    model = tiny(name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("per_expert_scale"):
                parameter.copy_(torch.linspace(0.5, 1.5, len(parameter)))
    batch = batch_for(model)
    with routed(model, fitted(model, "static_k", {"k": 1})):
        wanted = output(model, batch)
    policy = fitted(model, "top_p", {"p": 0.0})
    assert policy.layers[0].weights == ("raw" if name == "qwen3_moe" else "renormalised")
    assert policy.layers[0].mass == ("weights" if name in ("mixtral", "deepseek_v3") else "scores")
    with routed(model, policy):
        torch.testing.assert_close(output(model, batch), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_dropped_experts_are_left_out_by_transformers_kernels(implementation: str) -> None:
    model = tiny("mixtral")
    model.set_experts_implementation(implementation)
    batch = batch_for(model)
    with routed(model, fitted(model, "top_p", {"p": 0.0})):
        got = output(model, batch)
    model.set_experts_implementation("eager")
    with routed(model, fitted(model, "static_k", {"k": 1})):
        torch.testing.assert_close(got, output(model, batch), rtol=1e-4, atol=1e-5)


def test_weights_of_another_choice_are_the_models_own() -> None:
    """Sigmoid gates with a correction bias and a scale: the policy's bias is in no weight."""
    model = tiny("deepseek_v3")
    policy = with_numbers(fitted(model, "bias", {"strength": 0}), bias=(0.0, 3.0, 0.0, 0.0, 0.0, 0.0))
    layer = find_moe_layers(model)[0]
    router = layer.ancestors[-1].gate
    seen = []
    with routed(model, policy):
        handle = observe(layer, lambda hidden, experts, weights: seen.append((hidden, experts, weights)))
        output(model, batch_for(model))
        handle.remove()
    hidden, experts, weights = seen[0]
    scores = torch.sigmoid(hidden @ router.weight.T).gather(1, experts)
    torch.testing.assert_close(weights, scores / scores.sum(-1, keepdim=True) * router.routed_scaling_factor)
    assert float((experts == 1).any(-1).float().mean()) > 0.5


def test_mass_over_all_experts_may_take_more_than_top_k() -> None:
    model = tiny("mixtral")
    with torch.no_grad():
        for layer in find_moe_layers(model):
            layer.ancestors[-1].gate.weight.mul_(20)  # some tokens are clear, others are not
    policy = fitted(model, "top_p", {"mass": "full", "mean_k": 3.0, "k_max": 5})
    assert policy.mean_k == pytest.approx(3.0, abs=0.2)
    with routed(model, policy), record(model, trace=True) as recorder:
        output(model, batch_for(model))
    (trace,) = recorder.trace.values()
    assert trace.experts_LTK.shape[2] == 5
    assert 1 <= int((trace.experts_LTK >= 0).sum(-1).min()) < 3 < int((trace.experts_LTK >= 0).sum(-1).max())
    np.testing.assert_allclose(trace.weights_LTK.sum(-1), 1, rtol=1e-5)


def test_a_token_does_not_feel_its_batch_unless_the_policy_says_so() -> None:
    model = tiny("qwen3_moe")
    pair = batch_for(model, (24, 17), "left")
    alone = {key: value[1:, -17:] for key, value in pair.items()}
    for name in ACTIVE:
        with routed(model, fitted(model, name)):
            difference = float((output(model, pair)[1, -17:] - output(model, alone)[0]).abs().max())
        assert (difference > 1e-4) == make_policy(name).batch_dependent, name


def test_a_fit_counts_no_padding() -> None:
    model = tiny("qwen3_moe")
    rows = [batch_for(model, (24,)), batch_for(model, (17,))]
    for name in ("bias", "top_p"):
        together = fit_policy(model, name, [Text(batch_for(model, (24, 17), "left"))], ACTIVE[name], sweeps=1)
        assert together.tokens == 41
    separate = fit_policy(model, "top_p", [Text(rows[0])], ACTIVE["top_p"], sweeps=1)
    padded = fit_policy(model, "top_p", [Text(batch_for(model, (24, 1)))], ACTIVE["top_p"], sweeps=1)
    assert abs(separate.layers[0].threshold - padded.layers[0].threshold) < 0.05  # type: ignore[operator]


def test_the_recorder_counts_what_is_sent() -> None:
    model = tiny("mixtral")
    policy = fitted(model, "top_p")
    with routed(model, policy), record(model) as recorder:
        output(model, batch_for(model))
    mean = recorder.counts.sum() / recorder.tokens_by_layer.sum()
    assert mean == pytest.approx(policy.mean_k)
    assert mean == pytest.approx(1.5, abs=0.05)
    assert recorder.unrouted.sum() == 2 * recorder.tokens_by_layer.sum() - recorder.counts.sum()


def test_the_control_sends_as_many_experts() -> None:
    model = tiny("mixtral")
    batch = batch_for(model, (120, 110))
    kept = {}
    for name in ("top_p", "random_k"):
        with routed(model, fit_policy(model, name, [Text(batch)], ACTIVE[name])), record(model) as recorder:
            output(model, batch)
        kept[name] = recorder.counts.sum() / recorder.tokens_by_layer.sum()
    assert kept["random_k"] == pytest.approx(kept["top_p"], abs=0.12)


def test_a_copy_of_a_model_has_its_own_policy() -> None:
    model = tiny("mixtral")
    batch = batch_for(model)
    before = output(model, batch)
    attach_policy(model, fitted(model, "top_p"))
    after = output(model, batch)
    twin = copy.deepcopy(model)
    detach_policy(model)
    assert torch.equal(output(model, batch), before)
    assert torch.equal(output(twin, batch), after)
    detach_policy(twin)
    assert torch.equal(output(twin, batch), before)


def test_one_policy_at_a_time_and_only_on_its_model() -> None:
    model = tiny("mixtral")
    policy = attach_policy(model, fitted(model, "bias"))
    with pytest.raises(EquipoiseError, match="under a routing policy already"):
        attach_policy(model, policy_of(policy))  # type: ignore[arg-type]
    with pytest.raises(EquipoiseError, match="under a routing policy already"):
        fitted(model, "bias")
    mine = policy_of(model)
    assert mine is not None
    with pytest.raises(PlanError, match="fitted for"):
        attach_policy(tiny("mixtral", seed=1), mine)


def test_an_error_inside_a_router_leaves_torch_as_it_was() -> None:
    model = tiny("mixtral")

    def broken(choice: object) -> None:
        raise ValueError("broken")

    tap = ChoiceTap(find_moe_layers(model)[0], broken)
    with pytest.raises(ValueError, match="broken"):
        output(model, batch_for(model))
    assert not torch.overrides._get_current_function_mode_stack()
    tap.remove()
    output(model, batch_for(model))


@pytest.mark.parametrize(
    ("name", "policy", "options", "message"),
    [
        ("dbrx", "top_p", {"mean_k": 1.5}, "no id for none"),
        ("jetmoe", "static_k", {"k": 1}, "counts on its top-2"),
        ("inkling", "top_p", {"mean_k": 1.5}, "by no rule known here"),
        ("inkling", "static_k", {"k": 1}, "counts on top-2"),
        ("zaya", "laser_style", {}, "ranks 7 classes, of which 6 are experts"),
        ("phimoe", "bias", {}, "ranks its experts by scores"),
        ("nllb_moe", "bias", {}, "computes its experts wrongly"),
        ("mixtral", "top_p", {"mean_k": 3}, "mean_k: 3 given"),
        ("mixtral", "static_k", {"k": 9}, "at most the 6 experts"),
    ],
)
def test_what_cannot_be_done_is_refused_when_it_is_fitted(name: str, policy: str, options: dict, message: str) -> None:  # type: ignore[type-arg]
    model = tiny(name)
    before = output(model, batch_for(model))
    with pytest.raises(EquipoiseError, match=message):
        fitted(model, policy, options)
    assert torch.equal(output(model, batch_for(model)), before)  # and the model is left as it was


@pytest.mark.parametrize("policy", ["bias", "laser_style"])
def test_a_balanced_model_keeps_its_policy(policy: str, tmp_path: Path) -> None:
    model = tiny("qwen3_moe")
    batch = batch_for(model)
    facts = model_facts(model, "tiny")
    attach_policy(model, fitted(model, policy))
    plan = make_plan(facts).model_copy(update={"routing_policy": policy_id(model), "exactness": "routing"})
    apply_plan(model, plan)
    save_balanced(model, None, tmp_path / "model")
    again = load(tmp_path / "model")
    torch.testing.assert_close(output(again, batch), output(model, batch), rtol=1e-5, atol=1e-6)
    again.save_pretrained(tmp_path / "again")
    assert policy_id(load(tmp_path / "again")) == policy_id(model)


@pytest.mark.parametrize("policy", ["top_p"])
def test_a_balanced_model_keeps_its_policy_in_a_fresh_process(policy: str, tmp_path: Path) -> None:
    model = tiny("qwen3_moe")
    batch = batch_for(model)
    facts = model_facts(model, "tiny")
    attach_policy(model, fitted(model, policy))
    plan = make_plan(facts, precisions=("fp32", "int8")).model_copy(
        update={"routing_policy": policy_id(model), "exactness": "routing"}
    )
    apply_plan(model, plan)
    wanted = output(model, batch)
    save_balanced(model, None, tmp_path / "model")
    torch.save({"wanted": wanted, "batch": batch}, tmp_path / "case.pt")
    code = """
        import sys, torch, equipoise
        from pathlib import Path
        from transformers import AutoModelForCausalLM
        here = Path(sys.argv[1])
        case = torch.load(here / "case.pt", weights_only=True)
        model = AutoModelForCausalLM.from_pretrained(here / "model")
        with torch.no_grad():
            torch.testing.assert_close(model(**case["batch"]).logits, case["wanted"], rtol=1e-5, atol=1e-6)
        from equipoise.models.policy_marks import policy_id
        print(policy_id(model))
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == policy_id(model)
    again = load(tmp_path / "model")
    detach_policy(again)
    assert not torch.allclose(output(again, batch), wanted, atol=1e-4)  # the policy was what made the difference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropped_experts_are_left_out_of_slots(dtype: torch.dtype) -> None:
    model = tiny("mixtral", dtype=dtype)
    batch = batch_for(model)
    facts = model_facts(model, "tiny")
    attach_policy(model, fitted(model, "top_p"))
    wanted = output(model, batch)
    plan = make_plan(facts).model_copy(update={"routing_policy": policy_id(model), "exactness": "routing"})
    apply_plan(model, plan)
    loose = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(output(model, batch), wanted, **loose)


def test_plans_of_another_policy_are_refused() -> None:
    model = tiny("mixtral")
    plan = make_plan(model_facts(model, "tiny"))
    policy = fitted(model, "bias")
    attach_policy(model, policy)
    with pytest.raises(PlanError, match=r"profile --policy"):
        apply_plan(model, plan)
    detach_policy(model)
    other = plan.model_copy(update={"routing_policy": policy.id, "exactness": "routing"})
    with pytest.raises(PlanError, match=r"\(--policy\)"):
        apply_plan(model, other)


def teardown_module() -> None:
    assert not torch.overrides._get_current_function_mode_stack(), "a mode was left behind"
    assert isinstance(tiny("mixtral"), PreTrainedModel)
