"""The dense model read from a GGUF file equals the model that was written into it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from equipoise.errors import EquipoiseError
from equipoise.models.reference.dense import _LAYER_NAMES, load_dense

gguf = pytest.importorskip("gguf")


def write(path: Path, model: LlamaForCausalLM, architecture: str = "llama") -> None:
    """What llama.cpp's converter writes: its own names, and rotary rows in pairs."""
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for add, token in ((writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2), (writer.add_pad_token_id, 2)):
        add(token)
    state = {name: weight.numpy() for name, weight in model.state_dict().items()}
    tensors = {"token_embd.weight": state["model.embed_tokens.weight"], "output_norm.weight": state["model.norm.weight"]}
    for layer in range(config.num_hidden_layers):
        for theirs, ours in _LAYER_NAMES.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if theirs == "attn_q" else config.num_key_value_heads
                rows, columns = weight.shape
                weight = weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
            tensors[f"blk.{layer}.{theirs}.weight"] = weight
    for name, weight in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_same_logits(model: LlamaForCausalLM, tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf", model)
    tokens = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            load_dense(tmp_path / "tiny.gguf")(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5
        )


def test_another_architecture_is_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf", model, architecture="gemma")
    with pytest.raises(EquipoiseError, match="holds a 'gemma' model"):
        load_dense(tmp_path / "tiny.gguf")
