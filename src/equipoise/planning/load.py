"""The load to plan for: what was measured, how far other text may deviate from it, and what a plan makes of both.

A layer's load is scaled so that the mean unit carries 1; then LIS over units is the largest unit load.
Shapes: S stretches of text, W windows, L MoE layers, E logical experts of the widest layer, U units, N slots of all
layers together, B directions in which the load of other text may deviate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from equipoise.artifacts import Profile

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SAMPLES = 24
"""Stretches of text that dispatches are tried on."""


@dataclass(frozen=True, eq=False)
class Slots:
    """The physical slots of all layers, as columns of equal length N, sorted by layer.

    Attributes:
        layer, expert, unit: [N] where a slot is and which logical expert it holds.
        share: [N] fraction of its expert's tokens that it serves; the shares of one expert add up to 1.
    """

    layer: Ints
    expert: Ints
    unit: Ints
    share: Floats

    def unit_load(self, load_LE: Floats, units: int) -> Floats:
        """[L, U] load of each unit when experts' tokens are split by the shares."""
        n_layers = load_LE.shape[0]
        served = load_LE[self.layer, self.expert] * self.share
        load = np.bincount(self.layer * units + self.unit, served, n_layers * units)
        return np.asarray(load, np.float64).reshape(n_layers, units)


@dataclass(frozen=True, eq=False)
class Outlook:
    """A profile's load, scaled to the mean unit, and how other text of the same kind deviates from it.

    Attributes:
        units: U.
        widths: [L] experts of each layer.
        load: [L, E] scaled load of the whole profile; zero in a layer that served nothing.
        variance: [L, E] variance of each expert's scaled load over windows; zero when there is only one window.
        deviations: [L, B, E] independent directions; the sum of their squares is that variance, small ones left out.
        windows: how many windows the profile has; the mean over them varies by 1 / windows of that variance.
        samples: [S, L, E] scaled load of stretches of text, each a batch for dispatches that split every batch anew:
            the windows, neighbours of one scenario joined where there are many.
    """

    units: int
    widths: Ints
    load: Floats
    variance: Floats
    deviations: Floats
    windows: int
    samples: Floats


def scaled(load_LE: NDArray[np.generic], units: int) -> Floats:
    """[..., L, E] load in units of the mean unit load: U * n_e / sum(n); zero in a layer that served nothing."""
    load = np.asarray(load_LE, np.float64)
    total = load.sum(-1, keepdims=True)
    return np.asarray(np.where(total > 0, units * load / np.maximum(total, 1e-300), 0.0))


def outlook(profile: Profile, units: int, rank: int = 12) -> Outlook:
    """Load and deviations of a profile.

    The deviations are the principal components of the windows' scaled loads around their mean, each window weighted by
    its tokens. Differences between scenarios are part of them: a unit whose experts are hot in different scenarios
    varies less. A profile without windows is judged by its scenarios.

    Args:
        profile: loads and windows.
        units: U.
        rank: most components kept per layer; what they leave out is near the noise of single windows.
    """
    windows = profile.windows if profile.windows.shape[0] > 1 else profile.scenario_load
    weight_WL = windows.sum(2).astype(np.float64)
    mean_LE = scaled(windows.sum(0), units)
    part_WL = np.sqrt(weight_WL / np.maximum(weight_WL.sum(0), 1e-300))
    # A window in which a layer served nothing says nothing of it: its part is zero.
    centred_LWE = ((scaled(windows, units) - mean_LE) * part_WL[:, :, None]).transpose(1, 0, 2)
    variance_LE = (centred_LWE**2).sum(1)
    p_LE = scaled(profile.load, units)
    deviations = _components(centred_LWE, rank)
    return Outlook(units, profile.widths, p_LE, variance_LE, deviations, windows.shape[0], scaled(_samples(profile), units))


def _samples(profile: Profile, most: int = SAMPLES) -> Ints:
    """[S, L, E] load of at most about `most` stretches of text, none of two scenarios."""
    if len(profile.windows) <= 1:
        return np.asarray(profile.scenario_load)
    part = -(-len(profile.windows) // most)
    starts = [0]
    for index in range(1, len(profile.windows)):
        if profile.window_scenario[index] != profile.window_scenario[index - 1] or index - starts[-1] >= part:
            starts.append(index)
    return np.asarray(np.add.reduceat(profile.windows, starts, axis=0))


def _components(centred_LWE: Floats, rank: int) -> Floats:
    """[L, B, E] rows with the same sum of outer products as the windows, up to the smallest components."""
    n_layers, n_windows, n_experts = centred_LWE.shape
    if n_windows < 2:
        return np.zeros((n_layers, 0, n_experts))
    if n_windows <= rank:
        return np.ascontiguousarray(centred_LWE)
    if n_windows < n_experts:  # the smaller Gram matrix has the same components
        values, vectors = np.linalg.eigh(centred_LWE @ centred_LWE.transpose(0, 2, 1))
        return np.ascontiguousarray(vectors[:, :, -rank:].transpose(0, 2, 1) @ centred_LWE)
    values, vectors = np.linalg.eigh(centred_LWE.transpose(0, 2, 1) @ centred_LWE)  # ascending
    top = vectors[:, :, -rank:] * np.sqrt(np.maximum(values[:, None, -rank:], 0.0))
    return np.ascontiguousarray(top.transpose(0, 2, 1))


def expected_lis(slots: Slots, look: Outlook, seed: int = 0, draws: int = 64) -> Floats:
    """[L] LIS over units to be expected on other text of the same kind and length, with the plan's shares.

    Mean over random deviations of the largest unit load. Profile and other text both scatter around the truth, hence
    twice the variance of the profile's mean. A planning estimate, not a measurement.

    Args:
        slots: where copies are and what they serve.
        look: load and its deviations.
        seed: of the random deviations, which are the same for every plan.
        draws: how many.
    """
    load_LU = slots.unit_load(look.load, look.units)
    directions = look.deviations.shape[1]
    if directions == 0:
        return np.asarray(load_LU.max(1))
    moved_LBU = np.stack([slots.unit_load(look.deviations[:, b], look.units) for b in range(directions)], 1)
    size = np.random.default_rng(seed).standard_normal((draws, directions)) * np.sqrt(2.0 / max(look.windows, 1))
    return np.asarray((load_LU[:, None] + size @ moved_LBU).max(2).mean(1))


def contiguous(widths_L: Ints, units: int) -> Slots:
    """The model as it is: expert e of a layer of E on unit e * U // E, no copies; expert e on unit e when U = E."""
    layer = np.repeat(np.arange(len(widths_L)), widths_L)
    expert = np.arange(len(layer)) - np.repeat(np.cumsum(widths_L) - widths_L, widths_L)
    return Slots(layer, expert, expert * units // widths_L[layer], np.ones(len(layer)))
