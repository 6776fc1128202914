"""Which copy of an expert serves which token: the rules of the engines, and of published dispatchers, by name.

A rule sees some batches of one layer and names the instance (see `placement`) that serves each token-expert pair.
Shapes: B batches, T tokens of a batch, K top-k, E experts, P slots, C most copies, R ranks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from equipoise.dispatch.deal import DEALS, DealRule
from equipoise.dispatch.placement import Floats, Ints, LayerMap
from equipoise.dispatch.split import least_split, order_in_expert, probabilities
from equipoise.errors import EquipoiseError
from equipoise.registry import Entry, Registry

KNUTH = 2654435769
"""floor(2^32 / golden ratio): the multiplier of Knuth's multiplicative hash."""


@dataclass(frozen=True, eq=False)
class Choice:
    """Who serves what.

    Attributes:
        instance_BTK: [B, T, K] instance that serves each pair.
        received_BR: [B, R] experts whose weights were sent to each rank for the batch.
    """

    instance_BTK: Ints
    received_BR: Ints


Rule = Callable[..., Choice]
RULES: Registry[Rule] = Registry("dispatch rule")
"""f(layer, ids_BTK, rng, **options) -> Choice."""


def choose(
    rule: str, layer: LayerMap, ids_BTK: Ints, rng: np.random.Generator, options: Mapping[str, Any] | None = None
) -> Choice:
    """The instances that a rule picks.

    Args:
        rule: a name in `RULES`.
        layer: where copies are.
        ids_BTK: [B, T, K] expert of each pair, in the order of the batch.
        rng: of what a rule leaves to chance.
        options: of the rule.

    Raises:
        EquipoiseError: unknown rule or option.
    """
    check_rule(rule, options or {})
    return RULES.get(rule)(layer, ids_BTK, rng, **(options or {}))


def check_rule(rule: str, options: Mapping[str, Any]) -> None:
    """Raise `EquipoiseError` when a rule does not exist or does not take these options."""
    allowed = list(inspect.signature(RULES.get(rule)).parameters)[3:]
    for name in options:
        if name not in allowed:
            raise EquipoiseError(f"rule '{rule}' has no option '{name}'; it has: {', '.join(allowed) or 'none'}.")


@RULES.register("even", summary="an expert's tokens in turn over its copies; what plans assume", source="EPLB")
def even(layer: LayerMap, ids_BTK: Ints, rng: np.random.Generator) -> Choice:
    """Each expert's tokens in turn, from a random copy on."""
    start_BE = rng.integers(0, 1 << 30, (len(ids_BTK), layer.experts))
    turn = order_in_expert(ids_BTK, layer.experts) + start_BE[np.arange(len(ids_BTK))[:, None, None], ids_BTK]
    return _of_copies(layer, ids_BTK, turn % layer.copies_E[ids_BTK])


@RULES.register("shares", summary="an expert's tokens by the plan's own shares", source="Equipoise")
def shares(layer: LayerMap, ids_BTK: Ints, rng: np.random.Generator) -> Choice:
    """Each expert's tokens spread over its copies in proportion to the plan's shares."""
    return _by_probability(layer, ids_BTK, probabilities(layer, layer.share_P)[None], rng)


@RULES.register("vllm", summary="(position in the flattened top-k ids) modulo copies, on each rank", source="vLLM")
def vllm(layer: LayerMap, ids_BTK: Ints, rng: np.random.Generator) -> Choice:
    """Position times top-k plus column, modulo copies: with even top-k and two copies the column alone decides."""
    _, tokens, top_k = ids_BTK.shape
    position = _local_index(layer, tokens)[:, None] * top_k + np.arange(top_k)
    return _of_copies(layer, ids_BTK, position % layer.copies_E[ids_BTK])


@RULES.register("vllm-hash", summary="hash of the token's index modulo copies, on each rank", source="vLLM, later versions")
def vllm_hash(layer: LayerMap, ids_BTK: Ints, rng: np.random.Generator) -> Choice:
    """Knuth's multiplicative hash of the token's index modulo copies, the same for all columns of a token."""
    hashed = (_local_index(layer, ids_BTK.shape[1]) * KNUTH) & 0xFFFFFFFF
    return _of_copies(layer, ids_BTK, hashed[:, None] % layer.copies_E[ids_BTK])


@RULES.register(
    "sglang-static", summary="the copy on the token's rank, else on its node, else one that is fixed per rank", source="SGLang"
)
def sglang_static(layer: LayerMap, ids_BTK: Ints, rng: np.random.Generator) -> Choice:
    """A table for each rank, made once (seed 42): nearest copy, or else one by a fair draw over the ranks without one."""
    table_RE = _nearest(layer)
    draw = np.random.default_rng(42 + layer.index)
    for expert in np.flatnonzero((table_RE < 0).any(0)):
        ranks, slots = np.flatnonzero(table_RE[:, expert] < 0), layer.slots_EC[expert, : layer.copies_E[expert]]
        whole, rest = divmod(len(ranks), len(slots))
        table_RE[ranks, expert] = draw.permutation(np.r_[np.tile(slots, whole), draw.permutation(slots)[:rest]])
    home_T = layer.home_of(ids_BTK.shape[1])
    return _standing(layer, table_RE[home_T[None, :, None], ids_BTK])


