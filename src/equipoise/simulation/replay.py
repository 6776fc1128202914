"""Batches through a plan: what every rank computes, reads and sends.

Shapes: L MoE layers, B batches, T tokens of a batch, K top-k, R ranks, N nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.artifacts import Plan
from equipoise.dispatch.choice import choose
from equipoise.dispatch.placement import Floats, Ints, LayerMap, layer_maps
from equipoise.planning.cost import CostModel
from equipoise.precisions import precision
from equipoise.simulation.report import PlanResult, RankFigures, Sample, Spread

CELLS = 4_000_000
"""Entries of the largest work array; more batches are replayed in several goes."""


@dataclass(frozen=True, eq=False)
class Replay:
    """What happened, for every layer and batch.

    Attributes:
        tokens_LBR: [L, B, R] token-expert pairs of each rank.
        activated_LBR: [L, B, R] replicas with at least one of them.
        bytes_LBR: [L, B, R] bytes of their weights; zeros when sizes are unknown.
        received_LBR: [L, B, R] experts whose weights were sent to each rank for the batch.
        rank_sends_LB: [L, B] sum over tokens of the other ranks that each is sent to.
        node_sends_LB: [L, B] the same for nodes.
        rank_hops: share of a token's pairs (expert, expert of the next layer) on different ranks; nan with one layer.
        node_hops: the same for nodes.
    """

    tokens_LBR: Ints
    activated_LBR: Ints
    bytes_LBR: Ints
    received_LBR: Ints
    rank_sends_LB: Ints
    node_sends_LB: Ints
    rank_hops: float
    node_hops: float


def replay(
    plan: Plan, ids_LBTK: Sequence[NDArray[np.integer[Any]]], rule: str, options: Mapping[str, Any], seed: int
) -> Replay:
    """Send batches through a plan by a dispatch rule.

    Args:
        plan: where the slots are.
        ids_LBTK: L arrays [B, T, K] of logical experts.
        rule: a name in `choice.RULES`.
        options: of the rule.
        seed: of what the rule leaves to chance.
    """
    layers = layer_maps(plan)
    batches, tokens, _ = ids_LBTK[0].shape
    ranks, nodes = plan.units, plan.nodes
    shape = (len(layers), batches, ranks)
    pairs, activated, held, received = (np.zeros(shape, np.int64) for _ in range(4))
    sends, node_sends = np.zeros(shape[:2], np.int64), np.zeros(shape[:2], np.int64)
    same = np.zeros(2)  # pairs of consecutive layers on one rank, on one node
    all_pairs = 0
    step = max(1, CELLS // (tokens * max(ranks, ids_LBTK[0].shape[2])))
    home_T = layers[0].home_of(tokens)
    for first in range(0, batches, step):
        some = slice(first, first + step)
        before: NDArray[np.float32] | None = None
        rng = np.random.default_rng([seed, first])
        for layer, ids_BTK in zip(layers, ids_LBTK, strict=True):
            ids = ids_BTK[some].astype(np.int64)
            choice = choose(rule, layer, ids, rng, options)
            index = layer.index
            pairs[index, some], activated[index, some], held[index, some] = _by_rank(layer, choice.instance_BTK)
            received[index, some] = choice.received_BR
            on_rank = _visits(layer.instance_rank[choice.instance_BTK], ranks)
            sends[index, some] = _others(on_rank > 0, home_T)
            on_node = on_rank.reshape(*on_rank.shape[:2], nodes, -1).sum(3)
            node_sends[index, some] = _others(on_node > 0, home_T * nodes // ranks)
            if before is not None:
                earlier_node = before.reshape(*before.shape[:2], nodes, -1).sum(3)
                same += [float((before * on_rank).sum(dtype=np.float64)), float((earlier_node * on_node).sum(dtype=np.float64))]
                all_pairs += ids.size * ids_LBTK[index - 1].shape[2]
            before = on_rank
    hops = 1 - same / all_pairs if all_pairs else np.full(2, np.nan)
    return Replay(pairs, activated, held, received, sends, node_sends, float(hops[0]), float(hops[1]))


def _by_rank(layer: LayerMap, instance_BTK: Ints) -> tuple[Ints, Ints, Ints]:
    """[B, R] pairs, activated replicas and their bytes."""
    batches, size = len(instance_BTK), len(layer.instance_rank)
    key = instance_BTK.reshape(batches, -1) + np.arange(batches)[:, None] * size
    served = np.bincount(key.ravel(), minlength=batches * size)
    used = np.flatnonzero(served)
    instance, cell = used % size, used // size * layer.ranks + layer.instance_rank[used % size]
    sums = (
        np.bincount(cell, weights, batches * layer.ranks)
        for weights in (served[used], np.ones(len(used)), layer.instance_bytes[instance])
    )
    pairs, activated, held = (total.astype(np.int64).reshape(batches, layer.ranks) for total in sums)
    return pairs, activated, held


def _visits(rank_BTK: Ints, ranks: int) -> NDArray[np.float32]:
    """[B, T, R] how many of a token's experts are on each rank."""
    batches, tokens, _ = rank_BTK.shape
    key = rank_BTK + (np.arange(batches * tokens) * ranks).reshape(batches, tokens, 1)
    counts = np.bincount(key.ravel(), minlength=batches * tokens * ranks)
    return counts.astype(np.float32).reshape(batches, tokens, ranks)


