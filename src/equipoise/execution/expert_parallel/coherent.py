"""Context-coherent expert parallelism (ExFlow, arXiv:2401.08383): a token stays where its expert ran, for models of top-k 1.

Every rank is given the same batch and holds the keys and values of all rows. While tokens are added one at a time, a row is
computed on one rank alone: it moves to a rank that has its expert before it is served (one all-to-all), and goes on from
there. At the end of a forward all ranks are given the new keys and values and the hidden states of all rows (one exchange).
Longer inputs, such as prompts, keep a row on one rank, and its tokens go to their experts and back.

Shapes: B rows of the batch, N of them on this rank, S columns of this call, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from equipoise.errors import ModelError
from equipoise.execution.expert_parallel.context import ResidentCache, share_rows
from equipoise.execution.expert_parallel.halves import Halves
from equipoise.execution.expert_parallel.ranks import Ranks
from equipoise.execution.expert_parallel.residency import homes, move_rows, rows_on
from equipoise.execution.expert_parallel.staying import Stay, StayingSlots
from equipoise.models.adapters.base import forward_names
from equipoise.models.tokens import TokenBatch

BY_ROW = {"attention_mask": (2, 4), "position_ids": (2,), "position_embeddings": (3,)}
"""Arguments of a decoder layer whose first dimension is the batch (or 1), and how many dimensions they may have."""
RECORDED = ("output_hidden_states", "output_attentions", "output_router_logits")
"""Outputs that are taken from every layer, of which a rank computes a part of the rows."""


@dataclass(frozen=True, eq=False)
class Place:
    """A decoder layer in its stack.

    Attributes:
        halves: how a layer with experts is run in two parts; None without experts.
        slots: its experts; None without.
        first, last: whether it is the stack's first or last.
    """

    halves: Halves | None
    slots: StayingSlots | None
    first: bool
    last: bool


class Coherence:
    """Where the rows of the forward in progress are, and what all ranks must be told at its end.

    Attributes:
        ranks: this rank among the others.
        owner_B: rank of each row.
        stays: rows move to their experts and stay; otherwise tokens go there and back.
    """

    def __init__(self, ranks: Ranks, slots: Sequence[StayingSlots]) -> None:
        self.ranks, self._slots = ranks, list(slots)
        assert slots[0].batches is not None, "slots are installed"
        self._batch, self._stack = slots[0].batches, slots[0].stack
        for each in slots:
            each.batches = self.batch
        self.owner_B = homes(0, ranks.size)
        self.stays = False
        self._rows_N = torch.empty(0, dtype=torch.long)
        self._columns = 0
        self._cache: ResidentCache | None = None

    @property
    def rows(self) -> int:
        """N."""
        return len(self._rows_N)

    def batch(self, stack: str, rows: int) -> TokenBatch:
        """The tokens of this rank's rows (see `TokenTracker.batch`)."""
        whole: TokenBatch = self._batch(stack, len(self.owner_B) * self._columns)  # type: ignore[assignment]
        device = whole.real_T.device
        at_T = (self._rows_N.to(device)[:, None] * self._columns + torch.arange(self._columns, device=device)).view(-1)
        assert rows == len(at_T), f"{rows} tokens are served of {len(at_T)} here"
        return TokenBatch(whole.real_T[at_T], whole.position_T[at_T], whole.sequence_T[at_T], whole.decode, whole.all_real)

    def begin(self, hidden_BSD: Tensor, cache: Any) -> Tensor:
        """[N, S, D] the rows that begin on this rank."""
        rows, self._columns = hidden_BSD.shape[:2]
        self.stays = self._batch(self._stack, rows * self._columns).decode
        self._cache = None if cache is None else ResidentCache(cache)
        for slots in self._slots:
            slots.stay = None
        self._settle(homes(rows, self.ranks.size), hidden_BSD.device)
        return hidden_BSD[self._rows_N]

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """A decoder layer's arguments for the rows on this rank; for the first row where there are none."""
        rows_N = self._rows_N if self.rows else torch.zeros(1, dtype=torch.long, device=self._rows_N.device)
        own = {name: self._part(name, value, rows_N) for name, value in given.items()}
        if self._cache is not None:
            self._cache.turn_to(self._rows_N, self.owner_B)
            own["past_key_values"] = self._cache
        return own

    def move(self, slots: StayingSlots, hidden_NSD: Tensor, halves: Halves) -> Tensor:
        """[N, S, D] the rows on this rank once every row has come to a rank that has its expert."""
        ranks, rows = self.ranks, len(self.owner_B)
        clock = [slots.now(hidden_NSD)]
        told_B2 = torch.zeros(rows, 2, dtype=torch.float64, device=hidden_NSD.device)
        if self.rows:
            chosen = slots.choose(lambda: halves.second(hidden_NSD))
            told_B2[self._rows_N] = torch.stack([each.double() for each in chosen], 1)
        every = ranks.gather(told_B2, f"exchanging choices of MoE layer {slots.layer}")
        told_B2 = every[torch.from_numpy(self.owner_B), torch.arange(rows)]
        slot_B = told_B2[:, 0].long()
        target_B = slots.place.rank_P[slot_B.cpu().numpy()]
        move = move_rows(self.owner_B, target_B, ranks.rank, ranks.size)
        clock.append(slots.now(hidden_NSD))
        if move.crossings:
            device = hidden_NSD.device
            leaving = hidden_NSD[torch.from_numpy(move.leaves_N).to(device)]
            arrived = ranks.swap(leaving, move.send_H, move.receive_H, f"moving tokens to MoE layer {slots.layer}")
            held = torch.cat([hidden_NSD[torch.from_numpy(move.stays_N).to(device)], arrived])
            hidden_NSD = held[torch.from_numpy(move.order_N).to(device)]
            self._settle(target_B, device)
        clock.append(slots.now(hidden_NSD))
        slots.stay = Stay(slot_B[self._rows_N], told_B2[self._rows_N, 1])
        out_NSD = halves.second(hidden_NSD) if self.rows else hidden_NSD
        if slots.calls is not None:
            sizes = len(move.leaves_N), hidden_NSD.shape[1] * hidden_NSD.shape[2] * hidden_NSD.element_size()
            slots.note(self.stays, *sizes, decide_s=clock[1] - clock[0], send_s=clock[2] - clock[1])
        return out_NSD

    def end(self, hidden_NSD: Tensor) -> Tensor:
        """[B, S, D] all rows, whose new keys and values are in the cache of every rank."""
        begun = self._slots[0].now(hidden_NSD)
        parts = [*(self._cache.parts() if self._cache else []), (hidden_NSD, self.owner_B)]
        (*states, hidden_BSD), sent = share_rows(self.ranks, parts, "exchanging the new context")
        if self._cache is not None:
            self._cache.add(states)
        self._cache = None
        if (calls := self._slots[-1].calls) is not None:
            calls[-1] = replace(calls[-1], context_bytes=sent, context_s=self._slots[-1].now(hidden_BSD) - begun)
        return hidden_BSD

    def _settle(self, owner_B: np.ndarray[Any, Any], device: torch.device) -> None:
        self.owner_B = owner_B
        self._rows_N = torch.from_numpy(rows_on(owner_B, self.ranks.rank)).to(device)

    def _part(self, name: str, value: Any, rows_N: Tensor) -> Any:
        if isinstance(value, tuple):
            return tuple(self._part(name, each, rows_N) for each in value)
        if not isinstance(value, Tensor):
            return value
        if value.dim() not in BY_ROW.get(name, ()) or value.shape[0] not in (1, len(self.owner_B)):
            raise ModelError(
                f"context='coherent' divides the rows of a batch among ranks, but a decoder layer is given '{name}' of shape "
                f"{tuple(value.shape)} for a batch of {len(self.owner_B)}, whose rows are not known; use context='own'."
            )
        return value if value.shape[0] == 1 else value[rows_N]


