"""Least-loaded expert parallelism: what one rank cannot take in a batch is computed elsewhere, and the weights follow (LLEP).

Source: LLEP (arXiv:2601.17111) Algorithms 2 to 4. Of two readings this takes the one of the authors' code for the gate
(largest over mean *rank* load, not expert load), and rounds the capacity up, so that it can hold all tokens.
An expert with several copies is native to all of their ranks: those are filled first, the least loaded first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` to `stop` of an expert, counted in the order of the batch, on one rank."""

    expert: int
    rank: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Assignment:
    """Which rank computes which of an expert's tokens.

    Attributes:
        chunks: cover every token of every expert once.
        transfers: (expert, from, to) weights that are sent for this batch.
        capacity: tokens that a rank takes before others are asked; exceeded only when no rank has room worth a transfer.
    """

    chunks: tuple[Chunk, ...]
    transfers: tuple[tuple[int, int, int], ...]
    capacity: int

    def load(self, ranks: int) -> Ints:
        """[R] tokens on each rank."""
        sizes = [chunk.stop - chunk.start for chunk in self.chunks]
        return np.bincount([c.rank for c in self.chunks], sizes, ranks).astype(np.int64)


def least_loaded(
    load_E: Sequence[int],
    hosts: Sequence[Sequence[int]],
    ranks: int,
    *,
    alpha: float = 1.0,
    least: int = 1024,
    gate: float = 1.3,
) -> Assignment:
    """Keep tokens on the ranks that hold their expert up to a capacity, and spill the rest to the least loaded ranks.

    No rank is given more than `capacity + (ranks - 1) * (least - 1)` tokens unless the gate is closed (alpha >= 1): when no
    rank takes a rest, every other rank lacks room for `least` tokens and the native ones are full, so the rest is smaller
    than the room of all others together, and the least loaded of them is below capacity.

    Args:
        load_E: [E] tokens of each expert in the batch.
        hosts: ranks that have a copy of each expert.
        ranks: R.
        alpha: capacity over the mean rank load.
        least: fewest tokens that are worth a transfer of weights, unless they are all that is left (m of the paper).
        gate: largest over mean rank load below which nothing is moved (lambda of the paper).

    Returns:
        The assignment; its chunks are in the order in which they were made.
    """
    total = int(sum(load_E))
    capacity = int(np.ceil(alpha * total / ranks - 1e-9))
    even = [_evenly(int(load), len(hosts[e])) for e, load in enumerate(load_E)]
    pending = [0] * ranks
    for e, parts in enumerate(even):
        for rank, part in zip(hosts[e], parts, strict=True):
            pending[rank] += part
    if total == 0 or max(pending) * ranks < gate * total:
        return _native(even, hosts, capacity)
    held = list(pending)  # assigned and still pending together
    chunks: list[Chunk] = []
    transfers: list[tuple[int, int, int]] = []
    for e in sorted(range(len(load_E)), key=lambda e: -load_E[e]):
        rest = int(load_E[e])
        if not rest:
            continue
        for rank, part in zip(hosts[e], even[e], strict=True):
            held[rank] -= part
        start = 0
        for rank in sorted(hosts[e], key=held.__getitem__):
            part = min(max(capacity - held[rank], 0), rest)
            start = _give(chunks, held, e, rank, start, part)
            rest -= part
        for rank, part in _spill(rest, held, hosts[e], ranks, capacity, least):
            start = _give(chunks, held, e, rank, start, part)
            if rank not in hosts[e]:
                transfers.append((e, hosts[e][0], rank))
    return Assignment(tuple(chunks), tuple(transfers), capacity)


def _spill(
    rest: int, held: Sequence[int], natives: Sequence[int], ranks: int, capacity: int, least: int
) -> list[tuple[int, int]]:
    """(rank, tokens) that take what the natives could not."""
    others = [rank for rank in range(ranks) if rank not in natives] or list(natives)
    after = {rank: held[rank] for rank in others}
    given: dict[int, int] = {}
    while rest > 0:
        for rank in sorted(others, key=after.__getitem__):
            part = min(rest, capacity - after[rank])
            if part > 0 and (part >= least or part == rest):
                break
        else:  # no rank has room worth a transfer
            rank, part = min(others, key=after.__getitem__), rest
        after[rank] += part
        given[rank] = given.get(rank, 0) + part
        rest -= part
    return list(given.items())


def _give(chunks: list[Chunk], held: list[int], expert: int, rank: int, start: int, part: int) -> int:
    if part > 0:
        chunks.append(Chunk(expert, rank, start, start + part))
        held[rank] += part
    return start + max(part, 0)


def _native(even: Sequence[Sequence[int]], hosts: Sequence[Sequence[int]], capacity: int) -> Assignment:
    """Every token on a rank that holds its expert, evenly over copies."""
    chunks = []
    for e, parts in enumerate(even):
        start = 0
        for rank, part in zip(hosts[e], parts, strict=True):
            if part:
                chunks.append(Chunk(e, rank, start, start + part))
            start += part
    return Assignment(tuple(chunks), (), capacity)


def _evenly(load: int, parts: int) -> list[int]:
    return [load // parts + (i < load % parts) for i in range(parts)]
