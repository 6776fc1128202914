"""Cost models of measured latencies: of single points of one rank, or of equal ranks that share a batch.

Shapes: N measured points, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import nnls

from equipoise.errors import PlanError
from equipoise.planning.cost import Bools, Floats

Curve = tuple[Floats, Floats]
"""Ascending abscissas and milliseconds."""
ROUNDS = 40


@dataclass(frozen=True, eq=False)
class PointCost:
    """Latencies that a user measured at some numbers of activated experts and pairs of one rank, interpolated linearly.

    At a fixed number of activated experts, a curve over pairs: flat while weights are read, then rising with arithmetic.
    Between two measured numbers of experts, both curves are read at the same pairs (but no fewer than one pair an expert)
    and mixed. Fewer experts than any curve has: the least curve's arithmetic, on top of what was measured for one pair an
    expert. Beyond the last point of a curve time grows in proportion to pairs, beyond the last curve in proportion to experts;
    `covers` is false there. The pairs of a rank are taken to be spread over its activated experts as they were in the
    measurement. A rank without pairs takes no time.

    Attributes:
        name: where the figures are from.
        experts: [N] activated experts of each curve, ascending.
        curves: N curves over pairs.
        few: curve over experts at about one pair an expert, up to the first of `experts`.
    """

    name: str
    experts: Floats
    curves: tuple[Curve, ...]
    few: Curve
    unit: str = "ms"

    def __call__(self, pairs: ArrayLike, activated: ArrayLike) -> Floats:
        """[..., R] milliseconds."""
        p, a = np.broadcast_arrays(np.asarray(pairs, np.float64), np.asarray(activated, np.float64))
        grid_N = np.stack([_along(curve, np.maximum(p, n)) for curve, n in zip(self.curves, self.experts, strict=True)])
        time = _between(self.experts, grid_N, a)
        least, most = self.experts[0], self.experts[-1]
        arithmetic = grid_N[0] - _along(self.curves[0], np.asarray(least))
        time = np.where(a < least, np.interp(a, *self.few) + np.maximum(arithmetic, 0.0), time)
        time = np.where(a > most, time * a / most, time)
        return np.where((p > 0) & (a > 0), time, 0.0)

    def covers(self, pairs: ArrayLike, activated: ArrayLike) -> Bools:
        """[..., R] whether experts and pairs lie within what was measured."""
        p, a = np.asarray(pairs, np.float64), np.asarray(activated, np.float64)
        longest = np.interp(a, self.experts, np.array([curve[0][-1] for curve in self.curves]))
        return np.asarray((p <= 0) | ((a >= self.few[0][0]) & (a <= self.experts[-1]) & (p <= longest)))


def point_cost(name: str, experts: ArrayLike, pairs: ArrayLike, latency_ms: ArrayLike) -> PointCost:
    """A cost model of measured points.

    Args:
        name: where they are from.
        experts: [N] activated experts of each point.
        pairs: [N] token-expert pairs of each point, no fewer than its experts.
        latency_ms: [N] milliseconds. Of several figures for one point the smallest counts.

    Raises:
        PlanError: no point, or one that is not finite or not positive, or has fewer pairs than experts.
    """
    a, p, ms = (np.asarray(column, np.float64).ravel() for column in (experts, pairs, latency_ms))
    if not a.size or not (np.isfinite(a) & np.isfinite(p) & np.isfinite(ms) & (a >= 1) & (p >= a) & (ms > 0)).all():
        raise PlanError(
            f"cost '{name}': {a.size} rows; all need experts >= 1, pairs >= experts and latency > 0; correct the table."
        )
    curves = {n: curve(p[a == n], ms[a == n]) for n in np.unique(a).tolist()}
    levels = np.array(sorted(curves))
    long = np.array([len(curves[n][0]) >= 2 for n in levels.tolist()])
    # A number of experts that was measured at one size only says what few pairs cost, not what many do.
    full = np.flatnonzero(long) if long.any() else np.arange(len(levels))
    head = levels[: int(full[0]) + 1]
    few = (head, np.array([curves[n][1][0] for n in head.tolist()]))
    return PointCost(name, levels[full], tuple(curves[n] for n in levels[full].tolist()), few)


@dataclass(frozen=True, slots=True)
class Roofline:
    """ms = launch + token * T + max(expert * a, pair * p) for a batch of T tokens, a activated experts and p pairs.

    Attributes:
        launch: ms of a call.
        token: ms per token of the batch, wherever its experts are (what a kernel spends on every row it is handed).
        expert: ms to read the weights of one expert.
        pair: ms of the arithmetic of one pair.
        error: median relative deviation of the fit from the measured points.
    """

    launch: float
    token: float
    expert: float
    pair: float
    error: float

    def work(self, activated: Floats, pairs: Floats) -> Floats:
        """[...] ms that depend on a rank's share of the batch."""
        return np.asarray(np.maximum(self.expert * activated, self.pair * pairs))


