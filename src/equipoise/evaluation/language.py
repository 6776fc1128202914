"""Perplexity, KL divergence and top-1 agreement of several models against one base, in one pass over the text.

Shapes: B rows of a batch, Y positions that can be scored, N predicted tokens of a batch, V vocabulary, R rows of a text.
No logits are kept: each batch goes through the base, then through each contender, and is reduced to sums per row.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import nll_loss

from equipoise.artifacts.evaluation import Interval
from equipoise.errors import ModelError, TextError
from equipoise.evaluation import statistics
from equipoise.profiling.forward import run_batch
from equipoise.profiling.sequences import IGNORED, Batch, Framing, Rows, build_rows, make_batches

# Rows of logits compared at a time hold this many numbers, so that float32 copies stay at 128 MB whatever the vocabulary.
BLOCK_NUMBERS = 2**25
LARGEST_LOG = 700.0  # exp of more is no float, and results are written as JSON, which has no infinity
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over the predicted tokens of each row, [R] each.

    Attributes:
        tokens: predicted tokens.
        nll_base, nll: negative log likelihood of the base and of the contender, nats.
        kl: KL(base || contender), nats.
        agreements: tokens on which both have the same first choice.
    """

    tokens: Floats
    nll_base: Floats
    nll: Floats
    kl: Floats
    agreements: Floats

    @classmethod
    def joined(cls, parts: Sequence[Sums]) -> Sums:
        """The rows of several texts, one after the other."""
        names = ("tokens", "nll_base", "nll", "kl", "agreements")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True)
class LanguageResult:
    """Figures of one text and one contender; see `artifacts.evaluation.TextResult`."""

    tokens: int
    perplexity_base: float
    perplexity: float
    perplexity_change: Interval
    kl: Interval
    top1_agreement: Interval


def cut(
    tokenizer: Any, config: Any, documents: Sequence[str], *, name: str, seq_len: int, tokens: int | None, seed: int
) -> Rows:
    """Cut documents into rows that do not overlap and do not cross documents.

    Args:
        tokenizer: of the base model.
        config: of the base model.
        documents: the text.
        name: of the text, for messages.
        seq_len: longest row, in tokens.
        tokens: budget of tokens, taken from all documents in turn; None for all of the text.
        seed: which excerpts are taken when the budget is smaller than the text.

    Raises:
        TextError: no text, or too little to predict anything or to state an interval.
    """
    framing = Framing.of(tokenizer, config)
    budget = sys.maxsize if tokens is None else tokens
    rows = build_rows(documents, tokenizer, framing, scenario=name, tokens=budget, seq_len=seq_len, seed=seed)
    scored = [int((batch.labels != IGNORED).sum()) for batch in make_batches(rows, 1)]
    if not any(scored):
        raise TextError(f"text '{name}' has no document of two tokens or more, so there is nothing to predict; give more text.")
    if sum(count > 0 for count in scored) < 2:
        raise TextError(
            f"text '{name}' is a single row of at most {seq_len} tokens, from which no interval can be had; "
            "give a second document, a longer text, or shorter rows (--seq-len)."
        )
    return rows


