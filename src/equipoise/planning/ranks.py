"""Placements on ranks: which logical expert each physical slot holds, what load the ranks then carry, and the Plan of it.

A placement is one array per layer, `physical_P`: the expert of each slot, rank-major, so slot j of P lies on rank j // (P / R).
P may differ by layer where the engine takes it. An expert's tokens are split evenly over its slots, as engines do it.
Shapes: S scenarios, L MoE layers, E logical experts of the widest layer, P physical slots of a layer, R ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from equipoise import __version__
from equipoise.artifacts import LayerPlan, Plan, Predicted, Profile
from equipoise.artifacts.plan import Dispatch, LayerForecast
from equipoise.artifacts.routing import NATIVE
from equipoise.errors import PlanError
from equipoise.metrics import lis
from equipoise.planning.load import contiguous as unplanned
from equipoise.planning.placement_bound import placement_bound as placement_bound
from equipoise.precisions import precision

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Physical = Sequence[Ints]
"""One [P] array per layer: the logical expert of each physical slot, rank-major."""
Phase = Literal["all", "prefill", "decode"]


@dataclass(frozen=True, slots=True)
class Target:
    """The ranks that a placement is for, checked against the model.

    Attributes:
        ranks: R.
        nodes: machines; node n has ranks n * R / nodes and following.
        slots: P of each layer.
    """

    ranks: int
    nodes: int
    slots: tuple[int, ...]

    @property
    def per_rank(self) -> tuple[int, ...]:
        """Slots of each layer on one rank."""
        return tuple(p // self.ranks for p in self.slots)


def target(profile: Profile, ranks: int, slots: int | Sequence[int] | None = None, nodes: int = 1) -> Target:
    """The ranks, nodes and slots that were asked for, checked.

    Args:
        profile: its model says how many experts each layer has.
        ranks: R.
        slots: physical slots of every layer, or a list with one number per layer; by default the layer's experts (no copies).
        nodes: machines that the ranks are divided among evenly.

    Raises:
        PlanError: a number that is not whole or out of range, ranks that do not divide the slots or nodes that do not divide
            the ranks, fewer slots than experts, or more than one copy of every expert on every rank.
    """
    for name, value in (("ranks", ranks), ("nodes", nodes)):
        _whole(name, value)
    if ranks % nodes:
        raise PlanError(f"nodes: {nodes} given, which does not divide {ranks} ranks; give a divisor of {ranks}.")
    widths = [layer.num_experts for layer in profile.model.layers]
    if slots is None:
        wanted = list(widths)
    elif isinstance(slots, Sequence):
        wanted = list(slots)
        if len(wanted) != len(widths):
            raise PlanError(
                f"slots: {len(wanted)} numbers given for {len(widths)} MoE layers; give one number, or one per layer."
            )
    else:
        wanted = [slots] * len(widths)
    for layer, (number, width) in enumerate(zip(wanted, widths, strict=True)):
        _whole("slots", number)
        least = -(-width // ranks) * ranks
        where = f"layer {layer} has {width} experts"
        if number < width:
            raise PlanError(f"slots: {number} given, but {where}; give at least {least} on {ranks} ranks.")
        if number % ranks:
            near = sorted({max(least, number // ranks * ranks), -(-number // ranks) * ranks})
            hint = f"give {' or '.join(str(n) for n in near)}"
            given = f"slots: {number} {'are the default' if slots is None else 'given'}"
            raise PlanError(f"{given}, which {ranks} ranks do not divide; {hint}.")
        if number > width * ranks:
            raise PlanError(
                f"slots: {number} given, but {where}, and more than one copy of each on each of {ranks} ranks serves nothing; "
                f"give at most {width * ranks}."
            )
    return Target(ranks, nodes, tuple(wanted))


def _whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise PlanError(f"{name}: {value!r} given; allowed is a whole number from 1.")


def phase_load(profile: Profile, phase: Phase = "all") -> Ints:
    """[S, L, E] selections of each scenario in one phase, or in both.

    Raises:
        PlanError: unknown phase, or one in which nothing was recorded.
    """
    if phase not in ("all", "prefill", "decode"):
        raise PlanError(f"phase: {phase!r} given; allowed are all, prefill, decode.")
    load = profile.counts.sum(1) if phase == "all" else profile.counts[:, ("prefill", "decode").index(phase)]
    if not load.any():
        raise PlanError(f"phase: nothing was recorded in phase '{phase}'; record that phase, or plan for phase 'all'.")
    return np.asarray(load)


def rank_load(physical_P: Ints, load_E: ArrayLike, ranks: int) -> Floats:
    """Load of each rank when an expert's tokens are split evenly over its slots; a second copy on one rank counts as a slot.

    Args:
        physical_P: [P] expert of each slot, rank-major.
        load_E: [..., E] load of each expert.
        ranks: R, a divisor of P.

    Returns:
        [..., R] loads.
    """
    load = np.asarray(load_E, np.float64)
    copies = np.bincount(physical_P, minlength=load.shape[-1])
    slot = load[..., physical_P] / copies[physical_P]
    return np.asarray(slot.reshape(*load.shape[:-1], ranks, -1).sum(-1))


def slots_of(plan: Plan) -> list[Ints]:
    """The placement of a plan, one [P] array per layer.

    Raises:
        PlanError: slots are not in rank-major order, or not equally many on each rank.
    """
    physical = []
    for index, layer in enumerate(plan.layers):
        per_rank, rest = divmod(layer.num_slots, plan.units)
        if rest or list(layer.units) != [j // per_rank for j in range(layer.num_slots)]:
            raise PlanError(
                f"layer {index} of this '{plan.method}' plan does not have equally many slots on each of {plan.units} ranks in "
                "order of ranks; plan again with a method that places on ranks (robust, eplb, round_robin, contiguous)."
            )
        physical.append(np.array(layer.experts, np.int64))
    return physical


def placement_of(current: Plan, profile: Profile, ranks: int) -> list[Ints]:
    """The placement in force, one [P] array per layer, checked against what is to be planned.

    Raises:
        PlanError: the current plan is of another model, has other ranks, or is no uniform placement.
    """
    current.check_profile(profile)
    if current.units != ranks:
        raise PlanError(
            f"current: that plan is for {current.units} ranks, the new one for {ranks}; plan for as many, or leave current out."
        )
    return slots_of(current)


def moved_slots(physical_P: Ints, current_P: Ints, ranks: int) -> int:
    """How many slots hold an expert that its rank did not hold before, and so must be sent to it.

    Args:
        physical_P: [P] the new placement.
        current_P: [P'] the current one; P' may differ.
        ranks: R of both.
    """
    now, before = (
        set(zip((np.arange(len(p)) * ranks // len(p)).tolist(), p.tolist(), strict=True)) for p in (physical_P, current_P)
    )
    return len(now - before)


def rank_plan(
    profile: Profile,
    physical_L: Physical,
    *,
    ranks: int,
    nodes: int = 1,
    method: str,
    options: Mapping[str, Any],
    seed: int = 0,
    current: Plan | None = None,
    out_of_sample_L: Sequence[float | None] | None = None,
    note: str = "",
    dispatch: Dispatch = "even",
    load_LE: NDArray[Any] | None = None,
) -> Plan:
    """The validated Plan of a placement, with each layer's forecast.

    Args:
        profile: what the placement was made from.
        physical_L: L arrays, rank-major.
        ranks: R.
        nodes: machines that the ranks are divided among evenly.
        method: name of the method, to be written into the plan.
        options: of the method, to be written into the plan.
        seed: to be written into the plan.
        current: the plan in force, to count what moves; its ranks must be as many.
        out_of_sample_L: L ratios of max to mean rank load on traffic that the layer was planned without, where known.
        note: what the user should read.
        dispatch: which copy serves which token.
        load_LE: [L, E] load that the forecast is made on; the whole profile's when omitted (pass the planned phase's).

    Raises:
        PlanError: the current plan is of another model or has other ranks.
    """
    load = np.asarray(profile.load if load_LE is None else load_LE, np.float64)
    before = None if current is None else placement_of(current, profile, ranks)
    outside = [None] * len(physical_L) if out_of_sample_L is None else list(out_of_sample_L)
    native = precision(profile.model.dtype)
    layers, forecasts, unit_bytes = [], [], 0
    for index, (physical, facts) in enumerate(zip(physical_L, profile.model.layers, strict=True)):
        width, p = facts.num_experts, len(physical)
        assert p % ranks == 0, f"{p} slots on {ranks} ranks"
        copies = np.bincount(physical, minlength=width)
        experts = tuple(np.asarray(physical).tolist())
        layer = LayerPlan(
            experts=experts,
            precisions=(native.name,) * p,
            units=tuple(np.repeat(np.arange(ranks), p // ranks).tolist()),
            shares=tuple((1.0 / copies[physical]).tolist()),
        )
        layers.append(layer)
        forecasts.append(
            LayerForecast(
                in_sample=_ratio(rank_load(physical, load[index, :width], ranks)),
                out_of_sample=outside[index],
                lower_bound=placement_bound(load[index, :width], p, ranks, duplicates=layer.duplicates > 0),
                duplicates=layer.duplicates,
                moved=None if before is None else moved_slots(physical, before[index], ranks),
            )
        )
        unit_bytes += p // ranks * facts.expert_bytes(native)
    plan = Plan(
        method=method,
        options=dict(options),
        seed=seed,
        equipoise_version=__version__,
        profile_sha256=profile.source.text_sha256,
        routing_policy=profile.source.routing_policy,
        model=profile.model,
        units=ranks,
        nodes=nodes,
        allows_duplicates=any(f.duplicates for f in forecasts),
        unit_bytes=max(1, unit_bytes),  # 1 where sizes are not known
        dispatch=dispatch,
        exactness="exact" if profile.source.routing_policy == NATIVE else "routing",
        layers=tuple(layers),
    )
    raw_LR = unplanned(profile.widths, ranks).unit_load(load, ranks)
    worst = [f.in_sample for f in forecasts]
    paper = plan.lis_paper(load)
    predicted = Predicted(
        lis_raw=float(np.mean([_ratio(row) for row in raw_LR])),
        lis=float(np.mean(worst)),
        lis_max=max(worst),
        lis_paper=float(np.mean(np.where(np.isnan(paper), 1.0, paper))),
        lower_bound=float(np.mean([f.lower_bound for f in forecasts])),
        output_error=0.0,
        bytes=ranks * unit_bytes,
        budget_bytes=ranks * unit_bytes,
        overrun_bytes=0,
        layers=tuple(forecasts),
        note=note,
    )
    return plan.model_copy(update={"predicted": predicted})


def _ratio(load_R: Floats) -> float:
    """Max over mean; 1 for a layer that served nothing: nothing is out of balance."""
    return float(np.nan_to_num(lis(load_R), nan=1.0))
