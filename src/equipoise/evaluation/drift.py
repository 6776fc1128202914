"""What a change of a model did to its routing: fine-tuning, rounding and pruning all move what earlier text is sent to.

Two models of one architecture, before and after, on the same fixed text (the probe).
Shapes: L MoE layers, T tokens, K top-k, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from equipoise.errors import ModelError
from equipoise.metrics import jensen_shannon
from equipoise.models.layers import MoELayer, find_moe_layers
from equipoise.models.recorder import Recorder, record
from equipoise.profiling.forward import evaluation_mode, negative_log_likelihood, run_batch
from equipoise.profiling.sequences import Batch

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RoutingDrift:
    """How far routing moved on the probe.

    Attributes:
        overlap_L: [L] share of a token's selections that are the same after as before, mean over tokens; 1 for no drift.
        divergence_L: [L] Jensen-Shannon divergence of the experts' loads, in bits; 0 for no drift, and also when tokens have
            merely changed places.
    """

    overlap_L: Floats
    divergence_L: Floats


@dataclass(frozen=True)
class CrossedLoss:
    """Loss on the probe of the two models, and of each with the routers of the other, in nats per token.

    Where the old routers on the new experts do better than the new ones, it is routing that was lost; where the new routers on
    the old experts do as well as the old, it is what experts know. Source: re-routing protocol of SAME (arXiv:2602.01990).
    """

    before: float
    after: float
    old_routers_new_experts: float
    new_routers_old_experts: float


def routing_drift(before: Any, after: Any, batches: Sequence[Batch]) -> RoutingDrift:
    """Compare what two models send where, on the same text.

    Args:
        before: a transformers MoE model.
        after: one of the same layers.
        batches: the probe.

    Raises:
        ModelError: their MoE layers differ in number, width or top-k.
    """
    first, second = (_recorded(model, batches) for model in (before, after))
    shapes = [[(layer.num_experts, layer.top_k) for layer in recorder.layers] for recorder in (first, second)]
    if shapes[0] != shapes[1]:
        raise ModelError("the two models differ in their MoE layers; drift is told between two states of one model.")
    overlap_L = np.zeros(len(first.layers))
    for old, new in zip(first.trace.values(), second.trace.values(), strict=True):
        for row, layer in enumerate(old.layers):
            overlap_L[layer] = overlap(old.experts_LTK[row], new.experts_LTK[row], int(old.events[row]))
    return RoutingDrift(overlap_L, jensen_shannon(first.counts.sum((0, 1)), second.counts.sum((0, 1))))


def overlap(before_TK: NDArray[np.int32], after_TK: NDArray[np.int32], events: int = 1) -> float:
    """Share of the selections before that are also made after, over all tokens.

    Args:
        before_TK: [T, K] expert ids; -1 for none.
        after_TK: as `before_TK`.
        events: routing events; a selection counts as made again in the same event alone.
    """
    width = before_TK.shape[1] // events
    kept = total = 0
    for start in range(0, width * events, width):
        old, new = before_TK[:, start : start + width], after_TK[:, start : start + width]
        there = (old[:, :, None] == new[:, None, :]).any(2) & (old >= 0)
        kept, total = kept + int(there.sum()), total + int((old >= 0).sum())
    return kept / total if total else float("nan")


def crossed_loss(before: Any, after: Any, batches: Sequence[Batch]) -> CrossedLoss:
    """Loss of two states of a model on the same text, and of each with the routers of the other.

    All weights but the routers' stay where they are: "experts" stands for the rest of the model. Both are left as they were.

    Args:
        before: a transformers MoE model with an LM head.
        after: one of the same layers.
        batches: the probe.

    Raises:
        ModelError: the routers of the two have other shapes, or a layer's router is no module of its block.
    """
    old, new = _loss(before, batches), _loss(after, batches)
    with swapped_routers(before, after):
        return CrossedLoss(old, new, _loss(after, batches), _loss(before, batches))


@contextmanager
def swapped_routers(one: Any, other: Any) -> Iterator[None]:
    """Inside, each of two models has the other's routers, selection bias included.

    Args:
        one: a transformers MoE model.
        other: one of the same layers.

    Raises:
        ModelError: as `crossed_loss`.
    """
    pairs = list(zip(_routers(one), _routers(other), strict=False))
    if len(pairs) != len(find_moe_layers(other)) or len(pairs) != len(find_moe_layers(one)):
        raise ModelError(
            "the two models have different numbers of MoE layers; routers are exchanged between states of one model."
        )
    _exchange(pairs)
    try:
        yield
    finally:
        _exchange(pairs)


def _exchange(pairs: Sequence[tuple[torch.nn.Module, torch.nn.Module]]) -> None:
    for mine, yours in pairs:
        states = [{name: value.clone() for name, value in router.state_dict().items()} for router in (mine, yours)]
        shapes = [{name: value.shape for name, value in state.items()} for state in states]
        if shapes[0] != shapes[1]:
            raise ModelError(f"the routers differ ({shapes[0]} and {shapes[1]}); give two states of one model.")
        mine.load_state_dict(states[1])
        yours.load_state_dict(states[0])


def _routers(model: Any) -> list[torch.nn.Module]:
    return [_router(model, layer) for layer in find_moe_layers(model)]


def _router(model: Any, layer: MoELayer) -> torch.nn.Module:
    if layer.router_path is None:
        raise ModelError(f"{layer.path} has no router module of its own, so routers cannot be exchanged.")
    router: torch.nn.Module = model.get_submodule(layer.router_path)
    return router


def _recorded(model: Any, batches: Sequence[Batch]) -> Recorder:
    with evaluation_mode(model), record(model, trace=True, transitions=False, coactivation=False) as recorder:
        for batch in batches:
            run_batch(model, batch, all_logits=False)
    return recorder


def _loss(model: Any, batches: Sequence[Batch]) -> float:
    with evaluation_mode(model):
        sums = [negative_log_likelihood(model, batch) for batch in batches]
    return sum(loss for loss, _ in sums) / sum(count for _, count in sums)
