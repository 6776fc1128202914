"""Lists that are no artifact: the points of a frontier, and the registered methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table


def frontier_table(rows: Mapping[str, Any]) -> Table:
    """The points as a table; those that no other point beats are marked."""
    table = Table(title="frontier of method rq (predicted)", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("", "bytes", "error bound", "LIS", "bound", "error", "slots"):
        table.add_column(name, justify="right")
    for row in rows["points"]:
        if row["lis"] is None:
            table.add_row("", f"{row['bytes_fraction']:.3g}", f"{row['error_bound']:.3g}", "no plan", "", "", "", style="dim")
            continue
        error = "assumed" if row["output_error"] is None else f"{row['output_error']:.4f}"
        table.add_row(
            "*" if row["efficient"] else "", f"{row['bytes_fraction']:.3g}", f"{row['error_bound']:.3g}", f"{row['lis']:.4f}",
            f"{row['lower_bound']:.4f}", error, f"{row['slots']:,}",
        )  # fmt: skip
    return table


def methods_table(kind: str, entries: Iterable[Mapping[str, str]]) -> Table:
    """The methods of one registry, one a row."""
    plural = f"{kind[:-1]}ies" if kind.endswith("y") else f"{kind}s"
    table = Table(title=plural, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("name", no_wrap=True)
    table.add_column("what it does")
    table.add_column("source", style="dim")
    for entry in entries:
        table.add_row(escape(entry["name"]), escape(entry["summary"]), escape(entry["source"]))
    return table
