"""The experts of a layer as physical slots, stored in groups of one precision.

Shapes: T tokens, K top-k, S selections, N rows sorted by slot, D model width, P slots of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.artifacts import LayerPlan
from equipoise.errors import unknown_name
from equipoise.execution import dispatch
from equipoise.execution.mixed_launch import mixed_experts
from equipoise.execution.selections import Selections
from equipoise.execution.slot_group import Activation, SlotGroup
from equipoise.precisions import precision

Listener = Callable[[Tensor, Tensor], None]
"""Called as listener(slot_S, real_S) with the slot that served each selection."""


class Batch(Protocol):
    """What dispatch must know of the tokens in a forward: `models.tokens.TokenBatch`."""

    @property
    def real_T(self) -> Tensor:
        """[T] False for padding."""
        ...

    @property
    def position_T(self) -> Tensor:
        """[T] index among the sequence's own real tokens."""
        ...

    @property
    def decode(self) -> bool:
        """A cache and one new token per sequence."""
        ...


class ExpertSlots(nn.Module):  # type: ignore[misc]
    """All slots of one layer, with the dispatch that picks one for each selection.

    Attributes:
        plan: the layer's columns; slot numbers here are positions in them.
        layer, stack: index among the MoE layers, and the stack whose tokens it sees.
        dispatch: "even", "least_loaded" or "gate_aware".
        batches: gives the tokens of the current forward (`TokenTracker.batch`); None before it is set.
        listeners: who is told the slot of each selection.
    """

    def __init__(
        self,
        plan: LayerPlan,
        layer: int,
        stack: str,
        units: int,
        groups: dict[str, SlotGroup],
        held: Sequence[int] | None = None,
    ) -> None:
        """Slots of one layer.

        Args:
            plan: the layer's columns.
            layer: index among the MoE layers.
            stack: name of the stack the layer is in.
            units: parallel units U.
            groups: storage of each precision, with as many slots as are held of it, in the plan's order.
            held: the slots whose weights are here; all of the plan's when omitted.
        """
        super().__init__()
        self.plan, self.layer, self.stack, self.units = plan, layer, stack, units
        self.dispatch = "even"
        self.listeners: list[Listener] = []
        self.copies = dispatch.Copies.of(plan, layer)
        self.num_experts = len(self.copies.number_E)
        here = range(plan.num_slots) if held is None else held
        self.order = [slot for name in groups for slot in here if canonical(plan.precisions[slot]) == name]
        assert len(self.order) == len(here), "every slot needs a group"
        self._places: dict[torch.device, Tensor] = {}
        self.batches: Callable[[str, int], Batch] | None = None
        for name, group in groups.items():
            self.add_module(module_name(name), group)

    @property
    def groups(self) -> list[SlotGroup]:
        """Groups in the order in which their slots are computed."""
        return [module for module in self.children() if isinstance(module, SlotGroup)]

    def forward(
        self,
        hidden_TD: Tensor,
        expert_TK: Tensor,
        weight_TK: Tensor,
        activate: Activation,
        after: Callable[[Tensor], Tensor] | None = None,
        partial: bool = False,
    ) -> Tensor:
        """What the experts module computes: the gate-weighted sum of the chosen experts' outputs.

        Args:
            hidden_TD: inputs.
            expert_TK: chosen experts.
            weight_TK: their gate weights.
            activate: what lies between the two matrices of an expert.
            after: applied to an expert's output before its weight (a norm).
            partial: ids outside 0..E-1 may occur and are served by no slot.

        Returns:
            [T, D] in the dtype of the inputs.
        """
        chosen = Selections.of(expert_TK, weight_TK, self.num_experts if partial else None)
        order_S, y_ND = self._serve(hidden_TD, chosen, activate)
        if after is not None:
            y_ND = after(y_ND)
        if partial:
            y_ND = y_ND * chosen.weight_S[order_S, None]  # gate weights may be of more bits than the experts
            out_TD = torch.zeros(chosen.tokens, y_ND.shape[1], dtype=y_ND.dtype, device=y_ND.device)
            return out_TD.index_add_(0, chosen.token_S[order_S], y_ND).to(hidden_TD.dtype)
        # Back in the order of tokens and summed in that order: deterministic on every device.
        back_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
        if y_ND.dtype == torch.float32:  # in one pass
            out_TD = F.embedding_bag(back_S.view(expert_TK.shape), y_ND, per_sample_weights=weight_TK.float(), mode="sum")
            return out_TD.to(hidden_TD.dtype)
        # In 16 bits as transformers does it, bit for bit: products are rounded before they are summed.
        y_ND = y_ND * chosen.weight_S[order_S, None]
        return y_ND[back_S].view(*expert_TK.shape, -1).sum(1).to(hidden_TD.dtype)

    def exchange(self, other: ExpertSlots) -> None:
        """Change plan and storage with other slots of the same layer; what else belongs to the place stays.

        Done again, it undoes itself. No forward may be running.

        Args:
            other: slots that no model runs.
        """
        mine, theirs = self.groups, other.groups
        for slots, old, new in ((self, mine, theirs), (other, theirs, mine)):
            for group in old:
                delattr(slots, module_name(group.form.name))
            for group in new:  # what else is a module, such as a family's activation, belongs to the place
                slots.add_module(module_name(group.form.name), group)
        for name in ("plan", "copies", "num_experts", "order", "_places"):
            ours, others = getattr(self, name), getattr(other, name)
            setattr(self, name, others)
            setattr(other, name, ours)

    def serve(self, x_SD: Tensor, chosen: Selections, activate: Activation) -> Tensor:
        """[S, D] outputs for inputs already gathered per selection, without gate weights, in the order of the selections."""
        rows_S = torch.arange(len(x_SD), device=x_SD.device)
        order_S, y_ND = self._serve(x_SD, chosen, activate, rows_S)
        return torch.empty_like(y_ND).index_copy_(0, order_S, y_ND)

    def _serve(self, x: Tensor, chosen: Selections, activate: Activation, row_S: Tensor | None = None) -> tuple[Tensor, Tensor]:
        slot_S = self._dispatch(chosen)
        place_N, order_S = torch.sort(self._place(slot_S.device)[slot_S], stable=True)
        count_P = torch.bincount(place_N, minlength=self.plan.num_slots)
        row_N = (chosen.token_S if row_S is None else row_S)[order_S]
        return order_S, compute(self.groups, x.to(self.input_dtype(x)), row_N, count_P, activate)

    def input_dtype(self, x: Tensor) -> torch.dtype:
        """What inputs are computed in: the dtype of the slots in the model's own precision, or else the inputs' own."""
        return next((t.dtype for group in self.groups if group.native for t in group.parameters()), x.dtype)

    def _dispatch(self, chosen: Selections) -> Tensor:
        expert_S = chosen.expert_S
        copies = self.copies.to(expert_S.device)
        if not copies.any and not self.listeners:
            return copies.slots_EC[expert_S, 0]
        assert self.batches is not None, "slots need the tokens of the forward"
        batch = self.batches(self.stack, chosen.tokens)
        real_S = batch.real_T.to(expert_S.device)[chosen.token_S]
        position_S = batch.position_T.to(expert_S.device)[chosen.token_S]
        if self.dispatch == "even":
            slot_S = dispatch.even(copies, expert_S, position_S)
        elif self.dispatch == "gate_aware":
            slot_S = dispatch.gate_aware(copies, expert_S, position_S, chosen.weight_S, real_S)
        elif self.dispatch == "least_loaded":
            slot_S = dispatch.least_loaded(copies, expert_S, real_S, self.units)
        else:
            raise unknown_name("dispatch", self.dispatch, ("even", "least_loaded", "gate_aware"))
        for listener in self.listeners:
            listener(slot_S, real_S)
        return slot_S

    def _place(self, device: torch.device) -> Tensor:
        """[P] where each slot of the plan is stored."""
        if device not in self._places:
            place = torch.full((self.plan.num_slots,), -1, dtype=torch.long, device="cpu")
            place[torch.tensor(self.order, dtype=torch.long, device="cpu")] = torch.arange(len(self.order), device="cpu")
            self._places[device] = place.to(device)
        return self._places[device]


