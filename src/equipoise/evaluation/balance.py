"""The balance of a model while it runs: recorded selections of a model as it is, tokens served by the slots of a balanced one.

Shapes: L MoE layers, E logical experts, P slots of a layer, U units.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from equipoise.artifacts.plan import Plan
from equipoise.execution.meter import SlotMeter
from equipoise.metrics import lis
from equipoise.models.recorder import record


@dataclass
class Balance:
    """Filled when the measurement ends: means over the layers that served something.

    Attributes:
        lis: LIS over units.
        lis_paper: m * max slot load / total load, with m the number of experts: each slot on a unit of its own.
    """

    lis: float = float("nan")
    lis_paper: float = float("nan")


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
        widths = [layer.num_experts for layer in recorder.layers]
        loads = [load[:width] for load, width in zip(load_LE, widths, strict=True)]
        unit_LU = np.stack([unit_load(load, units) for load in loads])
        paper_L = lis(load_LE, widths)
    else:
        with SlotMeter(model) as meter:
            yield balance
        unit_LU, paper_L = meter.unit_load, meter.lis_paper()
    balance.lis = float(np.nanmean(lis(unit_LU)))
    balance.lis_paper = float(np.nanmean(paper_L))


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
