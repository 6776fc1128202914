"""The balance of a model while it runs: recorded selections of a model as it is, tokens served by the slots of a balanced one.

Shapes: L MoE layers, E logical experts, P slots of a layer, U units.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from equipoise.artifacts.plan import Plan
from equipoise.execution.meter import SlotMeter
from equipoise.metrics import lis
from equipoise.models.recorder import record


@dataclass
class Balance:
    """What was served, filled when the measurement ends; scores are means over the layers that served something.

    Attributes:
        unit_LU: [L, U] tokens that each unit served.
        slot_LP: [P] tokens that each slot served, layer by layer; of a model as it is, a slot is an expert.
        experts: routed experts of each layer.
    """

    unit_LU: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 1)))
    slot_LP: Sequence[NDArray[np.float64]] = ()
    experts: Sequence[int] = ()

    @property
    def lis(self) -> float:
        """LIS over units."""
        return float(np.nanmean(lis(self.unit_LU)))

    @property
    def lis_paper(self) -> float:
        """M * max slot load / total load, with m the number of experts: each slot on a unit of its own."""
        served = [(m, slots) for m, slots in zip(self.experts, self.slot_LP, strict=True) if slots.sum() > 0]
        return float(np.mean([m * slots.max() / slots.sum() for m, slots in served]))

    @classmethod
    def pooled(cls, parts: Sequence[Balance]) -> Balance:
        """The balance of several measurements of one model together."""
        slots = [np.sum(loads, 0) for loads in zip(*(part.slot_LP for part in parts), strict=True)]
        return cls(np.sum([part.unit_LU for part in parts], 0), slots, parts[0].experts)


@contextmanager
def measure(model: Any, plan: Plan | None, units: int) -> Iterator[Balance]:
    """Measure the balance of everything that a model runs inside the `with` block.

    Args:
        model: the model.
        plan: what it was balanced with; None for a model as it is.
        units: parallel units U of every layer; a balanced model's are those of its plan.
    """
    balance = Balance()
    if plan is None:
        with record(model, transitions=False, coactivation=False) as recorder:
            yield balance
        load_LE = np.asarray(recorder.counts).sum((0, 1))
        balance.experts = [layer.num_experts for layer in recorder.layers]
        balance.slot_LP = [load[:width].astype(np.float64) for load, width in zip(load_LE, balance.experts, strict=True)]
        balance.unit_LU = np.stack([unit_load(load, units) for load in balance.slot_LP])
    else:
        with SlotMeter(model) as meter:
            yield balance
        balance.experts = [layer.num_experts for layer in plan.model.layers]
        balance.slot_LP = [np.asarray(load, np.float64) for load in meter.slot_load]
        balance.unit_LU = np.asarray(meter.unit_load, np.float64)


def unit_load(load_E: ArrayLike, units: int) -> NDArray[np.float64]:
    """[U] tokens that each unit serves when experts lie on units in order, as many on each as can be.

    With U = E, unit e holds expert e; with fewer units, unit u is rank u of an expert-parallel layer.

    Args:
        load_E: [E] selections of each expert.
        units: U, at least 1.
    """
    load = np.asarray(load_E, np.float64)
    unit_E = np.arange(load.size) * units // load.size
    return np.asarray(np.bincount(unit_E, weights=load, minlength=units), np.float64)
