"""A placement on ranks as tables: predicted balance in and out of sample, the proven bound, and each layer's slots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from equipoise.reporting.style import new_table

Rows = Mapping[str, Any]


def placement_tables(rows: Rows) -> list[RenderableType]:
    """What to print of a plan that places experts on ranks.

    Args:
        rows: the plan as a dictionary (`plan_rows`), with a forecast in each layer.

    Returns:
        Head, predicted balance, what the planner wants read, and the layers.
    """
    predicted, layers = rows["predicted"], rows["layers"]
    model = rows["model"]
    where = f"{rows['units']} ranks" + (f" on {rows['nodes']} nodes" if rows["nodes"] > 1 else "")
    out: list[RenderableType] = [
        Text.from_markup(
            f"[bold]placement for {escape(model['name'])}[/bold] ({model['model_type']}: {model['moe_layers']} MoE layers, "
            f"up to {model['max_experts']} experts)\n{rows['method']}, {where}, class {rows['exactness']}"
        ),
        _balance(predicted, layers),
    ]
    if predicted["note"]:
        out.append(Text(predicted["note"], style="bold"))
    heads = ("slots/E", "copied", "most", "max/mean", "held out", "bound", "moved", "doubled")
    table = new_table("slots of each layer (decided; max/mean predicted)", ["layer"], heads)
    for row in layers:
        forecast = row["forecast"]
        most = "-" if row["most_copied"] is None else f"{row['most_copied']} x{row['most_copies']}"
        table.add_row(
            str(row["layer"]), f"{row['slots']}/{row['experts']}", str(row["copied_experts"]), most,
            _fixed(forecast["in_sample"]), _fixed(forecast["out_of_sample"]), _fixed(forecast["lower_bound"]),
            "-" if forecast["moved"] is None else str(forecast["moved"]), str(forecast["duplicates"]),
        )  # fmt: skip
    return [*out, table]


def _balance(predicted: Rows, layers: list[Rows]) -> Table:
    """Ratios of the largest rank load to the mean, averaged over layers."""
    table = new_table("max/mean rank load on the profile it was made from (predicted)", ["mean over layers"], ["value"])
    table.add_row("experts in order, no copies", _fixed(predicted["lis_raw"]))
    table.add_row("this plan", f"{_fixed(predicted['lis'])} (worst layer {_fixed(predicted['lis_max'])})")
    table.add_row("proven lower bound for these slots", _fixed(predicted["lower_bound"]))
    outside = [row["forecast"]["out_of_sample"] for row in layers if row["forecast"]["out_of_sample"] is not None]
    if outside:
        mean = sum(outside) / len(outside)
        table.add_row("this method on scenarios held out", f"{_fixed(mean)} (worst layer {_fixed(max(outside))})")
    moved = [row["forecast"]["moved"] for row in layers if row["forecast"]["moved"] is not None]
    if moved:
        table.add_row("slots that move from the plan in force", f"{sum(moved):,} of {sum(row['slots'] for row in layers):,}")
    if predicted["bytes"]:
        table.add_row("bytes of all slots", f"{predicted['bytes']:,}")
    return table


def _fixed(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
