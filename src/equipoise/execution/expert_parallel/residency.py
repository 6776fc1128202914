"""Where the rows of a batch are while a context-coherent forward runs, and which of them change ranks at a layer.

All ranks know all of it. A rank holds its rows in the order of the batch. Shapes: B rows of the batch, N of them on this rank,
H ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from equipoise.dispatch.placement import Ints


@dataclass(frozen=True, eq=False)
class Move:
    """What one rank sends, receives and holds when rows change ranks.

    Attributes:
        stays_N: places, among the rows held before, of those that stay.
        leaves_N: places of those that leave, in the order of the ranks that they go to.
        send_H: rows for each rank, none for itself.
        receive_H: rows from each rank, none from itself.
        order_N: the rows held afterwards, as places among those that stayed followed by those that came.
        crossings: rows that change ranks, over all ranks.
    """

    stays_N: Ints
    leaves_N: Ints
    send_H: list[int]
    receive_H: list[int]
    order_N: Ints
    crossings: int


def homes(rows: int, ranks: int) -> Ints:
    """[B] the rank that each row of a batch begins on: consecutive parts, equal up to one row."""
    return np.arange(rows) * ranks // max(rows, 1)


def rows_on(owner_B: Ints, rank: int) -> Ints:
    """[N] the rows that a rank holds."""
    return np.flatnonzero(owner_B == rank)


def move_rows(owner_B: Ints, target_B: Ints, rank: int, ranks: int) -> Move:
    """What a rank does so that every row comes to its new rank.

    Args:
        owner_B: rank of each row.
        target_B: rank that it goes to.
        rank: whose part.
        ranks: H.
    """
    mine_N = rows_on(owner_B, rank)
    to_N = target_B[mine_N]
    stays_N, away_N = np.flatnonzero(to_N == rank), np.flatnonzero(to_N != rank)
    leaves_N = away_N[np.argsort(to_N[away_N], kind="stable")]
    come_N = np.flatnonzero((target_B == rank) & (owner_B != rank))
    come_N = come_N[np.argsort(owner_B[come_N], kind="stable")]  # as they arrive
    return Move(
        stays_N=stays_N,
        leaves_N=leaves_N,
        send_H=np.bincount(to_N[away_N], minlength=ranks).tolist(),
        receive_H=np.bincount(owner_B[come_N], minlength=ranks).tolist(),
        order_N=np.argsort(np.concatenate([mine_N[stays_N], come_N])),
        crossings=int((owner_B != target_B).sum()),
    )
