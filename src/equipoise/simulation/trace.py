"""Recorded routing, token by token, and the batches that a server would have made of it.

Shapes: L MoE layers, T tokens, K top-k, B batches.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import math
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from equipoise.artifacts import ModelFacts
from equipoise.errors import ProfileError

Ints = NDArray[np.int64]
Phase = Literal["prefill", "decode"]
MOST_BYTES = 4 << 30
"""Most bytes that the arrays of a trace file may take once unpacked."""
BROKEN = (
    OSError, ValueError, EOFError, KeyError, RuntimeError, SyntaxError,
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, tokenize.TokenError,
)  # fmt: skip
"""What reading a damaged archive or array header may raise."""
IDS = ("topk_ids", "routed_experts")
LENGTHS = ("seq_lens", "tokens")
DOCUMENTS = ("document", "documents", "doc", "doc_ids")


@dataclass(frozen=True, eq=False)
class Trace:
    """The experts that each real token was sent to.

    Attributes:
        name: where it is from.
        ids_LTK: [L, T, K] expert of each choice, columns in the order in which the router gave them.
        document_T: [T] number of the document or request of each token; tokens of one follow each other.
    """

    name: str
    ids_LTK: NDArray[np.integer[Any]]
    document_T: Ints

    def __post_init__(self) -> None:
        if self.ids_LTK.ndim != 3 or 0 in self.ids_LTK.shape or self.document_T.shape != (self.ids_LTK.shape[1],):
            raise ProfileError(
                f"trace '{self.name}': ids of shape {self.ids_LTK.shape} with documents of shape {self.document_T.shape}; "
                "expected [layers, tokens, top_k] and [tokens]."
            )

    @property
    def tokens(self) -> int:
        """T."""
        return int(self.ids_LTK.shape[1])

    @cached_property
    def sha256(self) -> str:
        """Hash of the ids, to tell one traffic from another."""
        return hashlib.sha256(np.ascontiguousarray(self.ids_LTK, np.int64).tobytes()).hexdigest()

    def check(self, model: ModelFacts) -> None:
        """Raise `ProfileError` when the trace cannot be of this model."""
        layers, _, top_k = self.ids_LTK.shape
        if layers != len(model.layers):
            raise ProfileError(
                f"trace '{self.name}' has {layers} MoE layers, '{model.name}' has {len(model.layers)}; give one of that model."
            )
        for index, facts in enumerate(model.layers):
            ids = self.ids_LTK[index]
            if facts.top_k != top_k:
                raise ProfileError(
                    f"trace '{self.name}' has top-{top_k}, but layer {index} top-{facts.top_k}; give one of that model."
                )
            if int(ids.min()) < 0 or int(ids.max()) >= facts.num_experts:
                wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
                raise ProfileError(
                    f"trace '{self.name}' names expert {wrong} in layer {index}, which has 0 to {facts.num_experts - 1}; "
                    "leave out padding, and map physical ids back to logical ones."
                )
            if any(bool((ids[:, :k] == ids[:, k : k + 1]).any()) for k in range(1, top_k)):
                raise ProfileError(
                    f"trace '{self.name}' has a token that chose one expert twice in layer {index}; "
                    "are the axes in the order [layers, tokens, top_k] or [tokens, layers, top_k]?"
                )

    def select(self, documents: NDArray[np.bool_]) -> Trace:
        """The trace of some tokens.

        Args:
            documents: [T] which tokens to keep.
        """
        return Trace(self.name, self.ids_LTK[:, documents], self.document_T[documents])


def load_trace(path: str | Path, model: ModelFacts) -> Trace:
    """Read a trace from an `.npz` file.

    The file holds `topk_ids` (or `routed_experts`, as vLLM's outputs are saved), [L, T, K] or [T, L, K], told apart by the
    model's layers; rows of dense layers are left out. It may hold the document of each token (`document` [T], also `doc` or
    `doc_ids`) or the documents' lengths (`seq_lens` or `tokens` [D]); other arrays are ignored.

    Args:
        path: the file.
        model: the model that it is of.

    Raises:
        ProfileError: unreadable, too large, without ids, or not of this model; the message says which.
    """
    path = Path(path)
    wanted = (*IDS, *LENGTHS, *DOCUMENTS)
    try:
        with zipfile.ZipFile(path) as file:
            infos = {info.filename.removesuffix(".npy"): info for info in file.infolist()}
            size = sum(infos[name].file_size for name in wanted if name in infos)
            if size > MOST_BYTES:
                raise ProfileError(
                    f"trace '{path}' unpacks to {size:,} bytes; at most {MOST_BYTES:,} are read. Give fewer tokens."
                )
            found = {name: _array(file.read(infos[name])) for name in wanted if name in infos}
    except BROKEN as error:
        raise ProfileError(f"trace '{path}' is not a readable .npz file ({error}).") from error
    ids = next((found.pop(name) for name in IDS if name in found), None)
    if ids is None or ids.ndim != 3 or 0 in ids.shape or not np.issubdtype(ids.dtype, np.integer):
        given = "no array 'topk_ids'" if ids is None else f"ids of shape {ids.shape}, {ids.dtype}"
        raise ProfileError(
            f"trace '{path}' has {given}; whole numbers, [layers, tokens, top_k] or [tokens, layers, top_k], needed."
        )
    ids = np.ascontiguousarray(_moe_layers(ids, model))
    trace = Trace(path.stem, ids, _documents(path, found, ids.shape[1]))
    trace.check(model)
    return trace


def _array(data: bytes) -> NDArray[Any]:
    """The array of an `.npy` file, without taking memory for more than the file holds."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"array format {version} is not known")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(data) - stream.tell():
        raise ValueError(f"an array of shape {shape} and type {dtype} does not fit its {len(data)} bytes")
    flat = np.frombuffer(data, dtype, offset=stream.tell())
    return flat.reshape(shape, order="F" if fortran else "C")


