"""The tokens that reached a layer's experts, expert by expert, without a copy of all of them.

Shapes: T tokens of a call, K top-k, N tokens of an expert, D width of its input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from equipoise.models.layers import MoELayer, expert_matrices
from equipoise.quantization.hessian import TOKENS_AT_ONCE

Call = tuple[Tensor, Tensor, Tensor]
"""hidden_TD, experts_TK and weights_TK of one call of the experts, real tokens only."""


class LayerTokens:
    """The calibration tokens of a layer, by expert. Families that put the gate on an expert's input get gated inputs."""

    def __init__(self, layer: MoELayer, calls: Sequence[Call]) -> None:
        self.layer, self.calls = layer, calls
        self.total = sum(len(hidden) for hidden, _, _ in calls)
        self.device = expert_matrices(layer, 0)[0].device

    def gates(self, expert: int) -> Tensor:
        """[N] gates of an expert's tokens."""
        found = [weights[experts == expert] for _, experts, weights in self.calls]
        return torch.cat(found).float().to(self.device)

    def inputs(self, expert: int) -> Iterator[Tensor]:
        """[n, D] inputs of an expert's tokens, in the order of `gates`, some thousands at a time."""
        waiting: list[Tensor] = []
        for hidden, experts, weights in self.calls:
            rows, columns = torch.nonzero(experts == expert, as_tuple=True)
            if len(rows):
                waiting.append(self._gated(hidden[rows], weights[rows, columns]))
            if sum(map(len, waiting)) >= TOKENS_AT_ONCE:
                yield torch.cat(waiting)
                waiting = []
        if waiting:
            yield torch.cat(waiting)

    def of_layer(self, limit: int) -> Tensor:
        """[n, D] inputs of at most `limit` tokens, evenly spaced, as any expert of the layer might get them."""
        picked = torch.linspace(0, self.total - 1, min(limit, self.total)).round().long()
        found, first = [], 0
        for hidden, experts, weights in self.calls:
            rows = picked[(picked >= first) & (picked < first + len(hidden))].to(hidden.device) - first
            first += len(hidden)
            served = (experts[rows] >= 0) & (experts[rows] < self.layer.num_experts)
            found.append(self._gated(hidden[rows], (weights[rows] * served).sum(-1) / served.sum(-1).clamp_min(1)))
        return torch.cat(found)

    def _gated(self, hidden: Tensor, gates: Tensor) -> Tensor:
        hidden = hidden.to(self.device).float()
        return hidden * gates.to(self.device).float()[:, None] if self.layer.adapter.gate_on_input else hidden
