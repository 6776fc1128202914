"""What a text is worth as calibration text: balance over the experts, perplexity under the model, compressibility.

Shapes: L MoE layers, E experts of the widest layer.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from equipoise.errors import ModelError
from equipoise.metrics import lis
from equipoise.models.layers import check_weights, find_moe_layers
from equipoise.models.recorder import record
from equipoise.profiling.forward import evaluation_mode, negative_log_likelihood
from equipoise.profiling.progress import ProgressBar
from equipoise.profiling.self_sampled_search import imbalance
from equipoise.profiling.sequences import Framing, build_rows, make_batches

DEGENERATE = 0.1
"""Rows that zlib shrinks below this part are loops; prose and code stay above 0.3."""


@dataclass(frozen=True)
class TextReport:
    """Figures of one text under one model, all measured on the same rows.

    Attributes:
        rows: rows that the text makes.
        tokens: real tokens, special ones counted.
        sigma: EBSS's imbalance: deviation of the experts' selections per token, mean over layers; 0 is balanced.
        lis: Load-Imbalance Score over experts, mean over layers; 1 is balanced.
        lis_max: that of the worst layer.
        unused: share of the experts that served no token.
        perplexity: under the model.
        compressibility: bytes of a row after zlib over before, median; text in natural languages and code is above 0.3.
        degenerate: share of rows below `DEGENERATE`.
    """

    rows: int
    tokens: int
    sigma: float
    lis: float
    lis_max: float
    unused: float
    perplexity: float
    compressibility: float
    degenerate: float

    def as_dict(self) -> dict[str, Any]:
        """The figures by name, for JSON."""
        return asdict(self)


def compressibility(text: str) -> float:
    """Bytes of a text after zlib (level 9) over its UTF-8 bytes; 1 for an empty text. Small values are repetitions."""
    data = text.encode()
    return len(zlib.compress(data, 9)) / len(data) if data else 1.0


def measure_text(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    tokens: int | None = None,
    seq_len: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> TextReport:
    """Measure any text, self-sampled or not, as profiling would read it.

    Args:
        model: a causal or encoder-decoder language model.
        tokenizer: its tokenizer.
        texts: documents.
        tokens: budget; all of the text when omitted.
        seq_len: longest row, in tokens.
        batch_size: rows of one forward pass.
        seed: which excerpts are taken.
        progress: show a progress bar on a terminal.

    Raises:
        ModelError: no MoE layers or no language-model head, or weights or losses that are not numbers.
        TextError: no text.
    """
    layers = find_moe_layers(model)
    check_weights(model)
    budget = tokens if tokens is not None else 1 << 62
    framing = Framing.of(tokenizer, model.config)
    rows = build_rows(texts, tokenizer, framing, tokens=budget, seq_len=seq_len, seed=seed)
    total, labels = 0.0, 0
    with (
        evaluation_mode(model),
        record(model, transitions=False, coactivation=False) as recorder,
        ProgressBar(progress) as bar,
    ):
        bar.stage("reading text", rows.tokens, "tokens")
        for batch in make_batches(rows, batch_size):
            loss, count = negative_log_likelihood(model, batch)
            total, labels = total + loss, labels + count
            bar.advance(batch.tokens)
    if not labels:
        raise ModelError("the text has no second token to predict; give more text.")
    load_LE = recorder.counts.sum((0, 1))
    width_L = np.array([layer.num_experts for layer in layers])
    ratios = [compressibility(tokenizer.decode(ids)) for ids in rows.content]
    scores = lis(load_LE, width_L)
    return TextReport(
        rows=len(rows.content),
        tokens=rows.tokens,
        sigma=float(imbalance(load_LE.astype(np.float64), width_L, np.array([layer.top_k for layer in layers]))),
        lis=float(np.nanmean(scores)),
        lis_max=float(np.nanmax(scores)),
        unused=float(((load_LE == 0).sum() - (load_LE.shape[1] - width_L).sum()) / width_L.sum()),
        perplexity=math.exp(total / labels),
        compressibility=float(np.median(ratios)),
        degenerate=float(np.mean(np.array(ratios) < DEGENERATE)),
    )
