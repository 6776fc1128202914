"""Re-planning from the plan in force with a bound on what moves: the steps that gain most, over all layers together.

Per layer a path of steps away from the placement in force, each the one that lowers the aim most for what it moves: a swap of
two slots (at most two move), or giving a copy's slot to another expert (one moves). The aim is the mean over scenarios of max
over mean rank load. Every stop on the path is an option (slots moved, aim); an exact knapsack over layers picks one per layer.
Shapes: S scenarios, G groups of scenarios, L MoE layers, E logical experts, P physical slots of a layer, R ranks, C candidate
steps, I slots on the ranks to relieve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from equipoise.artifacts import Plan, Profile
from equipoise.errors import PlanError
from equipoise.planning.knapsack import choose_exactly
from equipoise.planning.ranks import Phase, moved_slots, phase_load, placement_of, rank_plan, target

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

FEWEST, PART = 16, 4
"""A layer may take 16 of the moves, or four times an equal part of them: paths need not be walked further."""
HOT = 3
"""Ranks to relieve: those most often the fullest."""
SHORTLIST = 64
"""Steps of each kind that are judged on all scenarios, the best by groups of scenarios."""
GROUPS = 4
LEAST_GAIN = 1e-6
"""Lowering of the aim below which a step is not done."""


@dataclass(frozen=True, eq=False)
class Stop:
    """A placement on the path away from the one in force.

    Attributes:
        physical: [P].
        moved: slots whose expert its rank did not hold in the placement in force.
        aim: mean over scenarios of max over mean rank load.
    """

    physical: Ints
    moved: int
    aim: float


def incremental(
    profile: Profile,
    *,
    units: int,
    seed: int,
    slots: int | Sequence[int] | None = None,
    nodes: int = 1,
    current: Plan | None = None,
    phase: Phase = "all",
    most_moves: int = 64,
) -> Plan:
    """The plan in force, improved by the steps that gain most, with a bound on the slots that move.

    Never worse than the plan in force on the scenarios of the profile. Slots of one expert that already share a rank stay
    so unless another use of the slot gains more.

    Args:
        profile: what was measured lately; each scenario counts the same.
        units: ranks, as many as the plan in force has.
        seed: not used; nothing is left to chance.
        slots: as in the plan in force, or omitted.
        nodes: machines; where they divide the model's expert groups, experts stay on their node.
        current: the plan in force.
        phase: the phase to plan for.
        most_moves: slots, over all layers, that may receive an expert which their rank did not hold.

    Raises:
        PlanError: no current plan, one that does not match, or an option out of range.
    """
    if current is None:
        raise PlanError(
            "current: none given; 'incremental' improves the plan in force (--current PLAN), or plan with 'robust'."
        )
    if isinstance(most_moves, bool) or not isinstance(most_moves, int) or most_moves < 0:
        raise PlanError(f"most_moves: {most_moves!r} given; allowed is a whole number from 0.")
    before_L = placement_of(current, profile, units)
    goal = target(profile, units, [len(p) for p in before_L] if slots is None else slots, nodes)
    if goal.slots != tuple(len(p) for p in before_L):
        raise PlanError("slots: other numbers given than the plan in force has; leave them out, or plan anew with 'robust'.")
    load_SLE = phase_load(profile, phase)
    local = nodes > 1 and profile.model.expert_groups % nodes == 0
    most_here = min(most_moves, max(FEWEST, PART * most_moves // len(before_L)))
    paths = [
        path(load_SLE[:, layer, : facts.num_experts], physical, units, most_here, nodes if local else 1)
        for layer, (physical, facts) in enumerate(zip(before_L, profile.model.layers, strict=True))
    ]
    width = max(len(stops) for stops in paths)
    # Short paths repeat their first stop, the placement in force.
    padded = [stops + [stops[0]] * (width - len(stops)) for stops in paths]
    chosen_L = choose_exactly(
        np.array([[stop.moved for stop in stops] for stops in padded], np.int64),
        np.array([[stop.aim for stop in stops] for stops in padded]),
        most_moves,
    )
    physical_L = [stops[option].physical for stops, option in zip(padded, chosen_L.tolist(), strict=True)]
    return rank_plan(
        profile, physical_L, ranks=units, nodes=nodes, method="incremental", seed=seed, current=current,
        load_LE=load_SLE.sum(0), options={"slots": list(goal.slots), "phase": phase, "most_moves": most_moves},
    )  # fmt: skip


def path(load_SE: NDArray[np.generic], current_P: Ints, ranks: int, most_moves: int, nodes: int = 1) -> list[Stop]:
    """Stops from the placement in force to where no step gains or too much would move; each better than those before it.

    Args:
        load_SE: [S, E] load of each expert in each scenario.
        current_P: [P] placement in force, rank-major.
        ranks: R.
        most_moves: slots that may move.
        nodes: parts of the ranks that experts do not leave; 1 for no such bound.
    """
    state = _State(load_SE, current_P, ranks, nodes)
    stops = [Stop(current_P, 0, state.aim)]
    while True:
        step = state.best_step(most_moves)
        if step is None:
            return stops
        state.take(step)
        stops.append(Stop(state.physical_P.copy(), moved_slots(state.physical_P, current_P, ranks), state.aim))


@dataclass(frozen=True, slots=True)
class _Step:
    """Slots that get other experts, what the aim then is and how many more slots have moved."""

    slots: tuple[int, ...]
    experts: tuple[int, ...]
    aim: float
    moves: int


class _State:
    """A placement on the way, with the loads of its ranks in every scenario, scaled to a mean rank load of 1."""

    def __init__(self, load_SE: NDArray[np.generic], current_P: Ints, ranks: int, nodes: int) -> None:
        load = np.asarray(load_SE, np.float64)
        load = load[load.sum(1) > 0]
        self.load_SE = ranks * load / load.sum(1, keepdims=True) if len(load) else np.zeros((0, np.shape(load_SE)[1]))
        group = np.arange(len(load)) % GROUPS
        self.load_GE = np.array([self.load_SE[group == g].mean(0) for g in np.unique(group)]).reshape(-1, self.load_SE.shape[1])
        self.ranks, self.physical_P = ranks, current_P.copy()
        self.rank_P = np.arange(len(current_P)) * ranks // len(current_P)
        self.node_R = np.arange(ranks) * nodes // ranks
        self.new_ER = np.ones((self.load_SE.shape[1], ranks), np.int64)  # 1 where the placement in force has no such slot
        self.new_ER[current_P, self.rank_P] = 0
        self.moved = 0
        self._refresh()

    def _refresh(self) -> None:
        self.holds_ER = np.zeros_like(self.new_ER)
        np.add.at(self.holds_ER, (self.physical_P, self.rank_P), 1)
        self.copies_E = self.holds_ER.sum(1)
        self.on_node_EN = np.zeros((len(self.copies_E), int(self.node_R[-1]) + 1), bool)
        self.on_node_EN[self.physical_P, self.node_R[self.rank_P]] = True
        self.rank_SR = (self.load_SE / self.copies_E) @ self.holds_ER
        self.rank_GR = (self.load_GE / self.copies_E) @ self.holds_ER
        self.aim = float(self.rank_SR.max(1).mean()) if len(self.rank_SR) else 1.0

    def take(self, step: _Step) -> None:
        """Carry a step out."""
        self.physical_P[list(step.slots)] = step.experts
        self.moved += step.moves
        self._refresh()

    def best_step(self, most_moves: int) -> _Step | None:
        """The step with the greatest gain per slot that moves, among those that gain and stay within the bound."""
        if not len(self.load_SE):
            return None
        often_R = np.bincount(self.rank_SR.argmax(1), minlength=self.ranks)
        hot = np.argsort(-often_R, kind="stable")[: min(HOT, int((often_R > 0).sum()))]
        steps = [s for s in (*self._swaps(hot), *self._exchanges(hot)) if s.aim < self.aim - LEAST_GAIN]
        steps = [s for s in steps if self.moved + s.moves <= most_moves]
        return max(steps, key=lambda s: ((self.aim - s.aim) / max(s.moves, 0.5), -s.moves), default=None)

    def _swaps(self, hot: Ints) -> list[_Step]:
        """Exchanges of a slot on a hot rank with one on another rank, neither expert being there yet."""
        i = np.flatnonzero(np.isin(self.rank_P, hot))[:, None]
        j = np.arange(len(self.physical_P))[None, :]
        a, b, e, x = self.rank_P[i], self.rank_P[j], self.physical_P[i], self.physical_P[j]
        allowed = (a != b) & (self.holds_ER[e, b] == 0) & (self.holds_ER[x, a] == 0) & (self.node_R[a] == self.node_R[b])
        i, j = (np.broadcast_to(side, allowed.shape)[allowed] for side in (i, j))
        short = self._shortest(self._after_swap(self.load_GE, self.rank_GR, i, j))
        i, j = i[short], j[short]
        aims = self._after_swap(self.load_SE, self.rank_SR, i, j)
        e, x, a, b = self.physical_P[i], self.physical_P[j], self.rank_P[i], self.rank_P[j]
        moves = self.new_ER[x, a] + self.new_ER[e, b] - self.new_ER[e, a] - self.new_ER[x, b]
        return [
            _Step((s, t), (q, p), aim, m)
            for s, t, p, q, aim, m in zip(*(c.tolist() for c in (i, j, e, x, aims, moves)), strict=True)
        ]

    def _after_swap(self, load_SE: Floats, rank_SR: Floats, i: Ints, j: Ints) -> Floats:
        """[C] aim if slots i and j exchanged experts."""
        per_slot_SE = load_SE / self.copies_E
        gain_SC = per_slot_SE[:, self.physical_P[j]] - per_slot_SE[:, self.physical_P[i]]
        a, b = self.rank_P[i], self.rank_P[j]
        changed = np.maximum(rank_SR[:, a] + gain_SC, rank_SR[:, b] - gain_SC)
        # The fullest of all other ranks is among the three fullest.
        order = np.argsort(-rank_SR, axis=1, kind="stable")[:, :3]
        other = np.full(changed.shape, -np.inf)
        for place in reversed(range(order.shape[1])):
            rank = order[:, place, None]
            other = np.where((rank != a) & (rank != b), np.take_along_axis(rank_SR, rank, 1), other)
        return np.asarray(np.maximum(changed, other).mean(0))

    def _exchanges(self, hot: Ints) -> list[_Step]:
        """A slot of an expert that has others given to another expert: one of a hot rank's, or any in place of a hot slot."""
        spare = self.copies_E[self.physical_P] > 1
        wanted = np.zeros(len(self.copies_E), bool)
        wanted[self.physical_P[np.isin(self.rank_P, hot)]] = True
        on_hot = np.isin(self.rank_P, hot)
        pairs = spare[:, None] & (wanted[None, :] | on_hot[:, None]) & (self.holds_ER.T[self.rank_P] == 0)
        pairs &= self.on_node_EN.T[self.node_R[self.rank_P]]  # an expert does not come to a node that has none of its slots
        i, x = np.nonzero(pairs)
        short = self._shortest(self._relief(hot, i, x))
        i, x = i[short], x[short]
        aims = self._after_exchange(self.load_SE, self.rank_SR, i, x)
        a, e = self.rank_P[i], self.physical_P[i]
        moves = self.new_ER[x, a] - self.new_ER[e, a]
        return [_Step((s,), (q,), aim, m) for s, q, aim, m in zip(*(c.tolist() for c in (i, x, aims, moves)), strict=True)]

    def _after_exchange(self, load_SE: Floats, rank_SR: Floats, i: Ints, x: Ints) -> Floats:
        """[C] aim if slot i held expert x."""
        e, a = self.physical_P[i], self.rank_P[i]
        here_CR = np.arange(self.ranks) == a[:, None]
        c_e, c_x = self.copies_E[e][:, None], self.copies_E[x][:, None]
        # What one unit of load of e, and of x, adds to each rank.
        less_CR = (self.holds_ER[e] - here_CR) / np.maximum(c_e - 1, 1) - self.holds_ER[e] / c_e
        more_CR = (self.holds_ER[x] + here_CR) / (c_x + 1) - self.holds_ER[x] / c_x
        after = rank_SR[:, None] + load_SE[:, e, None] * less_CR + load_SE[:, x, None] * more_CR
        return np.asarray(after.max(2).mean(0))

    def _relief(self, hot: Ints, i: Ints, x: Ints) -> Floats:
        """[C] the aim by groups if slot i held expert x and only the hot ranks and the slot's own mattered."""
        e, a = self.physical_P[i], self.rank_P[i]
        per_slot_GE = self.load_GE / self.copies_E
        less_GE, more_GE = self.load_GE / np.maximum(self.copies_E - 1, 1), self.load_GE / (self.copies_E + 1)
        most_GC = self.rank_GR[:, a] - per_slot_GE[:, e] + more_GE[:, x]
        for rank in hot.tolist():
            lost_C, kept_C = self.holds_ER[x, rank], self.holds_ER[e, rank]
            change_GC = (more_GE - per_slot_GE)[:, x] * lost_C + (less_GE - per_slot_GE)[:, e] * kept_C
            most_GC = np.maximum(most_GC, np.where(a == rank, 0.0, self.rank_GR[:, rank, None] + change_GC))
        return np.asarray(most_GC.mean(0))

    def _shortest(self, aim_C: Floats) -> Ints:
        """The candidates with the lowest aims."""
        if len(aim_C) <= SHORTLIST:
            return np.arange(len(aim_C))
        return np.asarray(np.argpartition(aim_C, SHORTLIST)[:SHORTLIST])