@RULES.register("sglang-dynamic", summary="the copy on the token's rank, else on its node, else a random one", source="SGLang")
def sglang_dynamic(layer: LayerMap, ids_BTK: Ints, rng: np.random.Generator, *, nearest: bool = True) -> Choice:
    """A random copy; with `nearest`, as current versions do, only where neither the rank nor its node alone has one."""
    copy = rng.integers(0, 1 << 30, ids_BTK.shape) % layer.copies_E[ids_BTK]
    slot = layer.slots_EC[ids_BTK, copy]
    if nearest:
        near = _nearest(layer)[layer.home_of(ids_BTK.shape[1])[None, :, None], ids_BTK]
        slot = np.where(near >= 0, near, slot)
    return _standing(layer, slot)


@RULES.register("lp", summary="the split of this batch that is best for the largest rank load", source="LPLB; SGLang lp")
def lp(layer: LayerMap, ids_BTK: Ints, rng: np.random.Generator, *, sampled: bool = False) -> Choice:
    """The linear program's split; `sampled` draws each token's copy by it, as SGLang does, instead of dealing it out."""
    splits = [least_split(layer, counts)[0] for counts in _counts(layer, ids_BTK)]
    return _by_probability(layer, ids_BTK, np.stack([probabilities(layer, s) for s in splits]), rng, sampled=sampled)


def _from_counts(entry: Entry[DealRule]) -> Rule:
    """A rule that deals from counts, as a rule that names instances."""

    def rule(layer: LayerMap, ids_BTK: Ints, rng: np.random.Generator, **options: Any) -> Choice:
        chosen, received = [], np.zeros((len(ids_BTK), layer.ranks), np.int64)
        for b, counts in enumerate(_counts(layer, ids_BTK)):
            found = entry.function(layer, counts, **options)
            np.add.at(received[b], [target for _, _, target in found.transfers], 1)
            chosen.append(_by_quota(layer, ids_BTK[b], found.quota_ER))
        return Choice(np.stack(chosen), received)

    own = list(inspect.signature(entry.function).parameters.values())[2:]
    three = list(inspect.signature(rule).parameters.values())[:3]
    rule.__signature__ = inspect.Signature([*three, *own])  # type: ignore[attr-defined]
    return rule


for _entry in DEALS:
    RULES.register(_entry.name, summary=_entry.summary, source=_entry.source)(_from_counts(_entry))


def _counts(layer: LayerMap, ids_BTK: Ints) -> Ints:
    """[B, E] pairs of each expert in each batch."""
    batches = len(ids_BTK)
    key = ids_BTK.reshape(batches, -1) + np.arange(batches)[:, None] * layer.experts
    return np.bincount(key.ravel(), minlength=batches * layer.experts).reshape(batches, layer.experts)


def _local_index(layer: LayerMap, tokens: int) -> Ints:
    """[T] place of each token among those of its own rank."""
    home = layer.home_of(tokens)
    return np.arange(tokens) - np.searchsorted(home, home)


def _standing(layer: LayerMap, slot_BTK: Ints) -> Choice:
    return Choice(slot_BTK, np.zeros((len(slot_BTK), layer.ranks), np.int64))


def _of_copies(layer: LayerMap, ids_BTK: Ints, copy_BTK: Ints) -> Choice:
    return _standing(layer, layer.slots_EC[ids_BTK, copy_BTK])


def _nearest(layer: LayerMap) -> Ints:
    """[R, E] slot on the rank, or the first on its node where not all copies are there, or the only one; else -1."""
    table = layer.slot_ER.T.copy()
    if layer.nodes > 1:
        per_node = layer.ranks // layer.nodes
        node_EC = np.where(layer.slots_EC >= 0, layer.rank_P[layer.slots_EC] // per_node, -1)
        for rank in range(layer.ranks):
            here = node_EC == rank // per_node
            some = here.any(1) & (here.sum(1) < layer.copies_E) & (table[rank] < 0)
            table[rank, some] = layer.slots_EC[some, here.argmax(1)[some]]
    single = layer.copies_E == 1
    table[:, single] = layer.slots_EC[single, 0]
    return table


def _by_probability(
    layer: LayerMap, ids_BTK: Ints, part_BEC: Floats, rng: np.random.Generator, *, sampled: bool = False
) -> Choice:
    """Copies by probability: dealt out evenly in the order of the batch from a random start, or drawn token by token."""
    cumulative = np.cumsum(part_BEC, 2)
    batch = np.arange(len(ids_BTK))[:, None, None] if len(part_BEC) > 1 else 0
    if sampled:
        point = rng.random(ids_BTK.shape)
    else:
        counts = _counts(layer, ids_BTK)[np.arange(len(ids_BTK))[:, None, None], ids_BTK]
        point = (order_in_expert(ids_BTK, layer.experts) + 0.5) / counts
    copy = (point[..., None] > cumulative[batch, ids_BTK]).sum(-1)
    return _of_copies(layer, ids_BTK, np.minimum(copy, layer.copies_E[ids_BTK] - 1))


def _by_quota(layer: LayerMap, ids_TK: Ints, quota_ER: Ints) -> Ints:
    """[T, K] instances that fill the quotas: tokens stay on their own rank as far as its quota goes."""
    expert, home = ids_TK.ravel(), np.repeat(layer.home_of(len(ids_TK)), ids_TK.shape[1])
    key = expert * layer.ranks + home
    place = order_in_expert(key[None], layer.experts * layer.ranks)[0]
    stays = place < quota_ER[expert, home]
    rank = np.where(stays, home, -1)
    left_ER = quota_ER - np.bincount(key[stays], minlength=quota_ER.size).reshape(quota_ER.shape)
    others = np.flatnonzero(~stays)
    others = others[np.argsort(expert[others], kind="stable")]
    rank[others] = np.repeat(np.tile(np.arange(layer.ranks), layer.experts), left_ER.ravel())
    return layer.instances(expert, rank).reshape(ids_TK.shape)
