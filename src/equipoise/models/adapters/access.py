"""One MoE layer's experts, whatever their family: watch them, read their weights, run them.

Shapes: T tokens, E routed experts, K top-k, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from equipoise.errors import ModelError
from equipoise.models.adapters.base import Callback, Handle, Layer
from equipoise.models.adapters.offloaded import in_reach

STREAMED = "_equipoise_streamed"
"""Attribute of a model whose layers are read from disk when they are used: its `models.streamed.Streamed`."""


def observe(layer: Layer, callback: Callback) -> Handle:
    """Call back whenever tokens are sent to a layer's experts, before the experts run.

    Args:
        layer: the layer to watch.
        callback: called as callback(hidden_TD, experts_TK, weights_TK) with all rows of the call, padding included. An id
            outside 0..E-1 is a selection that reaches no routed expert (over capacity, identity expert, other modality).

    Returns:
        a handle; call its `remove()` to stop.
    """
    return layer.adapter.observe(layer, callback)


def expert_matrices(layer: Layer, expert: int) -> list[Tensor]:
    """The weight matrices of one expert, each (out, in), in the order of `layer.matrices`; views of the model's weights.

    Raises:
        ModelError: the layer is balanced; its weights are those of its slots.
    """
    if layer.balanced:
        raise ModelError(f"{layer.path} is balanced already: its experts are slots; load the original model instead.")
    streamed = getattr(layer.ancestors[0], STREAMED, None)
    if streamed is not None:
        streamed.fetch(layer.path)
    with in_reach(layer.experts) as device:
        matrices = layer.adapter.expert_matrices(layer.experts, expert)
    return matrices if device is None else [matrix.to(device) for matrix in matrices]


def expert_vectors(layer: Layer, expert: int) -> list[Tensor]:
    """The biases of one expert, `layer.vector_elements` elements in all; views of the model's weights."""
    with in_reach(layer.experts):
        return layer.adapter.expert_vectors(layer.experts, expert)


def run_expert(layer: Layer, expert: int, x_TD: Tensor, matrices: Sequence[Tensor] | None = None) -> Tensor:
    """What one expert computes, without the gate weight.

    Args:
        layer: the layer of the expert.
        expert: its id, 0..E-1.
        x_TD: [T, D] inputs, as the experts module receives them.
        matrices: weights to use in place of the expert's own, as `expert_matrices` returns them.

    Returns:
        y_TD: [T, D] outputs.
    """
    matrices = expert_matrices(layer, expert) if matrices is None else matrices
    with in_reach(layer.experts):
        return layer.adapter.run(layer.experts, expert, x_TD, matrices)


def expert_hidden(layer: Layer, expert: int, x_TD: Tensor, ups: Sequence[Tensor]) -> Tensor:
    """What one expert multiplies its last matrix with.

    Args:
        layer: the layer of the expert.
        expert: its id, 0..E-1.
        x_TD: [T, D] inputs, as the expert receives them.
        ups: all its matrices but the last, or weights in their place.

    Returns:
        [T, F] activations.
    """
    with in_reach(layer.experts):
        return layer.adapter.hidden(layer.experts, expert, x_TD, ups)


def gated_expert(
    layer: Layer, expert: int, x_TD: Tensor, weights_T: Tensor, matrices: Sequence[Tensor] | None = None
) -> Tensor:
    """What one expert adds to the layer's output: the gate weight on its output, or on its input where the family does so.

    Args:
        layer: the layer of the expert.
        expert: its id, 0..E-1.
        x_TD: [T, D] inputs.
        weights_T: [T] gate weights.
        matrices: weights to use in place of the expert's own.

    Returns:
        [T, D] contributions.
    """
    if layer.adapter.gate_on_input:
        return run_expert(layer, expert, x_TD * weights_T[:, None].to(x_TD.dtype), matrices)
    return run_expert(layer, expert, x_TD, matrices) * weights_T[:, None]
