"""Streaming sums of routing decisions: their size depends on layers and experts, never on tokens.

Shapes: S scenarios, W windows, L MoE layers, E experts of the widest layer, T real tokens, K top-k of the widest layer.
An id of E marks a selection that reached no routed expert.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equipoise.errors import RecordingError

Ints = NDArray[np.int64]

CHUNK = 1 << 22
"""Pairs that are counted at once, so that a long batch needs no large temporary."""

MASS_UNIT = 2.0**-32
"""Gate weights are summed as whole multiples of this, so that a sum does not depend on its order: not on a GPU's, and not on
which process counted which tokens. It is finer than float32 for weights above 0.004."""


def histogram(ids_LTK: Tensor, bins: int, weights_LTK: Tensor | None = None) -> Tensor:
    """[L, bins] occurrences of each id in each layer, or the sum of their weights in whole multiples of `MASS_UNIT`; int64.

    Raises:
        RecordingError: weights that are no finite numbers, or too many at once to be summed exactly.
    """
    size_L = ids_LTK.shape[0]
    flat = (ids_LTK.reshape(size_L, -1) + torch.arange(size_L, device=ids_LTK.device)[:, None] * bins).reshape(-1)
    # Whole numbers below 2^53 are exact in float64.
    weights = None if weights_LTK is None else (weights_LTK.reshape(-1).double() / MASS_UNIT).round()
    sums = torch.bincount(flat, weights=weights, minlength=size_L * bins)
    if weights is not None and not bool((sums.abs() < 2**53).all()):
        raise RecordingError("the gate weights of a forward pass are not finite numbers, or sum to 2^21 or more.")
    return sums.to(torch.int64).view(size_L, bins)


class PairCounts:
    """Counts of (first id, second id) per layer, kept on the device that produces them."""

    def __init__(self, size_L: int, size_E: int) -> None:
        self._shape = (size_L, size_E + 1, size_E + 1)
        self._counts: Tensor | None = None

    def add(self, first_LTK: Tensor, second_LTK: Tensor, first_layer: int) -> None:
        """Count all K x K pairs of each token for consecutive rows of layers from `first_layer` on."""
        size_L, size_T, size_K = first_LTK.shape
        base = self._shape[1]
        if self._counts is None:
            with torch.inference_mode(False):  # an inference tensor could not be added to outside inference mode
                self._counts = torch.zeros(int(np.prod(self._shape)), dtype=torch.int64, device=first_LTK.device)
        elif self._counts.device != first_LTK.device:  # loaded from a file
            self._counts = self._counts.to(first_LTK.device)
        layers_L = torch.arange(size_L, device=first_LTK.device)[:, None, None] * base * base
        step = max(1, CHUNK // max(1, size_L * size_K * size_K))
        target = self._counts[first_layer * base * base : (first_layer + size_L) * base * base]
        for start in range(0, size_T, step):
            first = first_LTK[:, start : start + step] * base + layers_L
            pairs = (first[..., :, None] + second_LTK[:, start : start + step, None, :]).reshape(-1)
            if 4 * len(pairs) >= len(target):
                target += torch.bincount(pairs, minlength=len(target))
            else:  # a decode step has few pairs: touch only theirs
                target.scatter_add_(0, pairs, torch.ones_like(pairs))

    def numpy(self) -> Ints:
        """[L, E, E] pairs, selections that reached no expert left out."""
        if self._counts is None:
            return np.zeros((self._shape[0], self._shape[1] - 1, self._shape[2] - 1), np.int64)
        return np.array(self._counts.view(self._shape)[:, :-1, :-1].cpu().numpy())

    def load(self, counts_LEE: Ints) -> None:
        """Go on from counts that `numpy` gave."""
        full = np.zeros(self._shape, np.int64)
        full[:, :-1, :-1] = counts_LEE
        self._counts = torch.from_numpy(full.reshape(-1))


class Windows:
    """Selections in consecutive stretches of real tokens, kept apart by scenario; at most `limit` of them.

    A forward call belongs whole to one window, so a window holds at least `tokens` tokens. Beyond the limit, neighbours
    of the same scenario are merged and `tokens` doubles.
    """

    COURSE = ("window_closed_scenario", "window_open_tokens", "window_size")
    """What of the state depends only on how many tokens the forward calls had, in which order."""

    def __init__(self, tokens: int, limit: int, size_S: int, shape_LE: tuple[int, int]) -> None:
        self.tokens = tokens
        self._limit = max(limit, size_S)
        self._closed: list[tuple[int, Ints]] = []
        self._open_SLE = np.zeros((size_S, *shape_LE), np.int64)
        self._open_tokens_S = np.zeros(size_S, np.int64)

    def add(self, scenario: int, first_layer: int, counts_LE: Ints) -> None:
        """Add the selections of some consecutive layers to the scenario's open window."""
        self._open_SLE[scenario, first_layer : first_layer + len(counts_LE)] += counts_LE

    def advance(self, scenario: int, tokens: int) -> None:
        """The forward call with these tokens is complete; close the window if it is full."""
        self._open_tokens_S[scenario] += tokens
        if self._open_tokens_S[scenario] >= self.tokens:
            self._closed.append((scenario, self._open_SLE[scenario].copy()))
            self._open_SLE[scenario] = 0
            self._open_tokens_S[scenario] = 0
            if len(self._closed) > self._limit:
                self._merge()

    def arrays(self) -> tuple[Ints, Ints]:
        """Windows [W, L, E] in order of time within a scenario, and the scenario of each [W]; the open ones come last.

        A window that is less than half full joins its predecessor, for a few tokens say little about balance.
        """
        closed = list(self._closed)
        for scenario in np.flatnonzero(self._open_tokens_S):
            last = next((i for i in reversed(range(len(closed))) if closed[i][0] == scenario), None)
            if last is not None and 2 * self._open_tokens_S[scenario] < self.tokens:
                closed[last] = (int(scenario), closed[last][1] + self._open_SLE[scenario])
            else:
                closed.append((int(scenario), self._open_SLE[scenario].copy()))
        windows = np.array([w for _, w in closed], np.int64).reshape(-1, *self._open_SLE.shape[1:])
        return windows, np.array([s for s, _ in closed], np.int64)

    def state(self) -> dict[str, Ints]:
        """Everything needed to go on later."""
        return {
            "window_closed": np.array([w for _, w in self._closed], np.int64).reshape(-1, *self._open_SLE.shape[1:]),
            "window_closed_scenario": np.array([s for s, _ in self._closed], np.int64),
            "window_open": self._open_SLE.copy(),
            "window_open_tokens": self._open_tokens_S.copy(),
            "window_size": np.array([self.tokens], np.int64),
        }

    def load(self, state: dict[str, Ints]) -> None:
        """Go on from what `state` gave."""
        self._closed = list(zip(map(int, state["window_closed_scenario"]), state["window_closed"].copy(), strict=True))
        self._open_SLE = state["window_open"].copy()
        self._open_tokens_S = state["window_open_tokens"].copy()
        self.tokens = int(state["window_size"][0])

    def _merge(self) -> None:
        """Merge neighbours of each scenario; an odd last window is opened again."""
        merged: list[tuple[int, Ints]] = []
        waiting: dict[int, int] = {}
        for scenario, counts in self._closed:
            if scenario in waiting:
                first = waiting.pop(scenario)
                merged[first] = (scenario, merged[first][1] + counts)
            else:
                waiting[scenario] = len(merged)
                merged.append((scenario, counts))
        for scenario, index in waiting.items():
            self._open_SLE[scenario] += merged[index][1]
            self._open_tokens_S[scenario] += self.tokens
        self._closed = [w for i, w in enumerate(merged) if i not in waiting.values()]
        self.tokens *= 2
