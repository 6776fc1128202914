"""What a balanced model serves, forward by forward: loads of experts and units, tokens, and the time of the experts.

Shapes: L MoE layers, E logical experts of the widest layer, P slots of a layer, U units, S selections.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from equipoise.execution.rebalance.gate import Gate
from equipoise.execution.slots import ExpertSlots
from equipoise.models.layers import MoELayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ints = NDArray[np.int64]
TIMED = 16
"""On a GPU the experts of one forward in so many are timed, for the clock must wait for the device."""


@dataclass
class Served:
    """What was served since the last time it was taken.

    Attributes:
        load_LE: [L, E] selections of each expert, real tokens alone.
        unit_LU: [L, U] selections that each unit served.
        tokens: real tokens, over all stacks that have MoE layers.
        forwards: calls of the model.
        seconds: of the experts modules, where they were timed.
        timed: selections that those served.
    """

    load_LE: Ints
    unit_LU: Ints
    tokens: int = 0
    forwards: int = 0
    seconds: float = 0.0
    timed: int = 0


class Watch:
    """Hooks on a balanced model: every forward passes the gate, and what it served is added up when it is complete.

    A forward that fails is not counted. Use as a context manager.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        moe_layers: Sequence[MoELayer],
        slots: Sequence[ExpertSlots],
        gate: Gate,
        on_forward: Callable[[], None] = lambda: None,
    ) -> None:
        """Hooks that are not in place yet.

        Args:
            model: the model.
            moe_layers: its MoE layers.
            slots: their slots, in the same order.
            gate: that forwards pass.
            on_forward: called after each complete forward, in its thread.
        """
        self._model, self._layers, self._slots, self._gate = model, moe_layers, slots, gate
        self._on_forward = on_forward
        self._lock = threading.Lock()
        self._size = (len(slots), max(s.num_experts for s in slots), slots[0].units)
        self._sum = self._empty()
        self._now: dict[int, list[Tensor]] = {}
        self._on_cpu = next(model.parameters()).device.type == "cpu"
        # The layer of each stack whose selections tell how many tokens there were.
        self._first = {layer.stack: i for i, layer in reversed(list(enumerate(moe_layers)))}
        self._seconds = 0.0
        self._begun: dict[int, float] = {}
        self._count = 0
        self._failed = False
        self._handles: list[Any] = []
        self._listeners: list[Callable[[Tensor, Tensor], None]] = []

    def __enter__(self) -> Watch:
        paths = dict.fromkeys(["", *(layer.stack_path for layer in self._layers)])
        for path in paths:
            module = self._model.get_submodule(path)
            # Before every other hook of the call, and after all of them.
            self._handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        for index, (layer, slots) in enumerate(zip(self._layers, self._slots, strict=True)):
            self._handles.append(layer.experts.register_forward_pre_hook(self._clock(index)))
            self._handles.append(layer.experts.register_forward_hook(self._unclock(index)))
            self._listeners.append(self._listener(index))
            slots.listeners.append(self._listeners[-1])
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for slots, listener in zip(self._slots, self._listeners, strict=False):
            slots.listeners.remove(listener)
        self._handles.clear()
        self._listeners.clear()

    @property
    def tokens(self) -> int:
        """Tokens of complete forwards since the last `take`."""
        with self._lock:
            return self._sum.tokens

    def take(self) -> Served:
        """What was served since the last call."""
        with self._lock:
            served, self._sum = self._sum, self._empty()
            return served

    def _empty(self) -> Served:
        n_layers, n_experts, n_units = self._size
        return Served(np.zeros((n_layers, n_experts), np.int64), np.zeros((n_layers, n_units), np.int64))

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._gate.enter()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._failed |= output is None
        complete = False
        try:
            if self._gate.depth == 1:
                complete = not self._failed and bool(self._now)
                if complete:
                    self._flush()
                self._now, self._begun, self._seconds, self._failed = {}, {}, 0.0, False
        finally:
            outermost = self._gate.leave()
        if outermost and complete:
            self._on_forward()

    def _flush(self) -> None:
        """Add up a complete forward, still inside the gate, so that slots are those that served it."""
        with self._lock:
            total = self._sum
            selections = 0
            for index, parts in self._now.items():
                plan = self._slots[index].plan
                count_P = torch.stack(parts).sum(0).cpu().numpy()
                np.add.at(total.load_LE[index], list(plan.experts), count_P)
                np.add.at(total.unit_LU[index], list(plan.units), count_P)
                selections += int(count_P.sum())
                if index in self._first.values():
                    total.tokens += -(-int(count_P.sum()) // self._layers[index].top_k)
            total.forwards += 1
            if self._seconds > 0:
                total.seconds += self._seconds
                total.timed += selections
            self._count += 1

    def _listener(self, index: int) -> Callable[[Tensor, Tensor], None]:
        def listen(slot_S: Tensor, real_S: Tensor) -> None:
            # Nothing here waits for the device; the counts are fetched when the forward is complete.
            counts = torch.zeros(self._slots[index].plan.num_slots, dtype=torch.int64, device=slot_S.device)
            self._now.setdefault(index, []).append(counts.scatter_add_(0, slot_S, real_S.to(torch.int64)))

        return listen

    def _clock(self, index: int) -> Callable[[nn.Module, Any], None]:
        def begin(module: nn.Module, args: Any) -> None:
            if self._timed():
                self._begun[index] = time.perf_counter()

        return begin

    def _unclock(self, index: int) -> Callable[[nn.Module, Any, Any], None]:
        def end(module: nn.Module, args: Any, output: Any) -> None:
            if index in self._begun:
                if isinstance(output, Tensor) and output.device.type == "cuda":
                    torch.cuda.synchronize(output.device)
                self._seconds += time.perf_counter() - self._begun.pop(index)

        return end

    def _timed(self) -> bool:
        """Whether the experts of this forward are timed; all layers of it or none."""
        return self._on_cpu or self._count % TIMED == 0
