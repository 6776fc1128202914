"""Documents become rows of tokens, and rows become batches, the same for a seed on every machine.

Documents stay apart: by default a row holds an excerpt of one document, padded on the right and masked, so that no
token attends to another document and a window of rows is a window of documents. The `packed` layout joins excerpts by
the end-of-text token into full rows instead: no padding, and the usual setting of perplexity figures.

Every document is cut into excerpts of at most one row. Rows take one excerpt from each document in turn, in an order
shuffled by the seed, until the token budget is met: a budget that is small beside the text still sees many documents,
and not only their first lines.

Encoder-decoder models read the first half of an excerpt in the encoder and predict the second half in the decoder.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.errors import TextError

LAYOUTS = ("documents", "packed")
IGNORED = -100
"""Label of a position whose prediction is not scored, as in torch's cross entropy."""

# No tokenizer in use needs 16 characters for a token on average, so longer documents need not be tokenized whole.
CHARACTERS_PER_TOKEN = 16
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Framing:
    """The special tokens that a model expects around text.

    Attributes:
        prefix: tokens before a row (the begin-of-text token, where the tokenizer adds one).
        suffix: tokens after the encoder's part of a row; used by encoder-decoder models alone.
        decoder_start: first token of the decoder's part; None for decoder-only models.
        separator: token between documents in the packed layout; None when the tokenizer has none.
        padding: token that fills a row; masked, so that its choice changes nothing.
        positions: longest row that a decoder-only model was made for; None where it names none.
    """

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    decoder_start: int | None = None
    separator: int | None = None
    padding: int = 0
    positions: int | None = field(default=None, repr=False, compare=False)  # says nothing of the rows themselves

    @property
    def overhead(self) -> int:
        """Special tokens of one row, which count against its length."""
        return len(self.prefix) + (0 if self.decoder_start is None else len(self.suffix) + 1)

    @classmethod
    def of(cls, tokenizer: Any, config: Any = None) -> Framing:
        """Ask a tokenizer what it puts around text, and a model's configuration whether it has a decoder of its own.

        Raises:
            TextError: an encoder-decoder model names no token for its decoder to start with.
        """
        bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        full = list(tokenizer("a")["input_ids"])
        at = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), None)
        prefix, suffix = ((), ()) if at is None or not bare else (tuple(full[:at]), tuple(full[at + len(bare) :]))
        start = positions = None
        if not getattr(config, "is_encoder_decoder", False):
            positions = getattr(getattr(config, "get_text_config", lambda: config)(), "max_position_embeddings", None)
        else:
            choices = (getattr(config, "decoder_start_token_id", None), tokenizer.bos_token_id, tokenizer.pad_token_id)
            start = next((int(token) for token in choices if token is not None), None)
            if start is None:
                raise TextError(
                    "the encoder-decoder model names no decoder_start_token_id; set it in the model's configuration."
                )
        end = tokenizer.eos_token_id
        padding = next((int(token) for token in (tokenizer.pad_token_id, end) if token is not None), 0)
        return cls(prefix, suffix, start, None if end is None else int(end), padding, positions)


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one scenario in the order in which they are run.

    Attributes:
        scenario: name of the traffic.
        content: token ids of each row without special tokens, at least one each.
        documents: for each row, index of the document (of its first one in the packed layout).
        framing: special tokens that batches put around the content.
    """

    scenario: str
    content: tuple[Ids, ...]
    documents: tuple[int, ...]
    framing: Framing

    @property
    def tokens(self) -> int:
        """Real tokens of all rows, special ones counted."""
        return sum(ids.size + self.framing.overhead for ids in self.content)


@dataclass(frozen=True, eq=False)
class Batch:
    """Arguments of one forward pass; B rows, S (encoder or only) and Y (decoder) positions, real tokens first in a row.

    Attributes:
        scenario: name of the traffic.
        input_ids, attention_mask: [B, S].
        decoder_input_ids, decoder_attention_mask: [B, Y]; None for decoder-only models.
        labels: [B, S] or [B, Y] the token that each position predicts, `IGNORED` where there is none.
    """

    scenario: str
    input_ids: Ids
    attention_mask: Ids
    labels: Ids
    decoder_input_ids: Ids | None = None
    decoder_attention_mask: Ids | None = None

    @property
    def tokens(self) -> int:
        """Real tokens of the batch, in both stacks."""
        return int(
            self.attention_mask.sum() + (0 if self.decoder_attention_mask is None else self.decoder_attention_mask.sum())
        )

    @property
    def last_tokens(self) -> int:
        """Real tokens of the last stack: the decoder, where there is one."""
        mask = self.attention_mask if self.decoder_attention_mask is None else self.decoder_attention_mask
        return int(mask.sum())

    def inputs(self) -> dict[str, Ids]:
        """The model's keyword arguments, without labels."""
        names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def build_rows(
    documents: Sequence[str],
    tokenizer: Any,
    framing: Framing,
    *,
    scenario: str = "text",
    tokens: int,
    seq_len: int = 512,
    seed: int = 0,
    layout: str = "documents",
) -> Rows:
    """Choose and tokenize excerpts of documents until a token budget is met.

    Args:
        documents: texts of one scenario.
        tokenizer: a transformers tokenizer.
        framing: the special tokens of the model.
        scenario: name of the traffic; a part of the seed, so that scenarios do not depend on each other.
        tokens: budget of real tokens, special ones counted; all of the text when it has fewer.
        seq_len: longest row, in tokens (of both stacks together for encoder-decoder models).
        seed: order of documents and excerpts.
        layout: "documents" (a row holds one document's excerpt) or "packed" (excerpts joined by the end-of-text token).

    Raises:
        TextError: no documents, text shorter than one token, or an option out of range.
    """
    room = seq_len - framing.overhead
    _check_options(documents, framing, scenario, tokens, seq_len, layout)
    rng = np.random.default_rng([seed, zlib.crc32(scenario.encode())])
    excerpts = _excerpts(documents, tokenizer, room, tokens, rng)
    if layout == "packed":
        excerpts = _packed(excerpts, room, framing.separator)
    content: list[Ids] = []
    sources: list[int] = []
    left = tokens
    for document, ids in excerpts:
        ids = ids[: max(left - framing.overhead, 0)]
        if ids.size == 0:
            break
        content.append(ids)
        sources.append(document)
        left -= ids.size + framing.overhead
    if not content:
        raise TextError(
            f"scenario '{scenario}': the text is shorter than one token, there is nothing to measure on; give more text."
        )
    return Rows(scenario, tuple(content), tuple(sources), framing)


