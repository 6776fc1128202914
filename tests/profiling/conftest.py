"""Tiny random models of several families and a tiny tokenizer, made in code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    SwitchTransformersConfig,
)

VOCABULARY = 300
LINES = [
    "the quick brown fox jumps over the lazy dog",
    "load is balanced when every expert serves as many tokens as the others",
    "a copy in fewer bits takes half of the place and serves half of the tokens",
    "def route(tokens): return [expert for expert in tokens if expert]",
]

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **COMMON, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **COMMON, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, n_group=2, topk_group=1,
        first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    ),
    "gpt_oss": lambda: GptOssConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2, head_dim=16),
    "switch": lambda: SwitchTransformersConfig(
        vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=24, num_heads=2, num_layers=2, num_decoder_layers=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4, expert_capacity=64,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    ),
}  # fmt: skip


def _make_model(family: str, seed: int = 0) -> Any:
    """A random model, with weights large enough that experts and routers differ clearly."""
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = loader.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "embed" not in name:
                parameter.normal_(0, 0.25)
            elif "bias" in name:
                parameter.normal_(0, 0.1)
    return model


def _make_tokenizer(*, begin: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a few lines; with `begin`, it puts a begin-of-text token before text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>", "<begin>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(LINES, trainer)
    if begin:
        core.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", bos_token="<begin>", pad_token="<end>")


def _make_documents(count: int, seed: int = 0, words: int = 40) -> list[str]:
    """Documents of random words from the training lines."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = " ".join(LINES).split()
    picks = torch.randint(len(vocabulary), (count, words), generator=generator).tolist()
    return [" ".join(vocabulary[i] for i in row) for row in picks]


@pytest.fixture(scope="session")
def make_model():
    return _make_model


@pytest.fixture(scope="session")
def make_tokenizer():
    return _make_tokenizer


@pytest.fixture(scope="session")
def make_documents():
    return _make_documents


@pytest.fixture(scope="session")
def tokenizer():
    return _make_tokenizer()
