"""`robust`: the placement method for traffic that the plan was not made from, with its cross-validation and its guard.

Shapes: S scenarios, W windows, L MoE layers, E logical experts of the widest layer, P physical slots, R ranks, F folds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from equipoise.artifacts import Plan, Profile
from equipoise.errors import PlanError
from equipoise.planning.eplb import by_shape
from equipoise.planning.linear import contiguous_placement
from equipoise.planning.ranks import Phase, Target, phase_load, placement_of, rank_plan, target
from equipoise.planning.robust.placement import SLACK, named, place, rank_loads, robust_placement
from equipoise.planning.robust.risk import grains, risk, scaled_load

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FOLDS = 3
"""Folds of the cross-validation; with fewer scenarios, one fold for each."""
CANDIDATES = ("spread", "level", "default")


@dataclass(frozen=True, slots=True, eq=False)
class _Data:
    """What a plan is made from; cross-validation makes it from a part.

    Attributes:
        load: [S, L, E] selections of each scenario.
        windows: [W, L, E] selections of each window.
        owner: [W] scenario of each window, or stretch of time where there is one scenario.
        tokens: [L, E, E] tokens that chose both of two experts; empty when not recorded.
    """

    load: Ints
    windows: Ints
    owner: Ints
    tokens: Ints


def robust(
    profile: Profile,
    *,
    units: int,
    seed: int,
    slots: int | Sequence[int] | None = None,
    nodes: int = 1,
    current: Plan | None = None,
    phase: Phase = "all",
    keep: int | None = None,
    hierarchical: bool = False,
    guard: bool = True,
    slack: float = SLACK,
) -> Plan:
    """Balance that holds on other traffic: of the placements balanced in sample, the one that parts experts hot together.

    Scenarios, windows (documents, stretches of time) and pairs of experts that tokens chose together say which experts rise
    and fall together. The plan is cross-validated over scenarios, or over stretches of time where there is one scenario. If it
    balances what was held out no better than the engine's default placement, that is given, and `predicted.note` says so.

    Args:
        profile: what was measured; the more different scenarios, and the shorter its windows, the better.
        units: ranks.
        seed: of the order in which swaps are tried.
        slots: physical slots of every layer, or one number per layer; as many as experts when omitted.
        nodes: machines; copies of one expert go to different ones where possible.
        current: the plan in force; ranks and slots are named so that little moves.
        phase: the phase to plan for; windows and pairs, which do not tell phases apart, then are not used.
        keep: most slots per layer that may move from the current plan; no bound when omitted.
        hierarchical: keep every expert group of the model on one node, as group-limited routing wants it.
        guard: emit the engine's default where cross-validation finds it as good; never with `keep`.
        slack: how far the largest rank load in sample may be above the proven lower bound; never above EPLB's. More leaves more
            choice for balance on other traffic.

    Raises:
        PlanError: an option is out of range, `keep` without `current`, or nodes that do not divide the expert groups.
    """
    goal = target(profile, units, slots, nodes)
    groups = _groups(profile, goal, hierarchical)
    _check_keep(keep, current, goal)
    if isinstance(slack, bool) or not isinstance(slack, int | float) or not 0 <= slack < float("inf"):
        raise PlanError(f"slack: {slack!r} given; allowed is a number from 0; {SLACK} is the default.")
    data = _data(profile, phase)
    shapes = list(zip((layer.num_experts for layer in profile.model.layers), goal.slots, strict=True))
    ratio_CL: Floats | None = None
    if keep is not None:
        choice, note = "spread", "not cross-validated: what may move is bounded by keep."
    else:
        ratio_CL, bal_C, folds = _cross_validate(data, shapes, goal, groups, seed, slack)
        choice, note = _choose(bal_C, folds, guard)
    before = None if current is None else placement_of(current, profile, units)
    default = [contiguous_placement(experts, p, units) for experts, p in shapes]
    if choice == "default":
        physical_L = default
    elif keep is not None and before is not None:
        physical_L = by_shape(shapes, lambda rows, e, p: _kept(data, rows, e, p, goal, groups, seed, before, keep))
    else:
        physical_L = by_shape(shapes, lambda rows, e, p: _placed(data, rows, e, p, goal, groups, seed, slack, before)[choice])
    outside = None if ratio_CL is None else ratio_CL[CANDIDATES.index(choice)]
    return rank_plan(
        profile, physical_L, ranks=units, nodes=nodes, method="robust", seed=seed, current=current, note=note,
        out_of_sample_L=None if outside is None else [None if np.isnan(x) else float(x) for x in outside],
        options={
            "slots": list(goal.slots), "phase": phase, "keep": keep, "hierarchical": hierarchical, "guard": guard,
            "slack": slack, "emitted": choice,
        },
        load_LE=data.load.sum(0),
    )  # fmt: skip


def _groups(profile: Profile, goal: Target, hierarchical: bool) -> int:
    groups = profile.model.expert_groups
    if not hierarchical or goal.nodes == 1:
        return 1
    if groups % goal.nodes or any(layer.num_experts % groups for layer in profile.model.layers):
        raise PlanError(
            f"hierarchical: the model's {groups} expert groups cannot be divided among {goal.nodes} nodes evenly; "
            "give a number of nodes that divides them, or leave hierarchical out."
        )
    for layer, p in zip(profile.model.layers, goal.slots, strict=True):
        most = layer.num_experts * goal.ranks // goal.nodes
        if p > most:
            raise PlanError(
                f"slots: {p} given, but with groups kept on their nodes {layer.num_experts} experts fill at most {most} slots "
                f"on {goal.ranks} ranks; give at most that, or leave hierarchical out."
            )
    return groups


def _check_keep(keep: int | None, current: Plan | None, goal: Target) -> None:
    if keep is None:
        return
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 0:
        raise PlanError(f"keep: {keep!r} given; allowed is a whole number of slots from 0; leave it out for no bound.")
    if current is None:
        raise PlanError("keep: it bounds what moves from the plan in force; give that plan (--current PLAN), or leave it out.")
    if tuple(layer.num_slots for layer in current.layers) != goal.slots:
        raise PlanError("keep: the plan in force has other slots than the new one; leave keep out, or plan for the same slots.")


def _data(profile: Profile, phase: Phase) -> _Data:
    load_SLE = phase_load(profile, phase)
    used = load_SLE.any((1, 2))
    windows, tokens = profile.windows, profile.coactivation
    if phase != "all":
        windows, tokens = windows[:0], tokens[:0]
    seen = windows.any((1, 2))
    windows, owner = windows[seen], profile.window_scenario[seen]
    number = np.cumsum(used) - 1
    one = used.sum() == 1 and len(windows) > 1
    owner = np.arange(len(windows)) * FOLDS // len(windows) if one else number[owner]
    return _Data(load_SLE[used], windows, owner, tokens)


def _moments(data: _Data, rows: Ints, experts: int) -> tuple[Floats, Floats]:
    """[L', E] what is to be balanced and [L', E, E] what is to be risked, of layers of one shape."""
    load = data.load[:, rows, :experts]
    tokens = data.tokens[rows][:, :experts, :experts] if data.tokens.size else None
    total_LE = load.sum(0).astype(np.float64)
    return total_LE, risk(scaled_load(total_LE), grains(load, None, data.windows[:, rows, :experts], tokens))


def _placed(
    data: _Data, rows: Ints, experts: int, slots: int, goal: Target, groups: int, seed: int,
    slack: float, before: list[Ints] | None = None, quick: bool = False,
) -> dict[str, Ints]:  # fmt: skip
    """The candidates of layers of one shape."""
    total_LE, moments_LEE = _moments(data, rows, experts)
    found = place(total_LE, moments_LEE, goal.ranks, slots, goal.nodes, groups, seed, quick=quick, slack=slack)
    both = {"spread": found.spread, "level": found.level}
    if before is None:
        return both
    start = np.stack([before[row] for row in rows])
    return {name: named(physical, start, goal.ranks, goal.nodes) for name, physical in both.items()}


def _kept(
    data: _Data, rows: Ints, experts: int, slots: int, goal: Target, groups: int, seed: int, before: list[Ints], keep: int
) -> Ints:
    return robust_placement(
        data.load[:, rows, :experts], ranks=goal.ranks, slots=slots, nodes=goal.nodes, groups=groups, seed=seed,
        start=np.stack([before[row] for row in rows]), keep=keep,
        windows_WLE=data.windows[:, rows, :experts],
        coactivation_LEE=data.tokens[rows][:, :experts, :experts] if data.tokens.size else None,
    )  # fmt: skip


def _cross_validate(
    data: _Data, shapes: list[tuple[int, int]], goal: Target, groups: int, seed: int, slack: float
) -> tuple[Floats | None, Floats | None, int]:
    """What was held out, under plans of the rest.

    Scenarios are dealt to the folds in turn; stretches of time where there is one. Pairs chosen by tokens are not told apart
    by scenario, so they are left out here.

    Returns:
        [C, L] mean ratio of max to mean rank load of each candidate, [C] mean balancedness, and the number of folds; None, None
        and 0 where there is nothing to hold out.
    """
    parts, one = (
        (len(data.load), False) if len(data.load) > 1 else (len(np.unique(data.owner)) if len(data.windows) else 0, True)
    )
    if parts < 2:
        return None, None, 0
    folds = min(FOLDS, parts)
    totals, counts = np.zeros((2, len(CANDIDATES), len(shapes))), np.zeros(len(shapes))
    for fold in range(folds):
        held = np.arange(parts) % folds == fold
        if one:
            train = _Data(
                data.windows[~held[data.owner]].sum(0)[None], data.windows[~held[data.owner]], data.owner, data.tokens[:0]
            )
            test_SLE = np.stack([data.windows[data.owner == part].sum(0) for part in np.flatnonzero(held)])
        else:
            train = _Data(data.load[~held], data.windows[~held[data.owner]], data.owner, data.tokens[:0])
            test_SLE = data.load[held]
        counts += _judge(train, test_SLE.astype(np.float64), shapes, goal, groups, seed, slack, totals)
    means = totals / np.where(counts > 0, counts, np.nan)
    return means[0], np.nanmean(means[1], axis=1), folds


def _judge(
    train: _Data,
    test_SLE: Floats,
    shapes: list[tuple[int, int]],
    goal: Target,
    groups: int,
    seed: int,
    slack: float,
    totals: Floats,
) -> Ints:
    """Add each candidate's ratios and balancedness on held-out scenarios to totals [2, C, L]; [L] scenarios that served."""
    served_L = np.zeros(len(shapes), np.int64)
    for experts, slots in dict.fromkeys(shapes):
        rows = np.flatnonzero([shape == (experts, slots) for shape in shapes])
        plans = _placed(train, rows, experts, slots, goal, groups, seed, slack, quick=True)
        plans["default"] = np.tile(contiguous_placement(experts, slots, goal.ranks), (len(rows), 1))
        test = test_SLE[:, rows, :experts]
        there_SL = test.sum(2) > 0
        served_L[rows] = there_SL.sum(0)
        for index, name in enumerate(CANDIDATES):
            load_SLR = rank_loads(plans[name], scaled_load(test, goal.ranks / experts), goal.ranks)
            ratio_SL = load_SLR.max(2) / load_SLR.mean(2)
            totals[0, index, rows] += (ratio_SL * there_SL).sum(0)
            totals[1, index, rows] += (there_SL / ratio_SL).sum(0)
    return served_L


def _choose(bal_C: Floats | None, folds: int, guard: bool) -> tuple[str, str]:
    """The candidate to emit, and what the user should read."""
    if bal_C is None:
        return "spread", "not cross-validated: the profile has one scenario and no windows; record several kinds of traffic."
    score = dict(zip(CANDIDATES, bal_C.tolist(), strict=True))
    better = "spread" if score["spread"] >= score["level"] else "level"
    figures = (
        f"balancedness held out ({folds} folds): {score[better]:.3f}, engine's default {score['default']:.3f}, "
        f"levelled on the total load {score['level']:.3f}"
    )
    if guard and score[better] <= score["default"]:
        return "default", f"the engine's default placement is kept: no plan does better on traffic held out. {figures}."
    kind = (
        "" if better == "spread" else " The levelled placement is used: parting experts that are hot together gained nothing."
    )
    return better, f"{figures}.{kind}"
