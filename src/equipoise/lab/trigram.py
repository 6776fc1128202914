"""A trigram model with interpolated Kneser-Ney smoothing: the floor that a trained model has to beat clearly.

It is estimated from the very rows that the model was trained on. Kneser and Ney 1995; the interpolated form with one
discount per order, n1 / (n1 + 2 n2), of Chen and Goodman 1999 (section 3).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class _Order:
    """Discounted counts of one order: n-grams and their contexts as sorted integer keys."""

    grams: Ids
    counts: Ids
    contexts: Ids
    totals: Ids
    kinds: Ids
    discount: float

    @classmethod
    def of(cls, grams: Ids, counts: Ids, vocabulary: int) -> _Order:
        contexts, first, kinds = np.unique(grams // vocabulary, return_index=True, return_counts=True)
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        discount = once / (once + 2 * twice) if once else 0.5
        return cls(grams, counts, contexts, np.add.reduceat(counts, first), kinds, discount)

    def mix(self, grams: Ids, vocabulary: int, lower: NDArray[np.float64]) -> NDArray[np.float64]:
        """Probability of the last token of each n-gram, given that of the next lower order."""
        count = _looked_up(self.grams, self.counts, grams)
        total = _looked_up(self.contexts, self.totals, grams // vocabulary)
        kinds = _looked_up(self.contexts, self.kinds, grams // vocabulary)
        seen = total > 0
        own = np.maximum(count - self.discount, 0) / np.where(seen, total, 1)
        return np.where(seen, own + self.discount * kinds / np.where(seen, total, 1) * lower, lower)


class Trigram:
    """Next-token probabilities from the two tokens before.

    Args:
        rows: rows of token ids; no n-gram crosses a row's end.
        vocabulary: number of token ids V; at most 2**20, so that three fit in an integer.
    """

    def __init__(self, rows: Iterable[Ids], vocabulary: int) -> None:
        self._vocabulary = vocabulary
        parts = [self._keys(np.asarray(row, np.int64), 3) for row in rows]
        grams, counts = np.unique(np.concatenate(parts), return_counts=True)
        self._trigrams = _Order.of(grams, counts, vocabulary)
        # Lower orders count in how many different contexts an n-gram was seen, not how often.
        grams, counts = np.unique(grams % vocabulary**2, return_counts=True)
        self._bigrams = _Order.of(grams, counts, vocabulary)
        grams, counts = np.unique(grams % vocabulary, return_counts=True)
        self._unigrams = _Order.of(grams, counts, vocabulary)

    def probabilities(self, row: Ids) -> NDArray[np.float64]:
        """[S-1] probability of each token of a row [S] but its first; the second has one token before it."""
        row, size = np.asarray(row, np.int64), self._vocabulary
        bigrams, trigrams = self._keys(row, 2), self._keys(row, 3)
        lower = self._unigrams.mix(bigrams % size, size, np.full(bigrams.size, 1 / size))
        lower = self._bigrams.mix(bigrams, size, lower)
        lower[1:] = self._trigrams.mix(trigrams, size, lower[1:])
        return lower

    def _keys(self, row: Ids, order: int) -> Ids:
        keys = np.zeros(max(row.size - order + 1, 0), np.int64)
        for place in range(order):
            keys = keys * self._vocabulary + row[place : row.size - order + 1 + place]
        return keys


def _looked_up(keys: Ids, values: Ids, wanted: Ids) -> Ids:
    """Value of each wanted key; 0 where there is none."""
    place = np.searchsorted(keys, wanted).clip(max=keys.size - 1)
    return np.where(keys[place] == wanted, values[place], 0)
