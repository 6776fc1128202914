"""Tiny models of the architectures that training recipes act on or bring."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from equipoise.models.architectures import learn

COMMON = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1,
    "bos_token_id": 1, "initializer_range": 0.2,
}  # fmt: skip
OWN = {
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2},
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 0, "moe_layer_start_index": 0,
                     "moe_layer_end_index": -1},
    "deepseek_v3": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 0,
                    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
                    "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
    "dynamic_moe": {"num_experts": 8, "num_experts_per_tok": 6, "router_top_p": 0.5},
    "chain_of_experts": {"num_experts": 8, "num_experts_per_tok": 2, "steps": 2},
}  # fmt: skip


def tiny_recipe_model(model_type, seed=0, **fields):
    """A random model of 2 layers of 8 experts."""
    learn(model_type)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**COMMON, **OWN[model_type], **fields}))
