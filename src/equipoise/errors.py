"""What a user can get wrong. Every message says what was given, what is allowed and what to do next."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class EquipoiseError(Exception):
    """Base of all errors that a user can cause and mend; the command line prints its text as one line."""


class ModelError(EquipoiseError):
    """The model has no MoE layers, is of an unsupported kind, or holds unusable weights."""


class TextError(EquipoiseError):
    """The text given is missing, empty, or too short to measure anything on."""


class ProfileError(EquipoiseError):
    """A profile is truncated, inconsistent, or belongs to another model or routing policy."""


class PlanError(EquipoiseError):
    """A plan is invalid, cannot be met, or belongs to another model."""


class CheckpointError(EquipoiseError):
    """A directory cannot be written, or does not hold the balanced model it should."""


class RecordingError(EquipoiseError):
    """The recorder saw nothing, or saw another number of selections than tokens times top-k."""


class ParallelError(EquipoiseError):
    """Processes that run a model together could not start, or one of them ended or hangs."""


def missing_package(purpose: str, *packages: str, instead: str = "") -> EquipoiseError:
    """An error for a package that a part of the library needs and that is not installed.

    Args:
        purpose: what needs it, as the subject of the sentence, with its verb ("the page needs").
        packages: names on the package index.
        instead: what can be done without it.
    """
    remedy = f"; or {instead}" if instead else ""
    return EquipoiseError(f"{purpose} {' and '.join(packages)}, not installed here: pip install {' '.join(packages)}{remedy}.")


def unknown_name(kind: str, given: str, allowed: Iterable[str]) -> EquipoiseError:
    """An error for a name that is not registered, with the nearest known name.

    Args:
        kind: what is named, in the singular ("method", "metric").
        given: the name that was not found.
        allowed: the names that exist.
    """
    names = sorted(allowed)
    near = get_close_matches(given, names, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return EquipoiseError(f"unknown {kind} '{given}'; known: {', '.join(names)}.{hint}")
