"""Frequency: how often an expert is chosen; the simplest score, and the one that others must beat."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from equipoise.profiling.importance.base import IMPORTANCE, Estimator, Ints, Measured


@IMPORTANCE.register(
    "frequency", summary="share of its layer's selections that an expert serves", source="Equipoise (the load itself)"
)
class Frequency(Estimator):
    """An expert's selections over all selections of its layer; zero in a layer that served nothing."""

    def finish(self, load_LE: Ints, checkpoint: Callable[[], None], advance: Callable[[int, int], None]) -> Measured:
        """[L, E] shares in 0..1."""
        total = load_LE.sum(1, keepdims=True)
        return Measured(importance=np.asarray(load_LE / np.maximum(total, 1), np.float64))
