"""Placements, plans and recorded loads that tests of engines share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from equipoise.artifacts import Plan, Profile
from equipoise.engines.records import Recording, to_profile
from equipoise.planning.ranks import rank_plan


def recorded(
    layers: int = 4, experts: int = 8, dense: Sequence[int] = (0,), seed: int = 0, scenarios: int = 2, top_k: int = 2
) -> Profile:
    """A profile of records of a model whose first layers are dense, as an engine counts them."""
    rng = np.random.default_rng(seed)
    recordings = []
    for scenario in range(scenarios):
        counts = rng.integers(1, 1000, (layers, experts))
        counts[list(dense)] = 0
        recordings.append(Recording(name=f"s{scenario}", counts=counts, rows="hidden", top_k=top_k))
    return to_profile(recordings, engine="test")


def placement(rng: np.random.Generator, experts: int, slots: int, ranks: int) -> np.ndarray:
    """A random placement with every expert, no expert twice on a rank, rank-major."""
    copies = np.ones(experts, int)
    for _ in range(slots - experts):
        copies[rng.choice(np.flatnonzero(copies < ranks))] += 1
    held: list[list[int]] = [[] for _ in range(ranks)]
    for expert in sorted(range(experts), key=lambda e: -copies[e]):
        # The ranks with most room never run out before the experts with most copies are placed.
        for rank in sorted(range(ranks), key=lambda r: (len(held[r]), rng.random()))[: copies[expert]]:
            held[rank].append(expert)
    return np.concatenate([rng.permutation(part) for part in held])


def placed(profile: Profile, ranks: int, slots: int | Sequence[int], seed: int = 0) -> Plan:
    """A plan of random placements; `slots` for all layers, or one number per layer."""
    rng = np.random.default_rng(seed)
    layers, experts = len(profile.model.layers), profile.model.max_experts
    each = [slots] * layers if isinstance(slots, int) else list(slots)
    physical = [placement(rng, experts, n, ranks) for n in each]
    return rank_plan(profile, physical, ranks=ranks, method="by hand", options={})
