"""The trigram model against a plain dictionary implementation of the same formula."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.lab.trigram import Trigram


def plain(rows, vocabulary):
    """p(c | a, b) by interpolated Kneser-Ney, written with dictionaries; counts of lower orders are of contexts."""
    three = Counter(gram for row in rows for gram in zip(row, row[1:], row[2:], strict=False))
    two = Counter(gram[1:] for gram in three)
    one = Counter(gram[1:] for gram in two)
    orders = [three, two, one]
    discounts = []
    for counts in orders:
        once, twice = (sum(1 for n in counts.values() if n == k) for k in (1, 2))
        discounts.append(once / (once + 2 * twice) if once else 0.5)
    totals, kinds = [], []
    for counts in orders:
        total, kind = defaultdict(int), defaultdict(int)
        for gram, n in counts.items():
            total[gram[:-1]] += n
            kind[gram[:-1]] += 1
        totals.append(total)
        kinds.append(kind)

    def probability(gram, order):
        if order == 3:
            return 1 / vocabulary
        context, lower = gram[:-1], probability(gram[1:], order + 1)
        total = totals[order][context]
        if not total:
            return lower
        own = max(orders[order][gram] - discounts[order], 0) / total
        return own + discounts[order] * kinds[order][context] / total * lower

    return probability


rows_of_tokens = st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=12), min_size=1, max_size=5)


@settings(deadline=None, max_examples=60)
@given(rows_of_tokens, st.lists(st.integers(0, 4), min_size=3, max_size=10))
def test_equals_a_plain_implementation(rows, asked):
    probability = plain(rows, 5)
    wanted = [probability(tuple(asked[:2]), 1), *(probability(tuple(asked[i - 2 : i + 1]), 0) for i in range(2, len(asked)))]
    got = Trigram([np.array(row) for row in rows], 5).probabilities(np.array(asked))
    assert got == pytest.approx(wanted)


@settings(deadline=None, max_examples=20)
@given(rows_of_tokens, st.integers(0, 4), st.integers(0, 4))
def test_probabilities_of_all_next_tokens_add_up_to_one(rows, first, second):
    model = Trigram([np.array(row) for row in rows], 5)
    assert sum(model.probabilities(np.array([first, second, third]))[-1] for third in range(5)) == pytest.approx(1)
