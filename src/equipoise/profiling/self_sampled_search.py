"""How a model's own sentences are chosen: balanced over the corpus (ours), as EBSS was published, or plainly drawn.

A sampler takes prompts and writes tokens after them with a `Stream`. All three are deterministic: chance comes from a numpy
generator alone, so that a device does not matter.

Shapes: B sentences, W branches of one sentence, R = B * W rows, S tokens of a row, V vocabulary, L MoE layers, E experts of
the widest layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equipoise.errors import EquipoiseError
from equipoise.profiling.self_sampled_stream import Stream
from equipoise.registry import Registry

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Step = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class Prompts:
    """What sentences start from.

    Attributes:
        ids_BWS: [B, W, S] first tokens of each sentence's branches; W is 1 where all branches start alike.
        encoder_BWS: [B, W, S'] what the encoder of an encoder-decoder model reads.
        banned_V: [V] tokens that are never written.
        ends: tokens that end a sentence, for samplers that let it end.
    """

    ids_BWS: Ints
    encoder_BWS: Ints | None
    banned_V: Tensor
    ends: frozenset[int] = frozenset()

    def start(self, stream: Stream) -> Tensor:
        """Begin all branches; [B * W, V] logits."""
        flat = torch.from_numpy(self.ids_BWS.reshape(-1, self.ids_BWS.shape[-1]))
        if self.encoder_BWS is None:
            return stream.start(flat)
        return stream.start(flat, torch.from_numpy(self.encoder_BWS.reshape(-1, self.encoder_BWS.shape[-1])))


@dataclass(frozen=True, eq=False)
class Written:
    """What a sampler wrote after the prompts.

    Attributes:
        branch_B: [B] which of its W prompts each sentence goes on from.
        ids: token ids of each sentence, the prompt left out.
        counts_LE: [L, E] selections of each expert by these sentences, the prompts' tokens counted.
    """

    branch_B: Ints
    ids: tuple[Ints, ...]
    counts_LE: Floats


class Sampler(Protocol):
    """A way to write sentences; its fields are its options, and `branches` prompts are given to each sentence."""

    @property
    def branches(self) -> int:
        """W, prompts that each sentence may choose among."""

    def write(
        self, stream: Stream, prompts: Prompts, new: int, corpus_LE: Floats, rng: np.random.Generator, step: Step
    ) -> Written:
        """Write up to `new` tokens after each prompt.

        Args:
            stream: an open stream of the model.
            prompts: what to start from.
            new: tokens of each sentence.
            corpus_LE: [L, E] selections of what has been accepted before.
            rng: all of the chance.
            step: called with the tokens that each step has added.
        """


LEAST_TAU = 1e-6

SAMPLERS: Registry[Callable[..., Sampler]] = Registry("sampler")


def imbalance(counts_LE: Floats, width_L: Ints, top_k_L: Ints) -> Floats:
    """Standard deviation of the experts' usage, mean over layers: EBSS's sigma; 0 is balanced.

    Usage u is an expert's selections per token, so that a layer's usages sum to its top-k, and the deviation is the sample's
    (over E - 1). The source leaves open whether u is per token or a share of the selections; its own figure of 0.043 for a
    64-expert, top-6 model on wikitext is plausible only per token.

    Args:
        counts_LE: [..., L, E] selections; experts beyond a layer's width are zero.
        width_L: [L] experts of each layer.
        top_k_L: [L] selections of one token.

    Returns:
        [...] deviations; a layer that served nothing counts as balanced.

    Source: MoEQuant (arXiv:2505.03804), the definition of sigma in section 3.2.
    """
    total_L = counts_LE.sum(-1)
    mean_L = total_L / width_L
    present_LE = np.arange(counts_LE.shape[-1]) < width_L[:, None]
    squared_L = (np.where(present_LE, counts_LE - mean_L[..., None], 0.0) ** 2).sum(-1)
    deviation_L = np.sqrt(squared_L / np.maximum(width_L - 1, 1)) * top_k_L / np.maximum(total_L, 1)
    return np.asarray(deviation_L.mean(-1))


def ban_repeats(ids_RS: Tensor, size: int, log_probs_RV: Tensor) -> None:
    """Set to -inf, in place, every token that would complete a stretch of `size` tokens that its row already has."""
    if ids_RS.shape[1] < size:
        return
    windows_RNS = ids_RS.unfold(1, size, 1)
    seen_RN = (windows_RNS[..., :-1] == ids_RS[:, None, ids_RS.shape[1] - size + 1 :]).all(-1)
    row, place = seen_RN.nonzero(as_tuple=True)
    log_probs_RV[row, windows_RNS[row, place, -1]] = -torch.inf


def draw(log_probs_RV: Tensor, top: int | None, rng: np.random.Generator) -> Tensor:
    """[R] one token of each row, from its distribution restricted to the `top` likeliest (all when None)."""
    top = log_probs_RV.shape[1] if top is None else min(top, log_probs_RV.shape[1])
    values_RN, ids_RN = (log_probs_RV, None) if top == log_probs_RV.shape[1] else log_probs_RV.topk(top)
    cumulative_RN = values_RN.double().softmax(-1).cumsum(-1).cpu()
    point_R1 = torch.from_numpy(rng.random((len(values_RN), 1))) * cumulative_RN[:, -1:]
    place_R1 = torch.searchsorted(cumulative_RN, point_R1).clamp_(max=top - 1).to(log_probs_RV.device)
    return (place_R1 if ids_RN is None else ids_RN.gather(1, place_R1))[:, 0]


def choose_branches(cost_BW: Floats, counts_BWLE: Floats, rest_LE: Floats, width_L: Ints, top_k_L: Ints, tau: float) -> Ints:
    """One branch for each sentence, so that `sum of costs + tokens * sigma / tau` of the whole corpus is small.

    This is the logarithm of EBSS's objective, PPL * exp(sigma / tau), times the number of tokens, on the corpus instead of
    on a sentence: a sentence need not be balanced, it need only use what the others leave. Sentences choose one after
    the other, each knowing what those before it have taken and what those after it had so far.

    Args:
        cost_BW: [B, W] negative log-likelihood of each branch, in nats.
        counts_BWLE: [B, W, L, E] selections of each branch's whole sentence.
        rest_LE: [L, E] selections of sentences accepted before.
        width_L: [L] experts of each layer.
        top_k_L: [L] selections of one token.
        tau: the larger, the less balance counts.

    Returns:
        [B] chosen branches.
    """
    size_B = cost_BW.shape[0]
    chosen_B = np.zeros(size_B, np.int64)
    others_LE = rest_LE + counts_BWLE.mean(1).sum(0)
    for b in range(size_B):
        total_WLE = others_LE - counts_BWLE[b].mean(0) + counts_BWLE[b]
        tokens_W = (total_WLE.sum(-1) / top_k_L).mean(-1)
        chosen_B[b] = int((cost_BW[b] + tokens_W * imbalance(total_WLE, width_L, top_k_L) / tau).argmin())
        others_LE = total_WLE[chosen_B[b]]
    return chosen_B


def _facts(stream: Stream) -> tuple[Ints, Ints]:
    """Width and top-k of every layer."""
    return np.array([x.num_experts for x in stream.layers]), np.array([x.top_k for x in stream.layers])


def _counts(stream: Stream, size_B: int) -> Floats:
    """[B, W, L, E] selections of each branch."""
    counts_RLE = stream.counts_LRE.transpose(0, 1).cpu().double().numpy()
    return np.asarray(counts_RLE.reshape(size_B, -1, *counts_RLE.shape[1:]))


def _check(sampler: Sampler, name: str, least: float) -> None:
    """Raise `EquipoiseError` when an option is below its least value, or not a whole number where tokens are counted."""
    value = getattr(sampler, name)
    whole = name != "tau"
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not value >= least:
        kind = "a whole number of" if whole else "a number of"
        raise EquipoiseError(f"the sampler's option {name} is {value}; it must be {kind} at least {least:g}.")


@SAMPLERS.register(
    "balanced",
    summary="drawn from the model, branches chosen so that the whole corpus uses the experts evenly",
    source="Equipoise, after EBSS (arXiv:2505.03804)",
)
@dataclass(frozen=True)
class Balanced:
    """Text drawn from the model, steered to experts that the corpus has used too little.

    Every sentence has `width` branches. A branch draws its tokens from the model's distribution, inside the `top` likeliest if
    told so, without repeating a stretch of `ngram` tokens. After every `stretch` tokens one branch of each sentence goes on
    (`choose_branches`) and is copied `width` times. The text is fluent and varied because it is drawn, and balanced because
    of the choice; a likelihood that weighs in the choice (a larger `tau`), or a small `top`, makes it less varied.

    Args:
        width: branches of a sentence; each costs as much as the sentence.
        top: likeliest tokens that are drawn from; all of them when None.
        stretch: tokens between choices.
        ngram: length of a stretch that a sentence may not repeat; 0 allows repetition.
        tau: weight of likelihood against balance; small values choose by balance alone.
    """

    width: int = 4
    top: int | None = None
    stretch: int = 8
    ngram: int = 6
    tau: float = 0.002

    def __post_init__(self) -> None:
        for name in ("width", "stretch") if self.top is None else ("width", "stretch", "top"):
            _check(self, name, 1)
        _check(self, "ngram", 2 if self.ngram else 0)
        _check(self, "tau", LEAST_TAU)

    @property
    def branches(self) -> int:
        """Each branch starts with a token of its own."""
        return self.width

    def write(
        self, stream: Stream, prompts: Prompts, new: int, corpus_LE: Floats, rng: np.random.Generator, step: Step
    ) -> Written:
        """Write `new` tokens after each prompt, as `Sampler.write` explains."""
        size_B, size_W, prompt = prompts.ids_BWS.shape
        width_L, top_k_L = _facts(stream)
        logits_RV = prompts.start(stream)
        branch_B = np.zeros(size_B, np.int64)
        if size_W == 1:
            logits_RV = _follow(stream, np.repeat(np.arange(size_B), self.width), logits_RV)
        cost_BW = np.zeros((size_B, self.width))
        for done in range(1, new + 1):
            log_probs_RV = logits_RV.log_softmax(-1)
            allowed_RV = log_probs_RV.masked_fill(prompts.banned_V, -torch.inf)
            if self.ngram:
                ban_repeats(stream.ids_RS[:, prompt - 1 :], self.ngram, allowed_RV)
            ids_R = draw(allowed_RV, self.top, rng)
            cost_BW -= log_probs_RV.gather(1, ids_R[:, None]).cpu().double().numpy().reshape(cost_BW.shape)
            logits_RV = stream.extend(ids_R)
            step(size_B)
            if done % self.stretch == 0 or done == new:
                chosen_B = choose_branches(cost_BW, _counts(stream, size_B), corpus_LE, width_L, top_k_L, self.tau)
                if done <= self.stretch and size_W > 1:
                    branch_B = chosen_B
                rows_B = np.arange(size_B) * self.width + chosen_B
                logits_RV = _follow(stream, rows_B if done == new else np.repeat(rows_B, self.width), logits_RV)
                cost_BW[:] = 0.0
        return Written(branch_B, _rows(stream.ids_RS[:, prompt:]), _counts(stream, size_B).sum((0, 1)))


@SAMPLERS.register(
    "ebss",
    summary="Expert-Balanced Self-Sampling as published: beam search on perplexity and each sentence's own balance",
    source="MoEQuant (arXiv:2505.03804) section 3.2 and Algorithm 1, errors settled as the documentation says",
)
@dataclass(frozen=True)
class Ebss:
    """Beams of the smallest `-(R_S + log P(v | S)) / (|S| + 1) + sigma(S) / tau`, R_S the log-likelihood of branch S.

    Where the source contradicts itself: scores are minimised (its equation 14 and line 20 write arg max of what must be
    small); sigma is of the branch before the new token, as the text defers it (line 14 takes it after); sigma divides by
    E - 1 inside the root (line 30 writes another factor). A beam can have no more than `width` survivors, so only its
    `width` likeliest tokens are scored. The sentence kept is the one of the smallest `-R / |S| + sigma / tau`.

    Args:
        width: beams of a sentence, the source's w.
        tau: weight of perplexity against balance.
    """

    width: int = 4
    tau: float = 1.2

    def __post_init__(self) -> None:
        _check(self, "width", 1)
        _check(self, "tau", LEAST_TAU)

    @property
    def branches(self) -> int:
        """All beams of a sentence start with the same token."""
        return 1

    def write(
        self, stream: Stream, prompts: Prompts, new: int, corpus_LE: Floats, rng: np.random.Generator, step: Step
    ) -> Written:
        """Write `new` tokens after each prompt, as `Sampler.write` explains; neither `corpus_LE` nor chance plays a part."""
        size_B, size_W, prompt = prompts.ids_BWS.shape
        assert size_W == 1, "the beams of a sentence start alike"
        width_L, top_k_L = _facts(stream)
        logits_RV = prompts.start(stream)
        likelihood_BW = np.zeros((size_B, 1))
        for done in range(1, new + 1):
            log_probs_RV = logits_RV.log_softmax(-1).masked_fill(prompts.banned_V, -torch.inf)
            best_RN, ids_RN = log_probs_RV.topk(self.width)
            sum_BWN = likelihood_BW[..., None] + best_RN.cpu().double().numpy().reshape(size_B, size_W, self.width)
            sigma_BW = imbalance(_counts(stream, size_B), width_L, top_k_L)
            score_BM = (-sum_BWN / (done + 1) + sigma_BW[..., None] / self.tau).reshape(size_B, -1)
            kept_BW = np.argsort(score_BM, axis=1, kind="stable")[:, : self.width]
            ids_R = ids_RN.reshape(size_B, -1).gather(1, torch.from_numpy(kept_BW).to(ids_RN.device)).reshape(-1)
            rows_R = (np.arange(size_B)[:, None] * size_W + kept_BW // self.width).reshape(-1)
            likelihood_BW = np.take_along_axis(sum_BWN.reshape(size_B, -1), kept_BW, axis=1)
            stream.select(torch.from_numpy(rows_R))
            logits_RV = stream.extend(ids_R)
            size_W = self.width
            step(size_B)
        score_BW = -likelihood_BW / (new + 1) + imbalance(_counts(stream, size_B), width_L, top_k_L) / self.tau
        stream.select(torch.from_numpy(np.arange(size_B) * size_W + score_BW.argmin(1)))
        counts_LE = _counts(stream, size_B).sum((0, 1))
        return Written(np.zeros(size_B, np.int64), _rows(stream.ids_RS[:, prompt:]), counts_LE)


@SAMPLERS.register(
    "plain",
    summary="drawn from the model as it is, temperature 1: traffic that nothing has balanced",
    source="ancestral sampling",
)
@dataclass(frozen=True)
class Plain:
    """Every token from the model's whole distribution; a sentence ends where the model ends it."""

    @property
    def branches(self) -> int:
        """There is nothing to choose among."""
        return 1

    def write(
        self, stream: Stream, prompts: Prompts, new: int, corpus_LE: Floats, rng: np.random.Generator, step: Step
    ) -> Written:
        """Write up to `new` tokens after each prompt, as `Sampler.write` explains; `corpus_LE` plays no part."""
        size_B, _, prompt = prompts.ids_BWS.shape
        logits_RV = prompts.start(stream)
        counts_LE = np.zeros(stream.counts_LRE[:, 0].shape)
        running = np.arange(size_B)
        ids: list[Ints] = [np.zeros(0, np.int64)] * size_B
        ends = torch.tensor(sorted(prompts.ends), dtype=torch.int64, device=logits_RV.device)
        for done in range(1, new + 1):
            ids_R = draw(logits_RV.masked_fill(prompts.banned_V, -torch.inf).log_softmax(-1), None, rng)
            logits_RV = stream.extend(ids_R)
            step(len(running))
            ended_R = torch.isin(ids_R, ends) if done < new else torch.ones_like(ids_R, dtype=torch.bool)
            if ended_R.any():
                counts_LE += stream.counts_LRE[:, ended_R].sum(1).cpu().double().numpy()
                left_R = ended_R.cpu().numpy()
                for sentence, row in zip(running[left_R], _rows(stream.ids_RS[ended_R, prompt:]), strict=True):
                    ids[sentence] = row
                running = running[~left_R]
                if not running.size:
                    break
                logits_RV = _follow(stream, np.flatnonzero(~left_R), logits_RV)
        return Written(np.zeros(size_B, np.int64), tuple(ids), counts_LE)


def _follow(stream: Stream, rows: Ints, logits_RV: Tensor) -> Tensor:
    """Go on with some rows; their logits."""
    index = torch.from_numpy(rows)
    stream.select(index)
    return logits_RV[index.to(logits_RV.device)]


def _rows(ids_RS: Tensor) -> tuple[Ints, ...]:
    return tuple(np.asarray(row, np.int64) for row in ids_RS.cpu().numpy())


def make_sampler(name: str, options: dict[str, float | None]) -> Sampler:
    """A sampler by name, with options of its own.

    Raises:
        EquipoiseError: unknown name, unknown option, or an option out of range.
    """
    kind = SAMPLERS.get(name)
    allowed: Sequence[str] = list(getattr(kind, "__dataclass_fields__", {}))
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise EquipoiseError(f"sampler '{name}' has no option '{unknown[0]}'; it has: {', '.join(allowed) or 'none'}.")
    return kind(**options)
