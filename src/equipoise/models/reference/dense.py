"""The dense model that the reference model is carved from, read out of its GGUF file.

Shapes: V vocabulary, D model width, N neurons of the feed-forward layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from equipoise.errors import EquipoiseError, missing_package

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""llama.cpp's names of a block's tensors and the names that transformers uses."""


def load_dense(gguf: Path) -> LlamaForCausalLM:
    """The dense model of a llama-architecture GGUF file with tied embeddings, dequantized to float32.

    Reading with `gguf` itself takes seconds where transformers' general GGUF path takes most of a minute.

    Args:
        gguf: the file.

    Returns:
        the model in evaluation mode.

    Raises:
        EquipoiseError: the package `gguf` is missing, or the file holds another architecture.
    """
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        raise missing_package("the reference model and its texts need", "gguf", "pyarrow") from error

    reader = GGUFReader(gguf)
    config = _config(reader)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        name, _, kind = tensor.name.rpartition(".")
        if name == "token_embd":
            state["model.embed_tokens.weight"] = state["lm_head.weight"] = weight
        elif name == "output_norm":
            state["model.norm.weight"] = weight
        else:
            _, layer, part = name.split(".")
            if part in heads:
                weight = _interleaved_to_halves(weight, heads[part])
            state[f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"] = weight
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, strict=True, assign=True)
    # Rotary frequencies are a buffer that no checkpoint holds; on the meta device they were never computed.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.tie_weights()
    return model.eval()


def load_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the GGUF file, splitting digits as the file says it must (its pre-tokenizer is "smollm")."""
    from tokenizers import pre_tokenizers

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers' conversion keeps only the byte-level half of this pre-tokenizer.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    return tokenizer


def generation_config(config: Any) -> GenerationConfig:
    """The special tokens that `generate` needs, greedy by default."""
    return GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id, do_sample=False
    )


def _config(reader: Any) -> LlamaConfig:
    def value(key: str) -> Any:
        return reader.fields[key].contents()

    architecture = value("general.architecture")
    if architecture != "llama":
        raise EquipoiseError(
            f"the GGUF file holds a '{architecture}' model; the reference model is carved from a 'llama' model."
        )
    return LlamaConfig(
        vocab_size=value("llama.vocab_size"),
        hidden_size=value("llama.embedding_length"),
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=value("llama.block_count"),
        num_attention_heads=value("llama.attention.head_count"),
        num_key_value_heads=value("llama.attention.head_count_kv"),
        max_position_embeddings=value("llama.context_length"),
        rms_norm_eps=float(f"{value('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": float(value("llama.rope.freq_base"))},
        bos_token_id=value("tokenizer.ggml.bos_token_id"),
        eos_token_id=value("tokenizer.ggml.eos_token_id"),
        pad_token_id=value("tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=True,
        dtype="float32",
    )


def _interleaved_to_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's order of rotary rows (pairs side by side) to that of transformers (two halves per head)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns).contiguous()
