"""Codes of quantized weights: their range, the groups that share a scale, and how they are packed into words.

The packed form is that of compressed-tensors (`pack_to_int32`): code + 2^(bits-1) as an unsigned number, one after the other
from the lowest bit of a row's first 32-bit word upwards, with no bits left free but those after a row's end, which are zero.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.nn import functional as F

from equipoise.precisions import WORD_BITS, Precision

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
BLOCK = 32
"""Codes that fill whole words whatever their width."""

assert sys.byteorder == "little", "words of packed codes are read and written byte by byte, lowest byte first"


def code_range(precision: Precision) -> tuple[int, int]:
    """The lowest and highest code that an integer format can store: (-128, 127) for 8 bits, (-8, 7) for 4."""
    return -(2 ** (precision.bits - 1)), 2 ** (precision.bits - 1) - 1


def largest_code(precision: Precision) -> int:
    """The largest code of a symmetric format: 127 for 8 bits, 7 for 4 bits; 448, the largest number, for fp8."""
    return int(FP8_LARGEST) if precision.is_fp8 else code_range(precision)[1]


def group_columns(columns: int, precision: Precision) -> int:
    """Columns that share one scale: the precision's group, or the whole row."""
    return columns if precision.group is None else min(precision.group, columns)


def spread_scales(scales: Tensor, columns: int, precision: Precision) -> Tensor:
    """Scales or zero points [..., rows, groups] repeated to [..., rows, columns]; the last group may be shorter."""
    if scales.shape[-1] == 1:
        return scales.expand(*scales.shape[:-1], columns)
    return scales.repeat_interleave(group_columns(columns, precision), dim=-1)[..., :columns]


def code_dtype(precision: Precision) -> torch.dtype:
    """Type of unpacked codes: float8 for fp8, int8 for integers."""
    return FP8 if precision.is_fp8 else torch.int8


def packed_dtype(precision: Precision) -> torch.dtype:
    """Type of the stored codes: float8 for fp8, int8 for 8 bits, 32-bit words for fewer."""
    return torch.int32 if precision.bits < 8 else code_dtype(precision)


def pack(codes: Tensor, precision: Precision) -> Tensor:
    """Codes as stored.

    Args:
        codes: int8 (float8 for fp8) [..., columns].
        precision: a quantized format.

    Returns:
        the codes themselves for 8 bits, int32 [..., ceil(columns * bits / 32)] for fewer.
    """
    bits = precision.bits
    if bits == 8:
        return codes.to(code_dtype(precision))
    columns, words = codes.shape[-1], precision.packed_columns(codes.shape[-1])
    unsigned = F.pad(codes.to(torch.uint8) + 2 ** (bits - 1), (0, -columns % BLOCK))
    if bits == 3:
        # Eight codes fill three bytes.
        eight = unsigned.unflatten(-1, (-1, 8)).to(torch.int32)
        stream = sum(eight[..., i] << (3 * i) for i in range(8))
        packed = torch.stack([(stream >> (8 * i)) & 255 for i in range(3)], dim=-1).to(torch.uint8)
    else:
        part = unsigned.unflatten(-1, (-1, 8 // bits))
        packed = part[..., 0].clone()
        for i in range(1, 8 // bits):
            packed |= part[..., i] << (bits * i)
        packed = packed.unsqueeze(-1)
    return packed.flatten(-2).contiguous().view(torch.int32)[..., :words].contiguous()


def unpack(packed: Tensor, columns: int, precision: Precision) -> Tensor:
    """The codes [..., columns] of stored ones: the inverse of `pack`.

    Wider words are filled with copies of the narrow ones, shifted, and masked: every step writes whole contiguous tensors,
    which is several times faster than writing each field of a word to its place.
    """
    bits = precision.bits
    if bits == 8:
        return packed
    if bits == 4:
        wide = packed.contiguous().view(torch.uint8).to(torch.int16)
        wide = (wide << 4).bitwise_or_(wide).bitwise_and_(0x0F0F)
    elif bits == 2:
        wide = packed.contiguous().view(torch.uint8).to(torch.int32)
        wide = (wide << 12).bitwise_or_(wide).bitwise_and_(0x000F000F)
        wide = (wide << 6).bitwise_or_(wide).bitwise_and_(0x03030303)
    else:
        wide = _spread_threes(packed)
    return wide.view(torch.int8)[..., :columns].sub_(2 ** (bits - 1))


def float_from_fp8(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights in e4m3 as floats, by their bits: torch converts them one by one on CPUs, ten times slower.

    Sign, exponent and fraction are moved to the places of bf16; what is left is a factor 2^120 between the biases of the
    exponents (127 - 7), which also makes subnormal numbers right.
    """
    if codes.device.type != "cpu":
        return codes.to(dtype)
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(4).bitwise_and_(-0x7810)
    return bits.view(torch.bfloat16).mul_(2.0**120).to(dtype)


def pack_zeros(zeros: Tensor, precision: Precision) -> Tensor:
    """Zero points as stored: int8 [..., rows, groups] for 8 bits, int32 [..., ceil(rows * bits / 32), groups] for fewer."""
    if precision.bits == 8:
        return zeros.to(torch.int8)
    return pack(zeros.transpose(-2, -1), precision).transpose(-2, -1).contiguous()


def unpack_zeros(packed: Tensor, rows: int, precision: Precision) -> Tensor:
    """The int8 zero points [..., rows, groups] of stored ones: the inverse of `pack_zeros`."""
    if precision.bits == 8:
        return packed
    return unpack(packed.transpose(-2, -1), rows, precision).transpose(-2, -1)


def _spread_threes(packed: Tensor) -> Tensor:
    """Three words are 32 codes of 3 bits, four times 24 bits: int64 [..., columns / 8], a code in each byte."""
    words = F.pad(packed, (0, -packed.shape[-1] % 3)).unflatten(-1, (-1, 3)).to(torch.int64) & (2**WORD_BITS - 1)
    first, second, third = words.unbind(-1)
    parts = (first, (first >> 24) | (second << 8), (second >> 16) | (third << 16), third >> 8)
    wide = torch.stack(parts, dim=-1).flatten(-2).bitwise_and_(0xFFFFFF)
    wide = (wide << 20).bitwise_or_(wide).bitwise_and_(0x00000FFF00000FFF)
    wide = (wide << 10).bitwise_or_(wide).bitwise_and_(0x003F003F003F003F)
    return (wide << 5).bitwise_or_(wide).bitwise_and_(0x0707070707070707)
