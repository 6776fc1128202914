"""Triton kernels for GPUs: rows of slots in several formats, multiplied in one launch.

Weights stay as they are stored and become floats in registers; sums are in fp32. A tile is some rows of one slot times some
outputs, so that slots of floats, bytes and 4-bit codes lie side by side in the launch's grid, and the grid is known without
waiting for the device to tell how many rows each slot got.

Shapes: N rows sorted by slot, P slots of the launch, G slots of a format, O outputs, I inputs, J groups of inputs, M tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton  # type: ignore[import-not-found,import-untyped]
import triton.language as tl  # type: ignore[import-not-found,import-untyped]
from torch import Tensor

FLOAT, BYTES, NIBBLES = 0, 1, 2
BLOCK_INPUTS = 32
"""Inputs of a step; a group of 4-bit codes is a multiple of it, so that a step needs one scale per output."""


@dataclass(frozen=True, eq=False, slots=True)
class Stored:
    """One matrix of the G slots of one format, as stored.

    Attributes:
        kind: FLOAT, BYTES (int8 with one scale per output) or NIBBLES (4 bits in groups, symmetric).
        weight: floats or int8 [G, O, I], or int32 [G, O, ceil(I / 8)].
        scales: bf16 [G, O, J]; None for floats.
        group: inputs of a scale.
    """

    kind: int
    weight: Tensor
    scales: Tensor | None = None
    group: int = 0


@dataclass(frozen=True, eq=False, slots=True)
class Tiles:
    """Which rows of which slot each tile has.

    Attributes:
        slot_M: slot; P where there is no work.
        first_M: its first row.
        stop_M: end of the slot's rows.
        rows: rows of a tile.
    """

    slot_M: Tensor
    first_M: Tensor
    stop_M: Tensor
    rows: int


def tiles_of(count_P: Tensor, total: int, rows: int | None = None) -> Tiles:
    """Tiles for so many rows of each slot, as many as could be needed at most.

    Args:
        count_P: rows of each slot, on the device.
        total: their sum N.
        rows: rows of a tile; by the mean of what a slot has when omitted.
    """
    slots = len(count_P)
    if rows is None:
        mean = total / slots
        rows = 16 if mean <= 16 else 32 if mean <= 32 else 64
    tiles_P = (count_P + (rows - 1)) // rows
    last_P, stop_P = tiles_P.cumsum(0), count_P.cumsum(0)
    # Every slot can have one tile that is not full.
    tile_M = torch.arange(total // rows + min(slots, total), device=count_P.device)
    slot_M = torch.searchsorted(last_P, tile_M, right=True)
    at_M = slot_M.clamp_max(slots - 1)
    first_M = (stop_P - count_P)[at_M] + (tile_M - (last_P - tiles_P)[at_M]) * rows
    return Tiles(slot_M, first_M, stop_P[at_M], rows)


def mixed_linear(x: Tensor, row_N: Tensor | None, stored: Sequence[Stored], tiles: Tiles, total: int) -> Tensor:
    """Rows times the transposed weights of their slots, for slots of several formats.

    Args:
        x: [T, I] inputs.
        row_N: which of them each row is, rows sorted by slot; None when they are the rows.
        stored: formats in the order of their slots, each kind at most once.
        tiles: rows of each slot.
        total: rows N.

    Returns:
        [N, O] products in the dtype of the inputs.
    """
    assert len({part.kind for part in stored}) == len(stored), "a launch takes one format of each kind"
    by_kind = {part.kind: part for part in stored}
    outputs, inputs = stored[0].weight.shape[1], x.shape[1]
    kinds = [part.kind for part in stored for _ in range(len(part.weight))]
    places = [place for part in stored for place in range(len(part.weight))]
    kind_P, place_P = torch.tensor([kinds, places], dtype=torch.int32).to(x.device, non_blocking=True)
    y_NO = x.new_empty(total, outputs)
    x = x.contiguous()
    floats, codes, nibbles = (by_kind.get(kind) for kind in (FLOAT, BYTES, NIBBLES))
    # A pointer is needed even where a kind is absent; it is not followed.
    weight = x if floats is None else floats.weight
    bytes_, byte_scales = (x, x) if codes is None else (codes.weight, codes.scales)
    pairs, pair_scales = (x, x) if nibbles is None else (nibbles.weight.view(torch.uint8), nibbles.scales)
    columns = 64 if outputs >= 64 else 16
    _mixed_kernel[(len(tiles.slot_M), triton.cdiv(outputs, columns))](
        x, x if row_N is None else row_N, y_NO, weight, bytes_, byte_scales, pairs, pair_scales,
        kind_P, place_P, tiles.slot_M, tiles.first_M, tiles.stop_M,
        len(kinds), outputs, inputs,
        pairs.shape[-1], 1 if nibbles is None else pair_scales.shape[-1],  # type: ignore[union-attr]
        INDEXED=row_N is not None, FLOATS=floats is not None, CODES=codes is not None, PAIRS=nibbles is not None,
        STEPS=1 if nibbles is None else nibbles.group // BLOCK_INPUTS,
        BLOCK_M=tiles.rows, BLOCK_N=columns, BLOCK_K=BLOCK_INPUTS,
    )  # fmt: skip
    return y_NO


@triton.jit  # type: ignore[untyped-decorator]
def _mixed_kernel(  # type: ignore[no-untyped-def]
    x, row, y, weight, codes, code_scales, pairs, pair_scales,
    kind_of, place_of, slot_of, first_of, stop_of,
    slots, outputs, inputs, pair_columns, groups,
    INDEXED: tl.constexpr, FLOATS: tl.constexpr, CODES: tl.constexpr, PAIRS: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile: BLOCK_M rows of a slot times BLOCK_N outputs."""
    tile = tl.program_id(0)
    slot = tl.load(slot_of + tile)
    if slot < slots:
        stop = tl.load(stop_of + tile)
        place = tl.load(place_of + slot).to(tl.int64)
        kind = tl.load(kind_of + slot)
        n = tl.load(first_of + tile) + tl.arange(0, BLOCK_M)
        o = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        live, real = n < stop, o < outputs
        source = n.to(tl.int64)
        if INDEXED:
            source = tl.load(row + n, mask=live, other=0).to(tl.int64)
        x_at = x + source[:, None] * inputs + k[None, :]
        of = place * outputs + o  # row of the stacked matrices
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if FLOATS:  # noqa: SIM102 (what is absent must not be compiled)
            if kind == 0:
                at = weight + of[None, :] * inputs + k[:, None]
                for start in range(0, inputs, BLOCK_K):
                    left = k < inputs - start
                    a = tl.load(x_at + start, mask=live[:, None] & left[None, :], other=0.0)
                    b = tl.load(at + start, mask=left[:, None] & real[None, :], other=0.0).to(a.dtype)
                    total = tl.dot(a, b, total, input_precision="ieee")
        if CODES:  # noqa: SIM102 (what is absent must not be compiled)
            if kind == 1:
                at = codes + of[None, :] * inputs + k[:, None]
                for start in range(0, inputs, BLOCK_K):
                    left = k < inputs - start
                    a = tl.load(x_at + start, mask=live[:, None] & left[None, :], other=0.0)
                    b = tl.load(at + start, mask=left[:, None] & real[None, :], other=0).to(a.dtype)
                    total = tl.dot(a, b, total, input_precision="ieee")
                total *= tl.load(code_scales + of, mask=real, other=0.0).to(tl.float32)[None, :]
        if PAIRS:  # noqa: SIM102 (what is absent must not be compiled)
            if kind == 2:
                at = pairs + of[None, :] * pair_columns + (k // 2)[:, None]
                for step in range(0, tl.cdiv(inputs, BLOCK_K)):
                    start = step * BLOCK_K
                    left = k < inputs - start
                    a = tl.load(x_at + start, mask=live[:, None] & left[None, :], other=0.0)
                    byte = tl.load(at + start // 2, mask=left[:, None] & real[None, :], other=0)
                    b = (((byte >> ((k % 2) * 4)[:, None].to(tl.uint8)) & 15).to(tl.int8) - 8).to(a.dtype)
                    scale = tl.load(pair_scales + of * groups + step // STEPS, mask=real, other=0.0).to(tl.float32)
                    total += tl.dot(a, b, input_precision="ieee") * scale[None, :]
        y_at = y + n.to(tl.int64)[:, None] * outputs + o[None, :]
        tl.store(y_at, total.to(y.dtype.element_ty), mask=live[:, None] & real[None, :])
