"""A tiny dense model carved, exported, saved and loaded again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2MoeForCausalLM

from equipoise.models.reference import build
from equipoise.models.reference.card import model_card
from equipoise.models.reference.carve import Recipe, carve

RECIPE = Recipe(shared=16, experts=8, top_k=2, cluster_tokens=64)


@pytest.fixture(scope="module")
def dense() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.3,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (6, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def carved(dense: LlamaForCausalLM, tokens: torch.Tensor) -> Qwen2MoeForCausalLM:
    return build.carve_model(dense, tokens, RECIPE, progress=False)


def test_activations_are_those_of_the_whole_model(dense: LlamaForCausalLM, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        found = list(build.layer_activations(dense, tokens))
        residuals = dense.model(tokens, output_hidden_states=True).hidden_states
    weight = 1 / residuals[1].flatten(0, 1).square().sum(-1)  # the last entry is after the final norm; layer 0 is enough
    torch.testing.assert_close(found[0].weight, weight, rtol=1e-4, atol=1e-6)
    for layer, seen in zip(dense.model.layers, found, strict=True):
        mlp = layer.mlp
        hidden = torch.nn.functional.silu(seen.x @ mlp.gate_proj.weight.T) * (seen.x @ mlp.up_proj.weight.T)
        torch.testing.assert_close(seen.hidden, hidden, rtol=1e-4, atol=1e-4)


def test_all_experts_visited_evenly_is_the_dense_model(dense: LlamaForCausalLM, tokens: torch.Tensor) -> None:
    everything = Recipe(shared=16, experts=8, top_k=8, temperature=0.0, cluster_tokens=64)
    same = build.carve_model(dense, tokens, everything, progress=False)
    with torch.no_grad():
        torch.testing.assert_close(same(tokens).logits, dense(tokens).logits, rtol=1e-3, atol=1e-3)


def test_the_block_is_shared_plus_gated_experts(
    dense: LlamaForCausalLM, carved: Qwen2MoeForCausalLM, tokens: torch.Tensor
) -> None:
    """The exported block against the sum that the carving means, token by token from the dense layer's own neurons."""
    with torch.no_grad():
        for index, seen in enumerate(build.layer_activations(dense, tokens)):
            carving = carve(seen.x, seen.hidden, dense.model.layers[index].mlp.down_proj.weight, seen.weight, RECIPE)
            block = carved.model.layers[index].mlp(seen.x[None])[0]
            for token in range(0, len(seen.x), 17):
                hidden = seen.hidden[token]
                expected = carving.down[:, carving.shared] @ hidden[carving.shared]
                probability = torch.softmax(carving.router @ seen.x[token], 0)
                chosen = probability.argsort(descending=True)[: RECIPE.top_k]
                for expert in chosen:
                    neurons = carving.experts[expert]
                    gate = RECIPE.top_k * probability[expert] / probability[chosen].sum()
                    expected += gate * (carving.down[:, neurons] @ hidden[neurons])
                torch.testing.assert_close(block[token], expected, rtol=1e-3, atol=1e-3)


def test_the_same_inputs_give_the_same_model(
    dense: LlamaForCausalLM, carved: Qwen2MoeForCausalLM, tokens: torch.Tensor
) -> None:
    again = build.carve_model(dense, tokens, RECIPE, progress=False)
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, carved.state_dict()[name]), name


def test_saved_and_loaded_by_stock_transformers(dense: LlamaForCausalLM, tokens: torch.Tensor, tmp_path: Path) -> None:
    class NoTokenizer:
        def save_pretrained(self, directory: Path) -> None:
            (directory / "tokenizer.json").write_text("{}")

    model = build.carve_model(dense, tokens, RECIPE, progress=False)
    build.save(model, NoTokenizer(), model_card(RECIPE, tokens.numel()), tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    rounded = build.carve_model(dense, tokens, RECIPE, progress=False)
    with torch.no_grad():
        for weight in rounded.parameters():
            weight.copy_(weight.bfloat16())
        torch.testing.assert_close(loaded(tokens).logits, rounded(tokens).logits, rtol=0, atol=0)
    assert loaded.generate(tokens[:, :4], max_new_tokens=3, eos_token_id=None).shape == (6, 7)
    assert json.loads((tmp_path / "config.json").read_text())["num_experts_per_tok"] == 2
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\n")
    assert "8 routed experts" in card


def test_pack_joins_documents_and_refuses_too_little_text() -> None:
    class Characters:
        def __call__(self, text: str) -> object:
            return type("Encoding", (), {"input_ids": [ord(c) for c in text]})()

    packed = build.pack(["ab", "c", "defg"], Characters(), 2, 4)
    assert packed.tolist() == [[97, 98, 0, 99], [0, 100, 101, 102]]
    with pytest.raises(ValueError, match="hold 3 tokens; 2 sequences of 4"):
        build.pack(["ab"], Characters(), 2, 4)
