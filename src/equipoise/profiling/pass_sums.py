"""Sums over forward passes that come out equal, bit for bit, however the passes were divided among processes.

Floating-point addition depends on its order, so the order is fixed: pass 0 with pass 1, 2 with 3, the first pair with the
second, and so on, a binary tree over the numbers of the passes. What is complete is folded up at once, so a process that runs
a stretch of N consecutive passes holds about 2 log2 N partial sums, and partial sums of several processes fold into the
same total that one process reaches.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class PassSums:
    """Named sums of one array for each forward pass; of a name, all arrays have one shape."""

    def __init__(self) -> None:
        self._parts: dict[str, dict[tuple[int, int], Floats]] = {}
        self._open: dict[str, tuple[int, Floats]] = {}

    def add(self, name: str, step: int, value: NDArray[Any]) -> None:
        """Add what a pass contributes, at once or in several calls that follow each other.

        Args:
            name: which sum.
            step: number of the pass in the whole run, or among those that contribute.
            value: the contribution, which is not changed later on.
        """
        of, so_far = self._open.pop(name, (step, None))
        if so_far is not None and of != step:
            self._fold(name, 0, of, so_far)
            so_far = None
        added = np.asarray(value, np.float64)
        self._open[name] = step, added if so_far is None else so_far + added

    def total(self, name: str) -> Floats | None:
        """The sum of a name; None when nothing was added."""
        self._close()
        parts = self._parts.get(name)
        if not parts:
            return None
        in_order = [parts[at] for at in sorted(parts, key=lambda at: at[1] << at[0])]
        return reduce(np.add, in_order)

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """The partial sums, by names that `absorb` reads."""
        self._close()
        return {
            f"{name}@{level}.{index}": part for name, parts in self._parts.items() for (level, index), part in parts.items()
        }

    def absorb(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Add the partial sums of an earlier run of this process, or of another process that ran other passes."""
        for key, part in state.items():
            name, _, place = key.rpartition("@")
            level, _, index = place.partition(".")
            self._fold(name, int(level), int(index), np.array(part))

    def _close(self) -> None:
        """Nothing more comes of the passes that were added last."""
        for name, (step, value) in self._open.items():
            self._fold(name, 0, step, value)
        self._open.clear()

    def _fold(self, name: str, level: int, index: int, value: Floats) -> None:
        parts = self._parts.setdefault(name, {})
        while (sibling := parts.pop((level, index ^ 1), None)) is not None:
            value, level, index = sibling + value, level + 1, index // 2
        assert (level, index) not in parts, f"'{name}': pass {index << level} was counted twice"
        parts[level, index] = value
