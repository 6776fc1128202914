"""Placement by affinity, judged on documents that it was not made from: planted groups, real traces, models run here.

The rows of one table (`affinity.py` prints it). A boundary is the step of a token from one MoE layer to the next; whether it
is crossed has three readings once top-k is above 1:

    top-1   the token's heaviest expert of either layer are on different ranks: what ExFlow counts, as its traces hold one
            expert a layer
    pairs   share of its k x k pairs (expert, next expert) on different ranks: what a profile's transitions count
    new     share of its next experts that lie on a rank where none of its present experts is: hidden states could only be
            used there if every rank that serves a token kept its state

Shapes: L layers, T tokens, K top-k, E experts, R ranks, G groups of tokens (documents or rows of text).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.models.recorder import record
from equipoise.planning.affinity.exflow import MU, place
from equipoise.planning.affinity.pairs import affinity, chance_crossings, count_pairs, traffic
from equipoise.profiling.forward import evaluation_mode, run_batch
from equipoise.profiling.progress import ProgressBar
from equipoise.profiling.sequences import Framing, text_batches

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]
Row = dict[str, Any]
Texts = Mapping[str, Sequence[str]]

READINGS = ("top-1", "pairs", "new")
DRAWS = 1000
"""Bootstrap samples of the groups for an interval."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """Routed tokens: ids_LTK (-1 where a token chose fewer), the heaviest of them ids_LT1, and the group of each [T]."""

    ids: Ids
    first: Ids
    group: Ids

    @classmethod
    def ordered(cls, ids_LTK: Ids, group_T: Ids) -> Tokens:
        """Of traces whose experts stand in order of their weights."""
        return cls(ids_LTK, ids_LTK[..., :1], group_T)

    def take(self, chosen_T: NDArray[np.bool_]) -> Tokens:
        """Some of them."""
        return Tokens(self.ids[:, chosen_T], self.first[:, chosen_T], self.group[chosen_T])


@dataclass(frozen=True, eq=False)
class Source:
    """Where tokens come from: those to plan on, and those to judge on; ranks to place on where they are not 8."""

    name: str
    experts: int
    fit: Tokens
    held: Tokens
    planned_ranks: int | None = None

    @property
    def ranks(self) -> int:
        """Ranks to place on: 8, or fewer where that would leave a rank less than two experts."""
        return self.planned_ranks or min(8, self.experts // 2)


def recorded(
    name: str, model: Any, tokenizer: Any, fit: Texts, held: Texts, tokens: int, batch_size: int = 8
) -> Iterator[Source]:
    """The stacks of a model as sources, run on either text.

    Args:
        name: of the model.
        model: a transformers model.
        tokenizer: its tokenizer.
        fit: domain -> documents to plan on.
        held: domain -> other documents, to judge on.
        tokens: of all domains together, of either text.
        batch_size: rows of a forward pass.
    """
    traces = []
    for documents in (fit, held):
        batches = text_batches(
            documents,
            tokenizer,
            Framing.of(tokenizer, model.config),
            tokens=-(-tokens // len(documents)),
            batch_size=batch_size,
        )
        with evaluation_mode(model), record(model, trace=True) as recorder, ProgressBar(True) as bar:
            bar.stage(name, sum(batch.tokens for batch in batches), "tokens")
            for batch in batches:
                run_batch(model, batch, all_logits=False)
                bar.advance(batch.tokens)
        traces.append(recorder.trace)
    for stack, trace in traces[0].items():
        if len(trace.layers) < 2:
            continue
        both = [one[stack] for one in traces]
        label = name if len(traces[0]) == 1 else f"{name}, {stack}"
        experts = max(recorder.layers[row].num_experts for row in trace.layers)
        yield Source(label, experts, *(_tokens(one) for one in both))


def _tokens(trace: Any) -> Tokens:
    heaviest = trace.weights_LTK.argmax(2)[..., None]
    ids = trace.experts_LTK.astype(np.int64)
    row = trace.forward_T * (int(trace.sequence_T.max()) + 1) + trace.sequence_T
    return Tokens(ids, np.take_along_axis(ids, heaviest, 2), row)


def judged(source: Source) -> list[Row]:
    """Rows of a source: each placement's held-out crossings in every reading."""
    ranks, experts = source.ranks, source.experts
    pairs = affinity(*count_pairs(source.fit.ids, experts))
    firsts = affinity(*count_pairs(source.fit.first, experts))
    held_pairs = affinity(*count_pairs(source.held.ids, experts))
    layers, _, k = source.held.ids.shape
    contiguous = [np.arange(experts)] * layers
    placements = {
        "contiguous": contiguous,
        f"`exflow`, mu = {MU:g}": place(pairs, ranks=ranks, mu=MU),
        "`exflow`, mu = 0": place(pairs, ranks=ranks, mu=0.0),
    }
    if k > 1:
        placements["of top-1 alone, mu = 0"] = place(firsts, ranks=ranks, mu=0.0)
    plain, rows = crossed(source.held, contiguous, ranks), []
    for method, physical in placements.items():
        met, mine = traffic(source.held.ids, physical, ranks), crossed(source.held, physical, ranks)
        means = {reading: float(mine[reading].mean()) for reading in READINGS}
        row: Row = {"routing": source.name, "E, k, ranks": f"{experts}, {k}, {ranks}", "placement": method} | means
        chance = float(chance_crossings(held_pairs, physical, ranks).mean())
        low, high = saved(plain["pairs"], mine["pairs"], source.held.group)
        share = f"{100 * (1 - means['pairs'] / plain['pairs'].mean()):.1f} % ({100 * low:.1f}..{100 * high:.1f})"
        row |= {"pairs by chance": chance, "saved (pairs)": "" if method == "contiguous" else share}
        rows.append(row | {"fan-out": met.fan_out, "load": met.load_ratio})
        source_cells = ("routing", "E, k, ranks")
        if len(rows) > 1:
            rows[-1] |= dict.fromkeys(source_cells, "")
    return rows


