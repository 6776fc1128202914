"""Expert ids of single requests, summed: counts by phase, stretches, transitions and co-activation, in bounded memory.

Shapes: T tokens of a request, N rows (transformer layers), L MoE layers, E experts, K top-k; 2 phases.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.engines.model_config import MAX_LAYERS
from equipoise.engines.per_token import choices, count_choices, count_pairs
from equipoise.engines.records import MAX_WINDOWS, Recording
from equipoise.errors import ProfileError

Ints = NDArray[np.int64]
MAX_PAIRS = 1 << 28
"""Most cells of the two tables of pairs together (8 bytes each); larger models are read without them."""

CHUNK = 8192
"""Tokens that are counted at once."""


class Stretches:
    """Counts of consecutive parts of traffic, at most `2 * MAX_WINDOWS` of them; beyond that neighbours are joined."""

    def __init__(self) -> None:
        self._parts: list[Ints] = []
        self._per_part = self._in_last = 1

    def add(self, counts_NE: Ints) -> None:
        """Add the next part of the traffic."""
        if self._parts and self._in_last < self._per_part:
            self._parts[-1] = self._parts[-1] + counts_NE
            self._in_last += 1
            return
        if len(self._parts) == 2 * MAX_WINDOWS:
            self._parts = [a + b for a, b in zip(self._parts[::2], self._parts[1::2], strict=True)]
            self._per_part *= 2
        self._parts.append(counts_NE)
        self._in_last = 1

    def array(self) -> Ints:
        """[W, N, E] the stretches in order of time."""
        return np.stack(self._parts)


class TokenTally:
    """Sums of routing decisions of requests that come one after the other.

    A token whose ids are zero in all rows was not recorded (vLLM's store of routing had dropped it) and is left out. A row
    that is zero for all tokens is a dense layer; with top-1 routing, where zeros may be choices, `moe_layers` tells.

    Attributes:
        dropped: tokens left out because their routing was not recorded.
    """

    def __init__(self, rows: int, experts: int, top_k: int, moe_layers: Sequence[int] | None = None) -> None:
        if not 1 <= rows <= MAX_LAYERS or not 1 <= top_k <= experts:
            raise ProfileError(f"{rows} layers and top-{top_k} of {experts} experts cannot be; give the right model's records.")
        self._shape = rows, experts, top_k
        self._may_be_moe_N = np.isin(np.arange(rows), moe_layers) if moe_layers and top_k == 1 else np.ones(rows, bool)
        self._counts = np.zeros((2, rows, experts), np.int64)
        self._stretches = Stretches()
        self._tokens = self.dropped = 0
        self._routed_N, self._silent_N = np.zeros(rows, bool), np.zeros(rows, bool)
        pairs = 2 * rows * experts * experts <= MAX_PAIRS
        self._pairs = (
            (np.zeros((rows - 1, experts, experts), np.int64), np.zeros((rows, experts, experts), np.int64)) if pairs else None
        )
        self._waiting: list[NDArray[Any]] = []

    def add(self, ids_TNK: NDArray[Any], what: str, *, prompt: int | None = None, skip: int = 0) -> None:
        """Count one request, a stretch of traffic of its own until there are too many of them.

        Args:
            ids_TNK: [T, N, K] expert ids.
            what: named in errors.
            prompt: tokens of the prompt, counted as prefill; all tokens are when it is not known.
            skip: leading tokens that are not counted.

        Raises:
            ProfileError: other layers or top-k than before, an expert that does not exist, or twice the same for a token.
        """
        rows, experts, top_k = self._shape
        if choices(ids_TNK, experts, what).shape[1:] != (rows, top_k):
            raise ProfileError(
                f"{what} has {ids_TNK.shape[1]} layers and top-{ids_TNK.shape[2]}; others have {rows} and top-{top_k}."
            )
        prefill = len(ids_TNK) if prompt is None else prompt
        window = np.zeros((rows, experts), np.int64)
        for start in range(skip, len(ids_TNK), CHUNK):
            ids = ids_TNK[start : start + CHUNK]
            position_T = np.arange(start, start + len(ids))
            if top_k > 1:
                recorded_T = ids.any((1, 2))
                self.dropped += int((~recorded_T).sum())
                ids, position_T = ids[recorded_T], position_T[recorded_T]
            if not len(ids):
                continue
            self._check_distinct(ids, what)
            phases = [count_choices(ids[position_T < prefill], experts), count_choices(ids[position_T >= prefill], experts)]
            self._counts += np.stack(phases)
            window += phases[0] + phases[1]
            self._tokens += len(ids)
            if self._pairs is not None:
                self._waiting.append(ids)
        self._stretches.add(window)
        if sum(map(len, self._waiting)) >= CHUNK:
            self._count_waiting()

    def recording(self, name: str) -> Recording:
        """What was summed, dense layers left out.

        Args:
            name: of the traffic.

        Raises:
            ProfileError: no token was recorded, or a layer is dense in one request and routed in another.
        """
        rows, _, _ = self._shape
        moe = np.flatnonzero(self._routed_N)
        if not self._tokens or not len(moe):
            raise ProfileError(f"scenario '{name}' is empty: no token's routing was recorded; send traffic and record again.")
        if (self._routed_N & self._silent_N).any():
            row = int(np.flatnonzero(self._routed_N & self._silent_N)[0])
            raise ProfileError(f"scenario '{name}': layer {row} was recorded in some requests only; record again.")
        self._count_waiting()
        adjacent = self._pairs is not None and bool((np.diff(moe) == 1).all())
        return Recording(
            name=name,
            counts=self._counts[:, moe],
            rows=tuple(moe.tolist()),
            windows=self._stretches.array()[:, moe],
            top_k=self._shape[2],
            tokens=self._tokens,
            hidden_layers=rows,
            transitions=self._pairs[0][moe[:-1]] if self._pairs is not None and adjacent else None,
            coactivation=self._pairs[1][moe] if self._pairs is not None else None,
        )

    def _check_distinct(self, ids_TNK: NDArray[Any], what: str) -> None:
        """Refuse choices that no router makes; rows of zeros alone are dense layers."""
        routed_N = ids_TNK.any((0, 2)) if self._shape[2] > 1 else self._may_be_moe_N
        self._routed_N |= routed_N
        self._silent_N |= ~routed_N
        ordered = np.sort(ids_TNK, axis=2)
        twice_TN = (ordered[..., 1:] == ordered[..., :-1]).any(2) & routed_N
        if twice_TN.any():
            token, row = (int(i[0]) for i in np.nonzero(twice_TN))
            raise ProfileError(
                f"{what}: a token was sent to experts {ids_TNK[token, row].tolist()} in layer {row}, twice to the same one; "
                "its routing is not whole, record it again."
            )

    def _count_waiting(self) -> None:
        if self._pairs is not None and self._waiting:
            for total, part in zip(self._pairs, count_pairs(np.concatenate(self._waiting), self._shape[1]), strict=True):
                total += part
            self._waiting = []
