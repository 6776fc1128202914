"""The context that all ranks hold alike: a forward's new keys and values, kept aside where they are made, then given to all.

Shapes: B rows of the batch, N of them on this rank, H ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from equipoise.dispatch.placement import Ints
from equipoise.errors import ModelError
from equipoise.execution.expert_parallel.ranks import Ranks
from equipoise.execution.expert_parallel.residency import rows_on

Part = tuple[Tensor, Ints]
"""[N, ...] this rank's rows of something, and [B] which rank had each row of it."""
KINDS = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers of caches whose whole state is keys and values of one row of the batch each."""


class ResidentCache(Cache):  # type: ignore[misc]
    """A cache as the rows on this rank see it during one forward; the cache itself is as it was until `parts` are shared.

    Attributes:
        whole: the cache of all rows, alike on every rank.
        rows_N: the rows that are here now.
        new: keys, values and owners of the rows that each layer was run on here, by layer.
    """

    def __init__(self, whole: Cache) -> None:
        """A view of a cache.

        Raises:
            ModelError: a cache of another kind than those that grow.
        """
        check_cache(whole)
        super().__init__(layers=whole.layers)
        self.whole = whole
        self.rows_N = torch.empty(0, dtype=torch.long)
        self.owner_B: Ints = np.empty(0, np.int64)
        self.new: dict[int, tuple[Tensor, Tensor, Ints]] = {}

    def turn_to(self, rows_N: Tensor, owner_B: Ints) -> None:
        """The rows that the next layer is run on; a rank without any runs the first one for nothing."""
        self.rows_N, self.owner_B = rows_N, owner_B

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """The rows' own history and what is new, which is kept aside."""
        held = len(self.rows_N)
        self.new[layer_idx] = (key_states[:held], value_states[:held], self.owner_B)
        layer = self.whole.layers[layer_idx] if layer_idx < len(self.whole.layers) else None
        if layer is None or not layer.is_initialized:
            return key_states, value_states
        rows_N = self.rows_N if held else torch.zeros(1, dtype=torch.long, device=self.rows_N.device)
        part = copy.copy(layer)
        if held < len(layer.keys):
            part.keys, part.values = layer.keys[rows_N], layer.values[rows_N]
        return part.update(key_states, value_states, *args, **kwargs)

    def parts(self) -> list[Part]:
        """What all ranks must be given, layer by layer."""
        return [(state, owner_B) for *states, owner_B in self.new.values() for state in states]

    def add(self, shared: Sequence[Tensor]) -> None:
        """Add the new keys and values of all rows to the cache.

        Args:
            shared: `parts` of all rows.
        """
        for at, layer_idx in enumerate(self.new):
            self.whole.update(shared[2 * at], shared[2 * at + 1], layer_idx)


def check_cache(cache: Any) -> None:
    """Raise `ModelError` unless all of a cache's state is keys and values of single rows that grow."""
    odd = [type(layer).__name__ for layer in cache.layers if type(layer) not in KINDS]
    if odd or cache.offloading:
        what = "an offloaded cache" if not odd else f"a cache with {odd[0]}"
        raise ModelError(
            f"context='coherent' cannot keep {what} alike on all ranks; it needs keys and values of softmax attention that "
            "grow (transformers' DynamicCache, the default of generate, with full or sliding attention). Use context='own'."
        )


def share_rows(ranks: Ranks, parts: Sequence[Part], what: str) -> tuple[list[Tensor], int]:
    """Give every rank all rows of some tensors, in one exchange.

    Args:
        ranks: who gives and gets.
        parts: this rank's rows of each, and who has which; shapes beyond the rows are alike on all ranks.
        what: what is being done, for an error.

    Returns:
        [B, ...] all rows of each, and the bytes that this rank sent.
    """
    if ranks.size == 1:
        return [rows for rows, _ in parts], 0
    row_bytes = [rows[:1].nbytes if len(rows) else rows.new_empty(1, *rows.shape[1:]).nbytes for rows, _ in parts]
    held_PH = [[rows_on(owner_B, rank) for rank in range(ranks.size)] for _, owner_B in parts]
    mine = torch.cat([rows.contiguous().view(-1).view(torch.uint8) for rows, _ in parts])
    sizes_H = [sum(n * len(held_H[rank]) for n, held_H in zip(row_bytes, held_PH, strict=True)) for rank in range(ranks.size)]
    assert len(mine) == sizes_H[ranks.rank], "this rank has the rows that all believe it has"
    others = [rank for rank in range(ranks.size) if rank != ranks.rank]
    send_H, receive_H = [0 if r == ranks.rank else len(mine) for r in range(ranks.size)], list(sizes_H)
    receive_H[ranks.rank] = 0
    data = ranks.swap(mine.repeat(len(others)), send_H, receive_H, what)
    whole = [rows.new_empty(len(owner_B), *rows.shape[1:]) for rows, owner_B in parts]
    for full, (rows, _), held_H in zip(whole, parts, held_PH, strict=True):
        full[torch.from_numpy(held_H[ranks.rank]).to(full.device)] = rows
    begin = 0
    for rank in others:
        for full, held_H, size in zip(whole, held_PH, row_bytes, strict=True):
            end = begin + size * len(held_H[rank])
            piece = data[begin:end].clone()  # aligned for its type
            full[torch.from_numpy(held_H[rank]).to(full.device)] = piece.view(full.dtype).view(-1, *full.shape[1:])
            begin = end
    return whole, len(mine) * len(others)
