"""Slots and their bits become a Plan, with what it is predicted to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import ValidationError

from equipoise import __version__
from equipoise.artifacts import LayerPlan, Plan, Predicted, Profile
from equipoise.artifacts.json_file import first_problem
from equipoise.artifacts.routing import NATIVE
from equipoise.errors import PlanError
from equipoise.metrics import lis
from equipoise.planning.bound import lower_bound
from equipoise.planning.budget import Budget
from equipoise.planning.load import Floats, Ints, Slots, contiguous, scaled


def assemble(
    profile: Profile,
    budget: Budget,
    slots: Slots,
    option_N: Ints,
    *,
    method: str,
    options: Mapping[str, Any],
    seed: int,
    dispatch: str,
    error_bound: float = float("inf"),
    least_error: float | None = None,
    proven_lis: float | None = None,
    count_copies: bool = False,
) -> Plan:
    """The plan of these slots, validated, with its predicted balance, bytes, error and proven bound.

    Args:
        profile: what the plan was made from.
        budget: bytes and errors of all choices.
        slots: copies, units and shares.
        option_N: [N] index into the budget's precisions of each slot.
        method: name of the method, to be written into the plan.
        options: of the method, to be written into the plan.
        seed: to be written into the plan.
        dispatch: which copy serves which token.
        error_bound: what the lower bound on LIS may assume of the error.
        least_error: proven bound on the error of any precisions of these slots, if there is one.
        proven_lis: bound on LIS that a method has proven itself; that of `bound.lower_bound` when omitted.
        count_copies: predict `lis_paper` with m = slots instead of m = experts.

    Raises:
        PlanError: the dispatch is unknown.
    """
    order = np.lexsort((slots.unit, slots.expert, slots.layer))
    names = np.array([p.name for p in budget.precisions])[option_N]
    starts = np.searchsorted(slots.layer[order], np.arange(1, len(profile.model.layers)))
    layers = tuple(
        LayerPlan(
            experts=tuple(slots.expert[rows].tolist()),
            precisions=tuple(names[rows].tolist()),
            units=tuple(slots.unit[rows].tolist()),
            shares=tuple(slots.share[rows].tolist()),
        )
        for rows in np.split(order, starts)
    )
    policy = profile.source.routing_policy
    exact = "exact" if set(names.tolist()) == {profile.model.dtype} else "weights"
    try:
        plan = Plan(
            method=method,
            options=dict(options),
            seed=seed,
            equipoise_version=__version__,
            profile_sha256=profile.source.text_sha256,
            routing_policy=policy,
            model=profile.model,
            units=budget.units,
            unit_bytes=budget.unit_bytes,
            dispatch=dispatch,  # type: ignore[arg-type]  # validated by the model
            exactness=exact if policy == NATIVE else "routing",  # type: ignore[arg-type]  # validated by the model
            layers=layers,
        )
    except ValidationError as error:
        raise PlanError(f"{first_problem(error)}; given: {dispatch!r}." if "dispatch" in str(error) else str(error)) from error
    predicted = _predict(plan, profile, budget, slots, option_N, error_bound, least_error, count_copies)
    if proven_lis is not None:
        predicted = predicted.model_copy(update={"lower_bound": min(proven_lis, predicted.lis)})
    return plan.model_copy(update={"predicted": predicted})


def _predict(
    plan: Plan,
    profile: Profile,
    budget: Budget,
    slots: Slots,
    option_N: Ints,
    error_bound: float,
    least_error: float | None,
    count_copies: bool,
) -> Predicted:
    load = profile.load
    scores = plan.lis(load)
    error_N = slots.share * budget.errors[slots.layer, slots.expert, option_N]
    used = set(option_N.tolist())
    known = all(budget.measured[q] for q in used)
    held = plan.bytes_by_unit()
    squared = float(error_N.sum())
    total = max(budget.total_bytes, int(held.sum()))
    p_LE = scaled(load, budget.units)
    return Predicted(
        lis_raw=_mean(lis(contiguous(profile.widths, budget.units).unit_load(p_LE, budget.units))),
        lis=_mean(scores),
        lis_max=_max(scores),
        lis_paper=_mean(plan.lis_paper(load, count_copies=count_copies)),
        lower_bound=lower_bound(p_LE, profile.widths, budget, error_bound, total_bytes=total),
        output_error=float(np.sqrt(squared / len(plan.layers))) if known else None,
        least_error=least_error if known else None,
        kl=squared * budget.nats if known and np.isfinite(budget.nats) else None,
        bytes=int(held.sum()),
        budget_bytes=budget.total_bytes,
        overrun_bytes=max(0, int(held.max()) - budget.unit_bytes),
    )


def _mean(scores: Floats) -> float:
    """Mean over layers that served something; 1 when none did: nothing is out of balance."""
    served = scores[~np.isnan(scores)]
    return float(served.mean()) if len(served) else 1.0


def _max(scores: Floats) -> float:
    served = scores[~np.isnan(scores)]
    return float(served.max()) if len(served) else 1.0
