"""What the loads of a layer's experts have in common: the second moments from which placements are judged.

Traffic that was not seen is taken as a new mixture of the kinds of tokens that were. Experts that are chosen by the same kinds
rise and fall together in any mixture, so what is risky is to have them on one rank. Such kinds show at every grain: between
scenarios, between documents or stretches of time, and within a token, which chooses several experts at once. Each grain gives
one covariance per layer; fine ones are mostly noise on the diagonal, which no placement can change. They are scaled to the
same mean variance and averaged.
Shapes: S scenarios, W windows (documents or stretches of time), L MoE layers, E logical experts, X observations.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

BALANCE = 2.0
"""Weight of the square of the mean load against a mean variance of 1. Of 0.3 to 8, tried without the cap on the load in sample,
DeepSeek-V2-Lite does about as well with any, gpt-oss-20b with any from 2."""
WINDOW_GRAINS = 2
"""Grains made of windows: as recorded, and by fours."""


def scaled_load(load_LE: ArrayLike, mean: float = 1.0) -> Floats:
    """[..., L, E] loads with a given mean over a layer's experts; the same for all in a layer that served nothing."""
    load = np.asarray(load_LE, np.float64)
    total = load.sum(-1, keepdims=True)
    return np.asarray(np.where(total > 0, mean * load.shape[-1] * load / np.maximum(total, 1e-300), mean))


def covariance(load_XLE: ArrayLike, weights_X: ArrayLike | None = None) -> Floats:
    """Covariance of experts' scaled loads over observations, which count alike or by weight; zero if there are less than two.

    Args:
        load_XLE: [X, L, E] loads; an observation in which a layer served nothing says nothing of it.
        weights_X: [X] weights, not negative.

    Returns:
        [L, E, E] in squares of the mean load of an expert.
    """
    load = np.asarray(load_XLE)
    weights = np.ones(len(load)) if weights_X is None else np.asarray(weights_X, np.float64)
    weight_XL = weights[:, None] * (load.sum(-1) > 0)
    part_XL = weight_XL / np.maximum(weight_XL.sum(0), 1e-300)
    x_LXE = scaled_load(load).transpose(1, 0, 2)
    part_LX1 = part_XL.T[:, :, None]
    x_LXE -= (part_LX1 * x_LXE).sum(1, keepdims=True)
    x_LXE *= np.sqrt(part_LX1)
    x = x_LXE.astype(np.float32)
    return np.asarray(x.transpose(0, 2, 1) @ x, np.float64)


def token_covariance(coactivation_LEE: ArrayLike) -> Floats:
    """Covariance of experts' scaled loads over single tokens, from how many tokens chose both of two experts.

    Args:
        coactivation_LEE: [L, E, E] tokens that chose both; the diagonal is the load.
    """
    both = np.asarray(coactivation_LEE, np.float64)
    n_experts = both.shape[-1]
    load_LE = np.diagonal(both, axis1=1, axis2=2)
    pairs = both.sum((1, 2))  # tokens x top-k^2
    load = load_LE.sum(1)  # tokens x top-k
    scale = np.where(pairs > 0, load**2 / np.maximum(pairs, 1e-300), 1.0)  # tokens
    top_k = np.where(load > 0, pairs / np.maximum(load, 1e-300), 1.0)
    moments = both * (n_experts / top_k)[:, None, None] ** 2 / np.maximum(scale, 1e-300)[:, None, None]
    mean_LE = scaled_load(load_LE)
    return np.asarray(np.where((load > 0)[:, None, None], moments - mean_LE[:, :, None] * mean_LE[:, None, :], 0.0))


def grains(
    load_SLE: ArrayLike,
    weights_S: ArrayLike | None = None,
    windows_WLE: ArrayLike | None = None,
    coactivation_LEE: ArrayLike | None = None,
) -> list[tuple[Floats, float]]:
    """The covariance at every grain that was recorded, and how much it can be relied on.

    X observations span X - 1 directions out of E; a grain with fewer than that counts by this part, others count as 1. Windows
    are also taken together by fours: noise averages out, what lasts longer stays.

    Args:
        load_SLE: [S, L, E] selections of each scenario.
        weights_S: [S] weights of the scenarios.
        windows_WLE: [W, L, E] selections in documents or stretches of time, in order.
        coactivation_LEE: [L, E, E] tokens that chose both of two experts.
    """
    load = np.asarray(load_SLE)
    size = load.shape[2]
    found = [(covariance(load, weights_S), min(1.0, (len(load) - 1) / size))]
    if windows_WLE is not None:
        windows = np.asarray(windows_WLE)
        while len(windows) > 1 and len(found) <= WINDOW_GRAINS:
            found.append((covariance(windows), min(1.0, (len(windows) - 1) / size)))
            windows = np.add.reduceat(windows, np.arange(0, len(windows), 4))
    if coactivation_LEE is not None and np.asarray(coactivation_LEE).size:
        found.append((token_covariance(coactivation_LEE), 1.0))
    return found


def risk(mean_LE: Floats, found: list[tuple[Floats, float]]) -> Floats:
    """Second moments that a placement is judged by: balance of the mean, and the average of the grains' covariances.

    Args:
        mean_LE: [L, E] mean loads, scaled to a mean expert load of 1.
        found: [L, E, E] covariance of each grain and its weight; one without any variance counts for nothing.

    Returns:
        [L, E, E]: BALANCE * mean mean^T + the weighted average of the covariances scaled to a mean variance of 1.
    """
    moments = BALANCE * mean_LE[:, :, None] * mean_LE[:, None, :]
    variances = [np.diagonal(one, axis1=1, axis2=2).mean(1) for one, _ in found]
    weight_GL = np.array([weight * (v > 0) for (_, weight), v in zip(found, variances, strict=True)])
    total_L = weight_GL.sum(0)
    total_L = np.where(total_L > 0, total_L, 1.0)
    for (one, _), weight_L, variance_L in zip(found, weight_GL, variances, strict=True):
        factor_L = weight_L / total_L / np.where(variance_L > 0, variance_L, 1.0)
        moments += one * factor_L[:, None, None]
    return moments
