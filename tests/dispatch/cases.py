"""Placements and batches for tests; E experts, P slots, R ranks, L layers, B batches, T tokens, K top-k."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from equipoise.artifacts import LayerFacts, LayerPlan, ModelFacts, Plan
from equipoise.dispatch.placement import LayerMap, layer_maps

WIDTH, INNER = 32, 16
EXPERT_BYTES = 3 * WIDTH * INNER * 2


def make_model(layers: int, experts: int, top_k: int, *, sized: bool = True) -> ModelFacts:
    matrices = ((2 * INNER, WIDTH), (WIDTH, INNER)) if sized else ()
    facts = tuple(
        LayerFacts(path=f"layers.{i}", model_layer=i, num_experts=experts, top_k=top_k, matrices=matrices)
        for i in range(layers)
    )
    return ModelFacts(name="toy", model_type="toy", dtype="bf16", fingerprint="f" * 64, layers=facts)


def make_plan(
    model: ModelFacts, slots_L: Sequence[Sequence[int]], ranks: int, *, nodes: int = 1, method: str = "hand", sha: str = ""
) -> Plan:
    """A plan of these slots, rank-major and equally many on each rank, with even shares."""
    layers = []
    for slots in slots_L:
        copies = np.bincount(slots)
        layers.append(
            LayerPlan(
                experts=tuple(int(e) for e in slots),
                precisions=(model.dtype,) * len(slots),
                units=tuple(j * ranks // len(slots) for j in range(len(slots))),
                shares=tuple(1 / copies[e] for e in slots),
            )
        )
    return Plan(
        method=method, model=model, units=ranks, nodes=nodes, unit_bytes=1, exactness="exact", layers=tuple(layers),
        allows_duplicates=any(layer.duplicates for layer in layers), profile_sha256=sha,
    )  # fmt: skip


def make_map(slots: Sequence[int], ranks: int, *, nodes: int = 1) -> LayerMap:
    plan = make_plan(make_model(1, max(slots) + 1, 1), [slots], ranks, nodes=nodes)
    return layer_maps(plan)[0]


@st.composite
def placements(draw: st.DrawFn, most_experts: int = 12, most_ranks: int = 6, *, duplicates: bool = False) -> LayerMap:
    """A layer of random slots, equally many on each rank; without `duplicates` no rank has two copies of one expert."""
    ranks = draw(st.integers(1, most_ranks))
    experts = draw(st.integers(1, most_experts))
    per_rank = draw(st.integers(-(-experts // ranks), max(-(-experts // ranks), experts)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # Every expert has a slot; what is left is filled at random.
    table: list[list[int]] = [[] for _ in range(ranks)]
    for i, expert in enumerate(rng.permutation(experts).tolist()):
        table[i % ranks].append(expert)
    for row in table:
        while len(row) < per_rank:
            free = range(experts) if duplicates else [e for e in range(experts) if e not in row]
            row.append(int(rng.choice(list(free))))
    return make_map([e for row in table for e in row], ranks)


def random_ids(
    rng: np.random.Generator, batches: int, tokens: int, top_k: int, experts: int, skew: float = 1.0
) -> NDArray[np.int64]:
    """[B, T, K] distinct experts of each token, some experts hotter than others."""
    weight = rng.lognormal(0.0, skew, experts)
    noise = rng.gumbel(size=(batches, tokens, experts)) + np.log(weight)
    return np.argsort(-noise, axis=2)[:, :, :top_k]


def expert_of(layer: LayerMap, instance: NDArray[np.int64]) -> NDArray[np.int64]:
    """The expert whose weights each instance holds."""
    slots = len(layer.expert_P)
    return np.where(instance < slots, layer.expert_P[np.minimum(instance, slots - 1)], (instance - slots) // layer.ranks)
