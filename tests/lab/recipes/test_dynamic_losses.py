"""Losses of top-p routing, and the control that deals the numbers of experts out at random."""

from __future__ import annotations

import json
import math

import pytest
import torch

from equipoise.lab.extensions import Step
from equipoise.lab.recipes.dynamic_moe import DynamicMoe, entropy, shuffled_visits, visit_balance
from equipoise.lab.training import train
from equipoise.models.recorder import record


def test_the_formulas_by_hand():
    """arXiv:2403.07652 section 3: alpha N sum f_i Q_i with f_i the share of tokens, and the entropy of P."""
    probs_TE = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1]])
    experts_TK = torch.tensor([[0, 3], [0, 1]])  # the first token visits one expert
    f, q = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.6, 0.3, 0.1])
    torch.testing.assert_close(visit_balance(probs_TE, experts_TK), 3 * (f * q).sum())
    expected = -sum(p * math.log(p) for p in (0.7, 0.2, 0.1, 0.5, 0.4, 0.1)) / 2
    assert float(entropy(probs_TE)) == pytest.approx(expected)
    assert float(entropy(torch.full((5, 8), 1 / 8))) == pytest.approx(math.log(8))
    assert float(entropy(torch.eye(4))) == 0


def test_the_extension_adds_both_terms_of_every_layer(tiny, ids):
    model = tiny("dynamic_moe").train()
    heard = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, out: heard.append((out[0].detach(), out[1], out[2])))
    extension = DynamicMoe(0.3, 0.7)
    extension.attach(model)
    output = model(ids)
    expected = 0.0
    for logits_TE, weights_TK, experts_TK in heard:
        probs_TE = logits_TE.softmax(-1)
        visited_TE = torch.zeros_like(probs_TE).scatter_add_(1, experts_TK, (weights_TK.detach() > 0).float())
        expected += 0.3 * 8 * (visited_TE.mean(0) * probs_TE.mean(0)).sum()
        expected += 0.7 * -(probs_TE * probs_TE.log()).sum(-1).mean()
    torch.testing.assert_close(extension.loss(Step(0, model, None, output)).detach(), expected)


def visits(model, ids):
    with torch.no_grad(), record(model, trace=True) as recorder:
        model(ids)
    (trace,) = recorder.trace.values()
    return (trace.experts_LTK >= 0).sum(2)


def test_dealing_out_keeps_the_histogram_of_a_call_and_nothing_else(tiny, ids):
    model = tiny("dynamic_moe").eval()
    own = visits(model, ids)
    assert len(set(own.flatten().tolist())) > 2
    with shuffled_visits(model, seed=0):
        dealt = visits(model, ids)
    assert sorted(dealt[0].tolist()) == sorted(own[0].tolist())  # of deeper layers the inputs differ
    assert dealt[0].tolist() != own[0].tolist()
    with shuffled_visits(model, seed=0):
        assert (visits(model, ids) == dealt).all()
    assert (visits(model, ids) == own).all()


def test_it_trains_and_the_model_loads(make_recipe, lab_data, tmp_path):
    from equipoise.profiling.loading import load_model

    plain = make_recipe(steps=4)
    model = {**plain.model, "model_type": "dynamic_moe", "num_experts_per_tok": 4, "router_top_p": 0.4}
    recipe = plain.model_copy(update={"model": model, "extensions": {"dynamic-moe": {}}})
    train(recipe, lab_data, tmp_path / "run", progress=False)
    watched = json.loads((tmp_path / "run/watch.jsonl").read_text().splitlines()[-1])["experts_per_token"]
    assert all(1 <= visits < 4 for visits in watched.values())
    loaded = load_model(str(tmp_path / "run/model"))
    assert type(loaded).__name__ == "DynamicMoeForCausalLM"
    assert loaded.config.router_top_p == 0.4