class ResidentForward:
    """The forward of a decoder layer for the rows that are on this rank."""

    def __init__(self, coherence: Coherence, layer: nn.Module, place: Place) -> None:
        self._coherence, self._own, self._place = coherence, layer.forward, place
        self._names = forward_names(layer)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the layer's own; the first of a stack takes all rows, the last gives all rows."""
        place, coherence = self._place, self._coherence
        given = dict(zip(self._names, args, strict=False)) | kwargs
        hidden = given.pop("hidden_states")
        if place.first:
            hidden = coherence.begin(hidden, given.get("past_key_values"))
        own = coherence.arguments(given)
        rows = coherence.rows
        input = hidden if rows else hidden.new_zeros(1, *hidden.shape[1:])  # for the shapes of keys and values
        if place.slots is None or place.halves is None:
            hidden = self._own(input, **own)[:rows]
        else:
            hidden = place.halves.first(input, own)[:rows]
            hidden = coherence.move(place.slots, hidden, place.halves) if coherence.stays else place.halves.second(hidden)
        return coherence.end(hidden) if place.last else hidden


def make_coherent(stack: nn.Module, ranks: Ranks, slots: Sequence[StayingSlots], halves: Sequence[Halves]) -> None:
    """Run a divided model's decoder layers on the rows that are on each rank.

    Args:
        stack: the stack that holds its MoE layers, which have their slots.
        ranks: this rank among the others.
        slots: of each MoE layer.
        halves: of each MoE layer (see `halves.find_halves`).
    """
    coherence = Coherence(ranks, slots)
    by_layer = {id(half.layer): (half, each) for half, each in zip(halves, slots, strict=True)}
    layers = list(stack.layers)[: getattr(stack.config, "num_hidden_layers", None)]  # as the stack itself goes through them
    for at, layer in enumerate(layers):
        half, each = by_layer.get(id(layer), (None, None))
        place = Place(half, each, first=at == 0, last=at == len(layers) - 1)
        layer.forward = ResidentForward(coherence, layer, place)
    stack.register_forward_pre_hook(refuse_recording, with_kwargs=True)


def refuse_recording(stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise `ModelError` when the outputs of single layers are asked for."""
    for name in RECORDED:
        if kwargs.get(name, getattr(stack.config, name, False)):
            raise ModelError(f"{name} asks for what every layer made of every row; under context='coherent' no rank has that.")
