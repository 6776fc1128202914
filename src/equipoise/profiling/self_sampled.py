"""Text that a model writes itself: for calibration where there is no data set, and as traffic where there is no text.

Balanced samplers ("balanced", "ebss") write text that uses all experts, for Hessians and importance. Such text says nothing
about the load of real traffic, which it evens out by design: profiling refuses it as a scenario. The sampler "plain" draws
from the model as it is; that load is unbiased as far as the model is.

Shapes: B sentences, W branches of one sentence, S tokens, V vocabulary, L MoE layers, E experts of the widest layer.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from equipoise import __version__
from equipoise.artifacts.files import write_atomic
from equipoise.errors import TextError
from equipoise.models.layers import check_weights, fingerprint
from equipoise.models.reference.cache import cache_dir, cached
from equipoise.profiling.forward import evaluation_mode
from equipoise.profiling.progress import ProgressBar
from equipoise.profiling.resume import Arrays, Checkpoint
from equipoise.profiling.self_sampled_report import TextReport, measure_text
from equipoise.profiling.self_sampled_search import Floats, Ints, Prompts, Sampler, Written, make_sampler
from equipoise.profiling.self_sampled_stream import Stream, keeps_cache
from equipoise.profiling.sequences import Framing
from equipoise.profiling.texts import SAMPLER_FIELD, BalancedText, read_documents

SELF_SAMPLED, BALANCED = "self-sampled", "self-balanced"
"""Names of plainly drawn text, as traffic, and of balanced text, for calibration."""

UNBIASED = "plain"
"""The sampler whose text may stand for traffic."""

TEXT_FILE, REPORT_FILE = "text.jsonl", "report.json"

SAVE_EVERY = 30.0
"""Seconds between writes of an unfinished run's state."""

FORMAT = 1
"""Grows when the same options would give other text, so that cached text of an older version is not taken."""


@dataclass(frozen=True)
class SelfText:
    """Text that a model wrote, and how good it is.

    Attributes:
        texts: one document per sentence; `BalancedText` unless drawn plainly.
        sampler: how it was chosen.
        report: its balance, perplexity and compressibility, measured on the text as it is read back.
        options: everything that it depends on beside the model.
        model_fingerprint: of the model that wrote it.
        path: the cached file, where it was kept.
    """

    texts: tuple[str, ...]
    sampler: str
    report: TextReport
    options: dict[str, Any]
    model_fingerprint: str
    path: Path | None = None

    def save(self, path: str | Path) -> None:
        """Write the text as JSON lines, each with the sampler's name, so that balanced text is known as such when read."""
        rows = [{"text": str(text), SAMPLER_FIELD: self.sampler} for text in self.texts]
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def self_sampled(
    model: Any,
    tokenizer: Any,
    *,
    sampler: str = "balanced",
    sentences: int = 128,
    length: int = 512,
    batch_size: int = 16,
    seed: int = 0,
    resume_path: str | Path | None = None,
    progress: bool = True,
    **options: float | None,
) -> SelfText:
    """Let a model write its own text.

    The text depends on the model and the arguments alone, whether or not the run was interrupted and resumed.

    A sentence of a causal model starts with the tokenizer's prefix and one random token of the vocabulary (plainly drawn:
    with what stands before a document). An encoder-decoder model writes as profiling reads: its encoder is first given
    the random token and the decoder writes half of the sentence; then the encoder is given that half, and the decoder
    writes the other.

    Args:
        model: a causal or encoder-decoder language model with MoE layers; it runs where its weights are.
        tokenizer: its tokenizer.
        sampler: "balanced" (ours), "ebss" (as published) or "plain" (temperature 1, nothing balanced).
        sentences: how many; "plain" writes as many documents as fill `sentences * length` tokens.
        length: tokens of a sentence, special ones of a row counted.
        batch_size: sequences written at once; with branches, rows are `batch_size * width`.
        seed: of every random choice.
        resume_path: file that keeps an unfinished run; complete when this returns.
        progress: show a progress bar on a terminal.
        **options: of the sampler: width, tau; of "balanced" also top, stretch, ngram.

    Raises:
        ModelError: no MoE layers or no language-model head, or weights or logits that are not numbers.
        TextError: an argument out of range, or a tokenizer without usable tokens.
        ProfileError: the state at `resume_path` is of another run.
        EquipoiseError: unknown sampler, or an option out of range.
    """
    chosen = make_sampler(sampler, options)
    framing = Framing.of(tokenizer, model.config)
    settings = _settings(chosen, framing, sampler, sentences, length, batch_size, seed)
    check_weights(model)
    identity = _identity(model, tokenizer, framing, settings) | {"version": __version__}
    with evaluation_mode(model), ProgressBar(progress) as bar:
        writer = _Writer(model, tokenizer, framing, chosen, settings)
        ids = writer.go(Checkpoint(resume_path, identity, SAVE_EVERY), bar)
    kind = str if sampler == UNBIASED else BalancedText
    decoded = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    texts = tuple(kind(text) for text in decoded if text.strip())
    if not texts:
        raise TextError("the model wrote nothing but white space and ends of text; it cannot be its own source of text.")
    report = measure_text(model, tokenizer, texts, seq_len=length, batch_size=batch_size, progress=progress)
    return SelfText(texts, sampler, report, settings, identity["model"])


