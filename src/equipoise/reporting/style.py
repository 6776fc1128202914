"""How tables look on a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.table import Table


def new_table(title: str, left: Iterable[str], right: Iterable[str] = ()) -> Table:
    """A table with its title, the heads of its columns of words, then those of its columns of figures."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", overflow="fold")
    return table
