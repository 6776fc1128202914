"""Weights of 4 bits multiplied as they lie in memory, for few rows; for many rows they become floats block by block.

torch's CPU kernel wants blocks of 64 outputs: byte j of input k in a block holds output j in its low half (a nibble) and
output 32 + j in its high half. The reordered weights are as many bytes as the stored ones. Weights of 2 and 3 bits lie in
the same order, their bits packed closer, and are spread to nibbles slot by slot when they are used: their two low bits in
one plane, four codes a byte, the third bit in another, eight a byte.

Shapes: N rows sorted by slot, G slots of a group, O outputs, I inputs, B blocks of 64 outputs, J groups of inputs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from equipoise.execution.kernels import CHUNK_BYTES, has_bfloat16_unit

BITS = (2, 3, 4)
BLOCK = 64
GROUPS = (32, 64, 128, 256)
ZERO = 8
"""The nibble that stands for zero in the kernel."""
# Rows of a slot up to which the packed kernel is faster, whose time grows with every row; measured with and without a
# unit for bf16.
PACKED_ROWS = 64
PACKED_ROWS_NO_UNIT = 96

assert sys.byteorder == "little", "the halves of a word are read as bytes, the low one first"


@dataclass(frozen=True, eq=False, slots=True)
class NibbleKernel:
    """Weights of 2, 3 or 4 bits in groups of inputs, in the order of torch's CPU kernel for 4 bits.

    Attributes:
        bits: bits of a code.
        packed: uint8 [G, O, I * bits / 8]; with 3 bits two planes, I / 4 and I / 8 wide.
        scales: bf16 [G, J, O, 2] scale and shift: weight = (nibble - 8) * scale + shift.
    """

    bits: int
    packed: tuple[Tensor, ...]
    scales: Tensor

    @classmethod
    def pack(cls, bits: int, codes: Iterable[Tensor], scales_GOJ: Tensor, zeros_GOJ: Tensor | None) -> NibbleKernel:
        """Lay out codes and scales, which can be dropped afterwards (see `codes` and `row_scales`).

        Args:
            bits: bits of a code, 2 to 4.
            codes: int8 [O, I] of each slot, -2^(bits-1) to 2^(bits-1) - 1.
            scales_GOJ: bf16.
            zeros_GOJ: int8 zero points of asymmetric formats.
        """
        scales_GJO = scales_GOJ.to(torch.bfloat16).transpose(1, 2)
        shift_GJO = torch.zeros_like(scales_GJO) if zeros_GOJ is None else -zeros_GOJ.transpose(1, 2) * scales_GJO
        planes = zip(*(_planes(bits, codes_OI) for codes_OI in codes), strict=True)
        packed = tuple(torch.stack(plane) for plane in planes)
        return cls(bits, packed, torch.stack((scales_GJO, shift_GJO), dim=-1).contiguous())

    def nibbles(self, slot: int) -> Tensor:
        """uint8 [O, I / 2] nibbles of a slot, as the kernel takes them: code + 8."""
        if self.bits == 4:
            return self.packed[0][slot]
        wide = self.packed[0][slot].to(torch.int16)
        wide = (wide << 4).bitwise_or_(wide).bitwise_and_(0x0F0F)
        wide = (wide << 2).bitwise_or_(wide).bitwise_and_(0x3333)
        if self.bits == 2:
            return wide.add_(0x6666).view(torch.uint8)
        third = self.packed[1][slot].to(torch.int32)
        third = (third << 12).bitwise_or_(third).bitwise_and_(0x000F000F)
        third = (third << 6).bitwise_or_(third).bitwise_and_(0x03030303)
        third = (third << 3).bitwise_or_(third).bitwise_and_(0x11111111)
        return wide.view(torch.int32).bitwise_or_(third.bitwise_left_shift_(2)).add_(0x44444444).view(torch.uint8)

    def codes(self) -> Tensor:
        """int8 [G, O, I]: exactly the codes that were packed."""
        return torch.stack([_codes(self.nibbles(slot)) for slot in range(len(self.scales))])

    def row_scales(self) -> Tensor:
        """bf16 [G, O, J]: exactly the scales that were packed."""
        return self.scales[..., 0].transpose(1, 2).contiguous()

    def rows(self, x_NI: Tensor) -> Tensor:
        """Rows in bf16, the only dtype that the kernel is fast in."""
        return x_NI.detach().to(torch.bfloat16)

    def linear(self, rows: Tensor, slots: Sequence[int], counts: Sequence[int]) -> Tensor:
        """One product per slot, bf16."""
        y_NO = torch.empty(len(rows), self.scales.shape[2], dtype=torch.bfloat16)
        limit = PACKED_ROWS if has_bfloat16_unit() else PACKED_ROWS_NO_UNIT
        for x_nI, y_nO, slot in zip(rows.split(list(counts)), y_NO.split(list(counts)), slots, strict=True):
            if len(x_nI) <= limit:
                y_nO.copy_(_product(x_nI, self.nibbles(slot), self.scales[slot]))
            else:
                _expanded(x_nI, self.nibbles(slot), self.scales[slot], y_nO)
        return y_NO


def fits_nibbles(bits: int, rows: int, columns: int, group: int | None) -> bool:
    """Whether the kernel takes a matrix of these outputs and inputs, of this many bits in groups of this size."""
    return bits in BITS and group in GROUPS and columns % group == 0 and rows % BLOCK == 0


@lru_cache(maxsize=1)
def has_nibble_kernel() -> bool:
    """Whether this torch has the kernel for this CPU, with the layout known here."""
    if not getattr(torch.cpu, "_is_avx512_supported", lambda: False)():  # elsewhere it is reference code or laid out otherwise
        return False
    codes_OI = (torch.arange(BLOCK * 32).view(BLOCK, 32) * 7 % 16 - 8).to(torch.int8)
    x_NI = torch.arange(64).view(2, 32).to(torch.bfloat16)
    try:
        kernel = NibbleKernel.pack(4, [codes_OI], torch.ones(1, BLOCK, 1), None)
        y_NO = _product(x_NI, kernel.nibbles(0), kernel.scales[0])
    except (AttributeError, RuntimeError):  # the operator is not part of torch's public interface
        return False
    return bool(torch.equal(y_NO, (x_NI.float() @ codes_OI.float().t()).to(torch.bfloat16)))


def _planes(bits: int, codes_OI: Tensor) -> tuple[Tensor, ...]:
    """Codes in the kernel's order, packed to whole bytes: [O, I / 2], or the planes [O, I / 4] and [O, I / 8]."""
    lowest = ZERO if bits == 4 else 2 ** (bits - 1)
    blocks_BIO = (codes_OI + lowest).view(torch.uint8).view(-1, BLOCK, codes_OI.shape[1]).transpose(1, 2).contiguous()
    low, high = blocks_BIO.chunk(2, dim=-1)
    pairs = low.bitwise_or(high << 4).view(len(codes_OI), -1)
    if bits == 4:
        return (pairs,)
    two = (pairs & 3) | ((pairs >> 2) & 12)
    planes = [two[:, 0::2] | (two[:, 1::2] << 4)]
    if bits == 3:
        one = ((pairs >> 2) & 1) | ((pairs >> 5) & 2)
        planes.append(one[:, 0::4] | (one[:, 1::4] << 2) | (one[:, 2::4] << 4) | (one[:, 3::4] << 6))
    return tuple(planes)


