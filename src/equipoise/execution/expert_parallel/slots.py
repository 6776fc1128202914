"""One layer's slots on one rank: tokens go to the ranks that serve them, and what these make of them comes back.

A batch is either each rank's own (data-parallel attention: all-to-all there and back) or shared (every rank holds all tokens
and adds up what the ranks computed). Shapes: T tokens and S selections on this rank, N rows served here, E experts, P slots,
H ranks (R where they serve), I slots and copies of one rank in a batch, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equipoise.artifacts import LayerPlan
from equipoise.dispatch.deal import DEALS, Deal, deal, own_parts
from equipoise.dispatch.placement import Ints, LayerMap
from equipoise.execution.expert_parallel.ranks import Pending, Ranks
from equipoise.execution.expert_parallel.wire import GroupForm, Sender, Transfer, received_groups, start_transfers
from equipoise.execution.selections import Selections
from equipoise.execution.slot_group import Activation, SlotGroup
from equipoise.execution.slots import ExpertSlots, canonical, compute


@dataclass(frozen=True)
class Rule:
    """Which rank serves which token.

    Attributes:
        name: "even" (by the plan's shares and a token's own position), "gate_aware", or a rule of `dispatch.deal.DEALS`.
        options: of the rule.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def counts(self) -> bool:
        """Whether it needs the whole batch's counts."""
        return self.name in DEALS


@dataclass(frozen=True)
class Call:
    """What one call of a layer did on this rank. Seconds are the host's, waiting for other ranks counted.

    Attributes:
        decode: whether the rule for decode was used.
        rows: token-expert pairs that were served here.
        sent_rows: pairs of this rank's tokens that other ranks served; of tokens that stay there, those that left.
        activated: slots and copies here that served at least one.
        read_bytes: bytes of their weights.
        received_bytes: bytes of weights that came here for this batch.
        token_bytes: bytes of hidden states that this rank sent: inputs to others, and outputs back to them, if they go back.
        decide_s: counting, exchanging counts, and the rule.
        send_s: inputs out and in.
        compute_s: the experts.
        back_s: outputs back.
        total_s: the whole call.
        context_bytes: bytes of keys, values and hidden states that this rank gave the others at the end of the forward, told
            with its last layer (see `coherent.Coherence`).
        context_s: seconds of that.
    """

    decode: bool
    rows: int
    sent_rows: int
    activated: int
    read_bytes: int
    received_bytes: int
    token_bytes: int
    decide_s: float
    send_s: float
    compute_s: float
    back_s: float
    total_s: float
    context_bytes: int = 0
    context_s: float = 0.0


@dataclass(frozen=True, eq=False)
class Parcels:
    """What a decision means for this rank.

    Attributes:
        order_S: selections by the slot or copy that serves them, those of one rank together, in the order of ranks.
        send_H: rows for each rank.
        receive_HI: [H, I] rows from each rank for each slot and copy here.
        transfers: copies of the batch.
        decode: whether the rule for decode decided.
    """

    order_S: Tensor
    send_H: list[int]
    receive_HI: Tensor
    transfers: tuple[Transfer, ...]
    decode: bool


