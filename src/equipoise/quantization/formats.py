"""Weights in few bits: rounding, packing and unpacking, batched over any leading axes (experts).

A quantized matrix is packed row by row, ceil(columns * bits / 8) bytes each, beside one bf16 scale per row and group;
its bytes are exactly those that `precisions.Precision.matrix_bytes` gives to the planner.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from equipoise.errors import EquipoiseError, ModelError
from equipoise.precisions import Precision, precision
from equipoise.quantization.methods import METHODS, group_columns, spread_scales

FLOAT_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, eq=False, slots=True)
class QuantizedMatrix:
    """Matrices [..., rows, columns] in an integer format.

    Attributes:
        packed: int8 [..., rows, columns] for 8 bits, uint8 [..., rows, ceil(columns / 2)] for 4 bits.
        scales: bf16 [..., rows, groups].
        columns: inputs of the matrix, which packing to whole bytes hides.
        precision: the storage format.
    """

    packed: Tensor
    scales: Tensor
    columns: int
    precision: Precision

    @property
    def nbytes(self) -> int:
        """Bytes stored: packed weights and scales."""
        return int(self.packed.nbytes + self.scales.nbytes)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrices [..., rows, columns] as floats."""
        return dequantize(self.packed, self.scales, self.columns, self.precision, dtype)


def packed_columns(columns: int, precision: Precision) -> int:
    """Bytes of one packed row."""
    return (columns * precision.bits + 7) // 8


def scale_groups(columns: int, precision: Precision) -> int:
    """Scales of one row."""
    return -(-columns // group_columns(columns, precision))


def packed_dtype(precision: Precision) -> torch.dtype:
    """Type of the packed tensor: signed bytes for 8 bits, pairs of nibbles for 4."""
    return torch.int8 if precision.bits == 8 else torch.uint8


def quantize(weight: Tensor, name: str | Precision, method: str = "rtn") -> QuantizedMatrix:
    """Round and pack weights into an integer format.

    Args:
        weight: [..., rows, columns] weights, finite.
        name: an integer precision or its name ("int8", "int4", "int4-g64").
        method: a rounding of `quantization.methods.METHODS`.

    Raises:
        EquipoiseError: a float precision, an unknown precision or method.
        ModelError: NaN or infinite weights.
    """
    form = name if isinstance(name, Precision) else precision(name)
    if form.is_float:
        raise EquipoiseError(f"'{form.name}' is a float format; integer formats are int8, int4 and int4-gN.")
    require_finite(weight)
    codes, scales = METHODS.get(method)(weight, form)
    return QuantizedMatrix(pack(codes, form), scales, weight.shape[-1], form)


def pack(codes: Tensor, form: Precision) -> Tensor:
    """Codes [..., columns] as packed bytes.

    4-bit codes are two's complement nibbles: the first half of a row in the low ones, the second half in the high ones, so
    that unpacking writes two contiguous halves. An odd last nibble is zero.
    """
    if form.bits == 8:
        return codes.to(torch.int8)
    low, high = torch.nn.functional.pad(codes.to(torch.int16), (0, codes.shape[-1] % 2)).chunk(2, dim=-1)
    return ((low & 15) | (high << 4)).to(torch.uint8)


def unpack(packed: Tensor, columns: int, form: Precision) -> Tensor:
    """The int8 codes [..., columns] of packed bytes; the inverse of `pack`."""
    if form.bits == 8:
        return packed
    signed = packed.view(torch.int8)
    return torch.cat(((signed << 4) >> 4, signed >> 4), dim=-1)[..., :columns]


def dequantize(packed: Tensor, scales: Tensor, columns: int, form: Precision, dtype: torch.dtype = torch.float32) -> Tensor:
    """Packed bytes and scales as float matrices [..., rows, columns]."""
    codes = unpack(packed, columns, form).to(dtype)
    groups = scales.shape[-1]
    if groups > 1 and groups * group_columns(columns, form) == columns:
        return codes.unflatten(-1, (groups, -1)).mul_(scales.to(dtype).unsqueeze(-1)).flatten(-2)
    return codes.mul_(spread_scales(scales.to(dtype), columns, form))


def round_trip(weight: Tensor, name: str | Precision, method: str = "rtn") -> Tensor:
    """What a storage format keeps of a weight: the matrix stored and read back, in its own dtype.

    Args:
        weight: [..., rows, columns] weights.
        name: any precision or its name, floats included.
        method: rounding of the integer formats.
    """
    form = name if isinstance(name, Precision) else precision(name)
    if form.is_float:
        return to_float(weight, form).to(weight.dtype)
    return quantize(weight, form, method).dequantize(torch.float32).to(weight.dtype)


def to_float(weight: Tensor, form: Precision) -> Tensor:
    """The weights in a float storage format.

    Raises:
        ModelError: NaN or infinite weights, or weights beyond the format's range (fp16 ends at 65504).
    """
    require_finite(weight)
    stored = weight.to(FLOAT_DTYPES[form.name])
    if stored.dtype == torch.float16 and weight.dtype != torch.float16 and not torch.isfinite(stored).all():
        raise ModelError("weights beyond 65504 do not fit in fp16; use bf16 for this model.")
    return stored


def require_finite(weight: Tensor) -> None:
    """Raise `ModelError` when a weight is NaN or infinite."""
    # A sum is finite only if every term is, and needs no mask as large as the weights.
    if not torch.isfinite(weight.sum(dtype=torch.float64)):
        bad = int((~torch.isfinite(weight)).sum())
        raise ModelError(f"{bad} of {weight.numel()} expert weights are NaN or infinite; check the checkpoint.")
