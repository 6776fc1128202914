"""A byte-level tokenizer and tiny random models, all made here."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost far more than models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "</s>": 1} | {letter: i + 2 for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


def decoder_model(seed: int = 0) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
        initializer_range=0.5,  # far from uniform predictions and balanced routing
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return Qwen3MoeForCausalLM(config).eval()


def encoder_decoder_model() -> Any:
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=258,
        d_model=32,
        d_kv=16,
        d_ff=32,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        num_experts=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        expert_capacity=1024,
        decoder_start_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    return SwitchTransformersForConditionalGeneration(config).eval()


def perturbed(model: Any, noise: float = 0.02) -> Any:
    """A copy whose expert weights are off by a little."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "experts" in name:
                parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    return other


@pytest.fixture(scope="session")
def model() -> Any:
    return decoder_model()


@pytest.fixture(scope="session")
def encoder_decoder() -> Any:
    return encoder_decoder_model()


@pytest.fixture(scope="session")
def perturb() -> Callable[..., Any]:
    return perturbed


@pytest.fixture(scope="session")
def other(model: Any) -> Any:
    return perturbed(model)


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return [
        "The heaviest expert of a layer serves more tokens than the others, and all wait for it.",
        "A copy in fewer bits takes half of them.",
        "Nothing is retrained; the router decides as it did before. The memory stays the same.",
        "x",
        "Short.",
    ]
