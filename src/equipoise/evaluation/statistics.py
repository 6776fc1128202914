"""95 % intervals for paired comparisons of two models; every estimate is of the difference, never of each model alone.

Shapes: G clusters (documents, see `clusters`), N items of a task.
Limits contain the estimate. Their width is zero only where a continuous quantity is the same in every cluster (two identical
models have KL 0 everywhere); a count that happened to show no difference never has zero width.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from equipoise.artifacts.evaluation import Interval
from equipoise.errors import TextError

Floats = NDArray[np.float64]
CONFIDENCE = 0.95
TAIL = 0.5 + CONFIDENCE / 2


def clusters(documents: ArrayLike) -> NDArray[np.int64]:
    """The independent unit of each sequence: its document, or, when all are of one document, the sequence itself.

    Args:
        documents: [sequences] index of the document of each sequence.

    Returns:
        [sequences] cluster index in 0..G-1, with G >= 2.

    Raises:
        TextError: a single sequence, from which no interval can be had.
    """
    document = np.asarray(documents, np.int64)
    if document.size < 2:
        raise TextError(
            "the text is a single sequence, so no interval can be stated; "
            "give two documents, or a text longer than --seq-len tokens."
        )
    _, index = np.unique(document, return_inverse=True)
    return np.arange(document.size) if index.max() == 0 else index


def ratio_interval(numerator_G: ArrayLike, denominator_G: ArrayLike) -> Interval:
    """Sum of numerators over sum of denominators, with the linearised variance between clusters and Student's t.

    Args:
        numerator_G: [G] a sum over each cluster's tokens.
        denominator_G: [G] each cluster's tokens.

    Source: Cochran, Sampling Techniques, chapter 6 (ratio estimator); t with G - 1 degrees of freedom, since a percentile
    bootstrap is too short with few clusters.
    """
    y, n = np.asarray(numerator_G, np.float64), np.asarray(denominator_G, np.float64)
    value = y.sum() / n.sum()
    half = stats.t.ppf(TAIL, y.size - 1) * np.sqrt(_ratio_variance(y, n))
    return Interval(value=float(value), low=float(value - half), high=float(value + half))


def perplexity_change(nll_base_G: ArrayLike, nll_G: ArrayLike, tokens_G: ArrayLike) -> Interval:
    """Relative change of perplexity, paired over clusters: exp(mean difference of the tokens' loss) - 1.

    Args:
        nll_base_G: [G] summed negative log likelihood of the base, nats.
        nll_G: [G] the same of the other model.
        tokens_G: [G] predicted tokens.
    """
    difference = ratio_interval(np.asarray(nll_G, np.float64) - np.asarray(nll_base_G, np.float64), tokens_G)
    return Interval(value=_growth(difference.value), low=_growth(difference.low), high=_growth(difference.high))


def mean_per_token(sum_G: ArrayLike, tokens_G: ArrayLike) -> Interval:
    """Mean per token of a quantity that cannot be negative (KL divergence), clustered."""
    interval = ratio_interval(sum_G, tokens_G)
    return Interval(value=interval.value, low=min(max(interval.low, 0.0), interval.value), high=interval.high)


def proportion_interval(hits_G: ArrayLike, tokens_G: ArrayLike) -> Interval:
    """Share of tokens that hit, clustered, with an interval that holds near and at 0 and 1.

    Args:
        hits_G: [G] tokens that hit in each cluster.
        tokens_G: [G] tokens of each cluster.

    Source: Korn and Graubard (1998): Clopper-Pearson limits at the effective sample size p(1-p)/variance, scaled by
    (t_{n-1} / t_{G-1})^2 for the few degrees of freedom of that variance; at 0 and 1 the sample size is the number of tokens.
    """
    hits, n = np.asarray(hits_G, np.float64), np.asarray(tokens_G, np.float64)
    total = n.sum()
    p = hits.sum() / total
    variance = _ratio_variance(hits, n)
    size = p * (1 - p) / variance if variance > 0 else total
    scale = stats.t.ppf(TAIL, max(total - 1, 1)) / stats.t.ppf(TAIL, n.size - 1)
    size = min(size, total) * min(scale**2, 1.0)
    x = p * size
    low = stats.beta.ppf(1 - TAIL, x, size - x + 1) if x > 0 else 0.0
    high = stats.beta.ppf(TAIL, x + 1, size - x) if x < size else 1.0
    return Interval(value=float(p), low=float(low), high=float(high))


def paired_difference(base_N: ArrayLike, other_N: ArrayLike) -> Interval:
    """Mean of other - base over the same items, with an interval that is sound for few items and when none differs.

    Scores in [0, 1]: one made-up item is added that speaks for each side before the Wald limits are taken. When no item
    differs the limits are about +-2.8 / (N + 2), as they should be for a difference that N items failed to show. Other
    scores: Student's t over the items' differences.

    Args:
        base_N: [N] scores of the base.
        other_N: [N] scores of the other model on the same items, in the same order.

    Source: Bonett and Price (2012) for 0/1 scores, recommended for paired proportions by Fagerland, Lydersen and Laake
    (2014); fractional scores enter by the same two items.
    """
    base, other = np.asarray(base_N, np.float64), np.asarray(other_N, np.float64)
    if base.shape != other.shape or base.size == 0:
        raise ValueError(f"paired scores must be of the same items; got {base.shape} and {other.shape}")
    difference = other - base
    n, value = difference.size, float(difference.mean())
    bounded = min(base.min(), other.min()) >= 0 and max(base.max(), other.max()) <= 1
    if not bounded:
        if n < 2:
            raise ValueError("one item with an unbounded score has no interval")
        half = float(stats.t.ppf(TAIL, n - 1) * difference.std(ddof=1) / np.sqrt(n))
        return Interval(value=value, low=value - half, high=value + half)
    centre = float(difference.sum() / (n + 2))
    variance = (float((difference**2).sum()) + 2) / (n + 2) - centre**2
    half = float(stats.norm.ppf(TAIL) * np.sqrt(variance / (n + 2)))
    return Interval(value=value, low=min(max(centre - half, -1.0), value), high=max(min(centre + half, 1.0), value))


def _ratio_variance(y: Floats, n: Floats) -> float:
    if y.size < 2:
        raise ValueError(f"an interval needs at least two clusters; got {y.size}")
    residual = y - y.sum() / n.sum() * n
    return float(y.size / (y.size - 1) * (residual**2).sum() / n.sum() ** 2)


def _growth(log_ratio: float) -> float:
    # A model that is broken beyond measure still needs a finite number, for the file is JSON.
    return float(np.expm1(min(log_ratio, 700.0)))
