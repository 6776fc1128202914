"""A freshly initialised model of a recipe: a stock transformers architecture, or a registered one of our own."""

from __future__ import annotations

from typing import Any

import torch

import equipoise.lab.recipes  # noqa: F401  registers what recipe files name
from equipoise.errors import EquipoiseError
from equipoise.lab.extensions import ARCHITECTURES
from equipoise.lab.recipe import Recipe, RecipeError


def build_model(recipe: Recipe, tokenizer: Any) -> Any:
    """Make a recipe's model with weights drawn from its seed.

    The tokenizer decides vocabulary and special tokens; everything else is as the recipe says, or transformers' default.

    Raises:
        RecipeError: unknown `model_type`, a field that its configuration does not have, or values it refuses.
    """
    told = dict(recipe.model)
    model_type = told.pop("model_type")
    told = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **told,
    }
    torch.manual_seed(recipe.training.seed)
    if model_type in ARCHITECTURES:
        return ARCHITECTURES.get(model_type)(**told)
    return _stock(model_type, told)


def _stock(model_type: str, told: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    try:
        known = AutoConfig.for_model(model_type)
    except ValueError as error:
        ours = ", ".join(ARCHITECTURES.names()) or "none"
        raise RecipeError(
            f"unknown model_type '{model_type}'; give one of transformers', or a registered one ({ours})."
        ) from error
    strange = sorted(name for name in told if not hasattr(known, name) and name != "bos_token_id")
    if strange:
        raise RecipeError(f"the configuration of '{model_type}' has no field '{strange[0]}'.")
    if not hasattr(known, "bos_token_id"):  # T5 has none, and its place is not the recipe's doing
        told.pop("bos_token_id", None)
    if known.is_encoder_decoder:
        told.setdefault("decoder_start_token_id", told["pad_token_id"])
    try:
        config = AutoConfig.for_model(model_type, **told)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        return kind.from_config(config)
    except EquipoiseError:
        raise
    except Exception as error:  # whatever a configuration or a constructor refuses
        raise RecipeError(f"transformers refuses this configuration of '{model_type}': {error}") from error
