"""Top-p routing: how many experts a token needs, what the recorder sees of it, and that plans bear it."""

from __future__ import annotations

import copy

import pytest
import torch

from equipoise.errors import EquipoiseError
from equipoise.execution.apply import apply_plan
from equipoise.models.architectures.dynamic_moe import experts_needed, first_experts
from equipoise.models.layers import model_facts
from equipoise.models.recorder import record
from equipoise.planning.uniform import uniform_plan
from recipes_support import tiny_recipe_model

PROBS = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("p", "counts"),
    [(1e-6, [1, 1, 1]), (0.25, [1, 1, 1]), (0.5, [1, 2, 1]), (0.5001, [2, 3, 1]), (0.75, [2, 3, 1]), (0.76, [3, 4, 1]),
     (1.0, [4, 4, 1])],
)  # fmt: skip
def test_the_fewest_experts_that_reach_the_mass(p, counts):
    """arXiv:2403.07652 section 3.1: t = min k with P_1 + ... + P_k >= p."""
    assert experts_needed(PROBS, p, 4).tolist() == counts
    assert experts_needed(PROBS, p, 2).tolist() == [min(count, 2) for count in counts]


def test_weights_are_the_raw_probabilities_of_the_chosen():
    experts, weights = first_experts(PROBS, torch.tensor([2, 3, 1]), 3)
    assert experts[0].tolist() == [0, 1, 0]
    assert weights[0].tolist() == [0.5, 0.25, 0.0]
    assert weights.sum(1).tolist() == [0.75, 0.75, 1.0]
    assert weights[2].tolist() == [1.0, 0.0, 0.0]


def test_a_layer_is_the_weighted_sum_over_the_mass():
    model = tiny_recipe_model("dynamic_moe").eval()
    block = model.model.layers[0].mlp
    x_TD = torch.randn(12, 32)
    expected = torch.zeros_like(x_TD)
    for token, probs_E in enumerate((x_TD @ block.gate.weight.T).softmax(-1).detach()):
        mass = 0.0
        for expert in probs_E.argsort(descending=True).tolist()[:6]:
            gate, up = (block.experts.gate_up_proj[expert] @ x_TD[token]).chunk(2)
            made = block.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
            expected[token] += probs_E[expert] * made
            mass += float(probs_E[expert])
            if mass >= 0.5:
                break
    torch.testing.assert_close(block(x_TD[None])[0], expected, atol=1e-5, rtol=1e-4)


def test_the_recorder_counts_the_experts_visited_and_no_more():
    model = tiny_recipe_model("dynamic_moe").eval()
    ids, seen = torch.randint(2, 48, (2, 9)), []
    model.model.layers[1].mlp.gate.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad(), record(model, trace=True) as recorder:
        model(ids)
    ((_, weights_TK, experts_TK),) = seen
    visited = experts_TK[weights_TK > 0]
    assert recorder.counts[0, 0, 1].tolist() == torch.bincount(visited, minlength=8).tolist()
    assert recorder.unrouted[0, 1] == 18 * 6 - len(visited) > 0
    assert recorder.gate_mass[0, 1].sum() == pytest.approx(float(weights_TK.sum()), rel=1e-6)


def test_a_planned_model_runs_from_its_slots():
    model = tiny_recipe_model("dynamic_moe").eval()
    ids = torch.randint(2, 48, (2, 9))
    balanced = apply_plan(copy.deepcopy(model), uniform_plan(model_facts(model, "tiny"), "fp32"))
    with torch.no_grad():
        torch.testing.assert_close(balanced(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mass", [0.0, 1.5])
def test_a_mass_that_is_none_is_refused(mass):
    with pytest.raises(EquipoiseError, match="share of the routing mass"):
        tiny_recipe_model("dynamic_moe", router_top_p=mass)
