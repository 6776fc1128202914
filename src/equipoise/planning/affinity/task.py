"""What a placement by affinity is to minimise: crossings between layers, splits within them, and the largest load.

Copies are places of their own, each with its even part of the expert's pairs and load.
Shapes: L MoE layers, E places of a layer (physical slots, R of which divide them evenly), R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from equipoise.planning.affinity.pairs import Affinity, Ints, Physical

TINY = 1e-9
"""Smallest change of cost that counts, far above rounding and far below anything of use."""

Placement = list[Ints]
"""Rank of each place, layer by layer."""


@dataclass(frozen=True, eq=False)
class Task:
    """What is to be placed where, and what counts.

    Attributes:
        pairs: of the places of all layers.
        ranks: R; each takes E_l / R places of layer l.
        inside: per layer the block [E] that each place must stay in, block b being ranks b * R / B to (b + 1) * R / B.
        blocks: B.
        mu: weight of the largest load over the mean, per layer.
        together: weight of co-activated pairs that are split, against 1 for pairs across layers.
    """

    pairs: Affinity
    ranks: int
    inside: Placement
    blocks: int = 1
    mu: float = 0.0
    together: float = 0.0

    def cost(self, placement: Placement) -> float:
        """Sum over boundaries of crossings, over layers of `together` * splits and of `mu` * largest load over mean."""
        total = 0.0
        for i, p in enumerate(self.pairs.across):
            total += p.sum() - p[placement[i][:, None] == placement[i + 1][None, :]].sum()
        return float(total + sum(self.inner_cost(i, rank) for i, rank in enumerate(placement)))

    def inner_cost(self, layer: int, rank_E: Ints) -> float:
        """The part of the cost that a layer has by itself."""
        cost = 0.0
        if self.together:
            c = self.pairs.together[layer]
            cost += self.together * float(c.sum() - c[rank_E[:, None] == rank_E[None, :]].sum())
        if self.mu:
            cost += self.mu * self.ranks * float(np.bincount(rank_E, self.pairs.load[layer], self.ranks).max())
        return cost


def make_task(pairs: Affinity, places: Physical, ranks: int, *, mu: float = 0.0, together: float = 0.0) -> Task:
    """The task of placing these places on ranks, without blocks.

    Args:
        pairs: of logical experts.
        places: per layer [E] the logical expert of each place, sorted; copies of an expert are neighbours.
        ranks: R, a divisor of every E.
        mu: weight of the largest load over the mean.
        together: weight of co-activated pairs that are split.
    """
    part = [1.0 / np.bincount(expert)[expert] for expert in places]
    of_places = Affinity(
        across=tuple(p[np.ix_(places[i], places[i + 1])] * np.outer(part[i], part[i + 1]) for i, p in enumerate(pairs.across)),
        together=tuple(
            c[np.ix_(expert, expert)] * np.outer(x, x) for c, expert, x in zip(pairs.together, places, part, strict=True)
        ),
        load=tuple(q[expert] * x for q, expert, x in zip(pairs.load, places, part, strict=True)),
    )
    return Task(of_places, ranks, [np.zeros(len(expert), np.int64) for expert in places], 1, mu, together)


def keep_apart(task: Task, places: Physical, most: int) -> Task:
    """The same task at a price for two copies of an expert on one rank that outweighs everything else.

    The price is written as negative co-activation, so that every method minds it.

    Args:
        task: what counts.
        places: the logical expert of each place.
        most: copies of one expert that a rank (or node) may hold; experts with no more copies in all are left alone.
    """
    price = 4.0 * (2.0 + task.together + task.mu * task.ranks)
    together = []
    for pairs, expert in zip(task.pairs.together, places, strict=True):
        many = np.bincount(expert)[expert] > most
        same = (expert[:, None] == expert[None, :]) & many[:, None]
        np.fill_diagonal(same, False)
        together.append(task.together * pairs - price * same)
    if all(np.bincount(expert).max() <= most for expert in places):
        return task
    return replace(task, pairs=replace(task.pairs, together=tuple(together)), together=1.0)
