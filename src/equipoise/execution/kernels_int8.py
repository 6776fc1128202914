"""Products of bytes with bytes on CPUs that have instructions for them (VNNI): several times the speed of floats.

Inputs are rounded to 8 bits per row on the fly, products summed exactly in 32 bits and scaled by the row and by the output.

Shapes: N rows sorted by slot, G slots of a group, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from equipoise.execution.kernels import in_units

# oneDNN's fast kernels take unsigned bytes beside signed weights; signed inputs fall into its reference code.
ZERO = 128
LARGEST = 127
# Rows that the weights are laid out for. Measured: 10 to 20 % faster than no hint at 1 to 16 rows, equal at 256.
LAYOUT_ROWS = 64


@dataclass(frozen=True, eq=False, slots=True)
class ByteRows:
    """Rows rounded to 8 bits.

    Attributes:
        codes_NI: uint8, 128 stands for zero.
        scales_N1: what one step is worth in each row, fp32.
    """

    codes_NI: Tensor
    scales_N1: Tensor

    def __len__(self) -> int:
        return len(self.codes_NI)

    def __getitem__(self, rows: Tensor | slice) -> ByteRows:
        return ByteRows(self.codes_NI[rows], self.scales_N1[rows])


def byte_rows(x_NI: Tensor) -> ByteRows:
    """Round each row to the nearest of 255 steps of its largest magnitude: x ~ (code - 128) * scale, scale = max |x| / 127.

    Args:
        x_NI: rows of any float type; NaN and infinity give a row of NaN.
    """
    x_NI = x_NI.detach().float()
    # A row of zeros keeps a scale whose inverse is finite.
    scales_N1 = x_NI.abs().amax(1, keepdim=True).clamp_min_(1e-30).div_(LARGEST)
    codes_NI = (x_NI / scales_N1).round_().add_(ZERO).to(torch.uint8)
    return ByteRows(codes_NI, scales_N1)


@dataclass(frozen=True, eq=False, slots=True)
class Int8Kernel:
    """int8 weights with one scale per output, in the layout that oneDNN multiplies fastest.

    Attributes:
        packed: for each slot an opaque tensor of the bytes of its codes, reordered.
        scales_GO: scale of each output, fp32.
        zero_O: zero points of symmetric weights.
    """

    packed: tuple[Tensor, ...]
    scales_GO: Tensor
    zero_O: Tensor

    @classmethod
    def pack(cls, codes_GOI: Tensor, scales_GO: Tensor) -> Int8Kernel:
        """Lay out codes as stored; they can be dropped afterwards (see `codes`)."""
        hint = [LAYOUT_ROWS, codes_GOI.shape[2]]
        packed = tuple(torch.ops.onednn.qlinear_prepack.default(codes_OI, hint) for codes_OI in codes_GOI)
        return cls(packed, scales_GO.float(), torch.zeros(codes_GOI.shape[1], dtype=torch.int32))

    def codes(self) -> Tensor:
        """int8 [G, O, I]: exactly the codes that were packed."""
        return torch.stack([packed.to_dense().t() for packed in self.packed])

    def rows(self, x_NI: Tensor) -> ByteRows:
        """Rows rounded to 8 bits."""
        return byte_rows(x_NI)

    def linear(self, rows: ByteRows, slots: Sequence[int], counts: Sequence[int]) -> Tensor:
        """One product per slot, fp32."""
        y_NO = torch.empty(len(rows), self.scales_GO.shape[1])
        units = in_units(rows.codes_NI, counts, y_NO.shape[1])
        parts = zip(units, rows.scales_N1.split(counts), y_NO.split(counts), slots, strict=True)
        for (codes_nI, own), scales_n1, y_nO, slot in parts:
            product_nO = _product(codes_nI, self.packed[slot], self.scales_GO[slot], self.zero_O)
            torch.mul(product_nO[own], scales_n1, out=y_nO)
        return y_NO


@lru_cache(maxsize=1)
def has_int8_kernel() -> bool:
    """Whether this CPU multiplies bytes faster than floats and this torch reaches it and computes what is expected."""
    if not getattr(torch.cpu, "_is_vnni_supported", lambda: False)():
        return False
    codes_OI, rows_NI = torch.arange(-60, 60).view(8, 15).to(torch.int8), torch.arange(0, 30).view(2, 15) * 8
    try:
        kernel = Int8Kernel.pack(codes_OI[None], torch.ones(1, 8))
        y_NO = _product(rows_NI.to(torch.uint8), kernel.packed[0], kernel.scales_GO[0], kernel.zero_O)
        same = bool(torch.equal(kernel.codes()[0], codes_OI))
    except (AttributeError, RuntimeError):  # the operators belong to torch's compiler and may be missing or changed
        return False
    return same and bool(torch.equal(y_NO, (rows_NI - ZERO).float() @ codes_OI.float().t()))


def _product(codes_NI: Tensor, packed: Tensor, scales_O: Tensor, zero_O: Tensor) -> Tensor:
    """fp32 [N, O]: (codes - 128) times transposed weights, times the scale of the output."""
    product: Any = torch.ops.onednn.qlinear_pointwise.default
    return product(  # type: ignore[no-any-return]
        codes_NI, 1.0, ZERO, packed, scales_O, zero_O, None, 1.0, 0, torch.float32, "none", [], ""
    )
