"""Pairwise expert similarity is the mean cosine over all pairs, of what each expert makes of every token."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from equipoise.evaluation.similarity import expert_similarity, pairwise_similarity
from equipoise.models.layers import find_moe_layers, observe, run_expert
from equipoise.profiling.sequences import Batch
from recipes_support import tiny_recipe_model


def test_the_formula_by_brute_force():
    """arXiv:2506.14038: C(x) = 2 / (E (E - 1)) * sum_{i<j} cos(f_i(x), f_j(x))."""
    outputs_ETD = torch.randn(5, 7, 4, generator=torch.Generator().manual_seed(0))
    expected = [
        np.mean(
            [float(torch.cosine_similarity(outputs_ETD[i, t], outputs_ETD[j, t], dim=0)) for i, j in combinations(range(5), 2)]
        )
        for t in range(7)
    ]
    assert pairwise_similarity(outputs_ETD).numpy() == pytest.approx(np.array(expected), abs=1e-6)


def test_copies_are_alike_opposites_are_not_and_silence_counts_as_unlike():
    one = torch.randn(1, 3, 4)
    assert pairwise_similarity(one.repeat(4, 1, 1)).numpy() == pytest.approx(1)
    assert pairwise_similarity(torch.cat([one, -one])).numpy() == pytest.approx(-1)
    assert pairwise_similarity(torch.cat([one, one, 0 * one])).numpy() == pytest.approx(1 / 3)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "chain_of_experts"])
def test_of_a_model_all_experts_see_all_real_tokens(model_type):
    model = tiny_recipe_model(model_type).eval()
    ids = np.random.default_rng(0).integers(2, 48, (2, 6))
    mask = np.ones_like(ids)
    mask[1, 4:] = 0
    batch = Batch("x", ids, mask, ids)
    found = expert_similarity(model, [batch, batch])
    layers, seen = find_moe_layers(model), {0: [], 1: []}
    handles = [observe(layer, lambda hidden, *_, layer=layer: seen[layer.index].append(hidden)) for layer in layers]
    with torch.no_grad():
        model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
        for handle in handles:
            handle.remove()
        for layer in layers:
            real_TD = torch.cat([hidden[torch.from_numpy(mask.flatten() == 1)] for hidden in seen[layer.index]])
            outputs = torch.stack([run_expert(layer, expert, real_TD) for expert in range(8)])
            assert found[layer.index] == pytest.approx(float(pairwise_similarity(outputs).mean()), abs=1e-6)


def test_a_model_of_equal_experts_scores_one():
    model = tiny_recipe_model("qwen3_moe").eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                weight.copy_(weight[:1].expand_as(weight))
    ids = np.arange(2, 14)[None]
    assert expert_similarity(model, [Batch("x", ids, np.ones_like(ids), ids)]) == pytest.approx(1, abs=1e-5)
