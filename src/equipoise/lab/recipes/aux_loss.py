"""The auxiliary balance loss of Switch Transformers and GShard: for making models whose routing was kept level by a loss term.

Switch (arXiv:2101.03961), equations 4 to 6, in the form for top-k of DeepSeekMoE (arXiv:2401.06066, equations 12 to 14):
loss = coefficient * E * sum_i f_i P_i, f_i the share of all selections that fell on expert i, P_i the mean routing probability
of i. It is 1 * coefficient at balance for any k; libraries that count f_i per token have k * coefficient there. The terms of
all layers are added up, as in Switch. Gradients flow through P alone.

Shapes: T tokens, E experts, K top-k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from equipoise.lab.extensions import EXTENSIONS, Extension, Step
from equipoise.lab.recipe import RecipeError
from equipoise.lab.recipes.routers import RouterTap, Scores, selections


def balance_loss(probs_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """E * sum_i f_i P_i: 1 when selections or probabilities are level, up to E when both lie on one expert.

    Args:
        probs_TE: [T, E] routing probabilities, each row's sum 1.
        experts_TK: [T, K] the experts chosen; E for none.
    """
    counts_E = selections(experts_TK, probs_TE.shape[1]).to(probs_TE.dtype)
    return probs_TE.shape[1] * (counts_E / counts_E.sum() * probs_TE.mean(0)).sum()


@EXTENSIONS.register(
    "aux-loss",
    summary="balance loss on the routers: the level load of most published models, paid for in the language-model loss",
    source="Switch Transformers (arXiv:2101.03961) equations 4-6; GShard (arXiv:2006.16668)",
)
class AuxLoss(Extension):
    """Adds the balance loss of every layer.

    Args:
        coefficient: of the loss; Switch 0.01, DeepSeek-V2 0.003, SimBal's baseline 0.01.
        scores: how the model makes scores of logits.
    """

    def __init__(self, coefficient: float = 0.01, scores: Scores = "softmax") -> None:
        if coefficient < 0:
            raise RecipeError(f"aux-loss: coefficient is {coefficient}; a number from 0 is needed.")
        self.coefficient, self.scores = coefficient, scores

    def attach(self, model: Any) -> None:
        """Listen to the routers."""
        self._tap = RouterTap(model)

    def loss(self, step: Step) -> Tensor | None:
        """The term of this step."""
        terms = [balance_loss(event.probabilities(self.scores), event.experts_TK) for event in self._tap.take()]
        return self.coefficient * torch.stack(terms).sum()
