"""Matrix products of rows with the experts they belong to, for weights that are floats or must become floats first.

A kernel holds one matrix of every slot of a group (up or down), says how it wants its inputs (`rows`), and multiplies rows
sorted by slot (`linear`). `kernels_int8` and `kernels_int4` hold weights in layouts of their own.

Shapes: N rows sorted by slot, G slots of a group, O outputs, I inputs. `counts` says how many rows each listed slot has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

# Weights of several small slots are converted at once, to spare calls; large ones in parts, to stay in the cache and in
# memory that the allocator keeps.
CHUNK_BYTES = 4 << 20
# Rows that pass through both matrices together on a CPU: more would leave its caches, fewer would only cost calls.
BLOCK_ROWS = 256
# Rows of a slot up to which weights are read no faster in 16 bits than in 32, and the other way round.
FEW_ROWS = 4
# oneDNN makes code for every number of rows that it meets in 16 and 8 bits, and forgets it after a thousand others. Where
# numbers always differ that takes as long as the products with a small matrix, and more rows take less; not so with larger
# ones (measured: benchmarks/changing_rows.py).
ROW_UNIT = 16
UNIT_ELEMENTS = 1 << 20
# Outputs that zero points share words with, at most.
ROW_STEP = 32
ALIGNMENT = 16
Slots = list[int] | slice


class Kernel(Protocol):
    """One matrix of each slot of a group."""

    def rows(self, x_NI: Tensor) -> Any:
        """Inputs as `linear` takes them; what it returns can be indexed by rows."""
        ...

    def linear(self, rows: Any, slots: Sequence[int], counts: Sequence[int]) -> Tensor:
        """[N, O] products of rows sorted by slot with the transposed weights of their slots.

        Args:
            rows: rows of what `rows` returned.
            slots: ascending; all have rows.
            counts: rows of each, N in all.
        """
        ...


@dataclass(frozen=True, eq=False, slots=True)
class FloatKernel:
    """Weights [G, O, I] used as they are."""

    weight_GOI: Tensor

    def rows(self, x_NI: Tensor) -> Tensor:
        """Rows in the dtype of the weights."""
        return x_NI.to(self.weight_GOI.dtype)

    def linear(self, rows: Tensor, slots: Sequence[int], counts: Sequence[int]) -> Tensor:
        """One product per slot; that is also how torch groups them on a CPU."""
        if rows.device.type == "cpu":
            return _each(rows, [self.weight_GOI[slot] for slot in slots], counts)
        first, last = slots[0], slots[-1]
        count_G = torch.zeros(last + 1 - first, dtype=torch.int32)
        count_G[[slot - first for slot in slots]] = torch.tensor(counts, dtype=torch.int32)
        return grouped_linear(rows, self.weight_GOI[first : last + 1], count_G.to(rows.device))


@dataclass(frozen=True, eq=False, slots=True)
class ConvertedKernel:
    """Weights that become floats when they are used, a chunk at a time: some small slots, or some outputs of a large one.

    Attributes:
        read: gives the weights [len(slots), len(rows), I] of some slots and outputs in a dtype.
        outputs: O.
        dtype: what is computed in.
        scales_GO: multiplies the products, where all weights of an output share a scale: cheaper than on the weights.
    """

    read: Callable[[Slots, slice, torch.dtype], Tensor]
    outputs: int
    dtype: torch.dtype
    scales_GO: Tensor | None = None

    def rows(self, x_NI: Tensor) -> Tensor:
        """Rows as they are: the dtype depends on how many a slot has."""
        return x_NI

    def linear(self, rows: Tensor, slots: Sequence[int], counts: Sequence[int]) -> Tensor:
        """Products chunk by chunk."""
        # Few rows leave a product waiting for its weights, and those are in fp32 sooner.
        few = rows.device.type == "cpu" and max(counts) <= FEW_ROWS
        dtype = torch.float32 if few else self.dtype
        rows = rows.to(dtype)
        chunk = CHUNK_BYTES // (rows.shape[1] * dtype.itemsize)
        if rows.device.type != "cpu":
            y_NO = self._slots(rows, slots, counts, max(1, chunk // self.outputs))
        elif self.outputs <= chunk // 2:
            y_NO = self._slots(rows, slots, counts, chunk // self.outputs)
        else:
            step = max(ROW_STEP, chunk // ROW_STEP * ROW_STEP)
            y_NO = torch.empty(len(rows), self.outputs, dtype=dtype)
            for x_nI, y_nO, slot in zip(rows.split(list(counts)), y_NO.split(list(counts)), slots, strict=True):
                for first in range(0, self.outputs, step):
                    part = slice(first, first + step)
                    y_nO[:, part] = F.linear(x_nI, self.read(slice(slot, slot + 1), part, dtype)[0])
        if self.scales_GO is not None:
            y_NO = y_NO * spread(self.scales_GO, slots, counts).to(dtype)
        return y_NO

    def _slots(self, rows: Tensor, slots: Sequence[int], counts: Sequence[int], size: int) -> Tensor:
        """Products of whole slots, `size` at a time."""
        parts, start = [], 0
        for first in range(0, len(slots), size):
            chunk, rows_of = list(slots[first : first + size]), list(counts[first : first + size])
            # A run of neighbours is read in place; others would be copied together first.
            run = slice(chunk[0], chunk[-1] + 1) if chunk[-1] - chunk[0] == len(chunk) - 1 else chunk
            weight_GOI = self.read(run, slice(None), rows.dtype)
            part = rows[start : start + sum(rows_of)]
            if rows.device.type == "cpu":
                parts.append(_each(part, list(weight_GOI), rows_of))
            else:
                parts.append(grouped_linear(part, weight_GOI, torch.tensor(rows_of, device=rows.device)))
            start += sum(rows_of)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def blocks(counts: Sequence[int], limit: int) -> Iterator[tuple[list[int], list[int]]]:
    """Slots that have rows, with their counts, in runs of at most `limit` rows; a slot is not divided."""
    slots: list[int] = []
    rows: list[int] = []
    for slot, count in enumerate(counts):
        if rows and count and sum(rows) + count > limit:
            yield slots, rows
            slots, rows = [], []
        if count:
            slots.append(slot)
            rows.append(count)
    if rows:
        yield slots, rows


def spread(values_GO: Tensor, slots: Sequence[int], counts: Sequence[int]) -> Tensor:
    """[N, O] what a table has for the slot of each row."""
    if len(slots) == 1:
        return values_GO[slots[0]].expand(counts[0], -1)
    index_N = torch.repeat_interleave(torch.tensor(slots), torch.tensor(counts), output_size=sum(counts))
    return values_GO[index_N.to(values_GO.device)]


def grouped_linear(x_NI: Tensor, weight_GOI: Tensor, count_G: Tensor) -> Tensor:
    """Rows times the transposed weight of each row's slot, in one grouped kernel.

    Args:
        x_NI: rows sorted by slot, in the dtype of the weights.
        weight_GOI: weights of each slot.
        count_G: rows of each slot.

    Returns:
        [N, O] products.
    """
    if not _has_grouped_kernel(x_NI, weight_GOI):
        return _each(x_NI, list(weight_GOI), count_G.tolist())
    return F.grouped_mm(x_NI, weight_GOI.transpose(-2, -1), offs=count_G.cumsum(0, dtype=torch.int32))


def compute_dtype(x: Tensor, *, rounded: bool) -> torch.dtype:
    """The fastest dtype to multiply converted weights in.

    Args:
        x: the layer's inputs.
        rounded: whether inputs in 32 bits may be rounded to bf16.

    Returns:
        that of the inputs, except on CPUs: bf16 for fp32 inputs that may be rounded, where a unit multiplies it, and
        fp32 for 16-bit inputs where none does.
    """
    if x.device.type != "cpu":
        return x.dtype
    if x.dtype == torch.float32:
        return torch.bfloat16 if rounded and has_bfloat16_unit() else torch.float32
    return x.dtype if x.dtype == torch.bfloat16 and has_bfloat16_unit() else torch.float32


@lru_cache(maxsize=1)
def has_bfloat16_unit() -> bool:
    """Whether this CPU multiplies bf16 faster than fp32."""
    kinds = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, kind, lambda: False)()) for kind in kinds)


def in_units(x_NI: Tensor, counts: Sequence[int], outputs: int) -> Iterator[tuple[Tensor, slice]]:
    """The rows of each slot, for a small matrix as a multiple of `ROW_UNIT` rows, and where they are among those.

    What they are filled up with are rows of neighbouring slots, or zeros where there are not enough; its products are to be
    dropped. Up to `ROW_UNIT` rows stay as many as they are.

    Args:
        x_NI: rows sorted by slot.
        counts: rows of each slot, N in all.
        outputs: O of the matrix.
    """
    unit, start = ROW_UNIT if x_NI.shape[1] * outputs <= UNIT_ELEMENTS else 1, 0
    for count in counts:
        size = -(-count // unit) * unit if count > unit else count
        first = min(start, len(x_NI) - size)
        if first < 0:
            yield F.pad(x_NI[start : start + count], (0, 0, 0, size - count)), slice(0, count)
        else:
            yield x_NI[first : first + size], slice(start - first, start - first + count)
        start += count


def _each(x_NI: Tensor, weights: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    if x_NI.device.type == "cpu" and x_NI.element_size() == 2:
        units = zip(in_units(x_NI, counts, len(weights[0])), weights, strict=True)
        parts = [F.linear(rows, weight)[own] for (rows, own), weight in units if own.stop > own.start]
    else:
        parts = [F.linear(part, weight) for part, weight in zip(x_NI.split(list(counts)), weights, strict=True) if len(part)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _has_grouped_kernel(x_NI: Tensor, weight_GOI: Tensor) -> bool:
    if not hasattr(F, "grouped_mm"):
        return False
    if x_NI.device.type == "cuda" and (x_NI.dtype != torch.bfloat16 or torch.cuda.get_device_capability(x_NI.device) < (8, 0)):
        return False
    row_bytes = (x_NI.shape[1] * x_NI.element_size(), weight_GOI.shape[1] * weight_GOI.element_size())
    return all(size % ALIGNMENT == 0 for size in row_bytes) and x_NI.data_ptr() % ALIGNMENT == 0
