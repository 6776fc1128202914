"""What the load of a running model does over time: a window that forgets, and changes of traffic.

Text comes in documents, so neighbouring tokens choose alike and counts scatter more than independent draws would. How
much more is measured on the stream itself, from what one step differs from the next, and every test is held against it.
Shapes: N steps of the window, oldest first, L MoE layers, E logical experts of the widest layer.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np
from numpy.typing import NDArray

from equipoise.errors import PlanError
from equipoise.metrics import jensen_shannon

Floats = NDArray[np.float64]

PAIRS, QUANTILE = 12, 0.75
"""Differences of neighbouring steps, and the one of them that is the scatter: a single change of traffic does not count as
scatter, but steps that differ again and again soon do."""


def js_noise(first_LE: NDArray[np.generic], second_LE: NDArray[np.generic], sizes: tuple[Floats, Floats]) -> Floats:
    """[L] Jensen-Shannon divergence, in bits, to be expected between two samples of one load, if draws were independent.

    For samples of n and m draws from one distribution over E outcomes, (8 / (1/n + 1/m)) * JS in nats is near chi-squared
    with E - 1 degrees of freedom, E the outcomes that occur.

    Args:
        first_LE: [L, E] loads.
        second_LE: [L, E] loads.
        sizes: [L] draws of each; of a weighted sum its effective number.
    """
    seen_L = ((np.asarray(first_LE) > 0) | (np.asarray(second_LE) > 0)).sum(-1)
    inverse = sum(1.0 / np.maximum(size, 1e-9) for size in sizes)
    return np.asarray(np.maximum(seen_L - 1, 0) * inverse / (8 * math.log(2)), np.float64)


def js_ratio(first_LE: NDArray[np.generic], second_LE: NDArray[np.generic], sizes: tuple[Floats, Floats]) -> float:
    """Divergence of two loads over what independent draws of one load would show; layers together; 0 when nothing ran."""
    distance_L, noise_L = jensen_shannon(first_LE, second_LE), js_noise(first_LE, second_LE, sizes)
    known_L = ~np.isnan(distance_L) & (noise_L > 0)
    return float(distance_L[known_L].sum() / noise_L[known_L].sum()) if known_L.any() else 0.0


def scatter(windows: NDArray[np.generic], scenario: NDArray[np.integer] | None = None) -> float | None:
    """How much more neighbouring windows of a profile differ than independent draws would; None when it has no neighbours.

    Args:
        windows: [W, L, E] loads in order of time within a scenario.
        scenario: [W] neighbours count only within one; all of them when omitted.
    """
    pairs = [
        (windows[i], windows[i + 1]) for i in range(len(windows) - 1) if scenario is None or scenario[i] == scenario[i + 1]
    ]
    ratios = [js_ratio(a, b, (_size(a), _size(b))) for a, b in pairs]
    return max(1.0, float(np.median(ratios))) if ratios else None


class Window:
    """The load of the latest steps: older ones count less, and a change of traffic drops what was before it.

    Its memory is bounded by `most_steps`.

    Attributes:
        steps: how many were added in all.
    """

    def __init__(
        self,
        *,
        decay: float = 0.9,
        most_steps: int = 32,
        change: float = 4.0,
        prior_scatter: float | None = None,
    ) -> None:
        """An empty window.

        Args:
            decay: weight of a step beside the one after it.
            most_steps: steps that are kept.
            change: a step that differs from those before it by more than this many times what neighbours differ by is
                taken for a change of traffic.
            prior_scatter: as `scatter`, of a profile; used until the stream has shown its own. Without it the first steps are
                trusted to be of one traffic.

        Raises:
            PlanError: a number out of range.
        """
        if not 0 < decay <= 1 or most_steps < 2 or not change > 1:
            raise PlanError(
                f"decay {decay}, most_steps {most_steps}, change {change} given; allowed are a decay above 0 up to 1, 2 steps "
                "or more, a change above 1."
            )
        self._decay, self._change = decay, change
        self._loads: deque[NDArray[np.int64]] = deque(maxlen=most_steps)
        self._ratios: deque[float] = deque([] if prior_scatter is None else [prior_scatter], maxlen=PAIRS)
        self.steps = 0

    def add(self, load_LE: NDArray[np.integer]) -> bool:
        """Take in a step; True when it is of other traffic than the steps before it, which are then dropped."""
        self.steps += 1
        changed = False
        if self._loads:
            last = self._loads[-1]
            before, now = (self.load, self.size), (load_LE, _size(load_LE))
            ratio = js_ratio(before[0], now[0], (before[1], now[1]))
            changed = bool(self._ratios) and ratio > self._change * self.scatter
            self._ratios.append(js_ratio(last, load_LE, (_size(last), now[1])))
            if changed:
                self._loads.clear()
        self._loads.append(np.array(load_LE, np.int64))
        return changed

    @property
    def scatter(self) -> float:
        """How much more neighbouring steps differ than independent draws would; at least 1."""
        return max(1.0, float(np.quantile(self._ratios, QUANTILE))) if self._ratios else 1.0

    @property
    def loads(self) -> NDArray[np.int64]:
        """[N, L, E] the steps since the last change, oldest first.

        Raises:
            PlanError: no step was added yet.
        """
        if not self._loads:
            raise PlanError("the window is empty; run the model first.")
        return np.stack(self._loads)

    @property
    def weights(self) -> Floats:
        """[N] weight of each step; 1 for the latest."""
        return np.asarray(self._decay ** np.arange(len(self._loads) - 1, -1, -1.0))

    @property
    def load(self) -> Floats:
        """[L, E] weighted sum of the steps."""
        return np.asarray(np.tensordot(self.weights, self.loads, 1), np.float64)

    @property
    def size(self) -> Floats:
        """[L] how many selections, all of weight 1, would tell as much."""
        weight_N, sizes_NL = self.weights, self.loads.sum(-1).astype(np.float64)
        squared_L = (weight_N[:, None] ** 2 * sizes_NL).sum(0)
        return np.asarray((weight_N[:, None] * sizes_NL).sum(0) ** 2 / np.maximum(squared_L, 1e-9))

    def drift(self, planned_LE: NDArray[np.generic], planned_size_L: Floats | None = None) -> tuple[float, float]:
        """How far the window is from the load that was planned for.

        Args:
            planned_LE: [L, E] load that was planned for.
            planned_size_L: [L] effective selections of it; its sums when omitted.

        Returns:
            Jensen-Shannon divergence in bits, mean over layers, and that over what chance would show.
        """
        distance_L = jensen_shannon(self.load, planned_LE)
        known = distance_L[~np.isnan(distance_L)]
        size_L = _size(planned_LE) if planned_size_L is None else planned_size_L
        ratio = js_ratio(self.load, planned_LE, (self.size, size_L)) / self.scatter
        return (float(known.mean()) if len(known) else 0.0), ratio


def _size(load_LE: NDArray[np.generic]) -> Floats:
    return np.asarray(np.asarray(load_LE).sum(-1), np.float64)
