"""A model that is divided among ranks on text: its loss, what each rank did, and how long the layers took."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from equipoise.errors import EquipoiseError, TextError
from equipoise.execution.expert_parallel.meter import ParallelMeter, ParallelReport
from equipoise.execution.expert_parallel.runtime import rank_slots, staying_slots
from equipoise.profiling.forward import negative_log_likelihood
from equipoise.profiling.sequences import Batch

PROMPT = 32
"""Tokens of each row that generation starts from, at most."""


@dataclass(frozen=True, eq=False)
class ParallelRun:
    """What came out on all ranks together.

    Attributes:
        loss: negative log-likelihood in nats per token.
        tokens: labels that it is the mean of.
        prefill: calls of layers on text.
        decode: calls while one token was added at a time; None when nothing was generated.
        expert_bytes: [R] bytes of experts that each rank holds.
    """

    loss: float
    tokens: int
    prefill: ParallelReport
    decode: ParallelReport | None
    expert_bytes: tuple[int, ...]

    def rows(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "loss": self.loss,
            "perplexity": float(np.exp(self.loss)),
            "tokens": self.tokens,
            "expert_bytes_by_rank": list(self.expert_bytes),
            "prefill": self.prefill.rows(),
            "decode": None if self.decode is None else self.decode.rows(),
        }


def run_parallel(
    model: Any,
    batches: Sequence[Batch],
    *,
    generate: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ParallelRun:
    """Run text through a divided model, each rank its own batches in turn; every rank calls it and gets the same.

    With a coherent context all ranks run each batch together.

    Args:
        model: divided by `expert_parallel.parallelize`, not shared.
        batches: all of them, alike on every rank; rank r runs each R-th.
        generate: tokens to add to the beginning of a batch, one at a time, for the figures of decode.
        progress: told after each forward.

    Raises:
        TextError: no batches.
        EquipoiseError: every rank was told to hold the same batch.
    """
    slots = rank_slots(model)
    ranks = slots[0].ranks
    if not batches:
        raise TextError("no text to run; give some.")
    if slots[0].shared:
        raise EquipoiseError("the ranks share one batch, so there is nothing to divide; parallelize without `shared`.")
    # Of the batches at a time, which is this rank's.
    apart, at = (1, 0) if staying_slots(model) else (ranks.size, ranks.rank)
    total, count = 0.0, 0
    rounds = -(-len(batches) // apart)
    with ParallelMeter(model) as meter:
        for step in range(rounds):
            mine = step * apart + at
            # All ranks take part in every forward; one that has run out of text repeats some, which is not scored.
            found = negative_log_likelihood(model, batches[mine if mine < len(batches) else at % len(batches)])
            if mine < len(batches):
                total, count = total + found[0], count + found[1]
            progress(step + 1, rounds)
        if rounds > 1 and len(batches) % apart:
            meter.drop(1)
    prefill = meter.report()
    if apart < ranks.size and ranks.rank > 0:
        total, count = 0.0, 0  # all ranks have scored the same
    sums = ranks.add(torch.tensor([total, float(count)], dtype=torch.float64, device=ranks.device), "adding up the loss")
    held = sum(group.nbytes for layer in slots for group in layer.groups)
    every = ranks.gather(torch.tensor([held], device=ranks.device), "gathering bytes").flatten().tolist()
    return ParallelRun(
        loss=float(sums[0] / sums[1]),
        tokens=int(sums[1]),
        prefill=prefill.without(1) if prefill.calls > 1 else prefill,
        decode=_decode(model, batches[at % len(batches)], generate, apart) if generate else None,
        expert_bytes=tuple(every),
    )


def _decode(model: Any, batch: Batch, generate: int, size: int) -> ParallelReport:
    if batch.decoder_input_ids is not None:
        raise EquipoiseError("generation is measured on decoder-only models; leave --generate out.")
    device = next(model.parameters()).device
    width = min(PROMPT, int(batch.attention_mask.sum(1).min()))
    ids = torch.from_numpy(batch.input_ids[:, :width]).to(device)
    with torch.no_grad(), ParallelMeter(model) as meter:
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=generate + 1, min_new_tokens=generate + 1,
            do_sample=False, synced_gpus=size > 1,
        )  # fmt: skip
    return meter.report().without(1)  # the prompt
