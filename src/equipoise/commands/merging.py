"""The command that puts profiles of separate runs together: merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from equipoise.arguments import Json
from equipoise.commands.show import show


def merge(
    profiles: Annotated[list[Path], typer.Argument(help="two or more profiles of one model, of different text")],
    out: Annotated[Path, typer.Option(help="file to write, such as x.profile.safetensors")],
    as_json: Json = False,
) -> None:
    """Make one profile from those of separate runs, as if one run had seen all their text."""
    from equipoise.artifacts import Profile
    from equipoise.profiling.merge import HOW
    from equipoise.profiling.merge import merge as join
    from equipoise.reporting.rows import profile_rows
    from equipoise.reporting.tables import profile_tables

    result = join([Profile.load_file(path) for path in profiles])
    result.save(out)
    how = [f"{name}: {words}" for name, words in result.source.options[HOW].items()]
    show(as_json, profile_rows(result), [*profile_tables(result), *how], out)