def _check_options(documents: Sequence[str], framing: Framing, scenario: str, tokens: int, seq_len: int, layout: str) -> None:
    if isinstance(documents, str):
        raise TextError(f"scenario '{scenario}' is one string; give a list of documents.")
    if not documents or not any(document.strip() for document in documents):
        raise TextError(f"scenario '{scenario}' has no text; give at least one document that is not empty.")
    if layout not in LAYOUTS:
        raise TextError(f"unknown layout '{layout}'; known: {', '.join(LAYOUTS)}.")
    if layout == "packed" and framing.separator is None:
        raise TextError("the tokenizer has no end-of-text token to pack documents with; use the layout 'documents'.")
    if seq_len < framing.overhead + 2:
        raise TextError(f"seq_len is {seq_len}; it must be at least {framing.overhead + 2}.")
    if framing.positions is not None and seq_len > framing.positions:
        raise TextError(f"seq_len is {seq_len}; the model was made for {framing.positions} positions, give at most that.")
    if tokens < framing.overhead + 1:
        raise TextError(f"the budget is {tokens} tokens per scenario; it must be at least {framing.overhead + 1}.")


def _excerpts(
    documents: Sequence[str], tokenizer: Any, room: int, tokens: int, rng: np.random.Generator
) -> Iterator[tuple[int, Ids]]:
    """Excerpts of at most `room` tokens, one from each document in turn; documents are tokenized when first met."""
    limit = max(CHARACTERS_PER_TOKEN * tokens, 1 << 16)
    pieces: dict[int, list[Ids]] = {}
    order = [int(d) for d in rng.permutation(len(documents))]
    while order:
        for document in order:
            if document not in pieces:
                text = documents[document]
                if len(text) > limit:
                    start = int(rng.integers(len(text) - limit + 1))
                    text = text[start : start + limit]
                ids = np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int64)
                cut = [ids[i : i + room] for i in range(0, ids.size, room)]
                pieces[document] = [cut[i] for i in rng.permutation(len(cut))]
            if pieces[document]:
                yield document, pieces[document].pop()
        order = [document for document in order if pieces[document]]


