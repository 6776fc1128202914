"""Held-out loss and balance by domain, measured while a model trains and once it is trained.

Shapes: D domains, L MoE layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.errors import ModelError
from equipoise.metrics import lis, maxvio
from equipoise.models.layers import MoELayer, find_moe_layers
from equipoise.models.recorder import record
from equipoise.profiling.forward import evaluation_mode, negative_log_likelihood
from equipoise.profiling.sequences import Rows, make_batches


@dataclass(frozen=True, eq=False)
class HeldOut:
    """What a model does on held-out rows.

    Attributes:
        passes_D: by domain name, [passes, 2] summed negative log-likelihood in nats of a forward pass, and tokens it is over.
        tokens_DL: [D, L] tokens that passed each layer.
        load_DLE: [D, L, E] selections of each expert; no layers for a dense model.
        width_L: [L] routed experts of each layer.
    """

    passes_D: dict[str, NDArray[np.float64]]
    tokens_DL: NDArray[np.int64]
    load_DLE: NDArray[np.int64]
    width_L: NDArray[np.int64]

    @property
    def nll_D(self) -> dict[str, float]:
        """Summed negative log-likelihood in nats, by domain."""
        return {name: float(found[:, 0].sum()) for name, found in self.passes_D.items()}

    @property
    def scored_D(self) -> dict[str, int]:
        """Tokens that it is over, by domain."""
        return {name: int(found[:, 1].sum()) for name, found in self.passes_D.items()}

    @property
    def perplexity(self) -> float:
        """Over the tokens of all domains together."""
        return math.exp(sum(self.nll_D.values()) / sum(self.scored_D.values()))

    def domain_perplexity(self) -> dict[str, float]:
        """By domain."""
        scored_D = self.scored_D
        return {name: math.exp(nll / scored_D[name]) for name, nll in self.nll_D.items()}

    def balance(self) -> dict[str, list[float]]:
        """LIS and MaxVio of each MoE layer, all domains together; empty for a dense model."""
        if not self.width_L.size:
            return {}
        load_LE = self.load_DLE.sum(0)
        width = self.width_L
        return {"lis": lis(load_LE, width).tolist(), "maxvio": maxvio(load_LE, width).tolist()}

    def domain_lis(self) -> dict[str, float]:
        """Mean LIS over layers of each domain alone; empty for a dense model."""
        if not self.width_L.size:
            return {}
        return {name: float(lis(load, self.width_L).mean()) for name, load in zip(self.passes_D, self.load_DLE, strict=True)}

    def experts_per_token(self) -> dict[str, float]:
        """Routed experts that a token visits, mean over tokens and layers, by domain; top-k unless the model drops some."""
        visits_D = (self.load_DLE.sum(2) / self.tokens_DL).mean(1)
        return dict(zip(self.passes_D, visits_D.tolist(), strict=True))

    def summary(self) -> dict[str, Any]:
        """Plain values for a log."""
        told: dict[str, Any] = {"perplexity": self.perplexity, "domain_perplexity": self.domain_perplexity()}
        if not self.width_L.size:
            return told
        return told | self.balance() | {"domain_lis": self.domain_lis(), "experts_per_token": self.experts_per_token()}


def measure(model: Any, heldout: Mapping[str, Rows], *, batch_size: int = 8) -> HeldOut:
    """Run held-out rows and record loss and load; the model's mode and weights are left as they were.

    Args:
        model: a transformers model, dense or MoE.
        heldout: domain -> rows.
        batch_size: rows of one forward pass.
    """
    passes: dict[str, NDArray[np.float64]] = {}
    layers = _moe_layers(model)
    with evaluation_mode(model), ExitStack() as stack:
        recorder = None
        if layers:
            recorder = stack.enter_context(record(model, scenarios=tuple(heldout), transitions=False, coactivation=False))
        for name, rows in heldout.items():
            if recorder is not None:
                recorder.scenario = name
            found = [negative_log_likelihood(model, batch) for batch in make_batches(rows, batch_size)]
            passes[name] = np.array(found, np.float64)
    width_L = np.array([layer.num_experts for layer in layers], np.int64)
    if recorder is None:
        none = (len(heldout), 0)
        return HeldOut(passes, np.zeros(none, np.int64), np.zeros((*none, 0), np.int64), width_L)
    return HeldOut(passes, recorder.tokens_by_layer.sum(1), recorder.counts.sum(1), width_L)


def _moe_layers(model: Any) -> tuple[MoELayer, ...]:
    """The model's MoE layers; none for a dense model, which has loss alone."""
    try:
        return find_moe_layers(model)
    except ModelError:
        return ()
