"""A simulation's report as tables for a terminal of 80 columns; it comes as the plain dictionary that `--json` prints.

Every table says whether its figures were replayed from the experts that real tokens chose, or estimated from counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from equipoise.reporting.numbers import bytes_text, percent
from equipoise.reporting.style import new_table

Rows = Mapping[str, Any]
SAMPLES = {"in": "in sample", "out": "out of sample"}
UNITS = {"pairs": "pairs", "experts": "replicas", "ms": "ms"}


def simulation_tables(rows: Rows) -> list[RenderableType]:
    """What to print of a simulation.

    Args:
        rows: the report as a dictionary (`SimulationReport.model_dump(mode="json")`).

    Returns:
        For each traffic: balance and step time, what goes between ranks, what each rank does, and findings; then notes.
    """
    nodes = f" on {rows['nodes']} nodes" if rows["nodes"] > 1 else ""
    options = "".join(f", {name} {value}" for name, value in rows["rule_options"].items())
    out: list[RenderableType] = [
        Text.from_markup(
            f"[bold]simulation of {escape(rows['model'])}[/bold]: {rows['ranks']} ranks{nodes}; {rows['phase']} batches of "
            f"{rows['batch']:,} tokens; rule {rows['rule']}{options}; cost {escape(rows['cost'])}"
        )
    ]
    for part in rows["parts"]:
        title = f"{SAMPLES[part['sample']]}: {escape(part['name'])}, {part['batches']} batches ({part['origin']})"
        out += [
            _balance(title, part, rows["unit"]),
            _between(f"between ranks, {SAMPLES[part['sample']]} ({part['origin']})", part, rows["nodes"]),
            _ranks(f"ranks, all layers of a step, {SAMPLES[part['sample']]} ({part['origin']})", part),
            Text("\n".join(f"* {line}" for line in part["findings"])),
        ]
    out.append(Text("\n".join(rows["notes"]), style="dim"))
    return out


def _balance(title: str, part: Rows, unit: str) -> Table:
    step = f"step, {UNITS[unit]}"
    columns = ("slots", "max/mean", "p95", "tokens", "replicas", step, "p95", "waiting")
    table = new_table(title, ["plan"], columns)
    for r in part["results"]:
        # A plan that was made from other traffic than the heading says is marked.
        name = escape(r["name"]) + ("" if r["sample"] == part["sample"] or r["method"] == "contiguous" else " (out)")
        table.add_row(
            name, f"{r['slots']:g}", f"{r['imbalance']['mean']:.3f}", f"{r['imbalance']['p95']:.3f}",
            f"{r['max_tokens']['mean']:,.1f}", f"{r['max_activated']['mean']:.2f}", _time(r["step"]["mean"]),
            _time(r["step"]["p95"]), f"{100 * r['waiting']:.1f}%",
        )  # fmt: skip
    covered = max(r["uncovered"] for r in part["results"])
    table.caption = "tokens, replicas: pairs and activated replicas of the rank that has most, mean over layers and batches"
    if covered > 0:
        table.caption += f"; up to {100 * covered:.1f}% of times lie beyond the cost table and were continued"
    table.caption_justify = "left"
    return table


def _between(title: str, part: Rows, nodes: int) -> Table:
    far = nodes > 1
    columns = ["ranks/token", *(["nodes/token"] if far else []), "next on other rank"]
    table = new_table(title, ["plan"], [*columns, *(["other node"] if far else []), "weights sent", "bytes moved"])
    for r in part["results"]:
        far_cells = [f"{r['node_sends']:.3f}"] if far else []
        hops = [percent(r["rank_hops"], unit="%"), *([percent(r["node_hops"], unit="%")] if far else [])]
        table.add_row(
            escape(r["name"]),
            f"{r['rank_sends']:.3f}",
            *far_cells,
            *hops,
            f"{r['weights_moved']:.1f}",
            bytes_text(r["bytes_moved"]),
        )
    return table


def _ranks(title: str, part: Rows) -> Table:
    table = new_table(title, ["plan"], ["", "least", "on", "mean", "most", "on"])
    for r in part["results"]:
        name = escape(r["name"])
        for label, values, show in (
            ("pairs", r["ranks"]["tokens"], lambda v: f"{v:,.0f}"),
            ("replicas", r["ranks"]["activated"], lambda v: f"{v:,.1f}"),
            ("bytes read", r["ranks"]["bytes"], bytes_text),
        ):
            if values is None:
                continue
            low, high = int(np.argmin(values)), int(np.argmax(values))
            table.add_row(name, label, show(values[low]), str(low), show(float(np.mean(values))), show(values[high]), str(high))
            name = ""
    return table


def _time(value: float) -> str:
    return f"{value:.3f}" if value < 1000 else f"{value:,.0f}"
