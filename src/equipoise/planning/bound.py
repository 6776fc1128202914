"""A proven lower bound on the mean LIS over units that any plan can reach within its bytes and error.

Relaxation. Let p_e be the load of expert e scaled so that the mean unit carries 1. A plan whose fullest unit of layer l
carries t_l has t_l >= 1 and needs at least d_e(t) = max(1, ceil(p_e / t)) copies of expert e, because no slot serves
more than its unit. Of these, at best one is stored in a good format q and serves every token (error of q), the others
take the fewest bytes there are. Where slots live, and how bytes divide among units, is forgotten. What is left,

    min sum_l t_l   subject to   sum of bytes <= all units' bytes,   sum of errors <= L * bound^2,

is bounded from below by its Lagrangian dual, which separates by layer and expert. Any multipliers >= 0 prove a bound;
good ones are found by cutting planes (Kelley 1960), the dual being concave in two variables.
Shapes: L MoE layers, E logical experts of the widest layer, Q precisions, T levels that the fullest unit may have.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from equipoise.planning.budget import Budget, Floats

LARGEST_MULTIPLIER = 1e6
TOLERANCE = 1e-6
ROUNDS = 80


def lower_bound(
    p_LE: Floats, widths_L: NDArray[np.int64], budget: Budget, error_bound: float, total_bytes: int | None = None
) -> float:
    """Mean over layers with load of a proven lower bound on LIS over units.

    Args:
        p_LE: [L, E] load scaled to 1 per unit; zero rows are layers that served nothing.
        widths_L: [L] experts of each layer.
        budget: bytes and errors of all choices.
        error_bound: allowed relative RMS error of the layers' routed output; inf for none.
        total_bytes: bytes of all units together, if not the budget's.

    Returns:
        The bound, at least 1; 1 when no layer served anything.
    """
    served = p_LE.sum(1) > 0
    if not served.any():
        return 1.0
    present = np.arange(p_LE.shape[1]) < widths_L[:, None]
    levels_LT, extra_LT = _levels(p_LE[served])
    # Bytes are counted in parts of all bytes, errors in parts of the allowance, so that both multipliers are alike.
    total = total_bytes or budget.total_bytes
    size_NQ = (budget.sizes / total)[np.nonzero(present)[0]]
    copy_LT = (budget.sizes.min(1) / total)[served][:, None] * extra_LT
    allowance = len(p_LE) * error_bound**2
    hurt_NQ, allowed = budget.errors[present], 1.0
    if 0 < allowance < np.inf:
        hurt_NQ = hurt_NQ / allowance
    else:  # no error at all leaves only the options without; any error leaves all
        size_NQ = np.where((hurt_NQ > 0) & (allowance == 0), np.inf, size_NQ)
        hurt_NQ = np.zeros_like(hurt_NQ)
    items = np.arange(len(size_NQ))
    layers = np.arange(len(levels_LT))

    def dual(alpha: float, beta: float) -> tuple[float, float, float]:
        """Value of the dual at two multipliers, and how it grows with each."""
        with np.errstate(invalid="ignore"):
            price_NQ = np.nan_to_num(alpha * size_NQ, nan=np.inf) + beta * hurt_NQ
        price_LT = levels_LT + alpha * copy_LT
        q, t = price_NQ.argmin(1), price_LT.argmin(1)
        # Large multipliers magnify what float64 cannot hold; that much is never claimed.
        rounding = 1e-11 * (1.0 + alpha + beta)
        value = float(price_NQ[items, q].sum() + price_LT[layers, t].sum() - alpha - beta * allowed) - rounding
        return value, float(size_NQ[items, q].sum() + copy_LT[layers, t].sum() - 1.0), float(hurt_NQ[items, q].sum() - allowed)

    return max(1.0, _maximise(dual, float(levels_LT.max(1, where=np.isfinite(levels_LT), initial=1.0).sum())) / len(layers))


def _maximise(dual: Callable[[float, float], tuple[float, float, float]], upper: float) -> float:
    """Largest value met of a concave function of two multipliers, while its cutting planes close in on the maximum.

    Args:
        dual: value and slopes at (alpha, beta).
        upper: no value is larger.
    """
    grid = (0.0, 0.1, 10.0, 1000.0)
    points = [(alpha, beta) for alpha in grid for beta in grid]
    best, planes, heights = -np.inf, list[tuple[float, float, float]](), list[float]()
    while points:
        alpha, beta = points.pop()
        value, by_alpha, by_beta = dual(alpha, beta)
        best = max(best, value)
        planes.append((-by_alpha, -by_beta, 1.0))  # height <= value + slopes * (point - here)
        heights.append(value - by_alpha * alpha - by_beta * beta)
        if not points and len(planes) < ROUNDS:
            limits = [(0.0, LARGEST_MULTIPLIER), (0.0, LARGEST_MULTIPLIER), (None, upper)]
            top = linprog((0.0, 0.0, -1.0), A_ub=np.array(planes), b_ub=np.array(heights), bounds=limits, method="highs")
            ceiling = -float(top.fun) if top.success else best
            if ceiling - best > TOLERANCE * abs(best):
                points.append((float(top.x[0]), float(top.x[1])))
    return best


def _levels(p_LE: Floats) -> tuple[Floats, Floats]:
    """[L, T] possible values of a layer's fullest unit, and the copies beyond one per expert that each needs.

    The need for copies steps down where t = p_e / j; between steps a larger t buys nothing.
    """
    levels = [_layer_levels(p) for p in p_LE]
    width = max(len(t) for t, _ in levels)
    pad = [(np.pad(t, (0, width - len(t)), constant_values=np.inf), np.pad(x, (0, width - len(x)))) for t, x in levels]
    return np.stack([t for t, _ in pad]), np.stack([x for _, x in pad])


def _layer_levels(p_E: Floats) -> tuple[Floats, Floats]:
    steps = [p / np.arange(1, np.ceil(p)) for p in p_E[p_E > 1.0]]
    t = np.unique(np.concatenate([np.ones(1), *steps]))
    copies = np.maximum(np.ceil(p_E[None, :] / t[:, None] - 1e-9), 1.0)
    return t, copies.sum(1) - len(p_E)
