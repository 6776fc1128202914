from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from transformers import PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

from equipoise.artifacts import ModelFacts
from equipoise.models.layers import model_facts

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="session")
def original() -> PreTrainedModel:
    import torch

    torch.manual_seed(0)
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or "gate" in name:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="session")
def facts(original: PreTrainedModel) -> ModelFacts:
    return model_facts(original, "tiny")


@pytest.fixture
def fresh(original: PreTrainedModel) -> Callable[[], PreTrainedModel]:
    return lambda: copy.deepcopy(original)