def fit_roofline(tokens: Floats, activated: Floats, pairs: Floats, ms: Floats) -> Roofline:
    """The roofline closest to measured points in relative least squares, all terms at least 0.

    Alternates between which points are bound by reading and which by arithmetic, and a non-negative least-squares fit.

    Args:
        tokens: [N] of the whole batch.
        activated: [N] experts of the rank with at least one token.
        pairs: [N] token-expert pairs of the rank.
        ms: [N] measured.
    """
    reads = pairs < 64 * activated
    terms = np.zeros(4)
    for _ in range(ROUNDS):
        columns = np.stack([np.ones_like(ms), tokens, activated * reads, pairs * ~reads], 1) / ms[:, None]
        terms, _ = nnls(columns, np.ones_like(ms))
        now = terms[2] * activated >= terms[3] * pairs
        if (now == reads).all():
            break
        reads = now
    fitted = terms[0] + terms[1] * tokens + np.maximum(terms[2] * activated, terms[3] * pairs)
    launch, token, expert, pair = (float(term) for term in terms)
    return Roofline(launch, token, expert, pair, error=float(np.median(np.abs(fitted / ms - 1))))


@dataclass(frozen=True, eq=False)
class GroupCost:
    """Latencies of one of R equal ranks under even routing, with a roofline for how a rank deviates from even.

    A rank's time is the latency that was measured for as many ranks and as many tokens, plus the difference that the
    roofline makes between what this rank has (activated experts, pairs) and what it had in the measurement. So it is
    exact where ranks are even, and each further expert or pair never makes it faster. Larger batches than were measured
    are continued by the roofline; `covers` is false there.

    Attributes:
        name: where the figures are from.
        width: E, experts of the layer.
        top_k: K.
        ranks: [N] sizes of the groups that were measured, ascending.
        curves: N curves over the tokens of a batch (of all ranks together).
        roofline: fitted to the same points.
    """

    name: str
    width: int
    top_k: int
    ranks: Floats
    curves: tuple[Curve, ...]
    roofline: Roofline
    unit: str = "ms"

    def __call__(self, pairs: ArrayLike, activated: ArrayLike) -> Floats:
        """[..., R] milliseconds; the batch is what all ranks have together."""
        p, a = np.broadcast_arrays(np.asarray(pairs, np.float64), np.asarray(activated, np.float64))
        count = p.shape[-1]
        total = p.sum(-1, keepdims=True)
        tokens = total / self.top_k
        grid_N = np.stack([self._even(tokens, line, float(n)) for line, n in zip(self.curves, self.ranks, strict=True)])
        base = _between(np.log2(self.ranks), grid_N, np.full(tokens.shape, np.log2(count)))
        even = self._work(tokens, count)
        least = self.roofline.launch + self.roofline.token * tokens
        time = np.maximum(base + self.roofline.work(a, p) - even, np.minimum(least, base))
        return np.where((p > 0) & (a > 0), time, 0.0)

    def _even(self, tokens: Floats, line: Curve, ranks: float) -> Floats:
        """[...] ms of one of so many even ranks."""
        known = np.minimum(tokens, line[0][-1])
        beyond = self._work(tokens, ranks) - self._work(known, ranks) + self.roofline.token * (tokens - known)
        return np.asarray(np.interp(known, *line) + beyond)

    def _work(self, tokens: Floats, ranks: float) -> Floats:
        """[...] the roofline's share of one of so many even ranks."""
        pairs = tokens * self.top_k / ranks
        return self.roofline.work(np.minimum(self.width / ranks, pairs), pairs)

    def covers(self, pairs: ArrayLike, activated: ArrayLike) -> Bools:
        """[..., R] whether a group of this size and a batch of this size lie within what was measured."""
        p = np.asarray(pairs, np.float64)
        tokens = p.sum(-1, keepdims=True) / self.top_k
        first, last = max(c[0][0] for c in self.curves), min(c[0][-1] for c in self.curves)
        known = (tokens >= first) & (tokens <= last) & (self.ranks[0] <= p.shape[-1] <= self.ranks[-1])
        return np.broadcast_to(known, p.shape)


def curve(x: ArrayLike, ms: ArrayLike) -> Curve:
    """A curve through points, ascending; of several at one abscissa the least."""
    at, y = np.asarray(x, np.float64), np.asarray(ms, np.float64)
    order = np.lexsort((y, at))
    unique, first = np.unique(at[order], return_index=True)
    return unique, y[order][first]


def _along(line: Curve, x: Floats) -> Floats:
    """A curve at these abscissas; in proportion beyond its end."""
    return np.asarray(np.interp(x, *line) * np.maximum(x / line[0][-1], 1.0))


def _between(levels_N: Floats, grid_N: NDArray[np.float64], at: Floats) -> Floats:
    """[...] values of N levels [N, ...], mixed linearly at one place each; the nearest level outside."""
    low = np.clip(np.searchsorted(levels_N, at, side="right") - 1, 0, len(levels_N) - 1)
    high = np.minimum(low + 1, len(levels_N) - 1)
    part = np.clip((at - levels_N[low]) / np.maximum(levels_N[high] - levels_N[low], 1e-12), 0.0, 1.0)
    below, above = (np.take_along_axis(grid_N, index[None], 0)[0] for index in (low, high))
    return np.asarray((1 - part) * below + part * above)
