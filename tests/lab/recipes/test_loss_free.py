"""The bias follows the load of an optimizer step and touches the selection alone."""

from __future__ import annotations

import pytest
import torch

from equipoise.errors import EquipoiseError
from equipoise.lab.extensions import Step
from equipoise.lab.recipes.loss_free import LossFree, bias_step, selection_bias
from equipoise.lab.recipes.routers import routers
from equipoise.lab.training import train
from equipoise.metrics import maxvio
from equipoise.models.layers import find_moe_layers
from equipoise.models.recorder import record


def biases(model):
    return [selection_bias(router) for layer in find_moe_layers(model) for router in routers(layer)]


def test_the_rules_by_hand():
    """Algorithm 1 of arXiv:2408.15664: b_i += u * sign(e_i), e_i = mean - c_i; proportional in shares of the mean."""
    counts = torch.tensor([6, 2, 4, 0])
    assert bias_step(counts, 0.1, "sign").tolist() == pytest.approx([-0.1, 0.1, -0.1, 0.1])
    assert bias_step(counts, 0.1, "proportional").tolist() == pytest.approx([-0.1, 0.1 / 3, -0.1 / 3, 0.1])
    assert bias_step(torch.tensor([3, 3]), 0.1, "sign").tolist() == [0, 0]


@pytest.mark.parametrize("model_type", ["deepseek_v3", "ernie4_5_moe"])
def test_equal_selection_gives_bit_equal_output(model_type, tiny, ids):
    model = tiny(model_type).eval()
    with torch.no_grad():
        plain = model(ids).logits
        for bias in biases(model):
            bias += 0.25  # the same for all: nothing is selected otherwise
        assert torch.equal(model(ids).logits, plain)
        for bias in biases(model):
            bias[..., 0] += 10.0
        assert not torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "ernie4_5_moe"])
def test_the_passes_of_one_optimizer_step_are_counted_together(model_type, tiny, ids):
    model = tiny(model_type).train()
    extension = LossFree(0.01, "proportional")
    extension.attach(model)
    with record(model, transitions=False, coactivation=False) as recorder:
        for part in (ids[:1], ids[1:]):
            assert extension.loss(Step(0, model, None, model(part))) is None
    assert all((bias == 0).all() for bias in biases(model))
    extension.after_step(Step(0, model, None, None))
    for bias, counts_E in zip(biases(model), recorder.counts.sum((0, 1)), strict=True):
        expected = bias_step(torch.from_numpy(counts_E), 0.01, "proportional")
        torch.testing.assert_close(bias.flatten().double(), expected, atol=1e-9, rtol=1e-5)
    kept = [bias.clone() for bias in biases(model)]
    model.eval()
    with torch.no_grad():
        model(ids)
    extension.after_step(Step(1, model, None, None))  # nothing was trained on: 0 / 0 would be not a number
    assert all(torch.equal(old, new) for old, new in zip(kept, biases(model), strict=True))


def fixed_scores(rate, rule, steps=1500):
    """[steps] MaxVio of a router whose scores do not change, while its bias does."""
    generator = torch.Generator().manual_seed(0)
    scores_TE = (torch.randn(512, 8, generator=generator) + torch.linspace(-1, 1, 8)).sigmoid()
    bias_E, seen = torch.zeros(8), []
    for _ in range(steps):
        counts_E = torch.bincount((scores_TE + bias_E).topk(2).indices.flatten(), minlength=8)
        seen.append(float(maxvio(counts_E.numpy())))
        bias_E += bias_step(counts_E, rate, rule).float()
    return seen


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_it_levels_fixed_skewed_scores(rule):
    seen = fixed_scores(0.001, rule)
    assert seen[0] > 0.5
    assert max(seen[-100:]) < 0.1


def test_without_a_rate_nothing_is_levelled():
    assert fixed_scores(0.0, "sign", steps=20)[-1] == fixed_scores(0.0, "sign", steps=1)[0] > 0.5


def test_a_larger_rate_swings_wider():
    swings = [max(fixed_scores(rate, "sign", steps=2000)[-200:]) for rate in (0.001, 0.01, 0.1)]
    assert swings == sorted(swings)
    assert swings[2] > 3 * swings[0]


def test_a_router_without_such_a_bias_is_refused(tiny):
    with pytest.raises(EquipoiseError, match="deepseek_v3"):
        LossFree().attach(tiny("qwen3_moe"))
    with pytest.raises(EquipoiseError, match="proportional"):
        LossFree(rule="linear")


def test_a_stopped_run_goes_on_with_its_bias(make_recipe, lab_data, tmp_path):
    plain = make_recipe(steps=6)
    model = {**plain.model, "model_type": "ernie4_5_moe", "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 0,
             "moe_layer_start_index": 0}  # fmt: skip
    model.pop("num_experts"), model.pop("num_experts_per_tok")
    recipe = plain.model_copy(update={"model": model, "extensions": {"loss-free": {"rate": 0.05}}})
    whole = train(recipe, lab_data, tmp_path / "whole", progress=False)
    train(recipe, lab_data, tmp_path / "parts", until=3, progress=False)
    assert train(recipe, lab_data, tmp_path / "parts", progress=False) == whole
    name = "model/model.safetensors"
    assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
