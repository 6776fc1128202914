"""Placements that need no load: what engines do without a plan.

Shapes: E logical experts, P physical slots, R ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from equipoise.artifacts import Plan, Profile
from equipoise.planning.ranks import Phase, phase_load, rank_plan, target

Ints = NDArray[np.int64]


def contiguous_placement(experts: int, slots: int, ranks: int) -> Ints:
    """[P] experts in order of their ids, then from the first again: the engines' start ("trivial" in SGLang, "linear" in vLLM).

    Args:
        experts: E.
        slots: P, a multiple of ranks.
        ranks: R; no effect but on which rank a slot lies.
    """
    return np.arange(slots) % experts


def round_robin_placement(experts: int, slots: int, ranks: int) -> Ints:
    """[P] experts dealt to the ranks in turn, then from the first again; expert e on rank e mod R (vLLM's "round_robin").

    Where a further round would put a copy beside the same expert, it starts one rank later.

    Args:
        experts: E.
        slots: P, a multiple of ranks.
        ranks: R.
    """
    dealt = np.arange(slots)
    rank = (dealt + dealt // math.lcm(experts, ranks)) % ranks
    return np.asarray((dealt % experts)[np.argsort(rank, kind="stable")])


def contiguous(
    profile: Profile,
    *,
    units: int,
    seed: int,
    slots: int | Sequence[int] | None = None,
    nodes: int = 1,
    current: Plan | None = None,
    phase: Phase = "all",
) -> Plan:
    """Experts on ranks in order of their ids, which is what engines do without a plan.

    Args:
        profile: what was measured; only the forecast depends on it.
        units: ranks.
        seed: not used.
        slots: physical slots of every layer, or one number per layer; as many as experts when omitted.
        nodes: machines.
        current: the plan in force, to count what moves.
        phase: the phase that the forecast is for.

    Raises:
        PlanError: an option is out of range.
    """
    return _plan(contiguous_placement, "contiguous", profile, units, seed, slots, nodes, current, phase)


def round_robin(
    profile: Profile,
    *,
    units: int,
    seed: int,
    slots: int | Sequence[int] | None = None,
    nodes: int = 1,
    current: Plan | None = None,
    phase: Phase = "all",
) -> Plan:
    """Experts dealt to ranks in turn, which parts neighbours that are hot together.

    Args:
        profile: what was measured; only the forecast depends on it.
        units: ranks.
        seed: not used.
        slots: physical slots of every layer, or one number per layer; as many as experts when omitted.
        nodes: machines.
        current: the plan in force, to count what moves.
        phase: the phase that the forecast is for.

    Raises:
        PlanError: an option is out of range.
    """
    return _plan(round_robin_placement, "round_robin", profile, units, seed, slots, nodes, current, phase)


def _plan(
    place: Callable[[int, int, int], Ints],
    method: str,
    profile: Profile,
    ranks: int,
    seed: int,
    slots: int | Sequence[int] | None,
    nodes: int,
    current: Plan | None,
    phase: Phase,
) -> Plan:
    goal = target(profile, ranks, slots, nodes)
    load_LE = phase_load(profile, phase).sum(0)
    physical_L = [place(layer.num_experts, p, ranks) for layer, p in zip(profile.model.layers, goal.slots, strict=True)]
    return rank_plan(
        profile, physical_L, ranks=ranks, nodes=nodes, method=method, seed=seed, current=current, load_LE=load_LE,
        options={"slots": list(goal.slots), "phase": phase},
    )  # fmt: skip
