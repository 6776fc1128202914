"""Plans of chosen precisions, balanced models on disk, and their logits, for tests of exports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from equipoise.artifacts import ModelFacts, Plan
from equipoise.execution.apply import apply_plan
from equipoise.execution.checkpoint import save_balanced
from equipoise.models.layers import model_facts
from execution.helpers import make_plan, token_batch


def layered_plan(facts: ModelFacts, forms: Sequence[str], extra: int = 0, seed: int = 0) -> Plan:
    """A plan with copies whose layer i is in forms[i], one after the other over and over."""
    drawn = make_plan(facts, extra=extra, seed=seed)
    names = [forms[i % len(forms)] for i in range(len(drawn.layers))]
    layers = [
        layer.model_copy(update={"precisions": (name,) * layer.num_slots})
        for layer, name in zip(drawn.layers, names, strict=True)
    ]
    exact = set(names) == {facts.dtype}
    return drawn.model_copy(update={"layers": tuple(layers), "exactness": "exact" if exact else "weights"})


def batch_for(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Tokens, of a decoder too where the model has one."""
    batch = token_batch(64)
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"]
    return batch


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Of `batch_for` the model."""
    with torch.no_grad():
        return model.eval()(**batch_for(model)).logits


def saved(model: PreTrainedModel, plan: Plan, directory: Path) -> torch.Tensor:
    """Balance a model, save it, and give its logits."""
    apply_plan(model, plan, int8_activations=False)
    save_balanced(model, None, directory)
    return logits(model)


def save_original(model: PreTrainedModel, directory: Path) -> ModelFacts:
    """Save a model as it is."""
    facts = model_facts(model, "tiny")
    model.save_pretrained(directory)
    return facts
