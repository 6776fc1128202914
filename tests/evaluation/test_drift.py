"""Drift: none between equal models, all of it between strangers, and routers that are exchanged and put back."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from equipoise.errors import ModelError
from equipoise.evaluation.drift import crossed_loss, overlap, routing_drift, swapped_routers
from equipoise.metrics import jensen_shannon
from equipoise.models.recorder import record
from equipoise.profiling.sequences import Batch
from recipes_support import tiny_recipe_model

IDS = np.random.default_rng(0).integers(2, 48, (3, 12))
PROBE = [Batch("x", IDS, np.ones_like(IDS), np.hstack([IDS[:, 1:], np.full((3, 1), -100)]))]


@pytest.fixture
def models():
    before = tiny_recipe_model("qwen3_moe").eval()
    after = copy.deepcopy(before)
    with torch.no_grad():
        for layer in after.model.layers:
            layer.mlp.gate.weight += 0.1 * torch.randn(layer.mlp.gate.weight.shape, generator=torch.Generator().manual_seed(5))
            layer.mlp.experts.down_proj *= 1.3
    return before, after


def test_overlap_by_hand():
    before, after = np.array([[0, 1], [2, 3], [4, -1]]), np.array([[1, 0], [2, 5], [-1, 4]])
    assert overlap(before, after) == 4 / 5
    assert overlap(before, before) == 1
    assert overlap(before, before + 8 * (before >= 0)) == 0
    # Of a chain of two events, an expert chosen in the other event is not the same selection.
    assert overlap(np.array([[0, 1]]), np.array([[1, 0]]), events=2) == 0


def test_a_model_does_not_drift_from_itself(models):
    found = routing_drift(models[0], copy.deepcopy(models[0]), PROBE)
    assert found.overlap_L.tolist() == [1, 1]
    assert found.divergence_L.tolist() == [0, 0]


def test_drift_by_brute_force(models):
    found = routing_drift(*models, PROBE)
    traces, loads = [], []
    for model in models:
        with torch.no_grad(), record(model, trace=True) as recorder:
            model(torch.from_numpy(IDS))
        traces.append(recorder.trace["decoder"].experts_LTK)
        loads.append(recorder.counts.sum((0, 1)))
    for layer in range(2):
        shared = [len({*old} & {*new}) for old, new in zip(*(trace[layer].tolist() for trace in traces), strict=True)]
        assert found.overlap_L[layer] == pytest.approx(sum(shared) / (2 * 36))
        assert found.divergence_L[layer] == pytest.approx(float(jensen_shannon(loads[0][layer], loads[1][layer])))
    assert (found.overlap_L < 1).all()
    assert (found.divergence_L > 0).all()


def loss(model):
    with torch.no_grad():
        logits = model(torch.from_numpy(IDS)).logits[:, :-1].flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(IDS[:, 1:]).flatten()))


def test_crossed_losses_are_those_of_hand_made_crosses(models):
    before, after = models
    found = crossed_loss(before, after, PROBE)
    assert found.before == pytest.approx(loss(before), abs=1e-5)
    assert found.after == pytest.approx(loss(after), abs=1e-5)
    cross, other = copy.deepcopy(after), copy.deepcopy(before)
    for one, old in zip(cross.model.layers, before.model.layers, strict=True):
        one.mlp.gate.weight.data.copy_(old.mlp.gate.weight)
    for one, new in zip(other.model.layers, after.model.layers, strict=True):
        one.mlp.gate.weight.data.copy_(new.mlp.gate.weight)
    assert found.old_routers_new_experts == pytest.approx(loss(cross), abs=1e-5)
    assert found.new_routers_old_experts == pytest.approx(loss(other), abs=1e-5)
    assert found.old_routers_new_experts != pytest.approx(found.after, abs=1e-5)


def fail_inside(models, wanted):
    with swapped_routers(*models):
        assert torch.equal(models[0].model.layers[0].mlp.gate.weight, wanted)
        raise ZeroDivisionError


def test_routers_are_put_back_also_when_something_fails(models):
    states = [copy.deepcopy(model.state_dict()) for model in models]
    with pytest.raises(ZeroDivisionError):
        fail_inside(models, states[1]["model.layers.0.mlp.gate.weight"])
    for model, state in zip(models, states, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_routers_of_a_chain_are_exchanged_all_of_them():
    one, other = (tiny_recipe_model("chain_of_experts", seed=seed) for seed in (0, 1))
    wanted = other.model.layers[1].mlp.gate[1].weight.clone()
    with swapped_routers(one, other):
        assert torch.equal(one.model.layers[1].mlp.gate[1].weight, wanted)


def test_models_of_other_layers_are_refused(models):
    with pytest.raises(ModelError, match="differ in their MoE layers"):
        routing_drift(models[0], tiny_recipe_model("qwen3_moe", num_experts=4), PROBE)
    with pytest.raises(ModelError, match="numbers of MoE layers"):
        crossed_loss(models[0], tiny_recipe_model("qwen3_moe", num_hidden_layers=1), PROBE)
    with (
        pytest.raises(ModelError, match="routers differ"),
        swapped_routers(models[0], tiny_recipe_model("qwen3_moe", num_experts=4)),
    ):
        pass
