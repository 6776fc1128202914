"""The least-loaded assignment: covers every token once, keeps its bound, moves nothing when balanced."""

from __future__ import annotations

import math

import numpy as np
import pytest

from equipoise.dispatch.llep import Assignment, least_loaded


def check_coverage(found: Assignment, load: list[int]) -> None:
    chunks = sorted(found.chunks, key=lambda c: (c.expert, c.start))
    reached = [0] * len(load)
    for chunk in chunks:
        assert chunk.start == reached[chunk.expert]
        assert chunk.stop > chunk.start
        reached[chunk.expert] = chunk.stop
    assert reached == load


def random_case(rng: np.random.Generator) -> tuple[list[int], list[list[int]], int, float, int]:
    ranks = int(rng.integers(1, 11))
    experts = int(rng.integers(1, 21))
    load = np.floor(rng.pareto(rng.uniform(0.3, 3.0), experts) * rng.uniform(0, 400)).clip(0, 10**6).astype(int)
    load[rng.random(experts) < rng.uniform(0, 0.7)] = 0
    most = int(rng.integers(1, min(ranks, 4) + 1))
    hosts = [rng.choice(ranks, int(rng.integers(1, most + 1)), replace=False).tolist() for _ in range(experts)]
    return load.tolist(), hosts, ranks, float(rng.uniform(1.0, 2.0)), int(rng.choice([1, 2, 7, 64, 256, 1024]))


def test_bound_and_coverage_in_10000_random_cases():
    rng = np.random.default_rng(0)
    above = spilled = single = 0
    for _ in range(10_000):
        load, hosts, ranks, alpha, least = random_case(rng)
        found = least_loaded(load, hosts, ranks, alpha=alpha, least=least, gate=0.0)
        check_coverage(found, load)
        held = found.load(ranks)
        assert held.sum() == sum(load)
        assert found.capacity == math.ceil(alpha * sum(load) / ranks - 1e-9)
        # The paper's algorithm has the bound m_a + (P - 1) m; whole tokens make it (P - 1)(m - 1).
        assert held.max(initial=0) <= found.capacity + (ranks - 1) * (least - 1)
        for expert, source, target in found.transfers:
            assert source in hosts[expert]
            assert target not in hosts[expert]
        assert len(set(found.transfers)) == len(found.transfers)
        above += held.max(initial=0) > found.capacity
        spilled += bool(found.transfers)
        single += all(len(h) == 1 for h in hosts)
    assert above > 100  # the bound is put to the test, not just the capacity
    assert spilled > 5_000
    assert single > 1_000


def test_every_foreign_chunk_has_its_transfer():
    rng = np.random.default_rng(1)
    for _ in range(300):
        load, hosts, ranks, alpha, least = random_case(rng)
        found = least_loaded(load, hosts, ranks, alpha=alpha, least=least, gate=0.0)
        foreign = {(c.expert, c.rank) for c in found.chunks if c.rank not in hosts[c.expert]}
        assert foreign == {(e, target) for e, _, target in found.transfers}


def test_a_closed_gate_moves_nothing():
    load, hosts = [10, 11, 9, 10], [[0], [1], [2], [3]]
    found = least_loaded(load, hosts, 4, least=1, gate=1.3)
    assert found.transfers == ()
    assert found.load(4).tolist() == load
    assert least_loaded(load, hosts, 4, least=1, gate=1.0).transfers  # without the gate it moves weights for one token


@pytest.mark.parametrize(("share", "hot"), [(0.3, 4), (0.5, 4), (0.8, 4), (0.95, 4), (0.95, 1)])
def test_levels_the_skews_of_the_paper(share: float, hot: int):
    """8 ranks, 128 experts, top-4, 32K tokens a rank, so many per cent of the tokens into a few experts of one rank."""
    total = 8 * 32_768 * 4
    load = np.full(128, (1 - share) * total / (128 - hot))
    load[:hot] = share * total / hot
    counts = load.astype(int).tolist()
    hosts = [[e // 16] for e in range(128)]
    before = np.bincount([h[0] for h in hosts], counts, 8)
    found = least_loaded(counts, hosts, 8)
    assert before.max() / before.mean() > 2.5
    assert found.load(8).max() / before.mean() < 1.001


def test_copies_are_filled_before_weights_are_sent():
    found = least_loaded([90, 10, 10, 10], [[0, 1], [1], [2], [3]], 4, least=1, gate=0.0)
    held = found.load(4)
    assert held.max() <= found.capacity
    assert {c.rank for c in found.chunks if c.expert == 0} >= {0, 1}
    alone = least_loaded([90, 10, 10, 10], [[0], [1], [2], [3]], 4, least=1, gate=0.0)
    assert len(found.transfers) < len(alone.transfers)


def test_nothing_to_do():
    assert least_loaded([0, 0], [[0], [1]], 2).chunks == ()
    assert least_loaded([5], [[0]], 1, gate=0.0).load(1).tolist() == [5]


def test_what_nobody_has_room_for_goes_to_the_least_loaded():
    # Capacity 10, no room worth a transfer anywhere. The rest of 4 goes to rank 2, which has 8; when that rank's own expert
    # comes, 6 of its tokens fit beside them, and the rest of 2 goes to rank 1, which has 9.
    found = least_loaded([14, 9, 8, 9], [[0], [1], [2], [3]], 4, least=100, gate=0.0)
    assert found.load(4).tolist() == [10, 11, 10, 9]
    assert found.transfers == ((0, 0, 2), (2, 2, 1))