def _others(visited_BTN: NDArray[np.bool_], home_T: Ints) -> Ints:
    """[B] places other than its own that tokens are sent to, summed over tokens."""
    at_home = visited_BTN[:, np.arange(len(home_T)), home_T]
    return np.asarray(visited_BTN.sum((1, 2)) - at_home.sum(1))


def result(
    name: str, plan: Plan, happened: Replay, batch: int, cost: CostModel, sample: Sample, *, drawn: bool, link_gbs: float | None
) -> PlanResult:
    """The figures of a replay.

    Args:
        name: of the plan.
        plan: that was replayed.
        happened: what happened.
        batch: tokens of a batch.
        cost: time of a rank.
        sample: whether the plan was made from this traffic.
        drawn: layers were drawn independently, so that hops between them mean nothing.
        link_gbs: GB/s at which one rank receives weights, added to its time where the cost is in ms; None to leave it out.
    """
    sized = plan.model.sized
    time_LBR = cost(happened.tokens_LBR, happened.activated_LBR)
    if link_gbs and sized and cost.unit == "ms":
        copy = np.array([facts.expert_bytes(precision(plan.model.dtype)) for facts in plan.model.layers])
        time_LBR = time_LBR + happened.received_LBR * copy[:, None, None] / (link_gbs * 1e6)
    pairs = happened.tokens_LBR.astype(np.float64)
    mean_LB = pairs.mean(2)
    step_B = time_LBR.max(2).sum(0)
    batches = pairs.shape[1]
    ratio_LBR = pairs / mean_LB[:, :, None]
    bytes_R = happened.bytes_LBR.sum(0).mean(0)
    return PlanResult(
        name=name,
        method=plan.method,
        sample=sample,
        slots=float(np.mean([layer.num_slots for layer in plan.layers])),
        imbalance=_spread(ratio_LBR.max(2)),
        balancedness=float((1 / ratio_LBR.max(2)).mean()),
        max_tokens=_spread(pairs.max(2)),
        max_activated=_spread(happened.activated_LBR.max(2)),
        max_bytes=_spread(happened.bytes_LBR.max(2)) if sized else None,
        step=_spread(step_B),
        waiting=float(1 - time_LBR.mean(2).sum() / step_B.sum()),
        uncovered=float(1 - cost.covers(happened.tokens_LBR, happened.activated_LBR).mean()),
        rank_sends=float(happened.rank_sends_LB.mean() / batch),
        node_sends=float(happened.node_sends_LB.mean() / batch),
        rank_hops=None if drawn or np.isnan(happened.rank_hops) else happened.rank_hops,
        node_hops=None if drawn or np.isnan(happened.node_hops) else happened.node_hops,
        weights_moved=float(happened.received_LBR.sum() / batches),
        bytes_moved=_bytes_moved(plan, happened) if sized else None,
        ranks=RankFigures(
            tokens=tuple(pairs.sum(0).mean(0).tolist()),
            activated=tuple(happened.activated_LBR.sum(0).mean(0).tolist()),
            bytes=tuple(bytes_R.tolist()) if sized else None,
        ),
        rank_profile=tuple((-np.sort(-ratio_LBR, axis=2)).mean((0, 1)).tolist()),
        step_times=tuple(step_B.tolist()),
    )


def _bytes_moved(plan: Plan, happened: Replay) -> float:
    """Bytes between ranks for a batch: each hidden state to a rank and back, and the weights of copies for one batch."""
    native = precision(plan.model.dtype)
    total = 0.0
    for facts, sends_B, received_BR in zip(plan.model.layers, happened.rank_sends_LB, happened.received_LBR, strict=True):
        state = facts.matrices[0][1] * native.bits / 8  # columns of the first matrix: the model's width
        total += 2 * float(sends_B.mean()) * state + float(received_BR.sum(1).mean()) * facts.expert_bytes(native)
    return total


def _spread(values: NDArray[Any] | Floats) -> Spread:
    return Spread(mean=float(np.mean(values)), p95=float(np.percentile(values, 95)))
