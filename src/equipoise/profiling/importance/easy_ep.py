"""EASY-EP: what an expert adds to the residual stream where that matters.

Shapes: L MoE layers, E logical experts, T tokens, K top-k, D model width, N tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from equipoise.models.layers import gated_expert
from equipoise.profiling.importance.base import IMPORTANCE, Context, Estimator, Floats, Ints, Measured, Observation


@IMPORTANCE.register(
    "easy_ep",
    summary="gate weight times norm of the expert's output, times how far its token's routed experts turn the residual stream",
    source="EASY-EP (arXiv:2504.06792)",
)
class EasyEP(Estimator):
    """I(i) = sum_t c_it s_t over all tokens t that chose expert i, with no sampling.

    c_it = g_it ||e_it||, the gate weight that is applied (normalised and scaled) times the norm of the expert's output, and
    s_t = max(0, 1 - cos(h_t, h_t + sum_i g_it e_it)), where h_t is the residual stream that enters the layer's block, before
    the norm, and the sum is over routed experts alone. A gate that a family puts on the expert's input counts where it acts.

    Several scenarios are domains: their scores are kept apart, and `importance` is their mixture, each divided by its layer's
    sum and added.

    Args:
        token_term: False leaves s_t out (ablation).
        norm_term: False leaves ||e_it|| out (ablation).
    """

    needs_residual = True

    def __init__(self, context: Context, *, token_term: bool = True, norm_term: bool = True) -> None:
        super().__init__(context)
        self.token_term, self.norm_term = token_term, norm_term
        self.scenarios = tuple(dict.fromkeys(batch.scenario for batch in context.batches))

    def observe(self, seen: Observation) -> None:
        """Run every expert on its tokens, and add up their scores."""
        routed_TD = torch.zeros_like(seen.hidden, dtype=torch.float32)
        size_TK = torch.zeros(seen.experts.shape, dtype=torch.float64, device=seen.hidden.device)
        width = seen.layer.num_experts
        served_TK = (seen.experts >= 0) & (seen.experts < width)
        for expert in seen.experts[served_TK].unique().tolist():
            rows_N, columns_N = torch.nonzero(seen.experts == expert, as_tuple=True)
            gates_N = seen.weights[rows_N, columns_N]
            output_ND = gated_expert(seen.layer, expert, seen.hidden[rows_N], gates_N).float()
            routed_TD.index_add_(0, rows_N, output_ND)
            size_TK[rows_N, columns_N] = (output_ND.norm(dim=-1) if self.norm_term else gates_N.abs()).double()
        if self.token_term:
            size_TK *= turned(seen.residual, routed_TD)[:, None]
        experts = seen.experts[served_TK].long().cpu().numpy()
        added_E = np.bincount(experts, weights=size_TK[served_TK].cpu().numpy(), minlength=self.context.shape[1])
        self.passes.add(f"{self.context.batches[seen.step].scenario}/{seen.layer.index}", seen.step, added_E)

    def finish(self, load_LE: Ints, checkpoint: Callable[[], None], advance: Callable[[int, int], None]) -> Measured:
        """[L, E] scores of each scenario, and of all as one mixed domain."""
        scores = {scenario: self._score(scenario) for scenario in self.scenarios}
        if len(scores) == 1:
            return Measured(importance=scores[self.scenarios[0]], by_scenario=scores)
        parts: list[Floats] = [score_LE / np.maximum(score_LE.sum(1, keepdims=True), 1e-300) for score_LE in scores.values()]
        return Measured(importance=np.sum(parts, 0), by_scenario=scores)

    def _score(self, scenario: str) -> Floats:
        """[L, E] of one scenario."""
        rows = [self.passes.total(f"{scenario}/{layer.index}") for layer in self.context.layers]
        return np.stack([np.zeros(self.context.shape[1]) if row_E is None else row_E for row_E in rows])


def turned(residual_TD: torch.Tensor, routed_TD: torch.Tensor) -> torch.Tensor:
    """[T] how far adding the routed experts' output turns the residual stream: max(0, 1 - cosine), float64."""
    before, after = residual_TD.double(), residual_TD.double() + routed_TD.double()
    return (1 - torch.nn.functional.cosine_similarity(before, after, dim=-1)).clamp(min=0)