def _packed(excerpts: Iterable[tuple[int, Ids]], room: int, separator: int | None) -> Iterator[tuple[int, Ids]]:
    """Excerpts joined by the separator and cut into rows of `room` tokens; the last row may be shorter."""
    assert separator is not None, "packing was checked to have a separator"
    row: list[Ids] = []
    size, first = 0, -1
    for document, ids in excerpts:
        rest = np.append(ids, separator)
        while rest.size:
            if size == 0:
                first = document
            part, rest = rest[: room - size], rest[room - size :]
            row.append(part)
            size += part.size
            if size == room:
                yield first, np.concatenate(row)
                row, size = [], 0
    if size:
        yield first, np.concatenate(row)


def make_batches(rows: Rows, batch_size: int) -> list[Batch]:
    """Group rows, in their order, into batches padded on the right to their longest row.

    Raises:
        TextError: the batch size is below 1.
    """
    if batch_size < 1:
        raise TextError(f"batch_size is {batch_size}; it must be at least 1.")
    return [_batch(rows, i, min(i + batch_size, len(rows.content))) for i in range(0, len(rows.content), batch_size)]


def text_batches(
    texts: Mapping[str, Sequence[str]],
    tokenizer: Any,
    framing: Framing,
    *,
    tokens: int,
    seq_len: int = 512,
    batch_size: int = 4,
    seed: int = 0,
    layout: str = "documents",
) -> list[Batch]:
    """Forward passes over excerpts of each scenario, chosen as by `build_rows`.

    Args:
        texts: scenario -> documents.
        tokenizer: a transformers tokenizer.
        framing: the special tokens of the model.
        tokens: budget of each scenario.
        seq_len: longest row, in tokens.
        batch_size: rows of one pass.
        seed: order of documents and excerpts.
        layout: "documents" or "packed".

    Raises:
        TextError: as `build_rows` and `make_batches`.
    """
    rows = [
        build_rows(documents, tokenizer, framing, scenario=name, tokens=tokens, seq_len=seq_len, seed=seed, layout=layout)
        for name, documents in texts.items()
    ]
    return [batch for part in rows for batch in make_batches(part, batch_size)]


def _batch(rows: Rows, start: int, stop: int) -> Batch:
    framing = rows.framing
    contents = [ids.tolist() for ids in rows.content[start:stop]]
    if framing.decoder_start is None:
        sequences = [[*framing.prefix, *ids] for ids in contents]
        ids, mask = _pad(sequences, framing.padding)
        labels, _ = _pad([[*sequence[1:], IGNORED] for sequence in sequences], IGNORED)
        return Batch(rows.scenario, ids, mask, labels)
    halves = [(ids[: -(-len(ids) // 2)], ids[-(-len(ids) // 2) :]) for ids in contents]
    ids, mask = _pad([[*framing.prefix, *first, *framing.suffix] for first, _ in halves], framing.padding)
    decoder_ids, decoder_mask = _pad([[framing.decoder_start, *second] for _, second in halves], framing.padding)
    labels, _ = _pad([[*second, IGNORED] for _, second in halves], IGNORED)
    return Batch(rows.scenario, ids, mask, labels, decoder_ids, decoder_mask)


def _pad(sequences: Sequence[Sequence[int]], filler: int) -> tuple[Ids, Ids]:
    """[B, S] ids filled on the right, and their [B, S] mask."""
    lengths = np.array([len(sequence) for sequence in sequences])
    mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
    ids = np.full(mask.shape, filler, np.int64)
    ids[mask == 1] = np.concatenate([np.asarray(sequence, np.int64) for sequence in sequences])
    return ids, mask


def fingerprint(rows: Iterable[Rows]) -> str:
    """sha256 over the scenarios' names and the token ids of all rows, with row boundaries and special tokens."""
    digest = hashlib.sha256()
    for scenario in rows:
        digest.update(f"{scenario.scenario}\0{scenario.framing}\0".encode())
        for ids in scenario.content:
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(ids, "<i8").tobytes())
    return digest.hexdigest()
