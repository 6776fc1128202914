"""One layer's physical slots as the arrays that replaying needs.

Shapes: E logical experts, P physical slots, C copies of the most copied expert, R ranks.
An *instance* is what serves a token: a physical slot (0 .. P-1), or a copy of expert e that a dispatcher made on rank r for
one batch only (P + e * R + r).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from equipoise.artifacts import LayerPlan, Plan
from equipoise.errors import PlanError
from equipoise.precisions import precision

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LayerMap:
    """Where the copies of every expert of a layer are.

    Attributes:
        index: of the layer among the MoE layers.
        experts: E.
        ranks: R.
        nodes: machines that the ranks are divided among evenly.
        expert_P: [P] expert of each slot.
        rank_P: [P] rank of each slot.
        share_P: [P] fraction of its expert's tokens that each slot is meant to serve.
        bytes_P: [P] bytes of each slot; zeros when the model's sizes are unknown.
        copy_bytes: bytes of a copy that is made for one batch, in the model's own format.
    """

    index: int
    experts: int
    ranks: int
    nodes: int
    expert_P: Ints
    rank_P: Ints
    share_P: Floats
    bytes_P: Ints
    copy_bytes: int

    @cached_property
    def copies_E(self) -> Ints:
        """[E] slots of each expert."""
        return np.bincount(self.expert_P, minlength=self.experts)

    @cached_property
    def slots_EC(self) -> Ints:
        """[E, C] slots of each expert in ascending order, which is the order of the engines' own maps; -1 beyond its copies."""
        order = np.argsort(self.expert_P, kind="stable")
        column = np.arange(len(order)) - np.repeat(np.cumsum(self.copies_E) - self.copies_E, self.copies_E)
        table = np.full((self.experts, int(self.copies_E.max())), -1, np.int64)
        table[self.expert_P[order], column] = order
        return table

    @cached_property
    def slot_ER(self) -> Ints:
        """[E, R] the first slot of each expert on each rank; -1 where it has none."""
        table = np.full((self.experts, self.ranks), -1, np.int64)
        table[self.expert_P[::-1], self.rank_P[::-1]] = np.arange(len(self.expert_P))[::-1]
        return table

    @cached_property
    def hosts_ER(self) -> NDArray[np.bool_]:
        """[E, R] whether a rank has a copy of an expert."""
        return self.slot_ER >= 0

    @cached_property
    def hosts(self) -> list[list[int]]:
        """Ranks that have a copy of each expert; the rank of the first slot first."""
        ranks = [[int(self.rank_P[slot]) for slot in row if slot >= 0] for row in self.slots_EC]
        return [list(dict.fromkeys(row)) for row in ranks]

    @cached_property
    def cost_ER(self) -> Ints | None:
        """[E, R] bytes of each expert's copy on each rank, 0 where it has none; None where all copies are equally large."""
        if len(set(self.bytes_P.tolist())) == 1:
            return None
        return np.where(self.hosts_ER, self.bytes_P[self.slot_ER], 0)

    @cached_property
    def instance_rank(self) -> Ints:
        """[P + E * R] rank of each instance."""
        return np.concatenate([self.rank_P, np.tile(np.arange(self.ranks), self.experts)])

    @cached_property
    def instance_bytes(self) -> Ints:
        """[P + E * R] bytes of each instance's weights."""
        return np.concatenate([self.bytes_P, np.full(self.experts * self.ranks, self.copy_bytes, np.int64)])

    def instances(self, expert: Ints, rank: Ints) -> Ints:
        """[...] the instance that serves an expert on a rank: its slot there, or else a copy for one batch."""
        slot = self.slot_ER[expert, rank]
        return np.where(slot >= 0, slot, len(self.expert_P) + expert * self.ranks + rank)

    def home_of(self, tokens: int) -> Ints:
        """[T] rank that each token of a batch comes from: consecutive, equal parts, as data-parallel attention holds them."""
        return np.arange(tokens) * self.ranks // max(tokens, 1)


def layer_maps(plan: Plan, ranks: int | None = None) -> list[LayerMap]:
    """The maps of all layers of a plan.

    Args:
        plan: the slots.
        ranks: ranks that the plan's units are divided among in equal, consecutive parts; one unit each when omitted.

    Raises:
        PlanError: the ranks do not divide the units.
    """
    if ranks is not None and (ranks < 1 or plan.units % ranks):
        fits = [r for r in range(1, plan.units + 1) if plan.units % r == 0]
        raise PlanError(
            f"the plan has {plan.units} units, which {ranks} ranks cannot share evenly; run {', '.join(map(str, fits))} ranks, "
            f"or plan for {ranks}."
        )
    return [_layer_map(plan, index, layer, ranks or plan.units) for index, layer in enumerate(plan.layers)]


def _layer_map(plan: Plan, index: int, layer: LayerPlan, ranks: int) -> LayerMap:
    facts = plan.model.layers[index]
    return LayerMap(
        index=index,
        experts=facts.num_experts,
        ranks=ranks,
        nodes=plan.nodes if ranks % plan.nodes == 0 else 1,
        expert_P=np.array(layer.experts, np.int64),
        rank_P=np.array(layer.units, np.int64) * ranks // plan.units,
        share_P=np.array(layer.shares, np.float64),
        bytes_P=layer.slot_bytes(facts),
        copy_bytes=facts.expert_bytes(precision(plan.model.dtype)),
    )