def compute(groups: Sequence[SlotGroup], x_TD: Tensor, row_N: Tensor, count_P: Tensor, activate: Activation) -> Tensor:
    """Outputs of the slots of some groups, without gate weights.

    Args:
        groups: in the order of their slots.
        x_TD: inputs.
        row_N: which of them each row is, rows sorted by slot.
        count_P: rows of each slot, over all groups.
        activate: what lies between the two matrices of an expert.

    Returns:
        [N, D] in the dtype of the inputs.
    """
    if x_TD.device.type == "cuda" and (launched := mixed_experts(groups, x_TD, row_N, count_P, activate)) is not None:
        return launched
    if len(groups) == 1:
        return groups[0](x_TD, row_N, count_P, activate)
    counts = count_P.tolist()
    outputs, start, first = [], 0, 0
    for group in groups:
        rows = sum(counts[first : first + len(group)])
        if rows:
            outputs.append(group(x_TD, row_N[start : start + rows], count_P[first : first + len(group)], activate))
        start, first = start + rows, first + len(group)
    return torch.cat(outputs) if outputs else x_TD.new_empty(0, x_TD.shape[1])


def canonical(name: str) -> str:
    """One name for each format ("int4" is "int4-g32")."""
    return precision(name).name


def module_name(name: str) -> str:
    """A precision as the name of a submodule, and so of its tensors in a checkpoint."""
    return name.replace("-", "_")


def slots_of(model: Any) -> list[ExpertSlots]:
    """The slots of a balanced model's layers, in the order of the plan; empty for any other model."""
    found = [module for module in model.modules() if isinstance(module, ExpertSlots)]
    return sorted(found, key=lambda slots: slots.layer)
