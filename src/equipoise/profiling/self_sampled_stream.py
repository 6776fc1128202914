"""A batch of sentences that a model is writing: its cache, its next-token logits, and the experts that each sentence chose.

Shapes: R rows (sentences or their branches), S tokens of a row so far, V vocabulary, L MoE layers, E experts of the widest
layer, T tokens of one call, K top-k.
"""

from __future__ import annotations

import inspect
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equipoise.errors import ModelError
from equipoise.models.layers import MoELayer, find_moe_layers
from equipoise.models.recorder import Recorder, record
from equipoise.models.tokens import TokenBatch

PROBE_TOLERANCE = 0.1
"""Difference that the cache may make, as a part of the difference that another row's text makes; bf16 stays below 0.05."""


class Stream:
    """Context manager around a model that writes; `start`, then `extend` and `select` in any order.

    Routing is read from what reaches the experts, real tokens only. Every row of a batch has the same length, so that
    nothing is padded and a row's tokens do not depend on the other rows.

    Args:
        model: a causal or encoder-decoder language model in evaluation mode.
        cache: keep keys and values between steps; False runs every row's whole text at each step, which is slow but asks
            nothing of the architecture. `keeps_cache` tells whether an architecture can do with the cache.

    Raises:
        ModelError: no MoE layers, or no language-model head.

    Attributes:
        ids_RS: [R, S] the rows' tokens; the decoder's, where there is one.
        counts_LRE: [L, R, E] selections of each routed expert by each row's tokens that have been run.
    """

    def __init__(self, model: Any, *, cache: bool = True) -> None:
        if model.get_output_embeddings() is None:
            name = type(model).__name__
            raise ModelError(f"{name} has no language-model head, so it cannot write text; load it as a causal LM.")
        self.model = model
        self.layers: tuple[MoELayer, ...] = find_moe_layers(model)
        self.device = next(model.parameters()).device
        self._cached = cache
        self._size_E = max(layer.num_experts for layer in self.layers)
        self._recorder: Recorder = record(model, transitions=False, coactivation=False)
        self._recorder.add_listener(self._listen)
        accepted = inspect.signature(model.forward).parameters
        self._last_only: dict[str, int] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._is_encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        self._past: Any = None
        self._encoded: Any = None
        self.ids_RS, self._counts_LRE, self._counts_encoder = self._empty(0)

    def __enter__(self) -> Stream:
        self._recorder.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._recorder.__exit__(kind, error, trace)

    @property
    def counts_LRE(self) -> Tensor:
        """[L, R, E] selections of each routed expert so far, float32."""
        return self._counts_LRE[..., :-1]

    def start(self, ids_RS: Tensor, encoder_ids_RS: Tensor | None = None) -> Tensor:
        """Begin rows anew.

        Args:
            ids_RS: [R, S] first tokens of each row; of the decoder for an encoder-decoder model.
            encoder_ids_RS: [R, S'] what the encoder reads, for encoder-decoder models alone.

        Returns:
            [R, V] float32 logits of the next token.

        Raises:
            ModelError: the model predicts something that is not a number.
        """
        assert (encoder_ids_RS is not None) == self._is_encoder_decoder, "an encoder's tokens belong to encoder-decoder models"
        _, self._counts_LRE, self._counts_encoder = self._empty(ids_RS.shape[0])
        self._past, self._encoded = None, None
        self.ids_RS = ids_RS.to(self.device)
        if encoder_ids_RS is not None:
            with torch.no_grad():
                self._encoded = self.model.get_encoder()(input_ids=encoder_ids_RS.to(self.device))
            self._counts_encoder = self._counts_LRE.clone()
        return self._run(self.ids_RS)

    def extend(self, ids_R: Tensor) -> Tensor:
        """One more token for every row.

        Args:
            ids_R: [R] the tokens.

        Returns:
            [R, V] float32 logits of the token after it.

        Raises:
            ModelError: the model predicts something that is not a number.
        """
        new_R1 = ids_R.to(self.device)[:, None]
        self.ids_RS = torch.cat([self.ids_RS, new_R1], dim=1)
        if self._cached:
            return self._run(new_R1)
        self._counts_LRE.copy_(self._counts_encoder)  # the whole text is counted again
        return self._run(self.ids_RS)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows; a row may be left out, moved, or repeated.

        Args:
            rows: [R'] indices of rows.
        """
        rows = rows.to(self.device)
        if torch.equal(rows, torch.arange(len(self.ids_RS), device=self.device)):
            return
        self.ids_RS = self.ids_RS[rows]
        self._counts_LRE = self._counts_LRE[:, rows]
        self._counts_encoder = self._counts_encoder[:, rows]
        if self._past is not None:
            self._past.reorder_cache(rows)
        if self._encoded is not None:
            self._encoded["last_hidden_state"] = self._encoded.last_hidden_state[rows]

    def _empty(self, size_R: int) -> tuple[Tensor, Tensor, Tensor]:
        """No tokens, and no selections of either stack; the last column counts what reached no routed expert."""
        counts_LRE = torch.zeros((len(self.layers), size_R, self._size_E + 1), dtype=torch.float32, device=self.device)
        return torch.zeros((size_R, 0), dtype=torch.int64, device=self.device), counts_LRE, counts_LRE.clone()

    def _run(self, ids_RS: Tensor) -> Tensor:
        inputs: dict[str, Any] = {"use_cache": self._cached, **self._last_only}
        if self._past is not None:
            inputs["past_key_values"] = self._past
        if self._is_encoder_decoder:
            inputs |= {"encoder_outputs": self._encoded, "decoder_input_ids": ids_RS}
        else:
            inputs["input_ids"] = ids_RS
        with torch.no_grad():
            output = self.model(**inputs)
        self._past = getattr(output, "past_key_values", None) if self._cached else None
        logits_RV: Tensor = output.logits[:, -1].float()
        if not torch.isfinite(logits_RV.sum()) and not torch.isfinite(logits_RV).all():
            raise ModelError("the model's logits are not finite numbers, so it cannot write text; check its weights and dtype.")
        return logits_RV

    def _listen(self, layer: MoELayer, hidden: Tensor, experts_TK: Tensor, weights_TK: Tensor, tokens: TokenBatch) -> None:
        """Count what one layer's tokens chose, row by row."""
        absent_TK = (experts_TK < 0) | (experts_TK >= layer.num_experts)
        if not tokens.all_real:
            absent_TK = absent_TK | ~tokens.real_T.to(experts_TK.device)[:, None]
        ids_TK = experts_TK.long().masked_fill(absent_TK, self._size_E)
        flat = (ids_TK + tokens.sequence_T.to(ids_TK.device)[:, None] * (self._size_E + 1)).reshape(-1)
        counts = self._counts_LRE[layer.index].view(-1)
        flat = flat.to(counts.device)
        counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=counts.dtype))


