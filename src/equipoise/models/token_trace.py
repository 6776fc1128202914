"""Every selection of a recorded stack, token by token.

Shapes: L layers of the stack, T real tokens in the order in which they were run, K largest top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from equipoise.models.layers import MoELayer
from equipoise.models.tally import Ints
from equipoise.models.tokens import TokenBatch


@dataclass(frozen=True, eq=False)
class TokenTrace:
    """Every selection of one stack, token by token, in the order in which they were run.

    Attributes:
        layers: [L] row of each of the stack's layers in the recorder's arrays.
        events: [L] routing events of each layer; the columns of one of C events are C equal parts, in the events' order.
        experts_LTK: [L, T, K] int32 expert ids; -1 where a selection reached no routed expert.
        weights_LTK: [L, T, K] float32 gate weights.
        scenario_T: [T] scenario of each token.
        forward_T: [T] which forward call of the stack, from 0.
        sequence_T: [T] which sequence of its batch.
        position_T: [T] index among its sequence's own real tokens.
        decode_T: [T] whether it was run in the decode phase.
    """

    layers: Ints
    events: Ints
    experts_LTK: NDArray[np.int32]
    weights_LTK: NDArray[np.float32]
    scenario_T: Ints
    forward_T: Ints
    sequence_T: Ints
    position_T: Ints
    decode_T: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class _Forward:
    """What one forward call of the stack adds."""

    experts_LTK: NDArray[np.int32]
    weights_LTK: NDArray[np.float32]
    scenario: int
    sequence_T: Ints
    position_T: Ints
    decode: bool


class TraceKeeper:
    """Keeps the selections of one stack, forward after forward."""

    def __init__(self, layers: Sequence[MoELayer], absent: int) -> None:
        """Start with nothing.

        Args:
            layers: the stack's MoE layers.
            absent: the id that stands for no routed expert in what is added.
        """
        self._layers, self._absent = layers, absent
        self._forwards: list[_Forward] = []

    def __bool__(self) -> bool:
        """Whether anything was kept."""
        return bool(self._forwards)

    def add(self, ids_LTK: Tensor, weights_LTK: Tensor, scenario: int, batch: TokenBatch) -> None:
        """Keep the selections of a batch's real tokens."""
        real = batch.real_T.cpu()
        experts_LTK = ids_LTK.masked_fill(ids_LTK == self._absent, -1).to("cpu").numpy().astype(np.int32)
        sequence_T, position_T = (t.cpu()[real].numpy() for t in (batch.sequence_T, batch.position_T))
        weights = weights_LTK.float().cpu().numpy()
        self._forwards.append(_Forward(experts_LTK, weights, scenario, sequence_T, position_T, bool(batch.decode)))

    def trace(self) -> TokenTrace:
        """All that was kept, joined."""
        kept = self._forwards
        sizes = [forward.experts_LTK.shape[1] for forward in kept]
        return TokenTrace(
            layers=np.array([layer.index for layer in self._layers]),
            events=np.array([layer.events for layer in self._layers]),
            experts_LTK=np.concatenate([forward.experts_LTK for forward in kept], axis=1),
            weights_LTK=np.concatenate([forward.weights_LTK for forward in kept], axis=1),
            scenario_T=np.repeat(np.array([forward.scenario for forward in kept]), sizes),
            forward_T=np.repeat(np.arange(len(kept)), sizes),
            sequence_T=np.concatenate([forward.sequence_T for forward in kept]),
            position_T=np.concatenate([forward.position_T for forward in kept]),
            decode_T=np.repeat(np.array([forward.decode for forward in kept]), sizes),
        )
