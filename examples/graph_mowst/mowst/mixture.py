"""Mowst and Mowst-star: a weak and a strong expert, and the confidence that divides nodes between them.

Shapes: N nodes, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mowst.gating import dispersion
from mowst.graphs import Graph
from mowst.predictions import Prediction


@dataclass(frozen=True, eq=False)
class Parts:
    """Log-probabilities of both experts, and the confidence in the weak one."""

    weak_NC: Tensor
    strong_NC: Tensor
    confidence_N: Tensor

    def with_confidence(self, confidence_N: Tensor) -> Parts:
        """The same experts under another confidence: a control."""
        return replace(self, confidence_N=confidence_N)


class Mowst(nn.Module):
    """A node is answered by the weak expert with probability C, otherwise by the strong one.

    Its loss, C L(p, y) + (1 - C) L(p', y), is the expected loss of that draw. Source: arXiv:2311.05185, L_Mowst.
    """

    def __init__(self, weak: nn.Module, gate: nn.Module, strong: nn.Module) -> None:
        super().__init__()
        self.weak, self.gate, self.strong = weak, gate, strong

    def weak_side(self, graph: Graph) -> tuple[Tensor, Tensor]:
        """[N, C] log-probabilities of the weak expert, and [N] the confidence in it."""
        logits_NC = self.weak(graph)
        return F.log_softmax(logits_NC, 1), self.gate(dispersion(logits_NC))

    def strong_side(self, graph: Graph) -> Tensor:
        """[N, C] log-probabilities of the strong expert."""
        return F.log_softmax(self.strong(graph), 1)

    def parts(self, graph: Graph) -> Parts:
        """Both experts and the confidence."""
        weak_NC, confidence_N = self.weak_side(graph)
        return Parts(weak_NC, self.strong_side(graph), confidence_N)

    def combine(self, parts: Parts) -> list[Prediction]:
        """The predictions that the parts give."""
        return [Prediction(parts.weak_NC, parts.confidence_N), Prediction(parts.strong_NC, 1 - parts.confidence_N)]


class MowstStar(Mowst):
    """A node is answered by the mixture C p + (1 - C) p' of both experts' probabilities, in training and afterwards.

    Source: arXiv:2311.05185, Mowst* (the published code trains a mixture of logits and tests one of probabilities).
    """

    def combine(self, parts: Parts) -> list[Prediction]:
        """The one prediction that the parts give."""
        confidence_N = parts.confidence_N.clamp(1e-6, 1 - 1e-6)  # keeps the logarithms and their gradients finite
        weak_NC = parts.weak_NC + confidence_N.log()[:, None]
        strong_NC = parts.strong_NC + (1 - confidence_N).log()[:, None]
        return [Prediction(torch.logaddexp(weak_NC, strong_NC), torch.ones_like(confidence_N))]
