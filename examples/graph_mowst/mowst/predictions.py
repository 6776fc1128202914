"""What a model says of each node, and how good that is.

A model answers with predictions: log-probabilities with the probability, per node, that this prediction is the one given. A
plain model has one, of weight 1; Mowst has two, because it draws whether a node's answer is the weak or the strong expert's.
Figures are exact expectations over those draws; the published code averages 50 draws, and keeps the training step of the
luckiest one.

Shapes: N nodes, C classes, R rows (nodes that are judged).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Prediction:
    """log_probabilities_NC, and weight_N: the probability that a node is given this prediction."""

    log_probabilities_NC: Tensor
    weight_N: Tensor


def plain(logits_NC: Tensor) -> list[Prediction]:
    """The predictions of a model without a choice."""
    return [Prediction(F.log_softmax(logits_NC, 1), logits_NC.new_ones(len(logits_NC)))]


def loss(predictions: Sequence[Prediction], labels_N: Tensor, rows_R: Tensor) -> Tensor:
    """Expected cross-entropy over the given nodes, in nats."""
    terms = [
        F.nll_loss(p.log_probabilities_NC[rows_R], labels_N[rows_R], reduction="none") * p.weight_N[rows_R] for p in predictions
    ]
    return torch.stack(terms).sum(0).mean()


def score(predictions: Sequence[Prediction], labels_N: Tensor, rows_R: Tensor, metric: str) -> float:
    """Expected accuracy or ROC AUC over the given nodes.

    Args:
        predictions: of one model; the weights of a node sum to 1.
        labels_N: true classes.
        rows_R: nodes that are judged.
        metric: "accuracy" or "auc" (of class 1).
    """
    labels_R = labels_N[rows_R]
    logs = [p.log_probabilities_NC.detach()[rows_R] for p in predictions]
    weights = [p.weight_N.detach()[rows_R] for p in predictions]
    if metric == "accuracy":
        right = [weight * (log.argmax(1) == labels_R) for log, weight in zip(logs, weights, strict=True)]
        return float(torch.stack(right).sum(0).mean())
    scores = torch.cat([log[:, 1] - log[:, 0] for log in logs]).double().numpy()
    positive = torch.cat([labels_R == 1] * len(logs)).numpy()
    return auc(scores, positive, torch.cat(weights).double().numpy())


def auc(scores: Floats, positive: NDArray[np.bool_], weights: Floats) -> float:
    """Weighted area under the ROC curve: the chance that a positive scores above a negative, ties counted half.

    With one row for each (node, expert) and the chance of that expert as weight, this is the expected AUC over independent
    draws of the experts: a pair holds two different nodes, so the chances of its two sides multiply.

    Args:
        scores: higher is more positive.
        positive: true class of each row.
        weights: of each row.
    """
    _, place = np.unique(scores, return_inverse=True)
    above = np.bincount(place, weights * positive)
    below = np.bincount(place, weights * ~positive)
    beaten = np.cumsum(below) - below / 2
    return float((above * beaten).sum() / (above.sum() * below.sum()))
