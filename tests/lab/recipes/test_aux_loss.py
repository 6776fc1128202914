"""The balance loss is Switch's formula, of the events of the training pass alone."""

from __future__ import annotations

import pytest
import torch

from equipoise.errors import EquipoiseError
from equipoise.lab.extensions import Step
from equipoise.lab.recipes.aux_loss import AuxLoss, balance_loss
from equipoise.lab.recipes.routers import RouterTap
from equipoise.models.layers import find_moe_layers


def test_the_formula_by_hand():
    """Switch (arXiv:2101.03961) equations 4 to 6 with selections shared out: E * sum_i f_i P_i."""
    probs_TE = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1]])
    experts_TK = torch.tensor([[0, 1], [0, 1]])
    f, p = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.6, 0.3, 0.1])
    torch.testing.assert_close(balance_loss(probs_TE, experts_TK), 3 * (f * p).sum())


def test_it_is_one_at_balance_for_any_k_and_e_at_collapse():
    level = torch.full((8, 4), 0.25)
    assert balance_loss(level, torch.arange(8)[:, None] % 4) == 1
    assert balance_loss(level, torch.stack([torch.arange(8) % 4, (torch.arange(8) + 1) % 4], 1)) == 1
    collapsed = torch.zeros(8, 4).index_fill(1, torch.tensor(2), 1.0)
    assert balance_loss(collapsed, torch.full((8, 1), 2)) == 4


def test_selections_of_no_expert_are_left_out():
    probs_TE = torch.rand(5, 4).softmax(-1)
    some = torch.tensor([[0, 4], [1, 4], [2, 4], [3, 4], [0, 1]])
    dense = torch.tensor([0, 1, 2, 3, 0, 1])
    expected = 4 * (torch.bincount(dense, minlength=4) / 6 * probs_TE.mean(0)).sum()
    torch.testing.assert_close(balance_loss(probs_TE, some), expected)


def test_a_step_down_its_gradient_lowers_what_the_busiest_expert_is_likely_to_get():
    logits_TE = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([2.0, 0, 0, 0])
    logits_TE.requires_grad_()
    probs_TE = logits_TE.softmax(-1)
    balance_loss(probs_TE, probs_TE.topk(1).indices).backward()
    lower = (logits_TE - 10 * logits_TE.grad).softmax(-1).mean(0)
    assert lower[0] < probs_TE.mean(0)[0]


@pytest.mark.parametrize(
    ("model_type", "scores"),
    [("qwen3_moe", "softmax"), ("ernie4_5_moe", "softmax"), ("deepseek_v3", "sigmoid"), ("chain_of_experts", "softmax")],
)
def test_the_extension_adds_up_all_routing_events_of_the_pass(model_type, scores, tiny, ids):
    model = tiny(model_type).train()
    heard = []
    for layer in find_moe_layers(model):
        router = model.get_submodule(layer.router_path)
        for one in router if isinstance(router, torch.nn.ModuleList) else [router]:
            one.register_forward_hook(lambda module, args, out: heard.append((out[0].detach(), out[2].detach())))
    extension = AuxLoss(0.5, scores)
    extension.attach(model)
    output = model(ids)
    expected = 0.0
    for logits_TE, experts_TK in heard:
        probs_TE = logits_TE.softmax(-1) if scores == "softmax" else logits_TE.sigmoid() / logits_TE.sigmoid().sum(-1, True)
        share_E = torch.bincount(experts_TK.flatten(), minlength=8) / experts_TK.numel()
        expected += 0.5 * 8 * (share_E * probs_TE.mean(0)).sum()
    assert len(heard) == (4 if model_type == "chain_of_experts" else 2)
    found = extension.loss(Step(0, model, None, output))
    torch.testing.assert_close(found.detach(), expected)
    found.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for name, p in model.named_parameters() if "gate.weight" in name)


def test_evaluation_between_steps_leaves_no_event(tiny, ids):
    model = tiny("qwen3_moe").train()
    tap = RouterTap(model)
    model.eval()
    with torch.no_grad():
        model(ids)
    model.train()
    assert tap.take() == []
    model(ids)
    assert len(tap.take()) == 2
    assert tap.take() == []


def test_a_negative_coefficient_is_refused():
    with pytest.raises(EquipoiseError, match="coefficient is -1"):
        AuxLoss(-1.0)