def _moe_layers(ids: NDArray[Any], model: ModelFacts) -> NDArray[Any]:
    """[L, T, K] the MoE layers of ids whose first or second axis is MoE layers, or all layers of the model."""
    rows = [facts.model_layer for facts in model.layers]
    for axis in (0, 1):
        if ids.shape[axis] == len(rows):
            return np.moveaxis(ids, axis, 0)
    for axis in (1, 0):
        if ids.shape[axis] == model.hidden_layers > max(rows):
            return np.moveaxis(np.take(ids, rows, axis), axis, 0)
    return ids


def _documents(path: Path, found: dict[str, NDArray[Any]], tokens: int) -> Ints:
    """[T] the document of each token; one document when the file does not say."""
    for name, array in found.items():
        if not np.issubdtype(array.dtype, np.integer) or array.ndim != 1:
            raise ProfileError(
                f"trace '{path}': '{name}' of shape {array.shape}, {array.dtype}; whole numbers in one row needed."
            )
        if name in LENGTHS:
            if int(array.min(initial=0)) < 0 or int(array.sum(dtype=np.int64)) != tokens:
                raise ProfileError(f"trace '{path}': '{name}' add up to {int(array.sum())}, but there are {tokens} tokens.")
            return np.repeat(np.arange(len(array)), array)
        if len(array) != tokens:
            raise ProfileError(f"trace '{path}': '{name}' has {len(array)} entries for {tokens} tokens.")
        return array.astype(np.int64)
    return np.zeros(tokens, np.int64)


def batches_of(trace: Trace, batch: int, phase: Phase, most: int, seed: int) -> NDArray[np.integer[Any]]:
    """Batches as a server would have made them.

    Documents come in a random order, one after the other. In prefill, a batch is so many consecutive tokens of them. In
    decode, the stream is served by `batch` lanes, each of which generates one token a step and goes on with its next
    document when one ends (continuous batching): a batch is one token of every lane.

    Args:
        trace: what was recorded.
        batch: tokens of a batch over all ranks.
        phase: prefill or decode.
        most: batches at most; evenly spaced ones are kept.
        seed: of the order of documents.

    Returns:
        [L, B, T, K] experts.

    Raises:
        ProfileError: fewer tokens than one batch.
    """
    if trace.tokens < batch:
        raise ProfileError(f"trace '{trace.name}' has {trace.tokens} tokens, fewer than one batch of {batch}; lower --batch.")
    begins = np.flatnonzero(np.r_[True, np.diff(trace.document_T) != 0])
    documents = np.split(np.arange(trace.tokens), begins[1:])
    order = np.concatenate([documents[i] for i in np.random.default_rng(seed).permutation(len(documents))])
    count = trace.tokens // batch
    rows = order[: count * batch]
    table = rows.reshape(count, batch) if phase == "prefill" else rows.reshape(batch, count).T
    keep = np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))
    return np.asarray(trace.ids_LTK[:, table[keep]])