def keeps_cache(model: Any, ids_RS: NDArray[np.int64]) -> tuple[bool, int]:
    """Whether a model predicts the same with its cache, rows reordered, as from the whole text; tried out, not looked up.

    Args:
        model: a causal or encoder-decoder language model in evaluation mode.
        ids_RS: [2, S] tokens of two different rows to try with.

    Returns:
        Whether the cache can be used, and the size V of the vocabulary.

    Raises:
        ModelError: the model predicts something that is not a number, or has no language-model head.
    """
    ids = torch.from_numpy(ids_RS)
    encoder = ids if getattr(model.config, "is_encoder_decoder", False) else None
    rows = torch.tensor([1, 0, 0])
    with Stream(model, cache=False) as whole:
        whole.start(ids[:, :-1], encoder)
        expected = whole.extend(ids[:, -1])
    try:
        with Stream(model) as stream:
            stream.start(ids[:, :-1], encoder)
            stream.select(rows)
            found = stream.extend(ids[rows, -1])
    except torch.OutOfMemoryError:
        raise  # without the cache more memory would be needed, not less
    except (RuntimeError, AttributeError, TypeError, ValueError, IndexError):
        return False, expected.shape[1]  # a cache of the architecture's own that knows no beams; the whole text runs, as above
    error = float((found - expected[rows.to(found.device)]).abs().mean())
    return error <= PROBE_TOLERANCE * float((expected[0] - expected[1]).abs().mean()), expected.shape[1]
