"""What the slots of a balanced model really served.

Shapes: L MoE layers, P slots of a layer, S selections of a call, U units.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from equipoise.errors import ModelError, RecordingError
from equipoise.execution.slots import ExpertSlots, slots_of
from equipoise.metrics import lis


class SlotMeter:
    """Counts the real tokens that each slot serves while its context is open; padding is not counted.

    with SlotMeter(model) as meter:
        model(**batch)
    meter.unit_load  # [L, U]

    Raises:
        ModelError: the model is not balanced; record it with `models.recorder` instead.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = slots_of(model)
        if not self._layers:
            raise ModelError("the model has no slots to meter; apply a plan first, or record its experts instead.")
        self._counts = [torch.zeros(slots.plan.num_slots, dtype=torch.int64, device="cpu") for slots in self._layers]
        self._listeners: list[Callable[[Tensor, Tensor], None]] = []

    def __enter__(self) -> SlotMeter:
        for index, slots in enumerate(self._layers):
            self._listeners.append(self._listener(index))
            slots.listeners.append(self._listeners[-1])
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for slots, listener in zip(self._layers, self._listeners, strict=True):
            slots.listeners.remove(listener)
        self._listeners.clear()
        if kind is None and not any(int(c.sum()) for c in self._counts):
            raise RecordingError("the meter saw no tokens; run the model inside its context.")

    @property
    def slot_load(self) -> list[NDArray[np.int64]]:
        """[P] tokens served by each slot, for each layer, in the order of the plan."""
        return [counts.cpu().numpy().copy() for counts in self._counts]

    @property
    def unit_load(self) -> NDArray[np.float64]:
        """[L, U] tokens served by each unit."""
        pairs = zip(self._layers, self.slot_load, strict=True)
        return np.stack([slots.plan.unit_load(load, slots.units) for slots, load in pairs])

    @property
    def lis(self) -> NDArray[np.float64]:
        """[L] LIS over units of what was served: U * max unit load / total load."""
        return lis(self.unit_load)

    def lis_paper(self, *, count_copies: bool = False) -> NDArray[np.float64]:
        """[L] the paper's reading of what was served: m * max slot load / total load.

        Args:
            count_copies: take m as the number of slots instead of the number of experts.
        """
        width = [slots.plan.num_slots if count_copies else slots.num_experts for slots in self._layers]
        loads = [load.astype(np.float64) for load in self.slot_load]
        with np.errstate(invalid="ignore"):
            return np.array([m * load.max() / load.sum() for m, load in zip(width, loads, strict=True)])

    def _listener(self, index: int) -> Callable[[Tensor, Tensor], None]:
        counts: ExpertSlots = self._layers[index]
        size = counts.plan.num_slots

        def listen(slot_S: Tensor, real_S: Tensor) -> None:
            self._counts[index] += torch.bincount(slot_S[real_S], minlength=size).to("cpu")

        return listen
