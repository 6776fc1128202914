"""Weights as they are stored: rounded, packed and read back, batched over any leading axes (experts).

A quantized matrix is three tensors, laid out as in compressed-tensors checkpoints: codes (`quantization.codes.pack`), bf16
scales, and zero points where the format has them. Their bytes are exactly those that `precisions.Precision.matrix_bytes`
gives to the planner.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from equipoise.errors import EquipoiseError, ModelError
from equipoise.precisions import Precision, precision
from equipoise.quantization.codes import (
    float_from_fp8,
    group_columns,
    pack,
    pack_zeros,
    packed_dtype,
    spread_scales,
    unpack,
    unpack_zeros,
)
from equipoise.quantization.methods import METHODS, Rounded

FLOAT_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, eq=False, slots=True)
class QuantizedMatrix:
    """Matrices [..., rows, columns] in a quantized format.

    Attributes:
        packed: codes; int8 or float8 [..., rows, columns] for 8 bits, int32 [..., rows, ceil(columns * bits / 32)] for fewer.
        scales: bf16 [..., rows, groups].
        zeros: codes of zero, packed along the rows: int8 [..., rows, groups] for 8 bits,
            int32 [..., ceil(rows * bits / 32), groups] for fewer; None in symmetric formats.
        columns: inputs of the matrix, which packing to whole words hides.
        precision: the storage format.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    columns: int
    precision: Precision

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes, scales and zero points."""
        return int(self.packed.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrices [..., rows, columns] as floats."""
        return dequantize(self.packed, self.scales, self.zeros, self.columns, self.precision, dtype)


def empty_storage(rows: int, columns: int, form: Precision) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of each stored tensor of one [rows, columns] matrix: "packed", "scales" and, if asymmetric, "zeros".

    Raises:
        EquipoiseError: a float precision.
    """
    _require_quantized(form)
    groups = form.groups(columns)
    stored: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "packed": ((rows, form.packed_columns(columns)), packed_dtype(form)),
        "scales": ((rows, groups), torch.bfloat16),
    }
    if not form.symmetric:
        stored["zeros"] = ((form.zero_rows(rows), groups), torch.int8 if form.bits == 8 else torch.int32)
    return stored


def quantize(weight: Tensor, name: str | Precision, method: str = "rtn", hessian: Tensor | None = None) -> QuantizedMatrix:
    """Round and pack weights into a quantized format.

    Args:
        weight: [..., rows, columns] weights, finite.
        name: a quantized precision or its name ("int8", "int4", "int3-g64-asym", "fp8").
        method: a rounding of `quantization.methods.METHODS`.
        hessian: [..., columns, columns] of the inputs, for methods that look at what the weights are multiplied with.

    Raises:
        EquipoiseError: a float precision, an unknown precision or method, or a method whose Hessian is missing.
        ModelError: NaN or infinite weights.
    """
    form = name if isinstance(name, Precision) else precision(name)
    _require_quantized(form)
    chosen = METHODS.get(method)
    if chosen.needs_hessian and hessian is None:
        raise EquipoiseError(f"quantization method '{method}' needs calibration text (its Hessian); give some, or use 'rtn'.")
    require_finite(weight)
    return store(chosen.round(weight, form, hessian), weight.shape[-1], form)


def store(rounded: Rounded, columns: int, form: Precision) -> QuantizedMatrix:
    """Rounded weights as stored.

    Args:
        rounded: codes [..., rows, columns], their scales and zero points.
        columns: inputs of the matrix.
        form: the format they were rounded to.
    """
    assert (rounded.zeros is None) == form.symmetric, f"{form.name} was rounded with the wrong kind of zero"
    zeros = None if rounded.zeros is None else pack_zeros(rounded.zeros, form)
    return QuantizedMatrix(pack(rounded.codes, form), rounded.scales.to(torch.bfloat16), zeros, columns, form)


def dequantize(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, columns: int, form: Precision, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Stored codes, scales and zero points as float matrices [..., rows, columns]: (code - zero) * scale.

    The difference is exact in every float type; the product is rounded once, to `dtype`.
    """
    codes = float_from_fp8(packed, dtype) if form.is_fp8 else unpack(packed, columns, form).to(dtype)
    scales = scales.to(dtype)
    shift = None if zeros is None else unpack_zeros(zeros, packed.shape[-2], form).to(dtype)
    groups = scales.shape[-1]
    if groups > 1 and groups * group_columns(columns, form) == columns:
        codes = codes.unflatten(-1, (groups, -1))
        if shift is not None:
            codes = codes.sub_(shift.unsqueeze(-1))
        return codes.mul_(scales.unsqueeze(-1)).flatten(-2)
    if shift is not None:
        codes = codes.sub_(spread_scales(shift, columns, form))
    return codes.mul_(spread_scales(scales, columns, form))


def round_trip(weight: Tensor, name: str | Precision, method: str = "rtn") -> Tensor:
    """What a storage format keeps of a weight: the matrix stored and read back, in its own dtype.

    Args:
        weight: [..., rows, columns] weights.
        name: any precision or its name, floats included.
        method: rounding of the quantized formats.
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


def _require_quantized(form: Precision) -> None:
    if form.is_float:
        raise EquipoiseError(f"'{form.name}' is a float format; quantized formats are int8, int4, int3, int2 and fp8.")
