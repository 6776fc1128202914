"""How far a load is from balance: pure functions of arrays whose last axis is what carries the load.

The last axis is logical experts for a model as it is, physical slots or parallel units for a plan.
An entry of the last axis that does not exist (layers of different width share one array) is excluded by `width`.
A layer that served nothing has no balance: its value is nan, never 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def _load(load: ArrayLike, width: ArrayLike | None) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Loads as float64 with absent entries zero, the number of entries that exist, and which exist."""
    values = np.asarray(load, dtype=np.float64)
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ValueError(f"a load needs at least one entry on its last axis; got shape {values.shape}")
    size = values.shape[-1]
    n = np.broadcast_to(np.asarray(size if width is None else width), values.shape[:-1]).astype(np.float64)
    present = np.arange(size) < n[..., None]
    return np.where(present, values, 0.0), n, present


def _safe_divide(a: Array, b: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(b > 0, a / b, np.nan), dtype=np.float64)


def lis(load: ArrayLike, width: ArrayLike | None = None) -> Array:
    """Load-Imbalance Score: width * max load / total load; 1 is balanced, width is the worst.

    Args:
        load: [..., E] tokens (or selections) served by each expert, slot or unit.
        width: [...] how many entries of the last axis exist; all of them when omitted.

    Returns:
        [...] scores; nan where nothing was served.

    Source: R&Q (arXiv:2602.19938) Definition 1, with m = width and n k = total load.

    Examples:
        The busiest of four experts has twice the mean; in a layer of two, the third and fourth do not exist.

        >>> print(lis([8, 4, 2, 2]))
        2.0
        >>> print(lis([[8, 4, 2, 2], [3, 1, 0, 0]], width=[4, 2]))
        [2.  1.5]
    """
    values, n, _ = _load(load, width)
    return _safe_divide(n * values.max(-1), values.sum(-1))


def maxvio(load: ArrayLike, width: ArrayLike | None = None) -> Array:
    """Maximal violation: (max - mean) / mean = LIS - 1. Source: Loss-Free Balancing (arXiv:2408.15664) section 4.1."""
    return np.asarray(lis(load, width) - 1.0)


def balancedness(load: ArrayLike, width: ArrayLike | None = None) -> Array:
    """Mean load / max load in (0, 1], as serving engines log it; 1 is balanced, nan where nothing was served."""
    return np.asarray(1.0 / lis(load, width))


def coefficient_of_variation(load: ArrayLike, width: ArrayLike | None = None) -> Array:
    """Standard deviation of the load over its mean (population form); 0 is balanced."""
    values, n, present = _load(load, width)
    mean = values.sum(-1) / n
    variance = (np.where(present, values - mean[..., None], 0.0) ** 2).sum(-1) / n
    return _safe_divide(np.sqrt(variance), mean)


def gini(load: ArrayLike, width: ArrayLike | None = None) -> Array:
    """Gini coefficient: mean absolute difference of all pairs over twice the mean; 0 is balanced, 1 - 1/width the worst."""
    values, n, present = _load(load, width)
    # Absent entries sort first as -inf-like minima of weight zero, so that ranks of the present ones stay 1..n.
    order = np.sort(np.where(present, values, -1.0), axis=-1)
    rank = np.arange(1, values.shape[-1] + 1) - (values.shape[-1] - n[..., None])
    weighted = np.where(order >= 0, (2 * rank - n[..., None] - 1) * np.maximum(order, 0.0), 0.0).sum(-1)
    return _safe_divide(weighted, n * values.sum(-1))


def jensen_shannon(first: ArrayLike, second: ArrayLike) -> Array:
    """Jensen-Shannon divergence of two loads in bits: 0 for equal shares, 1 for disjoint ones.

    Args:
        first: [..., E] loads; scaled to shares.
        second: as `first`.

    Returns:
        [...] divergences; nan where either served nothing. Source: Lin (1991), equation 4.1 with equal weights.

    Examples:
        >>> print(jensen_shannon([1, 1], [10, 10]), jensen_shannon([1, 0], [0, 1]))
        0.0 1.0
    """
    p, q = (_safe_divide(v, v.sum(-1, keepdims=True)) for v in (np.asarray(x, np.float64) for x in (first, second)))
    middle = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = [np.where(one > 0, one * np.log2(one / middle), np.where(np.isnan(one), np.nan, 0.0)) for one in (p, q)]
    return np.asarray((terms[0] + terms[1]).sum(-1) / 2)


def cumulative_lis(windows: ArrayLike, width: ArrayLike | None = None) -> Array:
    """LIS of all windows up to and including each one.

    Args:
        windows: [W, ..., E] load of each time window, in order of time.
        width: [...] how many entries of the last axis exist; all of them when omitted.

    Returns:
        [W, ...] running scores. Source: R&Q Figure 8 ("cumulative"); `lis(windows)` is its "instantaneous" form.

    Examples:
        Two windows, each as uneven as can be, are level together.

        >>> print(lis([[4, 0], [0, 4]]), cumulative_lis([[4, 0], [0, 4]]))
        [2. 2.] [2. 1.]
    """
    return lis(np.cumsum(np.asarray(windows, dtype=np.float64), axis=0), width)


METRICS = {
    "lis": lis,
    "maxvio": maxvio,
    "balancedness": balancedness,
    "gini": gini,
    "cv": coefficient_of_variation,
}
"""The metrics that tables print, by the name under which they print them."""
