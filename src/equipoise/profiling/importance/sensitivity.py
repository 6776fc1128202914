"""How much the model's predictions suffer when one layer's routed output is wrong: one measurement per MoE layer.

Shapes: L MoE layers, E logical experts, N predicted tokens of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from equipoise.errors import EquipoiseError, ModelError
from equipoise.models.layers import MoELayer, expert_matrices
from equipoise.precisions import Precision
from equipoise.profiling.forward import run_batch
from equipoise.profiling.importance.base import Floats
from equipoise.profiling.importance.sampling import spread_budget
from equipoise.profiling.sequences import IGNORED, Batch
from equipoise.quantization.formats import round_trip

PROBE_ERROR = 0.1
"""Relative squared error of a layer that is probed with: large against the rounding noise that any change of a 16-bit
model's weights sets off in later layers, small enough for the divergence to grow in proportion to the error still."""
ROWS = 512
"""Rows of logits compared at a time in float32."""


def choose_probes(errors: Mapping[str, Floats], forms: Mapping[str, Precision]) -> list[Precision | None]:
    """The format to probe each layer with: the one whose error is nearest to `PROBE_ERROR`; None where nothing has any.

    Args:
        errors: name -> [L, E] relative squared errors.
        forms: the formats of these names.
    """
    names = [name for name, form in forms.items() if not form.is_float]
    if not names:
        return [None] * len(next(iter(errors.values())))
    total_QL = np.stack([errors[name].sum(1) for name in names])
    with np.errstate(divide="ignore"):
        far_QL = np.abs(np.log(total_QL / PROBE_ERROR))
    far_QL[~np.isfinite(far_QL)] = np.inf
    best_L = far_QL.argmin(0)
    return [forms[names[q]] if np.isfinite(far_QL[q, layer]) else None for layer, q in enumerate(best_L.tolist())]


def first_rows(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """The first row of some batches, of all scenarios in turn, until they hold a budget of tokens; at least one of each."""
    names = ("input_ids", "attention_mask", "labels", "decoder_input_ids", "decoder_attention_mask")
    rows = [replace(b, **{n: getattr(b, n)[:1] for n in names if getattr(b, n) is not None}) for b in batches]
    return [rows[step] for step in spread_budget(rows, tokens)]


def layer_divergence(
    model: Any,
    layers: Sequence[MoELayer],
    probes: Sequence[Precision | None],
    batches: Sequence[Batch],
    done_L: Floats,
    advance: Callable[[int, int], None],
) -> Floats:
    """[L] KL divergence of the model from itself, in nats per predicted token, with one layer's experts rounded.

    Args:
        model: in evaluation mode; its weights are as before when this returns.
        layers: its MoE layers.
        probes: format of each layer; 0 where it is None.
        batches: text to predict.
        done_L: what was measured before an interruption, nan where not; filled in place.
        advance: takes (done, total) units of work.

    Raises:
        EquipoiseError: the text has nothing to predict.
        ModelError: the model has no language-model head, or an architecture whose expert weights cannot be changed in place.
    """
    todo = [index for index in range(len(layers)) if np.isnan(done_L[index])]
    if not todo:
        return done_L
    total_L, tokens, work = np.zeros(len(layers)), 0, 0
    for batch in batches:  # batch by batch, so that no more than one batch's predictions are kept
        base_NV = _logits(model, batch)
        tokens += len(base_NV)
        for index in todo:
            probe = probes[index]
            if probe is not None and len(base_NV):
                with rounded(layers[index], probe):
                    total_L[index] += _divergence(base_NV, _logits(model, batch))
            work += 1
            advance(work, len(todo) * len(batches))
    if not tokens:
        raise EquipoiseError("output_error: the text has no second token to predict; give more text, or sensitivity_tokens 0.")
    done_L[todo] = total_L[todo] / tokens
    return done_L


@contextmanager
def rounded(layer: MoELayer, form: Precision) -> Iterator[None]:
    """Store all experts of a layer in a format and read them back, for a while.

    Raises:
        ModelError: the architecture does not give its experts' weights as views that can be changed.
    """
    parts = [matrix for expert in range(layer.num_experts) for matrix in expert_matrices(layer, expert)]
    kept = [part.detach().clone() for part in parts]
    with torch.no_grad():
        try:
            for part, original in zip(parts, kept, strict=True):
                part.copy_(round_trip(original, form))
            if torch.equal(expert_matrices(layer, 0)[0], kept[0]) and bool(kept[0].any()):
                raise ModelError(
                    f"the experts of {layer.path} cannot be rounded in place: their weights are not views; "
                    "measure without sensitivity_tokens."
                )
            yield
        finally:
            for part, original in zip(parts, kept, strict=True):
                part.copy_(original)


def _logits(model: Any, batch: Batch) -> torch.Tensor:
    """[N, V] logits of the predicted tokens."""
    logits = getattr(run_batch(model, batch, all_logits=True), "logits", None)
    if logits is None or logits.ndim != 3:
        raise ModelError(f"{type(model).__name__} has no language-model head, so layers' sensitivity cannot be measured.")
    return logits[torch.from_numpy(batch.labels != IGNORED).to(logits.device)]


def _divergence(base_NV: torch.Tensor, other_NV: torch.Tensor) -> float:
    """Sum over tokens of KL(base || other)."""
    total = 0.0
    for base, other in zip(base_NV.split(ROWS), other_NV.split(ROWS), strict=True):
        p, q = base.float().log_softmax(-1), other.float().log_softmax(-1)
        total += float((p.exp() * (p - q)).nan_to_num(0.0).sum(dtype=torch.float64))
    return max(total, 0.0)
