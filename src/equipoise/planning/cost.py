"""What a rank's load costs in time: by tokens, by activated experts, or by measured kernel latencies.

A model is called with two arrays of one shape whose last axis holds all ranks: `pairs`, the token-expert pairs that each
computes, and `activated`, the replicas among its slots that at least one token was sent to. Balancing the first is right
when the experts' matrix products are bound by arithmetic (prefill, large batches). In small decode batches they are bound
by reading weights, and time follows the second: there, spreading one expert's few tokens over copies makes a step slower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@runtime_checkable
class CostModel(Protocol):
    """Time of one MoE layer on one rank."""

    @property
    def name(self) -> str:
        """What tables call it."""

    @property
    def unit(self) -> str:
        """Unit of the times: `pairs`, `experts` or `ms`; only the last is a time that a clock would show."""

    def __call__(self, pairs: ArrayLike, activated: ArrayLike) -> Floats:
        """[..., R] time of each rank.

        Args:
            pairs: [..., R] token-expert pairs on each rank.
            activated: [..., R] replicas with at least one token on each rank.
        """

    def covers(self, pairs: ArrayLike, activated: ArrayLike) -> Bools:
        """[..., R] whether the model holds there, or had to be continued beyond what was measured."""


@dataclass(frozen=True, slots=True)
class PairCost:
    """Time in proportion to token-expert pairs: arithmetic bound, as in prefill."""

    name: str = "tokens"
    unit: str = "pairs"

    def __call__(self, pairs: ArrayLike, activated: ArrayLike) -> Floats:
        """[...] the pairs themselves."""
        return np.asarray(pairs, np.float64)

    def covers(self, pairs: ArrayLike, activated: ArrayLike) -> Bools:
        """[...] everywhere."""
        return np.ones(np.shape(pairs), bool)


@dataclass(frozen=True, slots=True)
class ActivatedCost:
    """Time in proportion to activated replicas, whose weights must be read: memory bound, as in small decode batches.

    Source: METRO (arXiv:2512.09277) section 3.
    """

    name: str = "activated"
    unit: str = "experts"

    def __call__(self, pairs: ArrayLike, activated: ArrayLike) -> Floats:
        """[...] the activated replicas themselves."""
        return np.asarray(activated, np.float64)

    def covers(self, pairs: ArrayLike, activated: ArrayLike) -> Bools:
        """[...] everywhere."""
        return np.ones(np.shape(pairs), bool)


def expected_activated(rate: ArrayLike, tokens: int) -> Floats:
    """[...] probability that a batch sends at least one token to a slot, for tokens that choose independently.

    Summed over the slots of a rank, its expected activated replicas: what `ActivatedCost` needs when only counts are known.

    Args:
        rate: [...] probability that one token chooses the slot (its expert's selections per token, divided by copies).
        tokens: of the batch.
    """
    return np.asarray(-np.expm1(tokens * np.log1p(-np.clip(np.asarray(rate, np.float64), 0.0, 1.0 - 1e-12))))
