"""Gate norm: how much an expert adds to the layer's output where it is used."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from equipoise.models.layers import gated_expert
from equipoise.profiling.importance.base import IMPORTANCE, Context, Ints, Measured, Observation, check_choice
from equipoise.profiling.importance.sampling import Draw, SampledEstimator


@IMPORTANCE.register(
    "gate_norm",
    summary="gate weight times the norm of the expert's output, mean over its tokens",
    source="REAP (arXiv:2510.13999), saliency score",
)
class GateNorm(SampledEstimator):
    """`mean_t g_t ||y_t||_2` over the tokens that an expert serves, from a sample of them.

    Args:
        reduce: "mean" over the expert's tokens, or their "sum", which also counts how often it is used.
        max_tokens_per_expert: sample of each expert; None measures all tokens.
    """

    def __init__(self, context: Context, *, reduce: str = "mean", max_tokens_per_expert: int | None = 256) -> None:
        super().__init__(context, max_tokens_per_expert)
        check_choice("gate_norm", "reduce", reduce, ("mean", "sum"))
        self.reduce = reduce

    def measure(self, seen: Observation, drawn: Draw, hidden_ND: torch.Tensor, gates_N: torch.Tensor) -> None:
        """Add the weighted norms of one expert's drawn tokens."""
        output_ND = gated_expert(seen.layer, drawn.expert, hidden_ND, gates_N)
        self.put("norm", drawn.expert, drawn.weight * float(output_ND.double().norm(dim=-1).sum()))

    def finish(self, load_LE: Ints, checkpoint: Callable[[], None], advance: Callable[[int, int], None]) -> Measured:
        """[L, E] scores; zero for an expert without tokens."""
        total = self.sum("norm") * self.scale(load_LE)
        return Measured(importance=total if self.reduce == "sum" else total / np.maximum(load_LE, 1))
