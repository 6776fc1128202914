"""Rotation of an expert's inner width by blocks of a Hadamard matrix: it spreads outliers over their block, so that fewer
bits hold them (QuaRot, arXiv:2404.00456). The rotation is orthonormal and its own inverse, so that a last matrix stored as
W Q and multiplied with Q h gives W h exactly, up to floating-point rounding.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

LARGEST_BLOCK = 128
"""Longer blocks spread little further, and a block as a small matrix product costs its length for each element."""


def block_size(width: int) -> int:
    """The largest power of two, at most `LARGEST_BLOCK`, that divides a width; 1 leaves nothing to rotate."""
    return min(width & -width, LARGEST_BLOCK)


def rotate(x: Tensor) -> Tensor:
    """Rotate the last axis, block by block; a second time undoes it.

    Args:
        x: [..., F] activations or rows of weights, any float type.

    Returns:
        [..., F] in the same type and of the same norm.
    """
    size = block_size(x.shape[-1])
    if size == 1:
        return x
    matrix = _hadamard(size).to(device=x.device, dtype=x.dtype)
    return (x.unflatten(-1, (-1, size)) @ matrix).flatten(-2)


@lru_cache
def _hadamard(size: int) -> Tensor:
    """[size, size] symmetric, orthonormal: Sylvester's construction."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5
