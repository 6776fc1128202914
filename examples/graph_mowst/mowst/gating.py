"""Confidence in the weak expert, from the dispersion of what it says. Source: arXiv:2311.05185 (C = G after D).

Shapes: N nodes, C classes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def dispersion(logits_NC: Tensor) -> Tensor:
    """[N, 2] how far the probabilities are from uniform, each 0 for uniform and 1 for a single class.

    The first is their variance over that of a one-hot vector, the second is 1 - entropy / log C. The weak expert gets no
    gradient through them: it shall be right where it is confident, not look confident.

    Args:
        logits_NC: of the weak expert.
    """
    logs_NC = F.log_softmax(logits_NC.detach(), 1)
    probabilities_NC = logs_NC.exp()
    classes = logits_NC.shape[1]
    largest = (1 - 1 / classes) / classes
    variance_N = probabilities_NC.var(1, unbiased=False) / largest
    entropy_N = -(probabilities_NC * logs_NC).sum(1) / math.log(classes)
    return torch.stack([variance_N, 1 - entropy_N], 1)


class Gate(nn.Module):
    """A small MLP from dispersion to confidence."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, dispersion_N2: Tensor) -> Tensor:
        """[N] confidence in (0, 1)."""
        return torch.sigmoid(self.layers(dispersion_N2)).squeeze(1)


class GivenConfidence(nn.Module):
    """Control: a confidence that is given and never learned, whatever the weak expert says."""

    def __init__(self, confidence_N: Tensor) -> None:
        super().__init__()
        self.register_buffer("confidence_N", confidence_N)

    def forward(self, dispersion_N2: Tensor) -> Tensor:
        """[N] the confidence that was given."""
        confidence_N: Tensor = self.get_buffer("confidence_N")
        return confidence_N
