"""What the order of a batch does to predictions: nothing beyond rounding, unless a routing policy looks at the batch's load."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from equipoise.profiling.forward import run_batch
from equipoise.profiling.sequences import IGNORED, Batch, Rows, make_batches

TOKENS = 2048
"""Predicted tokens on which it is measured, at least one batch."""


def batch_order_kl(model: Any, rows: Rows, batch_size: int, seed: int = 0, tokens: int = TOKENS) -> float:
    """Mean KL divergence between a model's predictions for the same rows in two orders within their batches.

    Args:
        model: a model with an LM head, in evaluation mode.
        rows: the text.
        batch_size: rows of one forward pass; at least two are taken.
        seed: of the second order.
        tokens: predicted tokens after which no further batch is run.

    Returns:
        nats per predicted token.
    """
    draw = np.random.default_rng(seed)
    total, count = 0.0, 0
    for batch in make_batches(rows, max(2, batch_size)):
        size = len(batch.labels)
        if size < 2:
            continue
        order = draw.permutation(size)
        if (order == np.arange(size)).all():
            order = np.roll(order, 1)
        first, second = _predictions(model, batch)[order], _predictions(model, _reordered(batch, order))
        scored = torch.from_numpy(batch.labels[order] != IGNORED).to(first.device)
        first, second = first[scored], second[scored]
        total += float((first.exp() * (first - second)).sum(-1).double().sum().clamp_min(0.0))
        count += len(first)
        if count >= tokens:
            break
    return total / max(count, 1)


def _predictions(model: Any, batch: Batch) -> torch.Tensor:
    """[B, S, V] log probabilities."""
    return torch.log_softmax(run_batch(model, batch, all_logits=True).logits.float(), -1)


def _reordered(batch: Batch, order: np.ndarray[Any, np.dtype[np.int64]]) -> Batch:
    """The same rows in another order."""
    optional = (batch.decoder_input_ids, batch.decoder_attention_mask)
    decoder, mask = (None if part is None else part[order] for part in optional)
    return Batch(batch.scenario, batch.input_ids[order], batch.attention_mask[order], batch.labels[order], decoder, mask)
