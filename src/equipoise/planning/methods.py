"""The planning methods by name, and the one call that turns a profile into a plan."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from equipoise.artifacts import Plan, Profile
from equipoise.errors import PlanError
from equipoise.planning.affinity.exflow import exflow
from equipoise.planning.budget import default_units
from equipoise.planning.eplb import eplb
from equipoise.planning.exact import rq_exact
from equipoise.planning.linear import contiguous, round_robin
from equipoise.planning.prune import prune
from equipoise.planning.replan import incremental
from equipoise.planning.replicate_quantize import rq, rq_paper
from equipoise.planning.robust.method import robust
from equipoise.planning.uniform import uniform
from equipoise.registry import Registry

RANK_OPTIONS = ("slots", "nodes", "current", "phase")

METHODS: Registry[Callable[..., Plan]] = Registry("planning method")
"""Methods that make a plan of a profile: f(profile, *, units, seed, **options) -> Plan.

Methods that place experts on ranks all take `slots`, `nodes`, `current` and `phase`, and need `units`, the ranks.
"""

METHODS.register(
    "rq",
    summary="copies, bits and units chosen together: least imbalance expected on other text, in the same bytes",
    source="Equipoise; McNaughton (1959), Graham (1969), Sinha and Zoltners (1979)",
)(rq)
METHODS.register(
    "rq-exact",
    summary="bits, copies and units of a small model by integer programming: the proven optimum for the measured load",
    source="Equipoise; HiGHS",
)(rq_exact)
METHODS.register(
    "rq-paper",
    summary="Replicate-and-Quantize as published: one quantized copy and one quantized expert per layer",
    source="R&Q (arXiv:2602.19938) Algorithms 1 to 3",
)(rq_paper)
METHODS.register(
    "uniform",
    summary="every expert once, all in one precision: what others are held against",
    source="Equipoise",
)(uniform)
METHODS.register(
    "robust",
    summary="copies and places that keep ranks level on traffic not planned for; the engine's default where none is better",
    source="Equipoise",
)(robust)
METHODS.register(
    "contiguous",
    summary="experts on ranks in order of their ids: what engines do without a plan",
    source="SGLang 'trivial', vLLM 'linear'",
)(contiguous)
METHODS.register(
    "round_robin",
    summary="experts dealt to ranks in turn, which parts neighbours that are hot together",
    source="vLLM 'round_robin'",
)(round_robin)
METHODS.register(
    "eplb",
    summary="greedy copies and longest-first packing on the total load, hierarchical over nodes where groups allow",
    source="DeepSeek EPLB (github.com/deepseek-ai/EPLB)",
)(eplb)
METHODS.register(
    "exflow",
    summary="a token's next expert on its rank or node: crossings between layers against balance",
    source="ExFlow (arXiv:2401.08383), extended to top-k and copies",
)(exflow)
METHODS.register(
    "prune",
    summary="experts that a domain does not need are left out, as many in every layer; class capacity",
    source="EASY-EP (arXiv:2504.06792) and baselines",
)(prune)
METHODS.register(
    "incremental",
    summary="the plan in force improved by the steps that gain most, with a bound on the slots that move",
    source="Equipoise; Nemhauser and Ullmann (1969)",
)(incremental)


def make_plan(profile: Profile, method: str = "rq", *, units: int | None = None, seed: int = 0, **options: Any) -> Plan:
    """Decide the physical slots of every layer: copies, precision, unit and share.

    Args:
        profile: what was measured.
        method: a name in `METHODS`.
        units: parallel units U of every layer; by default the routed experts of the widest layer, so that a unit holds
            the bytes of one original expert. Under expert parallelism the number of ranks; methods that place on ranks
            need it. Layers of different width share the units, and the bytes of all layers together are divided evenly
            among them.
        seed: of what little a method leaves to chance; the same profile, options and seed give the same plan.
        **options: of the method; see its function.

    Returns:
        A validated plan with its predicted balance, bytes and error.

    Raises:
        EquipoiseError: unknown method.
        PlanError: unknown option, an option out of range, no ranks given, or a plan that cannot be.
    """
    function = METHODS.get(method)
    allowed = option_names(method)
    for name in options:
        if name not in allowed:
            near = get_close_matches(name, allowed, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            if name in RANK_OPTIONS:
                hint = f" Methods that place on ranks have it: {', '.join(rank_methods())}."
            raise PlanError(f"method '{method}' has no option '{name}'; it has: {', '.join(allowed)}.{hint}")
    for name, value, least in (("units", units, 1), ("seed", seed, 0)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise PlanError(f"{name}: {value!r} given; allowed is a whole number from {least}; leave it out for the default.")
    if units is None and method in rank_methods():
        raise PlanError(f"units: none given; method '{method}' places experts on ranks and needs their number (--ranks).")
    return function(profile, units=default_units(profile.model) if units is None else units, seed=seed, **options)


def rank_methods() -> list[str]:
    """The methods that place experts on ranks and so take slots, nodes, the current plan and a phase."""
    return [name for name in METHODS.names() if set(option_names(name)) >= set(RANK_OPTIONS)]


def option_names(method: str) -> list[str]:
    """The options that a method takes beside units and seed."""
    parameters = inspect.signature(METHODS.get(method)).parameters
    return [name for name in parameters if name not in ("profile", "units", "seed")]
