"""Which copy of an expert serves which token.

Shapes: T tokens, S selections (token, expert) of a batch, E logical experts, C copies of the most copied expert,
P slots, U units.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from equipoise.artifacts import LayerPlan
from equipoise.dispatch.flow import spread_evenly
from equipoise.precisions import precision

GOLDEN = (5**0.5 - 1) / 2
# Steps of the offsets between experts and layers: the plastic number's powers, badly approximable together with GOLDEN.
EXPERT_STEP, LAYER_STEP = 0.7548776662466927, 0.5698402909980532


@dataclass(eq=False)
class Copies:
    """The copies of each expert of one layer, those of the fewest bits first.

    Attributes:
        slots_EC: slot of each copy; experts with fewer copies repeat their last.
        upper_EC: share of the expert's tokens that go to this copy or an earlier one; 1 from the last copy on.
        units_EC: unit that each copy lives on.
        number_E: copies of each expert.
        offset_E: where each expert starts in the sequence that `even` follows.
    """

    slots_EC: Tensor
    upper_EC: Tensor
    units_EC: Tensor
    number_E: Tensor
    offset_E: Tensor
    _by_device: dict[torch.device, Copies] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, plan: LayerPlan, layer: int) -> Copies:
        """The copies that a layer's plan has.

        Args:
            plan: slots of the layer.
            layer: its index among the MoE layers, so that layers do not split alike.
        """
        bits = [precision(name).bits for name in plan.precisions]
        by_expert: dict[int, list[int]] = {}
        for slot in sorted(range(plan.num_slots), key=lambda s: (bits[s], s)):
            by_expert.setdefault(plan.experts[slot], []).append(slot)
        experts, width = len(by_expert), max(len(slots) for slots in by_expert.values())
        slots_EC = np.empty((experts, width), np.int64)
        upper_EC = np.ones((experts, width))
        for expert, slots in by_expert.items():
            slots_EC[expert] = slots + slots[-1:] * (width - len(slots))
            upper_EC[expert, : len(slots) - 1] = np.cumsum([plan.shares[s] for s in slots])[:-1]
        offset = (np.arange(experts) * EXPERT_STEP + layer * LAYER_STEP) % 1.0
        return cls(
            torch.from_numpy(slots_EC),
            torch.from_numpy(upper_EC),
            torch.from_numpy(np.asarray(plan.units, np.int64)[slots_EC]),
            torch.from_numpy(np.array([len(by_expert[e]) for e in range(experts)])),
            torch.from_numpy(offset),
        )

    @property
    def any(self) -> bool:
        """True when some expert has more than one copy."""
        return bool(self.slots_EC.shape[1] > 1)

    def to(self, device: torch.device) -> Copies:
        """The same tables on a device; kept there, since every forward needs them."""
        if self.slots_EC.device == device:
            return self
        if device not in self._by_device:
            tables = (self.slots_EC, self.upper_EC, self.units_EC, self.number_E, self.offset_E)
            self._by_device[device] = Copies(*(table.to(device) for table in tables))
        return self._by_device[device]


def even(copies: Copies, expert_S: Tensor, position_S: Tensor) -> Tensor:
    """Split by the shares, deterministic in a token's own position, so that its batch does not change its output.

    The positions walk the unit interval in steps of the golden ratio (the sequence of the lowest discrepancy), from
    a start of the expert's own; a copy serves the tokens that fall into its share of the interval.

    Args:
        copies: copies of the layer's experts.
        expert_S: expert of each selection.
        position_S: index of the selection's token among the real tokens of its own sequence.

    Returns:
        [S] slots.
    """
    if not copies.any:
        return copies.slots_EC[expert_S, 0]
    return _at(copies, expert_S, _walk(copies, expert_S, position_S))


def gate_aware(copies: Copies, expert_S: Tensor, position_S: Tensor, weight_S: Tensor, real_S: Tensor) -> Tensor:
    """Split by the shares; of an expert's tokens in the batch, those of the smallest gate weight get the fewest bits.

    Args:
        copies: copies of the layer's experts.
        expert_S: expert of each selection.
        position_S: as for `even`, which decides when an expert has a single token.
        weight_S: gate weight of each selection.
        real_S: False for padding, which does not count.

    Returns:
        [S] slots. They depend on the batch, since a token is ranked among those beside it.
    """
    if not copies.any:
        return copies.slots_EC[expert_S, 0]
    walk_S = _walk(copies, expert_S, position_S)
    by_weight = torch.sort(weight_S.float().masked_fill(~real_S, torch.inf), stable=True).indices
    rank_S, count_E = _rank(copies, expert_S, by_weight, real_S)
    # Rank plus the walk instead of rank plus one half: over many small batches the shares still come out right.
    quantile_S = (rank_S + walk_S) / count_E[expert_S].clamp_min(1)
    return _at(copies, expert_S, torch.where(real_S, quantile_S, walk_S))


def least_loaded(copies: Copies, expert_S: Tensor, real_S: Tensor, units: int) -> Tensor:
    """Split each expert's tokens among its copies so that the most loaded unit of this batch has the fewest tokens.

    Args:
        copies: copies of the layer's experts; the plan's shares are not used.
        expert_S: expert of each selection.
        real_S: False for padding, which does not count.
        units: number of parallel units U.

    Returns:
        [S] slots; the split is optimal (see `flow.spread_evenly`) and deterministic, and depends on the batch.
    """
    if not copies.any:
        return copies.slots_EC[expert_S, 0]
    rank_S, count_E = _rank(copies, expert_S, torch.arange(len(expert_S), device=expert_S.device), real_S)
    count, at_unit, number = (table.cpu().numpy() for table in (count_E, copies.units_EC, copies.number_E))
    upper_EC = spread_evenly(count, at_unit, number, units).cumsum(1)
    copy_S = (rank_S[:, None] >= torch.from_numpy(upper_EC).to(rank_S.device)[expert_S]).sum(1)
    copy_S = torch.where(real_S, copy_S, 0)
    return copies.slots_EC[expert_S, copy_S.clamp_max(copies.slots_EC.shape[1] - 1)]


def _walk(copies: Copies, expert_S: Tensor, position_S: Tensor) -> Tensor:
    """Where a position stands in [0, 1) for an expert."""
    return (position_S.to(torch.float64) * GOLDEN + copies.offset_E[expert_S]).frac()


def _at(copies: Copies, expert_S: Tensor, quantile_S: Tensor) -> Tensor:
    """The slot whose share of the unit interval holds a quantile."""
    copy_S = (quantile_S[:, None] >= copies.upper_EC[expert_S][:, :-1]).sum(1)
    return copies.slots_EC[expert_S, copy_S]


def _rank(copies: Copies, expert_S: Tensor, order_S: Tensor, real_S: Tensor) -> tuple[Tensor, Tensor]:
    """Rank of each real selection among those of its expert, in a given order, and how many each expert has.

    Padding gets ranks that mean nothing.
    """
    experts = len(copies.number_E)
    sorted_expert = torch.where(real_S, expert_S, experts)[order_S]
    grouped, within = torch.sort(sorted_expert, stable=True)
    count = torch.bincount(grouped, minlength=experts + 1)
    start = count.cumsum(0) - count
    rank = torch.empty_like(grouped)
    rank[order_S[within]] = torch.arange(len(grouped), device=grouped.device) - start[grouped]
    return rank, count[:experts]
