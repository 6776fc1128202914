"""How weights are rounded to few bits: one registry, so that a better rounding is one more entry.

A method turns weights [..., rows, columns] into integer codes of the same shape and bf16 scales [..., rows, groups].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from equipoise.precisions import Precision
from equipoise.registry import Registry

Rounding = Callable[[Tensor, Precision], tuple[Tensor, Tensor]]
METHODS: Registry[Rounding] = Registry("quantization method")


def group_columns(columns: int, precision: Precision) -> int:
    """Columns that share one scale: the precision's group, or the whole row."""
    return columns if precision.group is None else min(precision.group, columns)


def largest_code(precision: Precision) -> int:
    """The largest code of a symmetric format: 127 for 8 bits, 7 for 4 bits; -128 and -8 stay unused."""
    return int(2 ** (precision.bits - 1) - 1)


def spread_scales(scales: Tensor, columns: int, precision: Precision) -> Tensor:
    """Scales [..., rows, groups] repeated to [..., rows, columns]; the last group may be shorter than the others."""
    if scales.shape[-1] == 1:
        return scales.expand(*scales.shape[:-1], columns)
    return scales.repeat_interleave(group_columns(columns, precision), dim=-1)[..., :columns]


@METHODS.register("rtn", summary="round each weight to the nearest code of its group's largest magnitude", source="Equipoise")
def rtn(weight: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """Symmetric round-to-nearest.

    Args:
        weight: [..., rows, columns] finite weights of any float type.
        precision: an integer format.

    Returns:
        int8 codes [..., rows, columns] and bf16 scales [..., rows, groups].
    """
    columns, group, top = weight.shape[-1], group_columns(weight.shape[-1], precision), largest_code(precision)
    weight = weight.float()
    groups = -(-columns // group)
    padded = torch.nn.functional.pad(weight.abs(), (0, groups * group - columns))
    # The scale is rounded to its stored form first, so that the codes make up for its rounding.
    scales = (padded.unflatten(-1, (groups, group)).amax(-1) / top).to(torch.bfloat16)
    inverse = torch.where(scales > 0, scales.float(), torch.inf).reciprocal()
    codes = (weight * spread_scales(inverse, columns, precision)).round_().clamp_(-top, top)
    return codes.to(torch.int8), scales
