"""Experts on their way from rank to rank, for one batch: a slot as bytes, and bytes as slots that can be run.

A copy is sent as it is stored, so that it computes what the slot that it was taken from computes, bit for bit, and a
quantized expert costs no more than its quantized bytes. Shapes: H ranks, G slots of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from equipoise.execution.expert_parallel.ranks import Pending, Ranks
from equipoise.execution.slot_group import SlotGroup
from equipoise.precisions import Precision

Transfer = tuple[int, int, int]
"""(expert, from, to)."""


@dataclass(frozen=True)
class GroupForm:
    """What a group of slots is, without its weights.

    Attributes:
        form: storage format.
        shapes: (out, in) of up and of down.
        native: whether it is the model's own precision.
        biases: whether experts have biases.
        dtype: of the group's floats.
        rotated: as for `SlotGroup`.
        int8_activations: as for `SlotGroup`.
    """

    form: Precision
    shapes: tuple[tuple[int, int], ...]
    native: bool
    biases: bool
    dtype: torch.dtype
    rotated: bool
    int8_activations: bool

    @classmethod
    def of(cls, group: SlotGroup) -> GroupForm:
        """What a group is."""
        floats = [tensor.dtype for name, tensor in tensors_of(group).items() if name.endswith("bias") or group.form.is_float]
        dtype = floats[0] if floats else torch.float32  # not used by integer slots without biases
        return cls(group.form, group.shapes, group.native, group.has_biases, dtype, group.rotated, group.int8_activations)

    def empty(self, slots: int, device: torch.device | str) -> SlotGroup:
        """A group of this kind with room for so many experts."""
        group = SlotGroup(
            self.form,
            slots,
            self.shapes,
            native=self.native,
            biases=self.biases,
            dtype=self.dtype,
            device=torch.device(device),
            rotated=self.rotated,
        )
        group.int8_activations = self.int8_activations
        return group

    @cached_property
    def slot_bytes(self) -> int:
        """Bytes of one slot as it is stored and sent."""
        return self.empty(1, "meta").nbytes


def tensors_of(group: SlotGroup) -> dict[str, Tensor]:
    """The stored tensors of a group by name, each [G, ...]; always in this order."""
    group.unpack()
    return dict(group.named_parameters()) | dict(group.named_buffers())


def to_bytes(group: SlotGroup, index: int) -> Tensor:
    """One slot as it is stored, as one row of bytes."""
    parts = [tensor.detach()[index].contiguous().view(-1).view(torch.uint8) for tensor in tensors_of(group).values()]
    return torch.cat(parts)


def from_bytes(group: SlotGroup, index: int, data: Tensor) -> None:
    """Fill one slot from what `to_bytes` made of another of the same kind."""
    begin = 0
    for tensor in tensors_of(group).values():
        slot = tensor.detach()[index]
        part = data[begin : begin + slot.nbytes].clone()  # aligned for its type
        slot.copy_(part.view(slot.dtype).view(slot.shape))
        begin += slot.nbytes
    assert begin == len(data), f"{len(data)} bytes for a slot of {begin}"


class Sender:
    """Takes slots of one layer as bytes; those of integer formats are kept, as kernels lay their storage out anew."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int], Tensor] = {}

    def take(self, group: SlotGroup, index: int) -> Tensor:
        """The bytes of one slot."""
        if group.form.is_float:
            return to_bytes(group, index)
        key = (group.form.name, index)
        if key not in self._kept:
            self._kept[key] = to_bytes(group, index)
        return self._kept[key]


def start_transfers(
    ranks: Ranks, transfers: Sequence[Transfer], bytes_E: Sequence[int], take: Sequence[Tensor], what: str
) -> Pending:
    """Begin to send all copies of a batch.

    Args:
        ranks: who sends and receives.
        transfers: all of them, in the same order on every rank.
        bytes_E: bytes of the copy of each expert.
        take: the bytes of this rank's own sendings, in the order of the ranks that they go to and then of the transfers.
        what: what is being done, for an error.

    Returns:
        What arrives here: bytes in the order of the ranks that they are from, then of the transfers.
    """
    send_H, receive_H = [0] * ranks.size, [0] * ranks.size
    for expert, source, target in transfers:
        if source == ranks.rank:
            send_H[target] += bytes_E[expert]
        if target == ranks.rank:
            receive_H[source] += bytes_E[expert]
    data = torch.cat(list(take)) if take else torch.empty(0, dtype=torch.uint8, device=ranks.device)
    return ranks.start_swap(data, send_H, receive_H, what)


def received_groups(
    ranks: Ranks, transfers: Sequence[Transfer], forms: Sequence[GroupForm], data: Tensor
) -> tuple[list[SlotGroup], list[int]]:
    """The copies that arrived here as groups of slots.

    Args:
        ranks: this rank.
        transfers: all of the batch.
        forms: what the copy of each transfer is.
        data: what `start_transfers` gave.

    Returns:
        The groups, and for each transfer to this rank (in order) its place in their order.
    """
    mine = [i for i, (_, _, target) in enumerate(transfers) if target == ranks.rank]
    kinds = list(dict.fromkeys(forms[i] for i in mine))
    groups = [form.empty(sum(forms[i] == form for i in mine), ranks.device) for form in kinds]
    first = [sum(len(group) for group in groups[:k]) for k in range(len(groups))]
    used = [0] * len(groups)
    place = {}
    begin = 0
    for i in sorted(mine, key=lambda i: (transfers[i][1], i)):  # as they arrive
        kind = kinds.index(forms[i])
        size = forms[i].slot_bytes
        from_bytes(groups[kind], used[kind], data[begin : begin + size])
        place[i] = first[kind] + used[kind]
        used[kind] += 1
        begin += size
    return groups, [place[i] for i in mine]
