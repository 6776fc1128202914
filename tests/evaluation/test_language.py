from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from equipoise.errors import ModelError, TextError
from equipoise.evaluation.language import compare, cut, summarise
from equipoise.profiling.sequences import IGNORED, make_batches


def rows_of(tokenizer: Any, model: Any, documents: list[str], seq_len: int = 40) -> Any:
    return cut(tokenizer, model.config, documents, name="prose", seq_len=seq_len, tokens=None, seed=0)


def brute_force(base: Any, other: Any, rows: Any) -> np.ndarray:
    """Tokens, losses, KL and agreements of each row, one row and one token at a time."""
    out = []
    for batch in make_batches(rows, 1):
        inputs = {name: torch.from_numpy(value) for name, value in batch.inputs().items()}
        with torch.no_grad():
            p, q = (m(**inputs).logits[0].double().log_softmax(-1) for m in (base, other))
        sums = np.zeros(5)
        for position, target in enumerate(batch.labels[0]):
            if target != IGNORED:
                a, b = p[position], q[position]
                kl = sum(math.exp(x) * (x - y) for x, y in zip(a.tolist(), b.tolist(), strict=True))
                sums += [1, -float(a[target]), -float(b[target]), kl, float(a.argmax() == b.argmax())]
        out.append(sums)
    return np.array(out).T


def as_array(sums: Any) -> np.ndarray:
    return np.array([sums.tokens, sums.nll_base, sums.nll, sums.kl, sums.agreements])


def test_a_copy_is_at_distance_zero(tokenizer: Any, model: Any, documents: list[str]) -> None:
    rows = rows_of(tokenizer, model, documents)
    found = summarise(compare(model, {"same": copy.deepcopy(model)}, rows, batch_size=2)["same"], rows.documents)
    assert (found.kl.value, found.top1_agreement.value, found.perplexity_change.value) == (0.0, 1.0, 0.0)
    assert found.perplexity == found.perplexity_base > 1
    assert found.tokens == sum(len(d) for d in documents) - len(rows.content)


def test_several_contenders_match_brute_force(
    tokenizer: Any, model: Any, other: Any, perturb: Callable[..., Any], documents: list[str]
) -> None:
    rows = rows_of(tokenizer, model, documents)
    far = perturb(model, noise=0.5)
    sums = compare(model, {"near": other, "far": far}, rows, batch_size=3)
    for name, contender in (("near", other), ("far", far)):
        np.testing.assert_allclose(as_array(sums[name]), brute_force(model, contender, rows), rtol=2e-5, atol=2e-5)
    assert sums["far"].kl.sum() > sums["near"].kl.sum() > 0


def test_batch_size_does_not_matter(tokenizer: Any, model: Any, other: Any, documents: list[str]) -> None:
    rows = rows_of(tokenizer, model, documents)
    one, four = (as_array(compare(model, {"o": other}, rows, batch_size=size)["o"]) for size in (1, 4))
    np.testing.assert_allclose(one, four, rtol=1e-4, atol=1e-4)


def test_encoder_decoder_is_scored_on_the_second_half(
    tokenizer: Any, encoder_decoder: Any, perturb: Callable[..., Any], documents: list[str]
) -> None:
    model, other = encoder_decoder, perturb(encoder_decoder, noise=0.1)
    rows = rows_of(tokenizer, model, documents)
    sums = compare(model, {"o": other}, rows, batch_size=2)["o"]
    np.testing.assert_allclose(as_array(sums), brute_force(model, other, rows), rtol=1e-4, atol=1e-4)
    assert sums.tokens.tolist() == [len(ids) // 2 for ids in rows.content]


def test_blocks_of_logits_change_nothing(
    tokenizer: Any, model: Any, other: Any, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(tokenizer, model, documents)
    whole = as_array(compare(model, {"o": other}, rows, batch_size=4)["o"])
    monkeypatch.setattr("equipoise.evaluation.language.BLOCK_NUMBERS", 258 * 7)
    np.testing.assert_allclose(as_array(compare(model, {"o": other}, rows, batch_size=4)["o"]), whole, rtol=1e-6, atol=1e-9)


def test_tokens_that_the_base_rules_out_add_no_divergence(tokenizer: Any, model: Any, documents: list[str]) -> None:
    class Masked(torch.nn.Module):
        """The model with one vocabulary entry ruled out."""

        def __init__(self) -> None:
            super().__init__()
            self.model, self.config = model, model.config

        def forward(self, **inputs: Any) -> Any:
            output = self.model(**inputs)
            output.logits[..., 0] = -math.inf
            return output

    rows = rows_of(tokenizer, model, documents)
    sums = compare(Masked(), {"o": Masked()}, rows, batch_size=2)["o"]
    assert sums.kl.sum() == 0.0


def test_logits_that_are_not_numbers_are_an_error(tokenizer: Any, model: Any, documents: list[str]) -> None:
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[3] = math.nan
    with pytest.raises(ModelError, match="'broken' gives logits that are not numbers"):
        compare(model, {"broken": broken}, rows_of(tokenizer, model, documents), batch_size=2)


def test_text_too_short_is_an_error(tokenizer: Any, model: Any) -> None:
    with pytest.raises(TextError, match="nothing to predict"):
        rows_of(tokenizer, model, ["x", "y"])
    with pytest.raises(TextError, match="single row"):
        rows_of(tokenizer, model, ["a sentence"])
    with pytest.raises(TextError, match="no text"):
        rows_of(tokenizer, model, [])


def test_token_budget_is_met(tokenizer: Any, model: Any, documents: list[str]) -> None:
    rows = cut(tokenizer, model.config, documents, name="t", seq_len=20, tokens=60, seed=0)
    assert rows.tokens == 60
    assert len(set(rows.documents)) > 1
