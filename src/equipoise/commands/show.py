"""Printing of results: tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType


def show(as_json: bool, rows: Mapping[str, Any], tables: Iterable[RenderableType], written: Path | None) -> None:
    """Print one result: JSON on standard output, or tables and where the file went."""
    if as_json:
        print(json.dumps(rows, indent=2, allow_nan=False))
        return
    from rich.console import Console

    console = Console(highlight=False)
    for table in tables:
        plain = isinstance(table, str)  # may be meant to be pasted: not wrapped, and its brackets are no markup
        console.print(table, soft_wrap=plain, markup=not plain)
        console.print()
    if written:
        console.print(f"written: {written}", markup=False)


def show_evaluation(as_json: bool, evaluation: Any, written: Path | None) -> None:
    """Print an evaluation."""
    from equipoise.reporting.rows import evaluation_rows
    from equipoise.reporting.tables import evaluation_tables

    show(as_json, evaluation_rows(evaluation), evaluation_tables(evaluation), written)


def say(quiet: bool) -> Callable[[str], None]:
    """What tells a person each step, on standard error; nothing when quiet."""
    return (lambda text: None) if quiet else (lambda text: print(f"-- {text}", file=sys.stderr, flush=True))