def cached_self_text(
    model: Any,
    tokenizer: Any,
    *,
    sampler: str = "balanced",
    sentences: int = 128,
    length: int = 512,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
    **options: float | None,
) -> SelfText:
    """`self_sampled`, kept in the cache by the model's fingerprint and the options; an interrupted run goes on.

    The text of a model is the same text in whatever dtype it is loaded: the first that was written is kept.

    Args:
        model: as `self_sampled` takes it, like all that follows.
        tokenizer: its tokenizer.
        sampler: "balanced", "ebss" or "plain".
        sentences: how many.
        length: tokens of a sentence.
        batch_size: sequences written at once.
        seed: of every random choice.
        progress: show a progress bar on a terminal.
        **options: of the sampler.

    Returns:
        The text, with the path of its file.

    Raises:
        EquipoiseError: as `self_sampled`, or a cache that cannot be written.
    """
    framing = Framing.of(tokenizer, model.config)
    settings = _settings(make_sampler(sampler, options), framing, sampler, sentences, length, batch_size, seed)
    identity = _identity(model, tokenizer, framing, settings)
    name = f"self-text-{hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]}"
    state = cache_dir() / f".{name}.state"

    def fill(directory: Path) -> None:
        written = self_sampled(
            model, tokenizer, sampler=sampler, sentences=sentences, length=length, batch_size=batch_size, seed=seed,
            resume_path=state, progress=progress, **options,
        )  # fmt: skip
        written.save(directory / TEXT_FILE)
        write_atomic(directory / REPORT_FILE, json.dumps(written.report.as_dict(), indent=2))

    directory = cached(name, fill)
    state.unlink(missing_ok=True)
    report = TextReport(**json.loads((directory / REPORT_FILE).read_text()))
    texts = tuple(read_documents([directory / TEXT_FILE]))
    return SelfText(texts, sampler, report, settings, identity["model"], directory / TEXT_FILE)


def self_texts(model: Any, tokenizer: Any, **options: Any) -> dict[str, list[str]]:
    """Cached text that a model writes itself, as name -> documents: "self-balanced", or "self-sampled" if plainly drawn.

    Args:
        model: a causal or encoder-decoder language model with MoE layers.
        tokenizer: its tokenizer.
        **options: as `cached_self_text` takes them.
    """
    found = cached_self_text(model, tokenizer, **options)
    return {SELF_SAMPLED if found.sampler == UNBIASED else BALANCED: list(found.texts)}


def _settings(
    chosen: Sampler, framing: Framing, sampler: str, sentences: int, length: int, batch_size: int, seed: int
) -> dict[str, Any]:
    """Everything that the text depends on beside the model and the tokenizer.

    Raises:
        TextError: an argument out of range.
    """
    checks = (("sentences", sentences, 1), ("length", length, framing.overhead + 4), ("batch_size", batch_size, 1))
    for name, value, least in checks:
        if value < least:
            raise TextError(f"{name} is {value}; it must be at least {least}.")
    base = {"sampler": sampler, "sentences": sentences, "length": length, "batch_size": batch_size, "seed": seed}
    return base | vars(chosen)


def _identity(model: Any, tokenizer: Any, framing: Framing, settings: dict[str, Any]) -> dict[str, Any]:
    vocabulary = f"{len(tokenizer)} {framing}"
    return {"model": fingerprint(model), "tokenizer": vocabulary, "options": settings, "format": FORMAT}


