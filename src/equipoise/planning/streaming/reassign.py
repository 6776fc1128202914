"""Other experts in the slots that a layer has: places, precisions and bytes stay, and little moves.

From the slots in force a path is walked. Its first step only changes shares, which moves nothing. Each further one hands a
copy's slot to another expert, or lets two slots of one precision change experts; it is the one that best relieves the fullest
units. Shares are fitted anew at every step.
Shapes: N steps of a window, E logical experts of the layer, P slots, U units, Q precisions of the slots, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from equipoise.planning.dispatched import even_flows, fit_flows

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

HOT = 3
"""Fullest units that a step may relieve."""
SHORTLIST = 96
"""Candidates of each kind that are fitted, those that look best."""
QUICK, CAREFUL = 8, 60
"""Rounds of fitting for a candidate, and for the best of them."""
FINALISTS = 6
LEAST_GAIN = 2e-3
"""By how much the norm of unit loads, in mean unit loads, must fall for a step to be done."""
POWER = 8
"""Of the norm that steps are judged by: near the fullest unit, but falling when one of several equally full units does."""


@dataclass(frozen=True, eq=False)
class Stop:
    """Experts and shares of a layer's slots somewhere on the path.

    Attributes:
        experts: [P].
        shares: [P].
        moved: slots that hold another expert than those in force.
        peaks: [N] selections of the fullest unit in each step of the window.
    """

    experts: Ints
    shares: Floats
    moved: tuple[int, ...]
    peaks: Floats


@dataclass(frozen=True, eq=False)
class LayerTask:
    """What a layer's slots are, and what they shall serve.

    Attributes:
        experts: [P] in force.
        shares: [P] in force.
        units_P: [P] unit of each slot.
        kinds: [P] a number for each precision; slots of one number are of equal bytes.
        units: U.
        loads: [N, E] steps of the window.
        weights: [N] of the steps.
        least_loaded: each batch is split anew, so that shares do not matter.
    """

    experts: Ints
    shares: Floats
    units_P: Ints
    kinds: Ints
    units: int
    loads: NDArray[np.int64]
    weights: Floats
    least_loaded: bool = False


def path(task: LayerTask, most_moves: int) -> list[Stop]:
    """Stops from the slots in force on; the fullest unit has less at each than at those before it.

    Args:
        task: the layer.
        most_moves: slots that may hold another expert.
    """
    total_N = task.loads.sum(1)
    now = Stop(task.experts, task.shares, (), _peaks(task, task.experts, task.shares))
    mean_E = task.weights @ task.loads
    if not mean_E.sum() > 0:
        return [now]
    p_E = task.units * mean_E / mean_E.sum()
    flow_P, load_U = _fitted(task, task.experts, p_E, None, CAREFUL)
    experts = task.experts
    stops = [now]
    if not task.least_loaded:
        stops += _better(_stop(task, experts, flow_P, p_E), stops[-1], total_N, task)
    while True:
        found = _best_step(task, experts, flow_P, load_U, p_E, most_moves)
        if found is None:
            return stops
        experts, flow_P, load_U = found
        stops += _better(_stop(task, experts, flow_P, p_E), stops[-1], total_N, task)


def _better(stop: Stop, last: Stop, total_N: Ints, task: LayerTask) -> list[Stop]:
    """The stop, if the fullest unit has less than at the last one, over the window."""
    return [stop] if task.weights @ (last.peaks - stop.peaks) > 1e-9 * float(task.weights @ total_N) else []


def _stop(task: LayerTask, experts: Ints, flow_P: Floats, p_E: Floats) -> Stop:
    own_P = p_E[experts]
    copies_P = np.bincount(experts, minlength=len(p_E))[experts]
    shares = np.where(own_P > 0, flow_P / np.where(own_P > 0, own_P, 1.0), 1.0 / copies_P)
    shares = shares / np.bincount(experts, shares, len(p_E))[experts]
    moved = tuple(np.flatnonzero(experts != task.experts).tolist())
    return Stop(experts, shares, moved, _peaks(task, experts, shares))


def peaks(
    experts: Ints, shares: Floats, units_P: Ints, units: int, loads_NE: NDArray[np.int64], *, least_loaded: bool = False
) -> Floats:
    """[N] selections of the fullest unit in each step.

    Args:
        experts: [P] that the slots hold.
        shares: [P] of their experts' selections.
        units_P: [P] unit of each slot.
        units: U.
        loads_NE: [N, E] selections of each expert.
        least_loaded: each step is split anew, so that shares do not matter.
    """
    if least_loaded:
        total_N1 = np.maximum(loads_NE.sum(1, keepdims=True), 1)
        p_NE = units * loads_NE / total_N1
        flow = even_flows(experts[None], p_NE)
        load_NU = fit_flows(experts[None], units_P[None], p_NE, units, flow, CAREFUL)[1][0]
        return np.asarray(load_NU.max(1) * total_N1[:, 0] / units)
    on_unit_PU = np.zeros((len(experts), units))
    on_unit_PU[np.arange(len(experts)), units_P] = 1.0
    return np.asarray(((loads_NE[:, experts] * shares) @ on_unit_PU).max(1))


def _peaks(task: LayerTask, experts: Ints, shares: Floats) -> Floats:
    return peaks(experts, shares, task.units_P, task.units, task.loads, least_loaded=task.least_loaded)


def _fitted(task: LayerTask, experts: Ints, p_E: Floats, start_P: Floats | None, rounds: int) -> tuple[Floats, Floats]:
    """[P] flows and [U] loads of one placement when shares are free."""
    start = even_flows(experts[None], p_E[None]) if start_P is None else start_P[None, None]
    flow, load = fit_flows(experts[None], task.units_P[None], p_E[None], task.units, start, rounds)
    return flow[0, 0], load[0, 0]


def _best_step(
    task: LayerTask, experts: Ints, flow_P: Floats, load_U: Floats, p_E: Floats, most_moves: int
) -> tuple[Ints, Floats, Floats] | None:
    """The step that best relieves the fullest units; None when none does or too much would move."""
    changes = [*_turns(task, experts, flow_P, load_U, p_E), *_swaps(task, experts, flow_P, load_U)]
    after = [_changed(experts, change) for change in changes]
    after = [a for a in after if int((a != task.experts).sum()) <= most_moves]
    if not after:
        return None
    expert_CP = np.stack(after)
    unit_CP, p_1E = np.repeat(task.units_P[None], len(after), 0), p_E[None]
    # Experts that gained or lost a slot start evenly split, all others as they are.
    touched_CE = np.zeros((len(after), len(p_E)), bool)
    rows, slots = np.nonzero(expert_CP != experts)
    touched_CE[rows, expert_CP[rows, slots]] = True
    touched_CE[rows, experts[slots]] = True
    even = even_flows(expert_CP, p_1E)
    fresh = np.take_along_axis(touched_CE, expert_CP, 1)[:, None]
    start = np.where(fresh, even, np.maximum(flow_P, 1e-6))
    flow, load = fit_flows(expert_CP, unit_CP, p_1E, task.units, start, QUICK)
    top = np.argsort(_norm(load[:, 0]), kind="stable")[:FINALISTS]
    flow, load = fit_flows(expert_CP[top], unit_CP[top], p_1E, task.units, flow[top], CAREFUL)
    norm_C = _norm(load[:, 0])
    best = int(norm_C.argmin())
    if norm_C[best] >= _norm(load_U) - LEAST_GAIN:
        return None
    return expert_CP[top[best]], flow[best, 0], load[best, 0]


def _powers(*units: tuple[Floats, Floats]) -> Floats:
    """[X] what the sum under the norm changes by when units' loads change, given as (after, before)."""
    return np.asarray(sum(after**POWER - before**POWER for after, before in units))


