"""One forward pass of a batch: inputs on the model's device, only what is needed of the output.

Shapes: B rows, S positions, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from equipoise.errors import ModelError
from equipoise.profiling.sequences import IGNORED, Batch


@contextmanager
def evaluation_mode(*models: Any) -> Iterator[None]:
    """No dropout while measuring; each model's own mode afterwards."""
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, training in zip(models, modes, strict=True):
            model.train(training)


def run_batch(model: Any, batch: Batch, *, all_logits: bool, gradients: bool = False) -> Any:
    """Run a model over a batch without cache.

    Args:
        model: a transformers model in evaluation mode.
        batch: inputs of the pass.
        all_logits: False asks models that can for the last position's logits alone, which saves the vocabulary product.
        gradients: keep what a backward pass needs.

    Returns:
        The model's output.
    """
    device = next(model.parameters()).device
    if device.type == "meta":  # accelerate holds the weights back, and takes the inputs to the device itself
        device = torch.device("cpu")
    inputs = {name: torch.from_numpy(array).to(device) for name, array in batch.inputs().items()}
    accepted = inspect.signature(model.forward).parameters
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    if "logits_to_keep" in accepted and not all_logits:
        inputs["logits_to_keep"] = 1
    with torch.set_grad_enabled(gradients):
        return model(**inputs)


def negative_log_likelihood(model: Any, batch: Batch) -> tuple[float, int]:
    """Summed negative log-likelihood of a batch's labels in nats, and how many labels there are.

    Raises:
        ModelError: the model has no language-model head, or predicts something that is not a number.
    """
    logits = getattr(run_batch(model, batch, all_logits=True), "logits", None)
    if logits is None or logits.ndim != 3:
        raise ModelError(f"{type(model).__name__} has no language-model head, so it has no loss; load it as a causal LM.")
    total, count = 0.0, 0
    for logits_SV, labels_S in zip(logits, torch.from_numpy(batch.labels).to(logits.device), strict=True):
        scored = labels_S != IGNORED
        if scored.any():  # row by row: float32 logits of a whole batch can be larger than the model
            loss = torch.nn.functional.cross_entropy(logits_SV[scored].float(), labels_S[scored], reduction="sum")
            total += float(loss.double())
            count += int(scored.sum())
    if not total < float("inf"):
        raise ModelError(f"the model's loss on scenario '{batch.scenario}' is {total}; check its weights and its dtype.")
    return total, count
