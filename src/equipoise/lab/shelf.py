"""The shelf: small MoE models whose routing was learned here, on real text. For tests and benchmarks, not for use.

The weights live in the repository beside the package, not in the wheel.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from equipoise.errors import EquipoiseError

SHELF_VARIABLE = "EQUIPOISE_SHELF"
WEIGHTS = "model.safetensors"


def shelf_directory() -> Path:
    """Where the shelf is: as the environment says, else `shelf/` of the checkout that this package is in.

    Raises:
        EquipoiseError: there is none, as in an installation from a wheel.
    """
    told = os.environ.get(SHELF_VARIABLE)
    place = Path(told) if told else Path(__file__).resolve().parents[3] / "shelf"
    if not place.is_dir():
        raise EquipoiseError(
            f"there is no shelf of small models at '{place}': they are in the repository, not in the wheel. "
            f"Clone it and install from there, or name the directory in {SHELF_VARIABLE}."
        )
    return place


def names() -> list[str]:
    """Models on the shelf, in order of name."""
    return sorted(path.parent.name for path in shelf_directory().glob(f"*/{WEIGHTS}"))


def path(name: str) -> Path:
    """Directory of a model, for `from_pretrained` and for the command.

    Raises:
        EquipoiseError: no such model; the message lists those that are there.
    """
    if name not in names():
        raise EquipoiseError(f"there is no model '{name}' on the shelf; there are: {', '.join(names()) or 'none'}.")
    return shelf_directory() / name


def load(name: str, *, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """A model of the shelf and its tokenizer.

    Args:
        name: one of `names()`.
        dtype: "auto" (bf16, as stored), "fp32", "bf16" or "fp16".
        device: where the model goes.

    Raises:
        EquipoiseError: no such model, or no shelf.
    """
    from equipoise.profiling.loading import load_model, load_tokenizer

    directory = str(path(name))
    return load_model(directory, dtype=dtype, device=device), load_tokenizer(directory)