def compare(
    base: Any,
    contenders: Mapping[str, Any],
    rows: Rows,
    *,
    batch_size: int,
    spent: Callable[[str | None, float], None] = lambda name, seconds: None,
) -> dict[str, Sums]:
    """Run every row through the base once and through each contender once, and compare what they predict.

    A decoder-only model predicts each token from those before it; an encoder-decoder model reads the first half of a row and is
    scored on the second, so that the loss is its decoder's.

    Args:
        base: a model with an LM head.
        contenders: name -> model of the same vocabulary; logits are compared in float32.
        rows: the text.
        batch_size: rows of one forward pass; padding is masked, so that results do not depend on it.
        spent: called after each forward pass with the contender's name (None for the base) and its seconds.

    Raises:
        ModelError: a model has no LM head, its logits are not numbers, or vocabularies differ.
    """
    totals = {name: np.zeros((5, len(rows.content))) for name in contenders}
    for i, batch in enumerate(make_batches(rows, batch_size)):
        scored = batch.labels != IGNORED
        owner_N = np.nonzero(scored)[0]
        target_N = torch.from_numpy(batch.labels[scored])
        base_NV, seconds = _logits(base, "the base model", batch, scored)
        spent(None, seconds)
        for name, model in contenders.items():
            logits_NV, seconds = _logits(model, f"'{name}'", batch, scored)
            spent(name, seconds)
            if logits_NV.shape != base_NV.shape:
                raise ModelError(
                    f"'{name}' predicts {logits_NV.shape[-1]} tokens, the base {base_NV.shape[-1]}; they must agree."
                )
            values_5N = _reduce(base_NV, logits_NV.to(base_NV.device), target_N.to(base_NV.device))
            for total, value_N in zip(totals[name], values_5N, strict=True):
                total[i * batch_size : (i + 1) * batch_size] += np.bincount(owner_N, value_N, len(scored))
    return {name: Sums(*total) for name, total in totals.items()}


def summarise(sums: Sums, documents: Sequence[int]) -> LanguageResult:
    """Perplexities, paired change, KL and agreement with intervals clustered by document.

    Args:
        sums: of one contender.
        documents: [R] document of each row.
    """
    used = sums.tokens > 0
    cluster = statistics.clusters(np.asarray(documents)[used])
    columns = (sums.tokens, sums.nll_base, sums.nll, sums.kl, sums.agreements)
    tokens, nll_base, nll, kl, agreements = (np.bincount(cluster, column[used]) for column in columns)
    total = tokens.sum()
    return LanguageResult(
        tokens=int(total),
        perplexity_base=math.exp(min(nll_base.sum() / total, LARGEST_LOG)),
        perplexity=math.exp(min(nll.sum() / total, LARGEST_LOG)),
        perplexity_change=statistics.perplexity_change(nll_base, nll, tokens),
        kl=statistics.mean_per_token(kl, tokens),
        top1_agreement=statistics.proportion_interval(agreements, tokens),
    )


def _logits(model: Any, name: str, batch: Batch, scored: NDArray[np.bool_]) -> tuple[torch.Tensor, float]:
    """[N, V] logits of the predicted tokens alone, and the seconds of the forward pass."""
    start = perf_counter()
    logits = getattr(run_batch(model, batch, all_logits=True), "logits", None)
    if logits is None or logits.ndim != 3:
        raise ModelError(f"{name} has no language-model head, so it predicts nothing; load it as a causal or seq2seq LM.")
    logits_NV: torch.Tensor = logits[torch.from_numpy(scored).to(logits.device)]
    if torch.isnan(logits_NV).any():
        raise ModelError(f"{name} gives logits that are not numbers (NaN); its weights are damaged, load or quantize it again.")
    return logits_NV, perf_counter() - start


def _reduce(base_NV: torch.Tensor, other_NV: torch.Tensor, target_N: torch.Tensor) -> Floats:
    """[5, N] for each predicted token: 1, loss of both models, KL(base || other), and whether the first choices agree."""
    columns = [torch.zeros(5, 0, dtype=torch.float64, device=base_NV.device)]
    step = max(1, BLOCK_NUMBERS // base_NV.shape[1])
    for block in (slice(i, i + step) for i in range(0, len(target_N), step)):
        base, other = (torch.log_softmax(logits_NV[block].float(), -1) for logits_NV in (base_NV, other_NV))
        # An entry that the base rules out (-inf logit) adds nothing, whatever the other model says.
        divergence = torch.where(base == -math.inf, 0.0, base.exp() * (base - other)).sum(-1, dtype=torch.float64)
        columns.append(
            torch.stack(
                [
                    torch.ones_like(divergence),
                    nll_loss(base, target_N[block], reduction="none").double(),
                    nll_loss(other, target_N[block], reduction="none").double(),
                    divergence.clamp_min(0.0),  # rounding can leave -1e-8
                    (base.argmax(-1) == other.argmax(-1)).double(),
                ]
            )
        )
    values: Floats = torch.cat(columns, 1).cpu().numpy()
    return values