class RankSlots(ExpertSlots):
    """The slots of one layer that live on this rank, with the way to all others.

    Attributes:
        ranks: this rank among the others.
        place: where the copies of all ranks are.
        prefill, decode: which rank serves which token in either phase.
        shared: every rank holds the whole batch.
        plan_dispatch: the dispatch that the plan asks for.
        calls: what each call did, while a meter is open.
    """

    def __init__(
        self,
        plan: LayerPlan,
        layer: int,
        stack: str,
        units: int,
        groups: Mapping[str, SlotGroup],
        *,
        ranks: Ranks,
        place: LayerMap,
        forms: Mapping[str, GroupForm],
        input_dtype: torch.dtype | None,
        shared: bool,
    ) -> None:
        """Slots of one layer.

        Args:
            plan: the layer's columns, of all ranks.
            layer: index among the MoE layers.
            stack: name of the stack the layer is in.
            units: parallel units U of the plan.
            groups: storage of this rank's slots of each precision, in the order of `forms`.
            ranks: this rank among the others.
            place: where the copies of all ranks are.
            forms: every precision of the layer, also those that only other ranks hold.
            input_dtype: what experts compute in, where the layer has slots in the model's own precision.
            shared: every rank holds the whole batch.
        """
        held = [int(slot) for slot in np.flatnonzero(place.rank_P == ranks.rank)]
        super().__init__(plan, layer, stack, units, dict(groups), held)
        self.ranks, self.place, self.forms, self.shared = ranks, place, dict(forms), shared
        self.prefill = self.decode = Rule("even")
        self.plan_dispatch = "even"
        self.calls: list[Call] | None = None
        self._input_dtype, self._sender = input_dtype, Sender()
        self._slots_H = [_order(plan, place, forms, rank) for rank in range(ranks.size)]
        in_order = torch.tensor([slot for slots in self._slots_H for slot in slots])
        self._at_P = torch.empty_like(in_order).index_copy_(0, in_order, torch.arange(plan.num_slots))

    def input_dtype(self, x: Tensor) -> torch.dtype:
        """The same on all ranks, also on those without a slot in the model's own precision."""
        return self._input_dtype or x.dtype

    def forward(
        self,
        hidden_TD: Tensor,
        expert_TK: Tensor,
        weight_TK: Tensor,
        activate: Activation,
        after: Callable[[Tensor], Tensor] | None = None,
        partial: bool = False,
    ) -> Tensor:
        """As `ExpertSlots.forward`; a shared batch is summed over ranks, in float32."""
        if not self.shared:
            return super().forward(hidden_TD, expert_TK, weight_TK, activate, after, partial)
        chosen = Selections.of(expert_TK, weight_TK, self.num_experts if partial else None)
        mine_N, y_ND = self._serve(hidden_TD, chosen, activate)
        if after is not None:
            y_ND = after(y_ND)
        out_TD = torch.zeros(chosen.tokens, y_ND.shape[1], dtype=torch.float32, device=y_ND.device)
        out_TD.index_add_(0, chosen.token_S[mine_N], (y_ND * chosen.weight_S[mine_N, None]).float())
        return self.ranks.add(out_TD, self._what("outputs")).to(hidden_TD.dtype)

    def serve(self, x_SD: Tensor, chosen: Selections, activate: Activation) -> Tensor:
        """As `ExpertSlots.serve`."""
        if not self.shared:
            return super().serve(x_SD, chosen, activate)
        rows_S = torch.arange(len(x_SD), device=x_SD.device)
        mine_N, y_ND = self._serve(x_SD, chosen, activate, rows_S)
        y_SD = torch.zeros(len(x_SD), y_ND.shape[1], dtype=y_ND.dtype, device=y_ND.device)
        return self.ranks.add(y_SD.index_copy_(0, mine_N, y_ND), self._what("outputs"))

    def _serve(self, x: Tensor, chosen: Selections, activate: Activation, row_S: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Which selections, and their outputs: all of this rank's, or of a shared batch those that are served here."""
        clock = [self.now(x)]
        x = x.to(self.input_dtype(x))
        parcels = self._decide(chosen)
        copies = self._send_copies(parcels.transfers)
        clock.append(self.now(x))
        row_N = (chosen.token_S if row_S is None else row_S)[parcels.order_S]
        rows = x[row_N] if not self.shared else x
        if not self.shared:
            receive_H = parcels.receive_HI.sum(1).tolist()
            rows = self.ranks.swap(rows, parcels.send_H, receive_H, self._what("inputs"))
        groups, places = self.groups, list(range(len(self.order)))
        if parcels.transfers:
            forms = [self._form_of(transfer) for transfer in parcels.transfers]
            sent, at = received_groups(self.ranks, parcels.transfers, forms, copies.wait())
            groups, places = [*groups, *sent], [*places, *(len(self.order) + place for place in at)]
        clock.append(self.now(x))
        order_S, row_N, count_I = self._rows_here(parcels, places, row_N)
        y_ND = compute(groups, rows, row_N, count_I, activate)
        clock.append(self.now(x))
        if not self.shared:
            back = torch.empty_like(y_ND).index_copy_(0, row_N, y_ND)
            y_ND = self.ranks.swap(back, receive_H, parcels.send_H, self._what("outputs"))
            order_S = parcels.order_S
        clock.append(self.now(x))
        if self.calls is not None:
            self._note(parcels, groups, count_I, x, clock)
        return order_S, y_ND

    def _rows_here(self, parcels: Parcels, places: Sequence[int], row_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Selections served here (of a shared batch), which input each row served here is, and rows of each slot and copy."""
        device = parcels.order_S.device
        where_I = torch.tensor(places, dtype=torch.long, device=device)
        if self.shared:
            begin = sum(parcels.send_H[: self.ranks.rank])
            mine = slice(begin, begin + parcels.send_H[self.ranks.rank])
            place_N = where_I.repeat_interleave(parcels.receive_HI[0])
            by_place = torch.argsort(place_N, stable=True)
            order_S = parcels.order_S[mine][by_place]
            return order_S, row_S[mine][by_place], torch.bincount(place_N, minlength=len(places))
        place_N = where_I.repeat(self.ranks.size).repeat_interleave(parcels.receive_HI.reshape(-1))
        return parcels.order_S, torch.argsort(place_N, stable=True), torch.bincount(place_N, minlength=len(places))

    def _decide(self, chosen: Selections) -> Parcels:
        assert self.batches is not None, "slots need the tokens of the forward"
        decode = self.batches(self.stack, chosen.tokens).decode
        rule = self.decode if decode else self.prefill
        if not self.prefill.counts and self.prefill == self.decode:
            return self._by_slot(chosen, decode)
        count_E = torch.bincount(chosen.expert_S, minlength=self.num_experts)
        if self.shared:
            count_HE = count_E[None].cpu().numpy()
        else:  # the ranks must agree on a phase: decode is when all of them decode
            told = torch.cat([count_E, count_E.new_tensor([int(decode)])])
            count_HE = self.ranks.gather(told, self._what("counts")).cpu().numpy()
            decode = bool(count_HE[:, -1].all())
            count_HE, rule = count_HE[:, :-1], self.decode if decode else self.prefill
        if not rule.counts:
            return self._by_slot(chosen, decode)
        return self._by_deal(deal(rule.name, self.place, count_HE.sum(0), rule.options), count_HE, chosen.expert_S, decode)

    def _by_slot(self, chosen: Selections, decode: bool) -> Parcels:
        """By the plan's shares: which slot serves a selection depends on nothing that other ranks know."""
        self.dispatch = (self.decode if decode else self.prefill).name
        slot_S = self._dispatch(chosen)
        key_S = self._at_P.to(slot_S.device)[slot_S]
        widths = [len(slots) for slots in self._slots_H]
        count_P = torch.bincount(key_S, minlength=self.plan.num_slots)
        here = widths[self.ranks.rank]
        if self.shared:
            begin = sum(widths[: self.ranks.rank])
            receive_HI = count_P[None, begin : begin + here]
        else:
            received = self.ranks.swap(count_P, widths, [here] * self.ranks.size, self._what("counts"))
            receive_HI = received.view(self.ranks.size, here)
        return self._parcels(key_S, count_P, widths, receive_HI, (), decode)

    def _by_deal(self, found: Deal, count_HE: Ints, expert_S: Tensor, decode: bool) -> Parcels:
        """By quotas that all ranks have computed alike."""
        me, ranks = self.ranks.rank, self.ranks.size
        to_H: list[list[Transfer]] = [[sent for sent in found.transfers if sent[2] == rank] for rank in range(ranks)]
        widths = [len(slots) + len(sent) for slots, sent in zip(self._slots_H, to_H, strict=True)]
        key_ER = np.full(found.quota_ER.shape, -1, np.int64)
        for rank, (slots, sent) in enumerate(zip(self._slots_H, to_H, strict=True)):
            first = sum(widths[:rank])
            at = {slot: first + i for i, slot in enumerate(slots)}
            for expert in np.flatnonzero(self.place.slot_ER[:, rank] >= 0).tolist():
                key_ER[expert, rank] = at[int(self.place.slot_ER[expert, rank])]
            for i, (expert, _, _) in enumerate(sent):
                key_ER[expert, rank] = first + len(slots) + i
        assert (key_ER[found.quota_ER > 0] >= 0).all(), "every quota needs a slot or a copy"
        if self.shared:
            goes_ER, comes_HE = found.quota_ER, found.quota_ER[None, :, me]
        else:
            goes_ER, comes_HE = own_parts(found.quota_ER, count_HE, me)
        # An expert's tokens in the order of the batch: so many to the first rank that has it, so many to the next.
        by_expert = torch.argsort(expert_S, stable=True)
        keys = torch.from_numpy(np.repeat(key_ER.ravel(), goes_ER.ravel())).to(expert_S.device)
        key_S = torch.empty_like(keys).index_copy_(0, by_expert, keys)
        receive_HI = np.zeros((len(comes_HE), widths[me]), np.int64)
        here = np.flatnonzero(key_ER[:, me] >= 0)
        receive_HI[:, key_ER[here, me] - sum(widths[:me])] = comes_HE[:, here]
        count = torch.bincount(key_S, minlength=sum(widths))
        return self._parcels(key_S, count, widths, torch.from_numpy(receive_HI).to(expert_S.device), found.transfers, decode)

    def _parcels(
        self, key_S: Tensor, count: Tensor, widths: list[int], receive_HI: Tensor, transfers: tuple[Transfer, ...], decode: bool
    ) -> Parcels:
        send_H = [int(part.sum()) for part in count.cpu().split(widths)]
        return Parcels(torch.argsort(key_S, stable=True), send_H, receive_HI, transfers, decode)

    def _send_copies(self, transfers: Sequence[Transfer]) -> Pending:
        """Begin to send weights, so that they travel while tokens do."""
        if not transfers:
            empty = torch.empty(0, dtype=torch.uint8)
            return Pending(self.ranks, empty, empty, None, "")
        size_E = [0] * self.num_experts
        for transfer in transfers:
            size_E[transfer[0]] = self._form_of(transfer).slot_bytes
        mine = sorted((t for t in transfers if t[1] == self.ranks.rank), key=lambda t: t[2])
        taken = [self._sender.take(*self._stored(expert)) for expert, _, _ in mine]
        return start_transfers(self.ranks, transfers, size_E, taken, self._what("weights"))

    def _form_of(self, transfer: Transfer) -> GroupForm:
        expert, source, _ = transfer
        return self.forms[canonical(self.plan.precisions[int(self.place.slot_ER[expert, source])])]

    def _stored(self, expert: int) -> tuple[SlotGroup, int]:
        """Group and index in it of this rank's slot of an expert."""
        at = self.order.index(int(self.place.slot_ER[expert, self.ranks.rank]))
        for group in self.groups:
            if at < len(group):
                return group, at
            at -= len(group)
        raise AssertionError("the slot is held here")

    def _note(self, parcels: Parcels, groups: Sequence[SlotGroup], count_I: Tensor, x: Tensor, clock: list[float]) -> None:
        size = [group.nbytes // len(group) for group in groups for _ in range(len(group))]
        used = [int(i) for i in count_I.nonzero().flatten().cpu()]
        rows, row_bytes = int(count_I.sum()), x.shape[1] * x.element_size()
        away = sum(parcels.send_H) - parcels.send_H[self.ranks.rank]
        foreign = rows - int(parcels.receive_HI[self.ranks.rank].sum()) if not self.shared else 0
        mine = [t for t in parcels.transfers if t[2] == self.ranks.rank]
        steps = [later - earlier for earlier, later in pairwise(clock)]
        assert self.calls is not None, "a meter is open"
        self.calls.append(
            Call(
                decode=parcels.decode,
                rows=rows,
                sent_rows=0 if self.shared else away,
                activated=len(used),
                read_bytes=sum(size[i] for i in used),
                received_bytes=sum(self._form_of(t).slot_bytes for t in mine),
                token_bytes=0 if self.shared else (away + foreign) * row_bytes,
                decide_s=steps[0],
                send_s=steps[1],
                compute_s=steps[2],
                back_s=steps[3],
                total_s=clock[-1] - clock[0],
            )
        )

    def now(self, x: Tensor) -> float:
        """Seconds of the host's clock; with a meter open, what x waits for is waited for."""
        if self.calls is not None and x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        return perf_counter()

    def _what(self, sent: str) -> str:
        return f"exchanging {sent} of MoE layer {self.layer}"


def _order(plan: LayerPlan, place: LayerMap, forms: Mapping[str, GroupForm], rank: int) -> list[int]:
    """Slots of a rank in the order in which it stores them."""
    held = np.flatnonzero(place.rank_P == rank).tolist()
    return [slot for name in forms for slot in held if canonical(plan.precisions[slot]) == name]
