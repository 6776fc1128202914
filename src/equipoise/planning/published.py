"""Replicate-and-Quantize as published (arXiv:2602.19938, Algorithms 1 to 3): one copy per layer, two experts quantized."""

from __future__ import annotations

import numpy as np

from equipoise.artifacts import Profile
from equipoise.errors import PlanError
from equipoise.planning.budget import Budget
from equipoise.planning.load import Floats, Ints, Slots, contiguous


def heaviest_and_least(profile: Profile, importance_LE: Floats, less_important: str) -> list[tuple[int, list[int]]]:
    """The heavy hitter of every layer, and all other experts from the least important one up.

    Args:
        profile: its load names the heavy hitter, argmax_e n_e (the first of several).
        importance_LE: [L, E] scores.
        less_important: "highest" or "lowest": the end of the scores where the less important experts are.

    Returns:
        Per layer (heaviest, others); a layer that served nothing, or that has one expert, has no others.
    """
    result = []
    for load, score, width in zip(profile.load, importance_LE, profile.widths.tolist(), strict=True):
        heaviest = int(load[:width].argmax())
        order = np.argsort(-score[:width] if less_important == "highest" else score[:width], kind="stable")
        result.append((heaviest, [int(e) for e in order if e != heaviest] if load.sum() > 0 else []))
    return result


def replicate_and_quantize(
    profile: Profile, budget: Budget, importance_LE: Floats, less_important: str, copy_share: float
) -> tuple[Slots, Ints]:
    """Slots and precisions of the published method: `layer += quant(heaviest)`, `layer[least] = quant(layer[least])`.

    In terms of units, the heavy hitter's quantized copy moves in with the quantized less-important expert. If that is
    the heavy hitter itself, or lives on the heavy hitter's own unit, the next less-important expert takes its part.

    Args:
        profile: loads.
        budget: with the model's own format first and the quantized one second.
        importance_LE: [L, E] scores.
        less_important: "highest" or "lowest".
        copy_share: fraction of the heavy hitter's tokens that its copy serves.

    Raises:
        PlanError: there is a single unit, so that a copy has nowhere else to live.
    """
    if budget.units < 2:
        raise PlanError("units: 1 given; a copy needs a second unit to serve from; give at least 2.")
    slots = contiguous(profile.widths, budget.units)
    start = np.searchsorted(slots.layer, np.arange(len(profile.widths)))
    share, option = slots.share.copy(), np.zeros(len(slots.unit), np.int64)
    rows = []
    for layer, (heaviest, others) in enumerate(heaviest_and_least(profile, importance_LE, less_important)):
        own = start[layer] + heaviest
        partner = next((start[layer] + e for e in others if slots.unit[start[layer] + e] != slots.unit[own]), None)
        if partner is None:
            continue
        share[own] -= copy_share
        option[partner] = 1
        rows.append((layer, heaviest, int(slots.unit[partner])))
    copy_layer, copy_expert, copy_unit = np.array(rows, np.int64).reshape(-1, 3).T
    layers = np.concatenate([slots.layer, copy_layer])
    order = np.argsort(layers, kind="stable")
    return (
        Slots(
            layers[order],
            np.concatenate([slots.expert, copy_expert])[order],
            np.concatenate([slots.unit, copy_unit])[order],
            np.concatenate([share, np.full(len(rows), copy_share)])[order],
        ),
        np.concatenate([option, np.ones(len(rows), np.int64)])[order],
    )
