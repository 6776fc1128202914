"""The real reference model, where it is cached already; it is not built for a test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from equipoise.models.reference import DOMAINS, build, demo_texts
from equipoise.models.reference.cache import cache_dir


@pytest.fixture(scope="module")
def directory() -> Path:
    path = cache_dir() / f"reference-{build._digest(build.DEFAULT_RECIPE)}"
    if not path.is_dir():
        pytest.skip("the reference model is not in the cache: run `make demo` first")
    return path


def test_it_is_a_working_language_model(directory: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert (model.config.num_experts, model.config.num_experts_per_tok) == (16, 4)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**ids, max_new_tokens=8)[0])


def test_its_tokenizer_splits_digits_and_round_trips(directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = "In 1984,\n\n  x = 42  # naïve\n"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert all(len(token.strip("Ġ ")) <= 1 for token in tokenizer.convert_ids_to_tokens(ids) if any(c.isdigit() for c in token))


def test_heldout_loss_is_near_the_dense_model(directory: Path) -> None:
    """One sequence of each domain: far from a broken export, whose loss would be near log(49152) = 10.8."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokens = torch.cat([build.pack(texts, tokenizer, 1, 256) for texts in demo_texts("heldout").values()])
    assert len(tokens) == len(DOMAINS)
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1].float()
    assert torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) < 3.3
