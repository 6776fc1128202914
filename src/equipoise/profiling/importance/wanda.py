"""Wanda proxy: the paper's way to find a "less-important" expert.

Shapes: E experts of a layer, C input columns (the model's width), R rows of one matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from equipoise.errors import EquipoiseError, ModelError
from equipoise.models.layers import MoELayer, expert_matrices
from equipoise.profiling.importance.base import IMPORTANCE, Context, Estimator, Ints, Measured, Observation, check_choice


@IMPORTANCE.register(
    "wanda",
    summary="mean of the smallest |weight| * ||input||; raw: R&Q takes the expert with the LARGEST value as less important",
    source="R&Q (arXiv:2602.19938) section 2.3 and Algorithm 2, after Wanda (arXiv:2306.11695)",
)
class Wanda(Estimator):
    """Mean Wanda score of the weights that Wanda would prune first.

    `S = |W| * ||X||_2` with `||X||_2[c] = sqrt(sum_t X_tc^2)`; in every row the `int(C * fraction)` entries at one end
    of S are kept, and the expert's score is the mean over all kept entries. The value is stored as the formula gives it:
    the paper calls the expert with the largest value the less-important one, against the usual reading of S, so a
    planner that uses this score has to name the direction it takes.

    Scored are the matrices that read the layer's input X (gate and up projections). The down projection reads the
    expert's inner activations, which a layer input cannot weigh; it is left out.

    Args:
        fraction: part of each row that is kept; the paper's s, for which it gives no value.
        keep: "lowest" (the paper's text) or "highest" (the comment in its Algorithm 2).
        tokens: "layer" weighs every expert by all tokens of the layer (the paper's X_l); "routed" by its own tokens.
    """

    def __init__(self, context: Context, *, fraction: float = 0.5, keep: str = "lowest", tokens: str = "layer") -> None:
        super().__init__(context)
        if not 0 < fraction <= 1:
            raise EquipoiseError(f"wanda: fraction is {fraction}; it must be above 0 and at most 1.")
        check_choice("wanda", "keep", keep, ("lowest", "highest"))
        check_choice("wanda", "tokens", tokens, ("layer", "routed"))
        self.fraction, self.keep, self.routed = fraction, keep, tokens == "routed"

    def observe(self, seen: Observation) -> None:
        """Add the squared inputs: [C] for the layer, or [E, C] for each expert's own tokens."""
        squared = seen.hidden.float().square()
        if self.routed:
            total = squared.new_zeros(seen.layer.num_experts, squared.shape[1])
            served = (seen.experts >= 0) & (seen.experts < seen.layer.num_experts)
            token, _ = served.nonzero(as_tuple=True)
            total.index_add_(0, seen.experts[served].long(), squared[token])
        else:
            total = squared.sum(0)
        self.passes.add(f"squares.{seen.layer.index}", seen.step, total.double().cpu().numpy())

    def finish(self, load_LE: Ints, checkpoint: Callable[[], None], advance: Callable[[int, int], None]) -> Measured:
        """[L, E] mean kept scores; zero for an expert without tokens when `tokens` is "routed"."""
        scores = np.full(self.context.shape, np.nan)
        for layer in self.context.team.mine(self.context.layers):
            scores[layer.index] = 0.0
            squares = self.passes.total(f"squares.{layer.index}")
            if squares is None:
                continue
            norms = torch.from_numpy(np.sqrt(squares)).float()
            for expert in range(layer.num_experts):
                scores[layer.index, expert] = self._score(layer, expert, norms[expert] if self.routed else norms)
        return Measured(importance=self.context.team.join(scores))

    def _score(self, layer: MoELayer, expert: int, norm_C: Any) -> float:
        total, entries = 0.0, 0
        for weight in expert_matrices(layer, expert)[:-1]:
            if weight.shape[1] != norm_C.shape[0]:
                raise ModelError(
                    f"wanda: a matrix of {layer.path} has {weight.shape[1]} inputs, its tokens have {norm_C.shape[0]}; "
                    "this architecture's experts do not read the layer's input, use gate_norm or output_error."
                )
            keep = max(1, int(weight.shape[1] * self.fraction))
            score = weight.detach().float().abs() * norm_C.to(weight.device)
            kept = torch.topk(score, keep, dim=1, largest=self.keep == "highest", sorted=False).values
            total += float(kept.double().sum())
            entries += kept.numel()
        return total / entries
