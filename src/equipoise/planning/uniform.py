"""Every expert once, all in one precision, as the engines and other quantizers store them: the plan others are held against."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from equipoise import __version__
from equipoise.artifacts import LayerPlan, ModelFacts, Plan, Profile
from equipoise.errors import PlanError
from equipoise.planning.assemble import assemble
from equipoise.planning.budget import default_units, make_budget
from equipoise.planning.load import contiguous
from equipoise.precisions import precision as format_of

MOST = 64.0
"""Part of the original bytes that any format stays below."""


def uniform_plan(model: ModelFacts, precision: str, *, units: int | None = None) -> Plan:
    """The plan that stores every expert once in one precision; it needs no profile.

    Args:
        model: the model's layers.
        precision: any storage format, such as "int4-g128" or "bf16".
        units: parallel units U; the routed experts of the widest layer when omitted. Expert e of a layer of E is on unit
            e * U // E.

    Raises:
        EquipoiseError: unknown precision.
        PlanError: the sizes of the model's experts are not known.
    """
    if not model.sized:
        raise PlanError(f"the sizes of the experts of '{model.name}' are not known; give the model itself, or its config.json.")
    form = format_of(precision)
    units = default_units(model) if units is None else units
    layers = []
    for facts in model.layers:
        experts = range(facts.num_experts)
        layers.append(
            LayerPlan(
                experts=tuple(experts),
                precisions=(form.name,) * facts.num_experts,
                units=tuple(e * units // facts.num_experts for e in experts),
                shares=(1.0,) * facts.num_experts,
            )
        )
    plan = Plan(
        method="uniform",
        options={"precision": form.name},
        equipoise_version=__version__,
        model=model,
        units=units,
        unit_bytes=1,
        exactness="exact" if form.name == model.dtype else "weights",
        layers=tuple(layers),
    )
    return plan.model_copy(update={"unit_bytes": int(plan.bytes_by_unit().max())})


def uniform(profile: Profile, *, units: int, seed: int, precision: str = "int8", dispatch: str = "even") -> Plan:
    """The same as a planning method: `uniform_plan` with its balance and error predicted from a profile.

    Args:
        profile: loads, and measured errors when it has them.
        units: U.
        seed: not used.
        precision: any storage format.
        dispatch: of no effect, as there are no copies.

    Raises:
        EquipoiseError: unknown precision.
        PlanError: the sizes of the model's experts are not known.
    """
    plan = uniform_plan(profile.model, precision, units=units)
    form = format_of(precision)
    # Not fitted to a budget, so what its fullest unit holds is its budget.
    budget = replace(make_budget(profile, units, [form.name], MOST), unit_bytes=plan.unit_bytes)
    slots = contiguous(profile.widths, units)
    option_N = np.zeros(len(slots.unit), np.int64)
    return assemble(profile, budget, slots, option_N, method="uniform", options=plan.options, seed=seed, dispatch=dispatch)
