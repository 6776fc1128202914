"""What a streaming policy answers each step, and what its answer is weighed by.

A policy changes which expert a slot holds and what share it serves. How many slots there are, their precisions and their units
stay as the plan has them, so bytes stay to the last one.
Shapes: L MoE layers, E logical experts of the widest layer, U units.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from equipoise.artifacts import LayerPlan, Plan
from equipoise.artifacts.json_file import first_problem
from equipoise.errors import PlanError
from equipoise.metrics import lis
from equipoise.planning.streaming.reassign import peaks

Floats = NDArray[np.float64]
Load = NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class Costs:
    """What imbalance and changes cost, in seconds.

    Attributes:
        per_selection: time in which a unit serves one selection.
        per_byte: time to make a moved slot ready, per byte of it: fetching, rounding where needed, writing.
        per_swap: time for which the model stands still at a change of plan.
        measured: whether these were measured on this model and machine; else they are assumed.
    """

    per_selection: float
    per_byte: float
    per_swap: float
    measured: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """What a policy made of a step.

    Attributes:
        plan: the plan to change to; None to keep the one in force.
        reason: why, in words.
        drift: Jensen-Shannon divergence in bits between the window and the load of the plan in force, mean over layers; nan
            for a policy that does not look at it.
        changed: a change of traffic was found at this step.
        saved: seconds per step that the new plan is expected to save.
        dwell: steps for which that is expected to last.
        cost: seconds of moving and of the swap.
        slots: slots that get another expert.
        bytes: of those slots.
        layers: layers in which anything changes.
        seconds: spent on deciding; measured.
    """

    plan: Plan | None
    reason: str
    drift: float = float("nan")
    changed: bool = False
    saved: float = 0.0
    dwell: float = 0.0
    cost: float = 0.0
    slots: int = 0
    bytes: int = 0
    layers: int = 0
    seconds: float = 0.0

    @property
    def pays(self) -> float:
        """Predicted seconds won until the load changes, the cost deducted."""
        return self.saved * self.dwell - self.cost


class Policy(Protocol):
    """State over a stream; makes one decision a step."""

    def decide(self, load_LE: Load, plan: Plan, costs: Costs) -> Decision:
        """Take in the load of a step that ran under a plan, and say what to run the next one with."""
        ...


@dataclass
class Entry:
    """A change of plan, and what came of it.

    Attributes:
        step: after which it was made.
        predicted: seconds that it was to win, its cost deducted.
        cost: seconds of moving and swapping; measured where it was carried out.
        slots: that got another expert.
        bytes: of those.
        saved: seconds by which the fullest units were done earlier than under the plan before, on the load that came.
        steps: served since, until the next change.
    """

    step: int
    predicted: float
    cost: float
    slots: int
    bytes: int
    saved: float = 0.0
    steps: int = 0

    @property
    def paid(self) -> float:
        """Seconds won on the load that came, the cost deducted."""
        return self.saved - self.cost


def fullest(plan: Plan, load_LE: Load) -> float:
    """Selections of each layer's fullest unit, added up over layers.

    Args:
        plan: its dispatch: by shares, or each step split anew to the least loaded.
        load_LE: [L, E] selections of a step.
    """
    return math.fsum(
        float(
            peaks(
                np.array(columns.experts), np.array(columns.shares), np.array(columns.units), plan.units,
                np.asarray(load_E, np.int64)[None, : facts.num_experts], least_loaded=plan.dispatch == "least_loaded",
            )[0]
        )
        for columns, facts, load_E in zip(plan.layers, plan.model.layers, load_LE, strict=True)
    )  # fmt: skip


class Ledger:
    """What each change of plan has won on the load that came after it, against keeping the plan before.

    Attributes:
        entries: in order of time.
    """

    def __init__(self, fullest: Callable[[Plan, Load], float] = fullest) -> None:
        """Without entries yet.

        Args:
            fullest: selections of each layer's fullest unit of a load under a plan, added up over layers.
        """
        self.entries: list[Entry] = []
        self._fullest = fullest
        self._plans: tuple[Plan, Plan] | None = None

    def change(self, entry: Entry, before: Plan, after: Plan) -> None:
        """A change was made; the one before is settled."""
        self.entries.append(entry)
        self._plans = before, after

    def serve(self, load_LE: Load, per_selection: float) -> None:
        """A step was served under the plan of the last change."""
        if self._plans is None:
            return
        before, after = (self._fullest(plan, load_LE) for plan in self._plans)
        self.entries[-1].saved += (before - after) * per_selection
        self.entries[-1].steps += 1


def decision(plan: Plan, layers: tuple[LayerPlan, ...], costs: Costs, reason: str, begun: float) -> Decision:
    """A decision for other layers; without a plan when they are the same.

    Args:
        plan: in force.
        layers: to change to.
        costs: of moving and swapping.
        reason: for the change.
        begun: `time.perf_counter()` when the policy began.

    Raises:
        PlanError: the layers make no valid plan.
    """
    if layers == plan.layers:
        return Decision(None, "nothing to change", seconds=time.perf_counter() - begun)
    after = with_layers(plan, layers)
    slots, size, count = moved(plan, after)
    return Decision(
        after, reason, cost=moving_cost(plan, after, costs), slots=slots, bytes=size, layers=count,
        seconds=time.perf_counter() - begun,
    )  # fmt: skip


def with_layers(plan: Plan, layers: tuple[LayerPlan, ...]) -> Plan:
    """The plan with other experts and shares in its slots, validated; what was predicted of the old ones is left out.

    Raises:
        PlanError: the slots make no valid plan.
    """
    changed = dict(plan) | {"layers": [columns.model_dump() for columns in layers], "predicted": None}
    try:
        return Plan.model_validate(changed)
    except ValidationError as error:
        raise PlanError(f"the changed layers make no valid plan: {first_problem(error)}") from error


def moved(before: Plan, after: Plan) -> tuple[int, int, int]:
    """Slots that hold another expert, their bytes, and layers in which anything differs."""
    slots = size = layers = 0
    for old, new, facts in zip(before.layers, after.layers, before.model.layers, strict=True):
        differs = [i for i, (a, b) in enumerate(zip(old.experts, new.experts, strict=True)) if a != b]
        slots += len(differs)
        size += int(new.slot_bytes(facts)[differs].sum()) if facts.matrices else 0
        layers += old != new
    return slots, size, layers


def moving_cost(before: Plan, after: Plan, costs: Costs) -> float:
    """Seconds to get from one plan to another: bytes of the slots that change, and the swap."""
    return moved(before, after)[1] * costs.per_byte + costs.per_swap


def mean_lis(unit_load_LU: NDArray[Any]) -> float:
    """LIS over units, mean over the layers that served something; 1 when none did."""
    score_L = lis(unit_load_LU)
    known = score_L[~np.isnan(score_L)]
    return float(known.mean()) if len(known) else 1.0