def _norm(load_XU: Floats) -> Floats:
    """[X] power mean of unit loads."""
    return np.asarray((load_XU**POWER).mean(-1) ** (1 / POWER))


Change = Sequence[tuple[int, int]]
"""Slots and the experts that they get."""


def _changed(experts: Ints, change: Change) -> Ints:
    after = experts.copy()
    for slot, expert in change:
        after[slot] = expert
    return after


def _turns(task: LayerTask, experts: Ints, flow_P: Floats, load_U: Floats, p_E: Floats) -> list[Change]:
    """A copy's slot given to an expert of one of the fullest units that its own unit does not have."""
    copies_E = np.bincount(experts, minlength=len(p_E))
    hot_U = np.argsort(-load_U, kind="stable")[:HOT]
    wanted = np.unique(experts[np.isin(task.units_P, hot_U)])
    holds_EU = np.zeros((len(p_E), task.units), bool)
    holds_EU[experts, task.units_P] = True
    slot_X, expert_X = np.nonzero((copies_E[experts] > 1)[:, None] & ~holds_EU[wanted][:, task.units_P].T)
    newcomer_X = wanted[expert_X]
    part_X = p_E[newcomer_X] / (copies_E[newcomer_X] + 1)
    # What the unit would have with an even part of the newcomer, and what the fullest unit that has it would keep.
    there_X = load_U[task.units_P[slot_X]] - flow_P[slot_X] + part_X
    fullest_E = np.zeros(len(p_E))
    np.maximum.at(fullest_E, experts, load_U[task.units_P])
    kept_X = np.maximum(fullest_E[newcomer_X] - part_X / np.maximum(copies_E[newcomer_X], 1), 0.0)
    key_X = _powers((there_X, load_U[task.units_P[slot_X]]), (kept_X, fullest_E[newcomer_X]))
    order = np.argsort(key_X, kind="stable")[:SHORTLIST]
    return [[(int(slot_X[i]), int(newcomer_X[i]))] for i in order]


def _swaps(task: LayerTask, experts: Ints, flow_P: Floats, load_U: Floats) -> list[Change]:
    """A slot of one of the fullest units and one of equal precision elsewhere change experts."""
    hot_U = np.argsort(-load_U, kind="stable")[:HOT]
    hot_P = np.flatnonzero(np.isin(task.units_P, hot_U))
    holds_EU = np.zeros((int(experts.max()) + 1, task.units), bool)
    holds_EU[experts, task.units_P] = True
    i, j = hot_P[:, None], np.arange(len(experts))[None, :]
    a, b = task.units_P[i], task.units_P[j]
    allowed = (a != b) & (task.kinds[i] == task.kinds[j]) & (experts[i] != experts[j]) & (flow_P[i] > flow_P[j])
    allowed &= ~holds_EU[experts[i], b] & ~holds_EU[experts[j], a]
    at, other = np.nonzero(allowed)
    i_X, j_X = hot_P[at], other
    change_X = flow_P[i_X] - flow_P[j_X]
    hot_X, other_X = load_U[task.units_P[i_X]], load_U[task.units_P[j_X]]
    key_X = _powers((hot_X - change_X, hot_X), (other_X + change_X, other_X))
    order = np.argsort(key_X, kind="stable")[:SHORTLIST]
    return [[(int(i_X[n]), int(experts[j_X[n]])), (int(j_X[n]), int(experts[i_X[n]]))] for n in order]
