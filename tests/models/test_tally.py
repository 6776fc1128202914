from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.models import tally
from equipoise.models.tally import MASS_UNIT, PairCounts, Windows, histogram

EXPERTS = 5


def selections(seed: int, layers: int, tokens: int, k: int) -> torch.Tensor:
    """[L, T, K] distinct experts of each token; E stands for none."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(layers, tokens, EXPERTS + 1, generator=generator)
    return scores.topk(k, dim=-1).indices


@given(seed=st.integers(0, 99), layers=st.integers(1, 3), tokens=st.integers(0, 9), k=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_histogram_counts_and_weighs(seed, layers, tokens, k):
    ids = selections(seed, layers, tokens, k)
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed + 1))
    counted = histogram(ids, EXPERTS + 1)
    weighed = histogram(ids, EXPERTS + 1, weights)
    for layer in range(layers):
        numbers = Counter(ids[layer].flatten().tolist())
        assert counted[layer].tolist() == [numbers[e] for e in range(EXPERTS + 1)]
        for expert in range(EXPERTS + 1):
            whole = (weights[layer][ids[layer] == expert].double() / MASS_UNIT).round().sum()
            assert weighed[layer, expert] == whole


@given(seed=st.integers(0, 99), tokens=st.lists(st.integers(0, 60), min_size=1, max_size=3), k=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_pairs_equal_plain_loops_whatever_the_chunk(seed, tokens, k):
    chunk, tally.CHUNK = tally.CHUNK, 64  # so that long calls are counted in several steps
    pairs = PairCounts(3, EXPERTS)
    expected = np.zeros((3, EXPERTS, EXPERTS), np.int64)
    try:
        for call, n in enumerate(tokens):
            ids = selections(seed + call, 3, n, k)
            pairs.add(ids[:2], ids[1:], first_layer=1)
            for layer, token in product(range(2), range(n)):
                for a, b in product(ids[layer, token].tolist(), ids[layer + 1, token].tolist()):
                    if a < EXPERTS and b < EXPERTS:
                        expected[layer + 1, a, b] += 1
    finally:
        tally.CHUNK = chunk
    assert (pairs.numpy() == expected).all()
    again = PairCounts(3, EXPERTS)
    again.load(pairs.numpy())
    assert (again.numpy() == expected).all()


def test_pairs_may_be_added_inside_and_outside_inference_mode():
    pairs, ids = PairCounts(1, EXPERTS), selections(0, 1, 9, 2)
    with torch.inference_mode():
        pairs.add(ids, ids, 0)
    pairs.add(ids, ids, 0)
    assert pairs.numpy().sum() == 2 * int(((ids < EXPERTS).sum(-1) ** 2).sum())


calls = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 12)), max_size=60)


@given(calls=calls, size=st.integers(1, 20), limit=st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_windows_lose_nothing_keep_order_and_stay_few(calls, size, limit):
    windows = Windows(size, limit, size_S=3, shape_LE=(1, 1))
    order: dict[int, list[int]] = {0: [], 1: [], 2: []}
    resumed = Windows(size, limit, size_S=3, shape_LE=(1, 1))
    for scenario, tokens in calls:
        windows.add(scenario, 0, np.array([[tokens]]))
        windows.advance(scenario, tokens)
        order[scenario].append(tokens)
        state = resumed.state()
        resumed = Windows(size, limit, size_S=3, shape_LE=(1, 1))
        resumed.load(state)
        resumed.add(scenario, 0, np.array([[tokens]]))
        resumed.advance(scenario, tokens)
    counts, of = windows.arrays()
    assert len(counts) <= max(limit, 3) + 3  # those kept, and one open for each scenario
    for scenario, tokens in order.items():
        mine = counts[of == scenario, 0, 0]
        assert mine.sum() == sum(tokens)
        edges = set(np.cumsum(tokens).tolist())
        assert set(np.cumsum(mine).tolist()) <= edges, "a forward call lies in one window, in order of time"
        assert (mine[:-1] >= windows.tokens).all()
    for mine, other in zip(windows.arrays(), resumed.arrays(), strict=True):
        assert (mine == other).all()


def test_a_short_rest_joins_its_predecessor():
    windows = Windows(10, 8, size_S=1, shape_LE=(1, 1))
    for tokens in (10, 10, 4):
        windows.add(0, 0, np.array([[tokens]]))
        windows.advance(0, tokens)
    assert windows.arrays()[0].ravel().tolist() == [10, 14]
    windows.add(0, 0, np.array([[1]]))
    windows.advance(0, 1)
    assert windows.arrays()[0].ravel().tolist() == [10, 10, 5]
