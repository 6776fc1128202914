"""One layer's slots on one rank for tokens that stay where their expert ran: chosen first, served where they have come.

Shapes: S selections and tokens alike (top-k is 1), N rows on this rank, P slots, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equipoise.execution import dispatch
from equipoise.execution.expert_parallel.slots import Call, RankSlots
from equipoise.execution.selections import Selections
from equipoise.execution.slot_group import Activation
from equipoise.execution.slots import ExpertSlots, canonical


class Chosen(Exception):  # noqa: N818 - nothing went wrong
    """Ends a block's forward at its experts: which slot serves each token, and its gate weight."""

    def __init__(self, slot_S: Tensor, weight_S: Tensor) -> None:
        super().__init__("the block was run for its router's choice alone")
        self.slot_S, self.weight_S = slot_S, weight_S


@dataclass
class Stay:
    """Tokens that have come to their slots.

    Attributes:
        slot_N: slot of each, all of them here.
        weight_N: their gate weights, as the router gave them where the tokens were before.
        compute_s: seconds in the experts; known when they have run.
    """

    slot_N: Tensor
    weight_N: Tensor
    compute_s: float = 0.0


class StayingSlots(RankSlots):
    """Slots that tokens are brought to by the layer around them, or, where they are not, as `RankSlots` does it.

    Attributes:
        asked: the block is being run for its choice alone.
        stay: the tokens that have come; None when each goes back to where it is from.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As `RankSlots`."""
        super().__init__(*args, **kwargs)
        self.asked = False
        self.stay: Stay | None = None
        here = {(self.plan.experts[s], canonical(self.plan.precisions[s])): s for s in reversed(self.order)}
        kinds = zip(self.plan.experts, map(canonical, self.plan.precisions), strict=True)
        self._near_P = torch.tensor([here.get(kind, slot) for slot, kind in enumerate(kinds)])

    def choose(self, run: Callable[[], Any]) -> tuple[Tensor, Tensor]:
        """Which slot serves each token, and its gate weight.

        A copy on this rank is taken wherever it is as good as the one that the plan's shares and the token's position name.

        Args:
            run: runs the block.
        """
        self.asked = True
        try:
            run()
        except Chosen as found:
            return found.slot_S, found.weight_S
        finally:
            self.asked = False
        raise AssertionError("a block calls its experts")

    def forward(
        self,
        hidden_TD: Tensor,
        expert_TK: Tensor,
        weight_TK: Tensor,
        activate: Activation,
        after: Callable[[Tensor], Tensor] | None = None,
        partial: bool = False,
    ) -> Tensor:
        """As `RankSlots.forward`; tokens that have come keep the gate weights that they came with."""
        if self.stay is not None and not self.asked:
            weight_TK = self.stay.weight_N[:, None].to(weight_TK.dtype)
        return super().forward(hidden_TD, expert_TK, weight_TK, activate, after, partial)

    def _serve(self, x: Tensor, chosen: Selections, activate: Activation, row_S: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.asked:
            raise Chosen(self._nearest(chosen), chosen.weight_S)
        if self.stay is None:
            return super()._serve(x, chosen, activate, row_S)
        begun = self.now(x)
        # The router's choice of rows that came may differ in a tie from the one that brought them here: that one holds.
        served = ExpertSlots._serve(self, x, chosen, activate, row_S)
        self.stay.compute_s = self.now(x) - begun
        return served

    def _dispatch(self, chosen: Selections) -> Tensor:
        if self.stay is None:
            return super()._dispatch(chosen)
        return self.stay.slot_N[chosen.token_S]

    def _nearest(self, chosen: Selections) -> Tensor:
        assert self.batches is not None, "slots need the tokens of the forward"
        batch, expert_S = self.batches(self.stack, chosen.tokens), chosen.expert_S
        position_S, real_S = (each.to(expert_S.device)[chosen.token_S] for each in (batch.position_T, batch.real_T))
        slot_S = dispatch.even(self.copies.to(expert_S.device), expert_S, position_S)
        slot_S = self._near_P.to(slot_S.device)[slot_S]
        for listener in self.listeners:
            listener(slot_S, real_S)
        return slot_S

    def note(self, decode: bool, sent_rows: int, row_bytes: int, decide_s: float, send_s: float) -> None:
        """Tell the meter of tokens that stay here.

        Args:
            decode: whether tokens are added one at a time.
            sent_rows: tokens that left this rank for the layer.
            row_bytes: bytes of a hidden state.
            decide_s: seconds to choose and to exchange the choices.
            send_s: seconds in which tokens were on their way.
        """
        assert self.calls is not None, "a meter is open"
        assert self.stay is not None, "tokens have come"
        place = self._place(self.stay.slot_N.device)
        used = torch.unique(place[self.stay.slot_N]).tolist()
        size = [group.nbytes // len(group) for group in self.groups for _ in range(len(group))]
        self.calls.append(
            Call(
                decode=decode,
                rows=len(self.stay.slot_N),
                sent_rows=sent_rows,
                activated=len(used),
                read_bytes=sum(size[i] for i in used),
                received_bytes=0,
                token_bytes=sent_rows * row_bytes,
                decide_s=decide_s,
                send_s=send_s,
                compute_s=self.stay.compute_s,
                back_s=0.0,
                total_s=decide_s + send_s + self.stay.compute_s,
            )
        )