def _codes(nibbles: Tensor) -> Tensor:
    """int8 [O, I] of nibbles [O, I / 2] in the kernel's order."""
    bytes_BIO = nibbles.view(-1, nibbles.shape[1] * 2, BLOCK // 2)
    both_BIO = torch.cat((bytes_BIO & 15, bytes_BIO >> 4), dim=-1).view(torch.int8).sub_(ZERO)
    return both_BIO.transpose(1, 2).reshape(-1, both_BIO.shape[1])


def _product(x_NI: Tensor, nibbles: Tensor, scales: Tensor) -> Tensor:
    product: Any = torch.ops.aten._weight_int4pack_mm_for_cpu.default
    return product(x_NI, nibbles, x_NI.shape[1] // len(scales), scales)  # type: ignore[no-any-return]


def _expanded(x_NI: Tensor, nibbles: Tensor, scales: Tensor, y_NO: Tensor) -> None:
    """The product with weights expanded to floats, some blocks of outputs at a time.

    A byte is copied to both halves of a 16-bit word and masked, so that every step but the transposition writes whole
    contiguous tensors; that leaves outputs j and 32 + j of a block side by side, which is undone on the products.
    """
    inputs, groups = x_NI.shape[1], len(scales)
    dtype = torch.bfloat16 if has_bfloat16_unit() else torch.float32
    x_NI = x_NI.to(dtype)
    bytes_BIO = nibbles.view(-1, inputs, BLOCK // 2)
    scales_2JBO = scales.view(groups, -1, 2, BLOCK // 2, 2).permute(4, 0, 1, 3, 2).reshape(2, groups, 1, -1, BLOCK).to(dtype)
    shifted = bool(scales_2JBO[1].any())
    step = max(1, CHUNK_BYTES // (inputs * BLOCK * dtype.itemsize))
    for first in range(0, len(bytes_BIO), step):
        wide = bytes_BIO[first : first + step].to(torch.int16)
        wide = (wide << 4).bitwise_or_(wide).bitwise_and_(0x0F0F)
        number = len(wide)
        scale, shift = scales_2JBO[:, :, :, first : first + step]
        # One wide matrix is multiplied faster than many of 64 columns.
        weight_IBO = torch.empty(inputs, number, BLOCK, dtype=dtype)
        weight_IBO.copy_(wide.view(torch.int8).sub_(ZERO).transpose(0, 1))
        weight_JIBO = weight_IBO.view(groups, -1, number, BLOCK).mul_(scale)
        if shifted:
            weight_JIBO.add_(shift)
        y_NBO = (x_NI @ weight_IBO.view(inputs, -1)).view(-1, number, BLOCK // 2, 2).transpose(2, 3)
        y_NO[:, first * BLOCK : (first + number) * BLOCK] = y_NBO.reshape(len(x_NI), -1)
