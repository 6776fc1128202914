"""A recipe: everything that decides what a training run computes, read from one TOML file.

name = "qwen3-32"
mix = "mix.toml"             # the text: domains, tokenizer; shared by all recipes beside it
[model]
model_type = "qwen3_moe"     # a transformers architecture; the rest is its configuration
hidden_size = 128
[training]
steps = 2000
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError, model_validator

from equipoise.errors import EquipoiseError


class RecipeError(EquipoiseError):
    """A recipe cannot be read, or asks for what cannot be trained."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Domain(_Section):
    """One kind of text: its files under the data directory, its share of the rows, and where it is from."""

    train: tuple[str, ...] = Field(min_length=1)
    heldout: tuple[str, ...] = Field(min_length=1)
    weight: float = Field(default=1.0, gt=0)
    source: str = ""
    licence: str = ""


class Mix(_Section):
    """The text that models are trained on.

    Attributes:
        tokenizer: directory of the tokenizer, relative to the file; trained there when it does not exist.
        vocabulary: its size when it is trained.
        domains: name -> text.
    """

    tokenizer: str
    vocabulary: int = Field(default=8192, ge=512, le=65536)
    domains: dict[str, Domain] = Field(min_length=1)


class Training(_Section):
    """The optimisation.

    Attributes:
        steps: optimizer steps of the whole run.
        batch_size, seq_len: rows of one step, and tokens of one row (of both stacks together for encoder-decoder models).
        text_tokens: distinct tokens that are used, then read again in another order; None for all there are. A domain that is
            smaller than its share is read again sooner.
        learning_rate: its peak, after `warmup` steps; a cosine then lowers it to `final_fraction` of the peak.
        relative: learning rates are relative: each tensor's is times the root mean square of its initial values. T5 and Switch
            initialise tensors on scales a factor of 60 apart, on which no single rate works (Adafactor, arXiv:1804.04235, 8).
        rates: part of a tensor's name -> what the learning rate is times for it, in place of 1 or its `relative` scale.
            Few steps move the row of a rare token, so embeddings want more than matrices (as in muP, arXiv:2203.03466).
        undecayed: parts of the names of matrices that do not decay either; decay at a high rate would wipe out rare rows.
        weight_decay, beta1, beta2: of AdamW; matrices alone decay.
        clip: largest norm of the gradient.
        precision: of the products: "fp32", "bf16" (weights and moments stay fp32), or "auto": bf16 on a GPU, fp32 on a CPU.
        encoder_fractions: encoder-decoder models read this part of a row in the encoder; steps take the fractions in turn.
        seed: initial weights and order of the text.
        threads: of one process on a CPU; the same number gives the same bits.
        watch_every, watch_rows: steps between held-out measurements, and rows per domain of each.
        checkpoint_every: steps between checkpoints.
    """

    steps: int = Field(ge=1)
    batch_size: int = Field(default=8, ge=1)
    seq_len: int = Field(default=512, ge=8)
    text_tokens: int | None = Field(default=None, ge=1)
    learning_rate: float = Field(default=3e-3, gt=0)
    relative: bool = False
    rates: dict[str, PositiveFloat] = Field(default_factory=dict)
    undecayed: tuple[str, ...] = ()
    warmup: int = Field(default=100, ge=0)
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    weight_decay: float = Field(default=0.1, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    clip: float = Field(default=1.0, gt=0)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    encoder_fractions: tuple[float, ...] = Field(default=(0.5,), min_length=1)
    seed: int = Field(default=0, ge=0)
    threads: int = Field(default=1, ge=1)
    watch_every: int = Field(default=250, ge=1)
    watch_rows: int = Field(default=4, ge=1)
    checkpoint_every: int = Field(default=250, ge=1)


class Recipe(_Section):
    """One training run.

    Attributes:
        name: of the model.
        model: `model_type` and the configuration of the architecture, in transformers' words.
        training: the optimisation.
        extensions: registered extension -> its options, in the order in which they act.
        mix_file: the TOML file of the text.
        mix: what it says.
        dense: name of the recipe of the dense model of equal active size, if this is an MoE model with one.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: dict[str, Any]
    training: Training
    extensions: dict[str, dict[str, Any]] = Field(default_factory=dict)
    mix_file: Path
    mix: Mix
    dense: str | None = None

    @model_validator(mode="after")
    def _has_architecture(self) -> Recipe:
        if not isinstance(self.model.get("model_type"), str):
            raise ValueError("[model] needs a model_type, such as 'qwen3_moe'")
        return self

    @property
    def tokenizer_directory(self) -> Path:
        """Where the tokenizer is, or will be."""
        return (self.mix_file.parent / self.mix.tokenizer).resolve()

    def fingerprint(self) -> str:
        """sha256 over what decides the computation; where files lie and how often is looked at are left out."""
        told = self.model_dump(mode="json", exclude={"name", "mix_file", "dense"})
        for name in ("watch_every", "watch_rows", "checkpoint_every"):
            told["training"].pop(name)
        for name in ("rates", "undecayed", "text_tokens"):  # decide nothing when empty, and older fingerprints have none
            if not told["training"][name]:
                told["training"].pop(name)
        for domain in told["mix"]["domains"].values():
            domain.pop("source"), domain.pop("licence"), domain.pop("heldout")
        told["mix"].pop("tokenizer")
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def read_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe and its mix.

    Raises:
        RecipeError: a file is missing or not TOML, or a field is unknown, missing or out of range; the field is named.
    """
    path = Path(path)
    told = _toml(path)
    mix_file = path.parent / str(told.pop("mix", "mix.toml"))
    return _checked(Recipe, {**told, "mix_file": mix_file, "mix": read_mix(mix_file)}, path)


def read_mix(path: str | Path) -> Mix:
    """Read and check a mix of text.

    Raises:
        RecipeError: as `read_recipe`.
    """
    return _checked(Mix, _toml(Path(path)), Path(path))


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"recipe '{path}' does not exist.") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"cannot read '{path}' as TOML: {error}.") from error


S = TypeVar("S", bound=BaseModel)


def _checked(kind: type[S], told: dict[str, Any], path: Path) -> S:
    try:
        return kind.model_validate(told)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise RecipeError(f"'{path}': {where}: {first['msg']} (given: {str(first.get('input'))[:80]}).") from error
