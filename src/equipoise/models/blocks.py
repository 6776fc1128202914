"""The transformer layers of a model: the pieces in which a model that does not fit in memory is read, rounded and written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from equipoise.errors import ModelError
from equipoise.models.layers import MoELayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def block_path(layer: MoELayer) -> str:
    """Module path of the transformer layer that holds an MoE layer.

    Raises:
        ModelError: its stack keeps no list of layers.
    """
    parts = layer.path.split(".")
    start = len(layer.stack_path.split(".")) if layer.stack_path else 0
    for depth in range(start, len(parts)):
        if parts[depth].isdigit() and isinstance(layer.ancestors[depth], nn.ModuleList):
            return ".".join(parts[: depth + 1])
    raise ModelError(f"'{layer.path}' lies in no list of transformer layers, so the model cannot be worked through by layers.")


def moe_blocks(layers: Sequence[MoELayer]) -> dict[str, list[MoELayer]]:
    """The transformer layers that hold MoE layers: path -> what it holds, in the order in which a token meets them.

    Raises:
        ModelError: a stack without a list of layers.
    """
    found: dict[str, list[MoELayer]] = {}
    for layer in layers:
        found.setdefault(block_path(layer), []).append(layer)
    return found


def all_blocks(model: PreTrainedModel, layers: Sequence[MoELayer]) -> list[str]:
    """Paths of all transformer layers of the stacks that hold MoE layers, dense ones too.

    Raises:
        ModelError: a stack without a list of layers.
    """
    lists = dict.fromkeys(path.rpartition(".")[0] for path in moe_blocks(layers))
    return [f"{path}.{name}" for path in lists for name, _ in model.get_submodule(path).named_children()]
