"""The experts of a layer as physical slots, stored in groups of one precision.

Shapes: T tokens, K top-k, S selections, N rows sorted by slot, D model width, F expert width, P slots of the layer,
G slots of a group. `up` is [gate; up] in gated experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from equipoise.artifacts import LayerPlan
from equipoise.errors import unknown_name
from equipoise.execution import dispatch
from equipoise.execution.kernels import converted_linear, grouped_linear, has_int8_kernel, int8_linear, scaled_rows
from equipoise.precisions import Precision, precision
from equipoise.quantization.formats import (
    FLOAT_DTYPES,
    dequantize,
    packed_columns,
    packed_dtype,
    quantize,
    scale_groups,
    to_float,
)

Activation = Callable[[Tensor], Tensor]
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


class SlotGroup(nn.Module):  # type: ignore[misc]
    """G slots of one precision: float weights stacked, or packed integers beside their scales.

    A group in the model's own precision holds parameters and follows `model.to(dtype)`; the others hold buffers
    whose storage stays what the plan says, and are converted as they are used.
    """

    def __init__(
        self,
        form: Precision,
        slots: int,
        shapes: Sequence[tuple[int, int]],
        *,
        native: bool,
        biases: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Empty storage.

        Args:
            form: storage format.
            slots: number of slots G.
            shapes: (out, in) of up and of down.
            native: whether `form` is the model's own precision.
            biases: whether experts have biases.
            dtype: the model's dtype.
            device: where the weights live.
        """
        super().__init__()
        self.form, self.native, self.columns = form, native, [columns for _, columns in shapes]
        self.has_biases, self.int8_activations = biases, False
        bias_dtype = dtype if native or dtype.itemsize == 2 else FLOAT_DTYPES.get(form.name, torch.bfloat16)
        for name, (rows, columns) in zip(("up", "down"), shapes, strict=True):
            if form.is_float:
                self._hold(name, (slots, rows, columns), dtype if native else FLOAT_DTYPES[form.name], device)
            else:
                self._hold(f"{name}_packed", (slots, rows, packed_columns(columns, form)), packed_dtype(form), device)
                self._hold(f"{name}_scales", (slots, rows, scale_groups(columns, form)), torch.bfloat16, device)
            if biases:
                self._hold(f"{name}_bias", (slots, rows), bias_dtype, device)

    def _hold(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if self.native:
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        else:
            self.register_buffer(name, tensor)

    def __len__(self) -> int:
        return len(next(iter([*self.parameters(), *self.buffers()])))

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, scales and biases counted."""
        return sum(t.nbytes for t in [*self.parameters(), *self.buffers()])

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def write(self, slot: int, matrices: Sequence[Tensor], biases: Sequence[Tensor], method: str) -> None:
        """Store one expert.

        Args:
            slot: index within the group.
            matrices: up [2F or F, D] and down [D, F].
            biases: of up and of down, or none.
            method: rounding of integer formats.

        Raises:
            ModelError: NaN or infinite weights.
        """
        for name, matrix in zip(("up", "down"), matrices, strict=True):
            if self.form.is_float:
                # A native slot is a copy in the model's own dtype, whatever the plan's model was loaded in.
                getattr(self, name)[slot] = to_float(matrix, self.form) if not self.native else matrix
            else:
                stored = quantize(matrix, self.form, method)
                getattr(self, f"{name}_packed")[slot] = stored.packed
                getattr(self, f"{name}_scales")[slot] = stored.scales
        for name, bias in zip(("up_bias", "down_bias"), biases, strict=False):
            getattr(self, name)[slot] = bias

    def forward(self, x_ND: Tensor, count_G: Tensor, activate: Activation) -> Tensor:
        """[N, D] outputs of the experts in these slots, without gate weights, for rows sorted by slot."""
        hidden_NF = activate(self._linear(0, "up", x_ND, count_G))
        return self._linear(1, "down", hidden_NF, count_G)

    def _linear(self, which: int, name: str, x_NI: Tensor, count_G: Tensor) -> Tensor:
        if self.native:
            weight = getattr(self, name)
            y_NO = grouped_linear(x_NI.to(weight.dtype), weight, count_G)
        elif self.form.is_float:
            weight = getattr(self, name)
            if weight.dtype == x_NI.dtype:
                y_NO = grouped_linear(x_NI, weight, count_G)
            else:
                y_NO = converted_linear(x_NI, lambda slots: weight[slots].to(x_NI.dtype), weight.shape[1], count_G)
        else:
            packed, scales = getattr(self, f"{name}_packed"), getattr(self, f"{name}_scales")
            if self.int8_activations and self.form.bits == 8 and x_NI.device.type == "cpu" and has_int8_kernel():
                y_NO = int8_linear(x_NI, packed, scales[..., 0], count_G)
            elif scales.shape[-1] == 1 and self.form.bits == 8:
                # One scale per output: on the products it costs less than on the weights.
                y_NO = converted_linear(x_NI, lambda slots: packed[slots].to(x_NI.dtype), packed.shape[1], count_G)
                y_NO = scaled_rows(y_NO, scales[..., 0], count_G)
            else:
                columns, form, dtype = self.columns[which], self.form, x_NI.dtype
                read = lambda slots: dequantize(packed[slots], scales[slots], columns, form, dtype)  # noqa: E731
                y_NO = converted_linear(x_NI, read, packed.shape[1], count_G)
        if self.has_biases:
            bias = getattr(self, f"{name}_bias").to(y_NO.dtype)
            y_NO = y_NO + bias.repeat_interleave(count_G, dim=0, output_size=len(y_NO))
        return y_NO

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SlotGroup:
        if self.native:
            return super()._apply(fn, recurse)  # type: ignore[no-any-return]

        def keep_storage(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_storage, recurse)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Precision and number of slots, for printed models."""
        return f"{self.form.name}, slots={len(self)}"


class ExpertSlots(nn.Module):  # type: ignore[misc]
    """All slots of one layer, with the dispatch that picks one for each selection.

    Attributes:
        plan: the layer's columns; slot numbers here are positions in them.
        layer, stack: index among the MoE layers, and the stack whose tokens it sees.
        dispatch: "even", "least_loaded" or "gate_aware".
        batches: gives the tokens of the current forward (`TokenTracker.batch`); None before it is set.
        listeners: who is told the slot of each selection.
    """

    def __init__(self, plan: LayerPlan, layer: int, stack: str, units: int, groups: dict[str, SlotGroup]) -> None:
        """Slots of one layer.

        Args:
            plan: the layer's columns.
            layer: index among the MoE layers.
            stack: name of the stack the layer is in.
            units: parallel units U.
            groups: storage of each precision, with as many slots as the plan has of it, in the plan's order.
        """
        super().__init__()
        self.plan, self.layer, self.stack, self.units = plan, layer, stack, units
        self.dispatch = "even"
        self.listeners: list[Listener] = []
        self.copies = dispatch.Copies.of(plan, layer)
        self.num_experts = len(self.copies.number_E)
        self.order = [slot for name in groups for slot in range(plan.num_slots) if canonical(plan.precisions[slot]) == name]
        assert len(self.order) == plan.num_slots, "every slot of the plan needs a group"
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
        tokens, k = expert_TK.shape
        expert_S, weight_S = expert_TK.reshape(-1), weight_TK.reshape(-1)
        token_S = torch.arange(tokens * k, device=expert_S.device) // k
        if partial:
            kept_S = ((expert_S >= 0) & (expert_S < self.num_experts)).nonzero().squeeze(1)
            expert_S, weight_S, token_S = expert_S[kept_S], weight_S[kept_S], token_S[kept_S]
        order_S, y_ND = self._serve(hidden_TD, tokens, token_S, expert_S, weight_S, activate)
        if after is not None:
            y_ND = after(y_ND)
        y_ND = y_ND * weight_S[order_S, None]
        if partial:
            out_TD = torch.zeros(tokens, y_ND.shape[1], dtype=y_ND.dtype, device=y_ND.device)
            return out_TD.index_add_(0, token_S[order_S], y_ND).to(hidden_TD.dtype)
        # Back in the order of tokens, then a sum of fixed order: deterministic on every device.
        back_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
        return y_ND[back_S].view(tokens, k, -1).sum(1).to(hidden_TD.dtype)

    def serve(
        self, x_SD: Tensor, tokens: int, token_S: Tensor, expert_S: Tensor, weight_S: Tensor, activate: Activation
    ) -> Tensor:
        """[S, D] outputs for inputs already gathered per selection, without gate weights, in the order of the selections."""
        rows_S = torch.arange(len(x_SD), device=x_SD.device)
        order_S, y_ND = self._serve(x_SD, tokens, token_S, expert_S, weight_S, activate, rows_S)
        return torch.empty_like(y_ND).index_copy_(0, order_S, y_ND)

    def _serve(
        self,
        x: Tensor,
        tokens: int,
        token_S: Tensor,
        expert_S: Tensor,
        weight_S: Tensor,
        activate: Activation,
        row_S: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        slot_S = self._dispatch(tokens, token_S, expert_S, weight_S)
        place_N, order_S = torch.sort(self._place(slot_S.device)[slot_S], stable=True)
        count_P = torch.bincount(place_N, minlength=self.plan.num_slots)
        x_ND = x[(token_S if row_S is None else row_S)[order_S]]
        groups = self.groups
        if len(groups) == 1:
            return order_S, groups[0](x_ND, count_P, activate)
        native = next((t.dtype for group in groups if group.native for t in group.parameters()), x_ND.dtype)
        x_ND = x_ND.to(native)
        counts = count_P.tolist()
        outputs, start, first = [], 0, 0
        for group in groups:
            rows = sum(counts[first : first + len(group)])
            if rows:
                outputs.append(group(x_ND[start : start + rows], count_P[first : first + len(group)], activate))
            start, first = start + rows, first + len(group)
        return order_S, torch.cat(outputs) if outputs else x_ND

    def _dispatch(self, tokens: int, token_S: Tensor, expert_S: Tensor, weight_S: Tensor) -> Tensor:
        copies = self.copies.to(expert_S.device)
        if not copies.any and not self.listeners:
            return copies.slots_EC[expert_S, 0]
        assert self.batches is not None, "slots need the tokens of the forward"
        batch = self.batches(self.stack, tokens)
        real_S = batch.real_T.to(expert_S.device)[token_S]
        position_S = batch.position_T.to(expert_S.device)[token_S]
        if self.dispatch == "even":
            slot_S = dispatch.even(copies, expert_S, position_S)
        elif self.dispatch == "gate_aware":
            slot_S = dispatch.gate_aware(copies, expert_S, position_S, weight_S, real_S)
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
            place = torch.empty(self.plan.num_slots, dtype=torch.long, device="cpu")
            place[torch.tensor(self.order, device="cpu")] = torch.arange(self.plan.num_slots, device="cpu")
            self._places[device] = place.to(device)
        return self._places[device]


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
