"""A report as Markdown: the same findings and tables, without pictures."""

from __future__ import annotations

from collections.abc import Sequence

from equipoise.reporting.charts import ORIGINS, Table
from equipoise.reporting.report_parts import Report


def markdown(report: Report) -> str:
    """The report as Markdown.

    Args:
        report: what to say.
    """
    lines = [f"# {_plain(report.name)}", "", _plain(report.about), ""]
    if report.numbers:
        head = Table(["figure", "value", "origin"], [list(row) for row in report.numbers])
        lines += [*_table(head), ""]
    if report.findings:
        lines += ["## What matters most", ""]
        lines += [f"{i}. {_plain(f.text)} *({', '.join(f.origins)})*" for i, f in enumerate(report.findings, 1)]
        lines.append("")
    step = report.next_step
    lines += ["## Next", "", _plain(step.why), "", "```", step.command, "```", ""]
    for figure in report.figures:
        origins = f" ({', '.join(figure.origins)})" if figure.origins else ""
        lines += [f"## {_plain(figure.title)}{origins}", "", _plain(figure.caption), ""]
        if figure.table is not None:
            lines += [*_table(figure.table), ""]
    lines += ["## Sources", "", *_table(report.sources), ""]
    lines += [f"*{origin}*: {meaning}." for origin, meaning in ORIGINS.items() if origin != "quoted"]
    return "\n".join(lines) + "\n"


def _table(table: Table) -> list[str]:
    rule = [":--" if i < table.words else "--:" for i in range(len(table.heads))]
    return [_row(table.heads), _row(rule, raw=True), *(_row(cells) for cells in table.rows)]


def _row(cells: Sequence[str], *, raw: bool = False) -> str:
    return "| " + " | ".join(cell if raw else _plain(cell) for cell in cells) + " |"


def _plain(text: str) -> str:
    """Text whose characters mean nothing to Markdown."""
    out = text.replace("\\", "\\\\").replace("\n", " ")
    for mark in "|*_`<>[]#":
        out = out.replace(mark, f"\\{mark}")
    return out
