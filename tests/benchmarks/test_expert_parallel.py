"""The traffic and the trade-off of the benchmark of expert parallelism."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest


@pytest.fixture(scope="module")
def bench(script) -> ModuleType:
    return script("expert_parallel")


def test_injected_skew_is_what_its_name_says(bench: ModuleType):
    rng = np.random.default_rng(0)
    for case, share in (("0.5:4", 0.5), ("0.8:4", 0.8), ("0:0", 0.0)):
        ids = bench.injected(case, 20_000, rng)
        assert (np.diff(np.sort(ids, 1), axis=1) > 0).all()  # distinct within a token
        hot = int(case.partition(":")[2])
        assert (ids < hot).mean() == pytest.approx(share, abs=0.01)
        parts = np.bincount(ids.ravel(), minlength=bench.EXPERTS)
        assert not hot or parts[:hot].std() < 0.05 * parts[:hot].mean()
        assert parts[hot:].std() < 0.05 * parts[hot:].mean()


def test_memory_and_traffic_are_told_apart(bench: ModuleType):
    facts = bench.model_facts(bench.tiny_model(), "one layer")
    ids = bench.injected("0.8:4", 2048, np.random.default_rng(1))
    counts = np.bincount(ids.ravel(), minlength=bench.EXPERTS)[None]
    points = bench.curves(bench.profile_of(facts, ids), counts, 4, 64)
    by = {name: [p for p in points if p["method"] == name] for name in ("contiguous", "LLEP", "R&Q", "EPLB")}
    assert by["contiguous"][0]["imbalance"] > 2.5
    assert all(p["held_bytes"] == 0 and p["moved_bytes"] > 0 for p in by["LLEP"])
    assert all(p["moved_bytes"] == 0 for p in by["R&Q"] + by["EPLB"])
    assert by["R&Q"][0]["held_bytes"] <= 0
    imbalance = [p["imbalance"] for p in by["LLEP"]]
    assert imbalance == sorted(imbalance, reverse=True)
    assert imbalance[-1] < 1.05
