"""Batches drawn from counts, where no per-token record exists: an estimate, since how experts go together is not in counts.

Shapes: B batches, T tokens of a batch, K top-k, L MoE layers, E experts of the widest layer, W windows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from equipoise.artifacts import Profile
from equipoise.artifacts.profile import PHASES
from equipoise.simulation.trace import Phase

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MOST_SOURCES = 32
"""Most windows that one batch mixes."""


def draw_batches(profile: Profile, batch: int, phase: Phase, batches: int, seed: int) -> list[Ints]:
    """Batches whose tokens choose experts as often as the profile's windows did.

    A batch mixes whole stretches of traffic: in prefill as many windows as it takes to fill it, in decode one for each of
    up to 32 groups of requests. Every token draws its K experts without repetition by systematic sampling, so that
    each is chosen exactly as often as counted. Layers are drawn independently.

    Args:
        profile: counts; its windows, or its scenarios where it has none.
        batch: tokens of a batch over all ranks.
        phase: whose counts to draw from where the profile tells phases apart.
        batches: B.
        seed: of the draws.

    Returns:
        L arrays [B, T, K of that layer].
    """
    rng = np.random.default_rng(seed)
    stretch_WLE, weight_W = _stretches(profile, phase)
    top_k = [facts.top_k for facts in profile.model.layers]
    mean_tokens = max(1.0, float(weight_W.mean()) / top_k[0])
    sources = min(MOST_SOURCES, batch, max(1, round(batch / mean_tokens)) if phase == "prefill" else batch)
    picked_BM = rng.choice(len(weight_W), (batches, sources), p=weight_W / weight_W.sum())
    cuts = np.linspace(0, batch, sources + 1).round().astype(np.int64)
    out = []
    for index, facts in enumerate(profile.model.layers):
        width, k = facts.num_experts, facts.top_k
        chance_WE = inclusion(stretch_WLE[:, index, :width], k)
        ids = np.zeros((batches, batch, k), np.int64)
        for b in range(batches):
            for m in range(sources):
                ids[b, cuts[m] : cuts[m + 1]] = systematic(chance_WE[picked_BM[b, m]], int(cuts[m + 1] - cuts[m]), k, rng)
        out.append(ids)
    return out


def _stretches(profile: Profile, phase: Phase) -> tuple[Floats, Floats]:
    """[W, L, E] loads of stretches of traffic, and [W] their weights; of the phase where all its layers were seen."""
    of_phase = profile.counts[:, PHASES.index(phase)]
    mixed = bool(profile.counts.any((0, 2, 3)).all())
    if mixed and of_phase.any((0, 2)).all():
        loads = of_phase  # windows do not tell phases apart
    else:
        loads = profile.windows if len(profile.windows) > 1 else profile.scenario_load
    loads = loads[loads.any((1, 2))].astype(np.float64)
    total_LE = loads.sum(0)
    seen_WL = loads.sum(2, keepdims=True) > 0  # a layer that a stretch did not see gets the layer's mean
    nowhere_L = (total_LE.sum(1) == 0).astype(np.float64)
    filled = np.where(seen_WL, loads, total_LE[None] + nowhere_L[None, :, None])
    return np.asarray(filled, np.float64), np.asarray(filled.sum(2).max(1), np.float64)


def inclusion(load_WE: Floats, top_k: int) -> Floats:
    """[W, E] probability that a token chooses each expert: its share of selections times K, at most 1.

    What exceeds 1 (counts of several phases, or rounding) is divided among the others in proportion.

    Args:
        load_WE: [W, E] selections.
        top_k: K.
    """
    load = np.maximum(load_WE, 1e-9 * load_WE.sum(1, keepdims=True))  # so that a remainder always has somewhere to go
    full = np.zeros(load.shape, bool)
    while True:
        rest = np.where(full, 0.0, load)
        scale = (top_k - full.sum(1, keepdims=True)) / np.maximum(rest.sum(1, keepdims=True), 1e-300)
        chance = np.where(full, 1.0, rest * scale)
        over = chance > 1.0 + 1e-12
        if not over.any():
            return np.minimum(chance, 1.0)
        full |= over


def systematic(chance_E: Floats, tokens: int, top_k: int, rng: np.random.Generator) -> Ints:
    """[T, K] distinct experts of each token, chosen with exactly these probabilities.

    K points at distance 1 from a random start, on a line on which each expert has a stretch as long as its probability
    (Madow 1949). The order of experts on the line is random and new for every few tokens.

    Args:
        chance_E: [E] probabilities that add up to K, none above 1.
        tokens: T.
        top_k: K.
        rng: of starts and orders.
    """
    ids = np.zeros((tokens, top_k), np.int64)
    for first in range(0, tokens, 16):
        some = min(16, tokens - first)
        order = rng.permutation(len(chance_E))
        ends = np.cumsum(chance_E[order])
        ends *= top_k / ends[-1]
        points = rng.random((some, 1)) + np.arange(top_k)
        place = np.minimum(np.searchsorted(ends, points, side="right"), len(order) - 1)
        ids[first : first + some] = rng.permuted(order[place], axis=1)
    return ids
