"""Matrix products of sorted rows with the experts they belong to, for each kind of storage.

Shapes: N rows sorted by slot, G slots of a group, O outputs, I inputs. `count_G` says how many rows each slot has.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

# Weights of several small slots are converted at once, to spare calls; large slots one by one, to stay in the cache.
CHUNK_BYTES = 4 << 20
ALIGNMENT = 16
Slots = list[int] | slice


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
        return _loop(x_NI, weight_GOI, count_G.tolist())
    return F.grouped_mm(x_NI, weight_GOI.transpose(-2, -1), offs=count_G.cumsum(0, dtype=torch.int32))


def converted_linear(x_NI: Tensor, read: Callable[[Slots], Tensor], outputs: int, count_G: Tensor) -> Tensor:
    """The same for weights that must be converted first: active slots only, in chunks, so that little is held at a time.

    Args:
        x_NI: rows sorted by slot.
        read: gives the weights [len(slots), O, I] of some slots in the dtype of the rows.
        outputs: O.
        count_G: rows of each slot.

    Returns:
        [N, O] products.
    """
    counts = count_G.tolist()
    active = [slot for slot, count in enumerate(counts) if count]
    size = max(1, CHUNK_BYTES // (outputs * x_NI.shape[1] * x_NI.element_size()))
    if len(active) <= size:
        return grouped_linear(x_NI, read(active), count_G[active]) if active else x_NI.new_empty(0, outputs)
    y_NO = x_NI.new_empty(len(x_NI), outputs)
    start = 0
    for first in range(0, len(active), size):
        slots = active[first : first + size]
        stop = start + sum(counts[slot] for slot in slots)
        # A run of neighbours is read in place; others would be copied together first.
        run = slice(slots[0], slots[-1] + 1) if slots[-1] - slots[0] == len(slots) - 1 else slots
        weight = read(run)
        part = x_NI[start:stop]
        y_NO[start:stop] = F.linear(part, weight[0]) if len(slots) == 1 else grouped_linear(part, weight, count_G[slots])
        start = stop
    return y_NO


def scaled_rows(y_NO: Tensor, scales_GO: Tensor, count_G: Tensor) -> Tensor:
    """Multiply each row by the output scales of its slot, in place."""
    return y_NO.mul_(scales_GO.to(y_NO.dtype).repeat_interleave(count_G, dim=0, output_size=len(y_NO)))


def int8_linear(x_NI: Tensor, codes_GOI: Tensor, scales_GO: Tensor, count_G: Tensor) -> Tensor:
    """The same with both sides in 8 bits: weights as stored, rows rounded to 8 bits on the fly, sums exact in 32 bits.

    Args:
        x_NI: rows sorted by slot.
        codes_GOI: int8 weights, as stored.
        scales_GO: scale of each output channel.
        count_G: rows of each slot.

    Returns:
        [N, O] products in the dtype of the rows.
    """
    # A row of zeros keeps a scale whose inverse is finite.
    largest_N1 = x_NI.abs().amax(1, keepdim=True).float().clamp_min(1e-30)
    codes_NI = (x_NI * (127 / largest_N1)).round_().to(torch.int8)
    y_NO = torch.empty(len(x_NI), codes_GOI.shape[1], device=x_NI.device)
    scales_GO = scales_GO.float()
    start = 0
    for slot, count in enumerate(count_G.tolist()):  # torch has no grouped int8 product
        if count:
            stop = start + count
            torch.mul(torch._int_mm(codes_NI[start:stop], codes_GOI[slot].t()), scales_GO[slot], out=y_NO[start:stop])
            start = stop
    return y_NO.mul_(largest_N1 / 127).to(x_NI.dtype)


@lru_cache(maxsize=1)
def has_int8_kernel() -> bool:
    """Whether this CPU multiplies bytes faster than floats (VNNI instructions) and torch reaches them."""
    supported = getattr(torch.cpu, "_is_vnni_supported", lambda: False)
    return bool(supported()) and hasattr(torch, "_int_mm")


def _has_grouped_kernel(x_NI: Tensor, weight_GOI: Tensor) -> bool:
    if not hasattr(F, "grouped_mm"):
        return False
    if x_NI.device.type == "cuda" and (x_NI.dtype != torch.bfloat16 or torch.cuda.get_device_capability(x_NI.device) < (8, 0)):
        return False
    row_bytes = (x_NI.shape[1] * x_NI.element_size(), weight_GOI.shape[1] * weight_GOI.element_size())
    return all(size % ALIGNMENT == 0 for size in row_bytes) and x_NI.data_ptr() % ALIGNMENT == 0


def _loop(x_NI: Tensor, weight_GOI: Tensor, counts: list[int]) -> Tensor:
    parts = x_NI.split(counts)
    return torch.cat([F.linear(part, weight) for part, weight in zip(parts, weight_GOI, strict=True) if len(part)])
