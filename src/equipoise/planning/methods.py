"""The planning methods by name, and the one call that turns a profile into a plan."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from equipoise.artifacts import Plan, Profile
from equipoise.errors import PlanError
from equipoise.planning.budget import default_units
from equipoise.planning.replicate_quantize import rq, rq_paper
from equipoise.registry import Registry

METHODS: Registry[Callable[..., Plan]] = Registry("planning method")
"""Methods that make a plan of a profile: f(profile, *, units, seed, dispatch, **options) -> Plan."""

METHODS.register(
    "rq",
    summary="copies, bits and units chosen together: least imbalance expected on other text, in the same bytes",
    source="Equipoise; McNaughton (1959), Graham (1969), Sinha and Zoltners (1979)",
)(rq)
METHODS.register(
    "rq-paper",
    summary="Replicate-and-Quantize as published: one quantized copy and one quantized expert per layer",
    source="R&Q (arXiv:2602.19938) Algorithms 1 to 3",
)(rq_paper)


def make_plan(profile: Profile, method: str = "rq", *, units: int | None = None, seed: int = 0, **options: Any) -> Plan:
    """Decide the physical slots of every layer: copies, precision, unit and share.

    Args:
        profile: what was measured.
        method: a name in `METHODS`.
        units: parallel units U of every layer; by default the routed experts of the widest layer, so that a unit holds
            the bytes of one original expert. Under expert parallelism the number of ranks. Layers of different width
            share the units, and the bytes of all layers together are divided evenly among them.
        seed: of what little a method leaves to chance; the same profile, options and seed give the same plan.
        **options: of the method; see its function.

    Returns:
        A validated plan with its predicted balance, bytes and error.

    Raises:
        EquipoiseError: unknown method.
        PlanError: unknown option, an option out of range, or a plan that cannot be.
    """
    function = METHODS.get(method)
    allowed = option_names(method)
    for name in options:
        if name not in allowed:
            near = get_close_matches(name, allowed, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise PlanError(f"method '{method}' has no option '{name}'; it has: {', '.join(allowed)}.{hint}")
    for name, value, least in (("units", units, 1), ("seed", seed, 0)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise PlanError(f"{name}: {value!r} given; allowed is a whole number from {least}; leave it out for the default.")
    return function(profile, units=default_units(profile.model) if units is None else units, seed=seed, **options)


def option_names(method: str) -> list[str]:
    """The options that a method takes beside units and seed."""
    parameters = inspect.signature(METHODS.get(method)).parameters
    return [name for name in parameters if name not in ("profile", "units", "seed")]
