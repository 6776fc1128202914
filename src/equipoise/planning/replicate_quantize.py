"""Replicate-and-Quantize as planning methods: `rq-paper` as published, `rq` the optimal form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from equipoise.artifacts import Plan, Profile
from equipoise.errors import PlanError
from equipoise.planning.assemble import assemble
from equipoise.planning.budget import Budget, default_precisions, make_budget
from equipoise.planning.load import Floats, outlook
from equipoise.planning.precision import assign_bits
from equipoise.planning.published import replicate_and_quantize
from equipoise.planning.search import solve
from equipoise.precisions import precision

ERROR_BOUND = 0.07
"""Default bound on the relative RMS error of the layers' routed output, chosen on tuning documents with `agq` rounding: 96.0 to
99.4 % of the imbalance of three models goes, at a perplexity of -0.10 to +0.12 %; with 0.08 it is +0.20 % on one of them."""


def rq(
    profile: Profile,
    *,
    units: int,
    seed: int,
    dispatch: str = "even",
    error_bound: float = ERROR_BOUND,
    bytes_fraction: float = 1.0,
    precisions: Sequence[str] | None = None,
    tolerance: float = 0.002,
    alike: bool = True,
    bits_by: str = "error",
) -> Plan:
    """Copies, bits per copy and units chosen together for the least imbalance on text the plan was not made from.

    Args:
        profile: what was measured.
        units: U.
        seed: of the random deviations that candidates are compared under.
        dispatch: "even", "least_loaded" or "gate_aware".
        error_bound: most relative root-mean-square error of the layers' routed output that is predicted.
        bytes_fraction: of the original experts' bytes, in at most 16 bits, that the units have together.
        precisions: formats that slots may have; by default the 16-bit one of the model (bf16 for fp32) and those whose error
            the profile measured (int8 and int4-g32 if it measured none).
        tolerance: part of the expected imbalance without copies that may be given away for fewer of them, and so more bits
            for each.
        alike: all copies of an expert have one precision, so that no output depends on which copy serves a token.
        bits_by: "error", or "frequency" for the objective of Mixture Compressor, to compare with: copies and units as ever,
            bits by frequency x gate weight x change of output. The error stated is the same; only the copies heed its bound.

    Raises:
        PlanError: an option is out of range, or bytes and error cannot both be met.
    """
    _in_range("error_bound", error_bound, 0.0, math.inf, "0 allows no error, inf any; 0.07 is the default")
    _in_range("tolerance", tolerance, 0.0, math.inf, "0.002 is the default")
    if bits_by not in ("error", "frequency"):
        raise PlanError(f"bits_by: '{bits_by}' given; allowed are 'error' and 'frequency'; leave it out for the default.")
    names = tuple(precisions) if precisions is not None else default_precisions(profile)
    budget = make_budget(profile, units, names, bytes_fraction)
    look = outlook(profile, units)
    found = solve(look, budget, error_bound, tolerance, seed, alike=alike, least_loaded=dispatch == "least_loaded")
    if bits_by == "frequency":
        slots, bits = assign_bits(found.slots, replace(budget, errors=mixture_costs(profile, budget)), alike)
        found = replace(found, slots=slots, options=bits.option)
    options = {
        "error_bound": error_bound,
        "bytes_fraction": bytes_fraction,
        "precisions": [p.name for p in budget.precisions],
        "tolerance": tolerance,
        "alike": alike,
        "bits_by": bits_by,
        "errors": "measured" if all(budget.measured) else "assumed",
    }
    return assemble(
        profile, budget, found.slots, found.options,
        method="rq", options=options, seed=seed, dispatch=dispatch, error_bound=error_bound, least_error=found.least_error,
    )  # fmt: skip


def mixture_costs(profile: Profile, budget: Budget) -> Floats:
    """[L, E, Q] cost of each choice as Mixture Compressor has it (arXiv:2410.06270, PMQ with exponents of 1).

    f * w * eps: how often the expert is selected, its mean gate weight then, and the Frobenius norm of what the rounding
    changes in the layer's output.
    """
    load = profile.load.astype(np.float64)
    frequency = load / np.maximum(load.sum(1, keepdims=True), 1.0)
    weight = profile.gate_mass.sum(0) / np.maximum(load, 1.0)
    return np.asarray((frequency * weight)[:, :, None] * np.sqrt(budget.errors))


def rq_paper(
    profile: Profile,
    *,
    units: int,
    seed: int,
    dispatch: str = "even",
    importance: str = "wanda",
    less_important: str | None = None,
    precision_name: str | None = None,
    copy_share: float = 0.5,
    count_copies: bool = False,
) -> Plan:
    """R&Q as published: per layer one quantized copy of the heaviest expert, and one less-important expert quantized.

    Memory is counted as the paper does, in the model's own format (so an fp32 model has fp32 units, and its fp16 copy
    and fp16 partner take exactly the bytes of the partner before). Scales are counted too; with int8 they exceed the
    units' bytes a little, which `overrun_bytes` reports.

    Args:
        profile: what was measured.
        units: U.
        seed: not used; the method has no choice left open to chance.
        dispatch: "even", "least_loaded" or "gate_aware".
        importance: the estimate that finds the less-important expert (the paper: wanda).
        less_important: "highest" or "lowest", the end of the estimate where the less-important expert is. By default
            "highest" for wanda, as published ("lower means imply higher importance"), and "lowest" for all others.
        precision_name: format of copy and partner; by default int8, and fp16 for an fp32 model, as in the paper.
        copy_share: fraction of the heaviest expert's tokens that the copy serves; the paper does not say, 0.5 is even.
        count_copies: take m + 1 experts in `lis_paper` where a layer has a copy; the paper does not say.

    Raises:
        PlanError: an option is out of range, or the profile lacks the importance estimate.
    """
    _in_range("copy_share", copy_share, 0.0, 1.0, "0.5 splits evenly")
    end = less_important or ("highest" if importance == "wanda" else "lowest")
    if end not in ("highest", "lowest"):
        raise PlanError(f"less_important: '{end}' given; allowed are 'highest' and 'lowest'; leave it out for the default.")
    if importance not in profile.importance:
        have = ", ".join(profile.importance) or "none"
        raise PlanError(
            f"importance: '{importance}' is not in this profile (it has: {have}); "
            f"profile again with --importance {importance}, or name one that it has."
        )
    native = profile.model.dtype
    form = precision(precision_name or ("fp16" if native == "fp32" else "int8"))
    if form.bits >= precision(native).bits:
        raise PlanError(f"precision_name: '{form.name}' given; allowed are formats with fewer bits than the model's {native}.")
    budget = make_budget(profile, units, (native, form.name), 1.0, reference=native)
    slots, option_N = replicate_and_quantize(profile, budget, profile.importance[importance], end, copy_share)
    options = {
        "importance": importance,
        "less_important": end,
        "precision_name": form.name,
        "copy_share": copy_share,
        "count_copies": count_copies,
        "errors": "measured" if all(budget.measured) else "assumed",
    }
    return assemble(
        profile, budget, slots, option_N,
        method="rq-paper", options=options, seed=seed, dispatch=dispatch, count_copies=count_copies,
    )  # fmt: skip


def _in_range(name: str, value: float, low: float, high: float, hint: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise PlanError(f"{name}: {value!r} given; allowed is a number from {low:g} to {high:g}; {hint}.")