def crossed(tokens: Tokens, physical: Sequence[Ids], ranks: int) -> dict[str, Floats]:
    """[T] share of boundaries that each token crosses, mean over the boundaries, in every reading."""
    count = tokens.ids.shape[1]
    sums = {reading: np.zeros(count) for reading in READINGS}
    before: tuple[Floats, Floats] | None = None
    for layer, slots in enumerate(physical):
        rank = np.argsort(slots) // (len(slots) // ranks)
        here = tuple(_on_ranks(rank, ids[layer], ranks) for ids in (tokens.first, tokens.ids))
        if before is not None:
            (first_was, was), (first_is, now) = before, here
            sums["top-1"] += _apart(first_was, first_is)
            sums["pairs"] += _apart(was, now)
            served = now.sum(1)
            sums["new"] += ((was == 0) * now).sum(1) / np.maximum(served, 1)
        before = here[0], here[1]
    return {reading: total / (len(physical) - 1) for reading, total in sums.items()}


def _on_ranks(rank_E: Ids, ids_TK: Ids, ranks: int) -> Floats:
    """[T, R] how many of a token's experts lie on each rank."""
    at = np.where(ids_TK < 0, ranks, rank_E[np.maximum(ids_TK, 0)])
    return (at[..., None] == np.arange(ranks)).sum(1).astype(np.float64)


def _apart(was_TR: Floats, now_TR: Floats) -> Floats:
    """[T] share of pairs of a token's experts on different ranks; 0 where it has none."""
    pairs = was_TR.sum(1) * now_TR.sum(1)
    return np.asarray((pairs - (was_TR * now_TR).sum(1)) / np.maximum(pairs, 1))


def saved(plain_T: Floats, mine_T: Floats, group_T: Ids) -> tuple[float, float]:
    """95 % interval of the share of crossings saved, by resampling groups of tokens."""
    _, group = np.unique(group_T, return_inverse=True)
    sums = np.stack([np.bincount(group, values) for values in (plain_T, mine_T)])
    picks = np.random.default_rng(0).integers(0, sums.shape[1], (DRAWS, sums.shape[1]))
    plain, mine = sums[:, picks].sum(2)
    low, high = np.quantile(1 - mine / plain, (0.025, 0.975))
    return float(low), float(high)
