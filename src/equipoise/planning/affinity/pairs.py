"""Which experts serve the same tokens, and what a placement makes of it: pair counts, crossings, splits, traffic.

A token that has its next expert on another rank must travel there. Of all selections only pairs matter, so the counts of
pairs stand for the tokens and the size of the problem does not grow with the trace.
Shapes: L MoE layers, E logical experts, P physical slots, R ranks (or nodes), T tokens, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from equipoise.errors import PlanError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Physical = Sequence[Ints]

_CHUNK = 1 << 15


@dataclass(frozen=True, eq=False)
class Affinity:
    """Shares of pairs and of load, layer by layer; layers may have different numbers of experts.

    Attributes:
        across: per boundary [E_l, E_l+1] share of its pairs (expert in one layer, expert in the next); sums to 1, or is zero
            where nothing was served.
        together: per layer [E_l, E_l] share of its ordered pairs of different experts that one token chose; symmetric, zero
            diagonal, sums to 1; zero when top-k is 1 or nothing was recorded.
        load: per layer [E_l] share of its selections; sums to 1, or is zero.
    """

    across: tuple[Floats, ...]
    together: tuple[Floats, ...]
    load: tuple[Floats, ...]

    @property
    def widths(self) -> list[int]:
        """Experts of each layer."""
        return [len(row) for row in self.load]


def affinity(
    transitions: ArrayLike,
    coactivation: ArrayLike | None = None,
    load_LE: ArrayLike | None = None,
    widths: Sequence[int] | None = None,
) -> Affinity:
    """Pair counts as shares.

    Args:
        transitions: [L-1, E, E] pairs (expert in layer l, expert in layer l+1) of the same token.
        coactivation: [L, E, E] tokens that chose both experts; its diagonal is not used. None when not recorded.
        load_LE: [L, E] selections; by default read off the transitions, whose rows and columns add up to it.
        widths: [L] experts of each layer; all E when omitted.

    Raises:
        PlanError: shapes that do not fit together, or negative or non-finite counts.
    """
    pairs = np.asarray(transitions, np.float64)
    if pairs.ndim != 3 or pairs.shape[1] != pairs.shape[2] or pairs.shape[1] == 0:
        raise PlanError(f"transitions: shape {pairs.shape} given; allowed is [L-1, E, E], pairs of consecutive layers.")
    layers, experts = pairs.shape[0] + 1, pairs.shape[1]
    both = np.zeros((layers, experts, experts)) if coactivation is None else np.array(coactivation, np.float64)
    load = _marginals(pairs) if load_LE is None else np.asarray(load_LE, np.float64)
    for name, array, shape in (("coactivation", both, (layers, experts, experts)), ("load", load, (layers, experts))):
        if array.shape != shape:
            raise PlanError(f"{name}: shape {array.shape} given; with these transitions it must be {shape}.")
    for name, array in (("transitions", pairs), ("coactivation", both), ("load", load)):
        if not np.isfinite(array).all() or (array < 0).any():
            raise PlanError(f"{name}: negative or non-finite counts; record it again.")
    both = (both + both.transpose(0, 2, 1)) * (1.0 - np.eye(experts))
    n = [experts] * layers if widths is None else [int(width) for width in widths]
    return Affinity(
        across=tuple(_share(pairs[i, : n[i], : n[i + 1]]) for i in range(layers - 1)),
        together=tuple(_share(both[i, : n[i], : n[i]]) for i in range(layers)),
        load=tuple(_share(load[i, : n[i]]) for i in range(layers)),
    )


def _marginals(pairs: Floats) -> Floats:
    """[L, E] selections, each counted once per selection of the neighbouring layer."""
    if len(pairs) == 0:
        return np.zeros((1, pairs.shape[1]))
    return np.concatenate([pairs.sum(2), pairs[-1:].sum(1)])


def _share(counts: Floats) -> Floats:
    total = counts.sum()
    return np.ascontiguousarray(counts / total) if total > 0 else np.zeros_like(counts)


def count_pairs(ids_LTK: ArrayLike, experts: int) -> tuple[Ints, Ints]:
    """Pair counts of a trace.

    Args:
        ids_LTK: [L, T, K] logical experts of each token; -1 where a token chose fewer than K.
        experts: E.

    Returns:
        [L-1, E, E] transitions and [L, E, E] co-activation (its diagonal is the load), as a Profile holds them.

    Raises:
        PlanError: not [L, T, K], or ids that are no expert.
    """
    ids = np.asarray(ids_LTK)
    if ids.ndim != 3 or ids.dtype.kind not in "iu":
        raise PlanError(f"ids: {ids.dtype} of shape {ids.shape} given; allowed are whole numbers [L, T, K].")
    if ids.size and (int(ids.min()) < -1 or int(ids.max()) >= experts):
        raise PlanError(f"ids: from {ids.min()} to {ids.max()} given; allowed are 0..{experts - 1}, and -1 for no expert.")
    layers, tokens, _ = ids.shape
    transitions = np.zeros((max(layers - 1, 0), experts, experts), np.int64)
    coactivation = np.zeros((layers, experts, experts), np.int64)
    for start in range(0, tokens, _CHUNK):  # float32 sums of at most K^2 * _CHUNK ones are exact
        before = None
        for layer in range(layers):
            chosen_TE = _one_hot(ids[layer, start : start + _CHUNK], experts)
            coactivation[layer] += (chosen_TE.T @ chosen_TE).astype(np.int64)
            if before is not None:
                transitions[layer - 1] += (before.T @ chosen_TE).astype(np.int64)
            before = chosen_TE
    return transitions, coactivation


def _one_hot(ids_TK: NDArray[np.integer], experts: int) -> NDArray[np.float32]:
    tokens = len(ids_TK)
    flat = np.arange(tokens)[:, None] * (experts + 1) + np.where(ids_TK < 0, experts, ids_TK)
    counts = np.bincount(flat.reshape(-1), minlength=tokens * (experts + 1)).astype(np.float32)
    return np.ascontiguousarray(counts.reshape(tokens, experts + 1)[:, :experts])


def shares(physical_P: Ints, experts: int, ranks: int) -> Floats:
    """[E, R] share of each expert's tokens that each rank serves when they are split evenly over its copies.

    Args:
        physical_P: [P] expert of each slot, rank-major.
        experts: E.
        ranks: R; with the number of nodes instead, the shares of nodes.
    """
    slot = np.asarray(physical_P)
    rank = np.arange(len(slot)) // (len(slot) // ranks)
    copies = np.bincount(slot * ranks + rank, minlength=experts * ranks).reshape(experts, ranks)
    return np.asarray(copies / np.maximum(copies.sum(1, keepdims=True), 1))


def crossings(pairs: Affinity, physical: Physical, ranks: int) -> Floats:
    """[L-1] share of a boundary's pairs whose experts are on different ranks: crossings per token, with top-k 1.

    With top-k above 1 it is the chance that one of a token's experts in a layer and one in the next, both drawn
    evenly, are apart. Even split over copies. Zero at a boundary that nothing passed.

    Source: ExFlow (arXiv:2401.08383) objective, its sum over tokens replaced by the equal sum over pairs.
    """
    return _apart(pairs.across, physical, pairs.widths, ranks, 1)


def splits(pairs: Affinity, physical: Physical, ranks: int) -> Floats:
    """[L] share of pairs of experts chosen together that are on different ranks; zero when top-k is 1."""
    return _apart(pairs.together, physical, pairs.widths, ranks, 0)


def _apart(counts: Sequence[Floats], physical: Physical, widths: list[int], ranks: int, step: int) -> Floats:
    share = [shares(row, width, ranks) for row, width in zip(physical, widths, strict=True)]
    return np.array(
        [p.sum() - np.einsum("ij,ir,jr->", p, share[i], share[i + step], optimize=True) for i, p in enumerate(counts)]
    )


def load_ratio(pairs: Affinity, physical: Physical, ranks: int) -> Floats:
    """[L] largest rank load over the mean, with even split over copies; 1 for a layer that served nothing."""
    ratio = [ranks * (load @ shares(row, len(load), ranks)).max() for load, row in zip(pairs.load, physical, strict=True)]
    return np.array([r if load.any() else 1.0 for r, load in zip(ratio, pairs.load, strict=True)])


def chance_crossings(pairs: Affinity, physical: Physical, ranks: int) -> Floats:
    """[L-1] the crossings of this placement if each layer were routed independently of the last, at the same loads.

    What a placement gains against it is affinity; what independent routing itself gains against 1 - 1/R is load that
    the placement heaps onto few ranks.
    """
    load = [q @ shares(row, len(q), ranks) for q, row in zip(pairs.load, physical, strict=True)]
    return np.array([float(p.any()) - a @ b for p, a, b in zip(pairs.across, load[:-1], load[1:], strict=True)])


@dataclass(frozen=True)
class Traffic:
    """What tokens of a trace meet under a placement; means over tokens and layers (or boundaries between layers).

    Attributes:
        crossings: share of a token's (expert, next expert) pairs on different ranks.
        node_crossings: the same for nodes.
        fan_out: different ranks that a token's experts of one layer are on.
        node_fan_out: the same for nodes.
        load_ratio: largest rank load over the mean, mean over layers.
    """

    crossings: float
    node_crossings: float
    fan_out: float
    node_fan_out: float
    load_ratio: float


def traffic(ids_LTK: ArrayLike, physical: Physical, ranks: int, nodes: int = 1) -> Traffic:
    """Replay a trace on a placement, token by token.

    A token takes copy (its index modulo the number of copies), which splits evenly and is the same in every layer.

    Args:
        ids_LTK: [L, T, K] logical experts; -1 where a token chose fewer than K.
        physical: [P_l] experts of each layer's slots, rank-major.
        ranks: R.
        nodes: N, of R / N consecutive ranks each.

    Raises:
        PlanError: the trace and the placement have different numbers of layers, or the trace has no token.
    """
    ids = np.asarray(ids_LTK)
    if ids.ndim != 3 or len(ids) != len(physical) or ids.shape[1] == 0:
        raise PlanError(f"ids: shape {ids.shape} given; allowed is [{len(physical)}, T, K] with at least one token.")
    sums, load = np.zeros(4), np.zeros((len(ids), ranks))
    for start in range(0, ids.shape[1], _CHUNK):
        before: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
        for layer, slots in enumerate(physical):
            on_rank = _ranks_met(ids[layer, start : start + _CHUNK], np.asarray(slots), ranks, start)
            on_node = on_rank.reshape(len(on_rank), nodes, -1).sum(2)
            load[layer] += on_rank.sum(0)
            sums[2:] += (on_rank > 0).sum(), (on_node > 0).sum()
            if before is not None:
                for i, (a, b) in enumerate(zip(before, (on_rank, on_node), strict=True)):
                    pairs = a.sum(1) * b.sum(1)  # none where a token skipped a layer: it crosses nothing
                    sums[i] += ((pairs - (a * b).sum(1)) / np.maximum(pairs, 1)).sum()
            before = on_rank, on_node
    layers, tokens, _ = ids.shape
    ratio = ranks * load.max(1) / np.maximum(load.sum(1), 1)
    pair = sums[:2] / max(tokens * (layers - 1), 1)
    wide = sums[2:] / (tokens * layers)
    return Traffic(float(pair[0]), float(pair[1]), float(wide[0]), float(wide[1]), float(ratio.mean()))


def _ranks_met(ids_TK: NDArray[np.integer], slots_P: Ints, ranks: int, start: int) -> NDArray[np.float32]:
    """[T, R] how many of each token's selections each rank serves."""
    order = np.argsort(slots_P, kind="stable")
    copies = np.bincount(slots_P)
    first = np.cumsum(copies) - copies
    rank = order // (len(slots_P) // ranks)
    if ids_TK.size and int(ids_TK.max()) >= len(copies):
        raise PlanError(f"ids: expert {ids_TK.max()} has no slot in a placement of {len(copies)} experts.")
    expert = np.maximum(ids_TK, 0)
    turn = (start + np.arange(len(ids_TK)))[:, None] % copies[expert]
    met = np.where(ids_TK < 0, ranks, rank[first[expert] + turn])
    return _one_hot(met, ranks + 1)[:, :ranks]