class _Writer:
    """One run: batches of sentences, one after the other, each knowing what the corpus holds so far."""

    def __init__(self, model: Any, tokenizer: Any, framing: Framing, sampler: Sampler, settings: dict[str, Any]) -> None:
        self.tokenizer, self.framing, self.sampler, self.settings = tokenizer, framing, sampler, settings
        self.plain = settings["sampler"] == UNBIASED
        self.ends = frozenset(_ends(model, tokenizer))
        special = {*map(int, tokenizer.all_special_ids), *self.ends}
        known = min(len(tokenizer), len(model.get_input_embeddings().weight))
        self.usable = np.array([i for i in range(known) if i not in special], np.int64)
        if self.usable.size < 2:
            raise TextError(
                f"the tokenizer has {self.usable.size} tokens that are text; a sentence cannot be written with them."
            )
        tried = np.linspace(0, self.usable.size - 1, 12).astype(int)
        self.cached, vocabulary = keeps_cache(model, self.usable[tried].reshape(2, 6))
        self.usable = self.usable[self.usable < vocabulary]
        banned_V = torch.ones(vocabulary, dtype=torch.bool)
        banned_V[self.usable] = False
        if self.plain:
            banned_V[[i for i in self.ends if i < vocabulary]] = False
        self.stream = Stream(model, cache=self.cached)
        self.banned_V = banned_V.to(self.stream.device)

    def go(self, checkpoint: Checkpoint, bar: ProgressBar) -> list[Ints]:
        """Write what is missing; token ids of every sentence."""
        checkpoint.require_writable()
        corpus_LE = np.zeros(tuple(self.stream.counts_LRE.shape[::2]))
        ids: list[Ints] = []
        turn = 0
        if (loaded := checkpoint.load()) is not None:
            turn, state = loaded
            corpus_LE = state["corpus"]
            ids = np.split(state["ids"], np.cumsum(state["lengths"])[:-1])

        def keep() -> Arrays:
            return {"corpus": corpus_LE, "ids": np.concatenate(ids), "lengths": np.array([row.size for row in ids])}

        sentences, at_once = self.settings["sentences"], self.settings["batch_size"]
        budget = sentences * self.settings["length"]
        bar.stage("writing", budget, "tokens", sum(row.size for row in ids))
        while (left := budget - sum(row.size for row in ids) if self.plain else sentences - len(ids)) > 0:
            # Documents that end by themselves are shorter than `length`; twice as many as would fill the rest come close.
            size_B = min(at_once, -(-2 * left // self.settings["length"]) if self.plain else left)
            rng = np.random.default_rng([self.settings["seed"], zlib.crc32(self.settings["sampler"].encode()), turn])
            with self.stream:
                written, counts_LE = self._sentences(size_B, corpus_LE, rng, bar)
            ids += written
            corpus_LE = corpus_LE + counts_LE
            turn += 1
            checkpoint.save(turn, keep)
        checkpoint.save(turn, keep, force=True)
        return ids

    def _sentences(
        self, size_B: int, corpus_LE: Floats, rng: np.random.Generator, bar: ProgressBar
    ) -> tuple[list[Ints], Floats]:
        """Write one batch of sentences; their ids and what they add to the corpus."""
        framing, size_W = self.framing, self.sampler.branches
        room = self.settings["length"] - framing.overhead
        first_BW1 = self._starts(rng, size_B * size_W).reshape(size_B, size_W, 1)

        def write(ids_BWS: Ints, encoder_BWS: Ints | None, new: int) -> Written:
            prompts = Prompts(ids_BWS, encoder_BWS, self.banned_V, self.ends)
            return self.sampler.write(self.stream, prompts, new, corpus_LE, rng, bar.advance)

        if framing.decoder_start is None:
            begin = [*framing.prefix] or self._boundary()
            if self.plain and begin:
                written = write(np.tile(np.array(begin, np.int64), (size_B, 1, 1)), None, room)
                return [*written.ids], written.counts_LE
            written = write(_around(framing.prefix, first_BW1), None, room - 1)
            return _joined(first_BW1, written), written.counts_LE
        half = -(-room // 2)
        start = np.full((size_B, size_W, 1), framing.decoder_start)
        written = write(start, _around(framing.prefix, first_BW1, framing.suffix), half - 1)
        heads = _joined(first_BW1, written)
        whole = [b for b, head in enumerate(heads) if head.size == half and not self.ends & {int(head[-1])}]
        if not whole:
            return heads, written.counts_LE
        heads_BWS = np.stack([heads[b] for b in whole])[:, None]
        written = write(start[: len(whole), :1], _around(framing.prefix, heads_BWS, framing.suffix), room - half)
        for b, tail in zip(whole, written.ids, strict=True):
            heads[b] = np.concatenate([heads[b], tail])
        return heads, written.counts_LE

    def _boundary(self) -> list[int]:
        """What stands before a document where the tokenizer puts nothing: the begin- or end-of-text token."""
        tokens = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return [int(token) for token in tokens if token is not None][:1]

    def _starts(self, rng: np.random.Generator, count: int) -> Ints:
        """Random first tokens, none of them a part of a character; different ones while the vocabulary lasts."""
        order = rng.permutation(self.usable)
        found: list[int] = []
        for token in order.tolist():
            text = self.tokenizer.decode([token])
            if text and "\ufffd" not in text:
                found.append(token)
            if len(found) == count:
                break
        if not found:
            raise TextError("no token of the tokenizer is text by itself; a sentence has nothing to start with.")
        return np.resize(np.array(found, np.int64), count)


def _around(before: Sequence[int], ids_BWS: Ints, after: Sequence[int] = ()) -> Ints:
    """Rows with the same tokens put before and after each."""
    edges = [np.tile(np.array(part, np.int64), (*ids_BWS.shape[:2], 1)) for part in (before, after)]
    return np.concatenate([edges[0], ids_BWS, edges[1]], axis=-1)


def _joined(first_BW1: Ints, written: Written) -> list[Ints]:
    """Each sentence with the first token of the branch that it went on from."""
    return [np.concatenate([first_BW1[b, written.branch_B[b]], row]) for b, row in enumerate(written.ids)]


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Tokens with which the model ends a text."""
    told = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = told if isinstance(told, list) else [told]
    return {int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None}
