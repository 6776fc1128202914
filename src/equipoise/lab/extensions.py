"""What a training recipe adds to plain training: a loss term, something done after a step, an architecture of its own.

An extension is a class registered in `EXTENSIONS` and named in a recipe's `[extensions.NAME]` with its options. An
architecture of one's own is registered in `ARCHITECTURES` and named by `model_type`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from equipoise.profiling.sequences import Batch
from equipoise.registry import Registry


@dataclass(frozen=True, eq=False)
class Step:
    """One training step, as extensions see it.

    Attributes:
        number: from 0.
        model: the model in training.
        batch: what it was given.
        output: what it answered, with its graph; None after the step.
    """

    number: int
    model: Any
    batch: Batch
    output: Any


class Extension:
    """Base of extensions; every method does nothing until it is overridden."""

    def attach(self, model: Any) -> None:
        """Prepare a freshly built model, before its first step or its resumed state."""

    def loss(self, step: Step) -> Tensor | None:
        """A term that is added to the loss, or None."""
        return None

    def after_step(self, step: Step) -> None:
        """Act after the optimizer's step."""

    def state(self) -> dict[str, Tensor]:
        """Tensors that a resumed run needs."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""


EXTENSIONS: Registry[Callable[..., Extension]] = Registry("extension")
ARCHITECTURES: Registry[Callable[..., Any]] = Registry("architecture")
