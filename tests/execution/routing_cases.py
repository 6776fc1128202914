"""Policies on tiny models, for tests of several files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from equipoise.artifacts.routing import RoutingPolicy
from equipoise.execution.routing.fit import fit_policy
from models.oracle import inputs_for, padded, sequences

ACTIVE: dict[str, dict[str, Any]] = {
    "bias": {},
    "top_p": {"mean_k": 1.5},
    "random_k": {"mean_k": 1.5},
    "static_k": {"k": 1},
    "laser_style": {"share": 1, "t": 0.0},
    "load_only": {},
    "random_pool": {},
}
"""Options with which a policy changes what a random model does."""

IDENTITY: dict[str, dict[str, Any]] = {
    "bias": {"strength": 0},
    "top_p": {"p": 1},
    "random_k": {"p": 1},
    "static_k": {},
    "laser_style": {"eps_high": 0},
    "load_only": {"eps_high": 0},
    "random_pool": {"eps_high": 0},
}
"""Options with which it changes nothing."""


class Text:
    """A batch as calibration text."""

    def __init__(self, batch: Mapping[str, torch.Tensor]) -> None:
        self.batch = batch

    def inputs(self) -> dict[str, np.ndarray]:
        return {name: tensor.numpy() for name, tensor in self.batch.items()}


def batch_for(model: PreTrainedModel, lengths: Sequence[int] = (24, 17), side: str = "right") -> dict[str, torch.Tensor]:
    """Random text, padded."""
    return inputs_for(model, padded(sequences(tuple(lengths)), side))


@torch.no_grad()
def output(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Logits, or hidden states of a model without a head."""
    out = model(**batch)
    logits = getattr(out, "logits", None)
    return out.last_hidden_state if logits is None else logits


def fitted(model: PreTrainedModel, name: str, options: Mapping[str, Any] | None = None, **more: Any) -> RoutingPolicy:
    """A policy fitted on the random text."""
    return fit_policy(model, name, [Text(batch_for(model))], ACTIVE[name] if options is None else options, **more)
