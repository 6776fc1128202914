"""A layer whose slots are of several formats on a GPU: one launch for all ups, one for all downs.

Shapes: T tokens, N rows sorted by slot, P slots of the layer, O outputs, D model width, F expert width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from equipoise.execution.slot_group import Activation, SlotGroup

if TYPE_CHECKING:
    from equipoise.execution.kernels_triton import Stored


def mixed_experts(
    groups: Sequence[SlotGroup], x_TD: Tensor, row_N: Tensor, count_P: Tensor, activate: Activation
) -> Tensor | None:
    """Outputs of all slots of a layer, without gate weights and without waiting for the device.

    Args:
        groups: the layer's groups, in the order of their slots.
        x_TD: inputs, on the GPU.
        row_N: which of them each row is, rows sorted by slot.
        count_P: rows of each slot.
        activate: what lies between up and down.

    Returns:
        [N, D] in the dtype of the inputs; None where the layer has formats that the kernels do not take together (two of a
        kind, rotated ones, other formats than int8 and symmetric int4 in groups of a multiple of 32), floats alone, or Triton
        is missing.
    """
    if all(group.native for group in groups) or any(group.rotated for group in groups) or not len(row_N) or not has_triton():
        return None
    from equipoise.execution.kernels_triton import mixed_linear, tiles_of

    ups, downs = ([stored_for_launch(group, name, x_TD.dtype) for group in groups] for name in ("up", "down"))
    parts = [(up, down) for up, down in zip(ups, downs, strict=True) if up is not None and down is not None]
    if len(parts) < len(groups) or len({up.kind for up, _ in parts}) < len(groups):
        return None
    tiles = tiles_of(count_P, len(row_N))
    up_NF = mixed_linear(x_TD, row_N, [up for up, _ in parts], tiles, len(row_N))
    hidden_NF = activate(_biased(groups, "up", up_NF, count_P))
    y_ND = mixed_linear(hidden_NF.to(x_TD.dtype), None, [down for _, down in parts], tiles, len(row_N))
    return _biased(groups, "down", y_ND, count_P)


def stored_for_launch(group: SlotGroup, name: str, dtype: torch.dtype) -> Stored | None:
    """A group's "up" or "down" as the kernels take it; None if they do not.

    Args:
        group: slots of one format.
        name: which matrix.
        dtype: that of the inputs, which float weights must not be wider than.
    """
    from equipoise.execution.kernels_triton import BLOCK_INPUTS, BYTES, FLOAT, NIBBLES, Stored

    form = group.form
    if form.is_float:
        weight: Tensor = getattr(group, name)
        return Stored(FLOAT, weight) if weight.dtype == dtype or dtype == torch.float32 else None
    group.unpack()
    stored = group.stored(name)
    if "zeros" in stored or form.is_fp8:
        return None
    if form.bits == 8 and stored["scales"].shape[-1] == 1:
        return Stored(BYTES, stored["packed"], stored["scales"])
    if form.bits == 4 and form.group is not None and form.group % BLOCK_INPUTS == 0:
        return Stored(NIBBLES, stored["packed"], stored["scales"], form.group)
    return None


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether Triton is installed; torch brings it where it has a GPU to run on."""
    return find_spec("triton") is not None


def _biased(groups: Sequence[SlotGroup], name: str, y_NO: Tensor, count_P: Tensor) -> Tensor:
    if not groups[0].has_biases:
        return y_NO
    bias_PO = torch.cat([getattr(group, f"{name}_bias").to(y_NO.dtype) for group in groups])
    return y_NO + bias_PO.repeat_interleave(count_P, dim=0, output_size=len(y_NO))
