"""A streaming policy replayed on recorded loads, step by step: what it would have made of a stream.

Every step is served under the plan that was decided on after the step before it, as on a running model.
Shapes: N steps, L MoE layers, E logical experts of the widest layer, P slots of a layer, U units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from equipoise.artifacts import LayerPlan, Plan
from equipoise.dispatch.flow import spread_evenly
from equipoise.errors import PlanError
from equipoise.planning.streaming.decision import Costs, Decision, Entry, Ledger, Policy, mean_lis

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class StreamRun:
    """What a policy made of a stream.

    Attributes:
        instantaneous: [N] LIS over units of each step under the plan in force, mean over layers.
        cumulative: [N] the same of what units served in all steps so far.
        paper: [N] the paper's reading of each step, m * max slot load / total load, as if every copy had a unit of its own.
        decisions: after each step.
        ledger: what each change cost and won.
        bytes: [N] of all slots of the plan in force.
        saved: seconds by which the fullest units were done earlier than under the plan at the start, over the whole stream.
        plan: in force at the end.
    """

    instantaneous: Floats
    cumulative: Floats
    paper: Floats
    decisions: tuple[Decision, ...]
    ledger: Ledger
    bytes: NDArray[np.int64]
    saved: float
    plan: Plan

    @property
    def net(self) -> float:
        """Seconds won over the whole stream against the plan at the start, all costs deducted."""
        return self.saved - sum(entry.cost for entry in self.ledger.entries)


def replay_stream(
    steps_NLE: NDArray[np.integer],
    plan: Plan,
    policy: Policy,
    costs: Costs,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> StreamRun:
    """Run a policy over recorded steps.

    Args:
        steps_NLE: [N, L, E] selections of each step.
        plan: at the start.
        policy: that has seen nothing yet.
        costs: of imbalance and changes.
        progress: told after each step.

    Raises:
        PlanError: no steps, or steps of another model's shape.
    """
    shape = (len(plan.layers), plan.model.max_experts)
    if len(steps_NLE) == 0 or steps_NLE.shape[1:] != shape:
        raise PlanError(f"a stream of shape {steps_NLE.shape} given; it must have steps of shape {shape}, [L, E].")
    start, ledger = plan, Ledger(lambda plan, load_LE: float(unit_load(plan, load_LE).max(1).sum()))
    instantaneous, cumulative, paper, held, decisions = [], [], [], [], []
    total_LU = np.zeros((len(plan.layers), plan.units))
    saved = 0.0
    for number, load_LE in enumerate(steps_NLE):
        served_LU = unit_load(plan, load_LE)
        total_LU += served_LU
        instantaneous.append(mean_lis(served_LU))
        cumulative.append(mean_lis(total_LU))
        paper.append(float(np.nanmean(plan.lis_paper(load_LE))))
        held.append(int(plan.bytes_by_unit().sum()))
        saved += float((unit_load(start, load_LE).max(1) - served_LU.max(1)).sum()) * costs.per_selection
        ledger.serve(load_LE, costs.per_selection)
        made = policy.decide(load_LE, plan, costs)
        decisions.append(made)
        if made.plan is not None:
            ledger.change(Entry(number + 1, made.pays, made.cost, made.slots, made.bytes), plan, made.plan)
            plan = made.plan
        progress(number + 1, len(steps_NLE))
    return StreamRun(
        np.array(instantaneous), np.array(cumulative), np.array(paper), tuple(decisions), ledger, np.array(held), saved, plan
    )  # fmt: skip


def unit_load(plan: Plan, load_LE: NDArray[np.integer]) -> Floats:
    """[L, U] selections that each unit serves of a load, as the plan's dispatch splits it among copies.

    Args:
        plan: its dispatch: by shares, or each step split anew to the least loaded.
        load_LE: [L, E] selections of each expert.
    """
    if plan.dispatch != "least_loaded":
        return plan.unit_load(load_LE)
    return np.stack([_least_loaded(columns, load, plan.units) for columns, load in zip(plan.layers, load_LE, strict=True)])


def _least_loaded(columns: LayerPlan, load_E: NDArray[np.integer], units: int) -> Floats:
    order = np.argsort(np.array(columns.experts), kind="stable")
    number_E = np.bincount(columns.experts)
    units_EC = np.zeros((len(number_E), int(number_E.max())), np.int64)
    inside = np.arange(units_EC.shape[1]) < number_E[:, None]
    units_EC[inside] = np.array(columns.units)[order]
    split_EC = spread_evenly(np.asarray(load_E[: len(number_E)], np.int64), units_EC, number_E, units)
    return np.asarray(np.bincount(units_EC[inside], split_EC[inside], units), np.float64)
