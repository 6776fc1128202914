"""A report as one page of HTML that holds everything it needs: no network, light and dark, any width of screen, paper."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from equipoise.errors import missing_package
from equipoise.reporting import palette
from equipoise.reporting.charts import ORIGINS, Figure, Origin, Table, height_of
from equipoise.reporting.charts_plotly import figure_spec
from equipoise.reporting.report_parts import Report


def page(report: Report) -> str:
    """The report as HTML.

    plotly.js and the figures lie in it compressed (gzip, base64) and are unpacked by the browser; tables and findings are
    plain HTML, readable without a script.

    Args:
        report: what to say.

    Raises:
        EquipoiseError: plotly is not installed.
    """
    here = files("equipoise.reporting")
    specs = json.dumps([figure_spec(f) for f in report.figures if f.views], allow_nan=False, separators=(",", ":"))
    shown = [f for f in report.figures if f.views]
    links = "".join(f'<a href="#{f.key}">{escape(f.title)}</a>' for f in report.figures)
    body = [
        f"<header><div><h1>{escape(report.name)}</h1><p class=soft>{escape(report.about)}</p></div>"
        '<button id=theme type=button aria-label="switch colours">Dark</button></header>',
        f"<nav aria-label=figures><div><a href=#summary>Summary</a>{links}<a href=#sources>Sources</a></div></nav>",
        "<main>",
        _summary(report),
        *(_section(f) for f in report.figures),
        f"<section class=card id=sources><h2>Sources</h2>{_table(report.sources)}{_legend()}</section>",
        "</main><footer>Made by Equipoise. This page needs no network and holds no text of the corpus.</footer>",
        f'<script type="application/gzip" id="figures">{_compressed(specs)}</script>' if shown else "",
        f'<script type="application/gzip" id="plotly">{_compressed(_plotly())}</script>' if shown else "",
        f"<script>{here.joinpath('page.js').read_text()}</script>",
    ]
    colours = _variables(palette.LIGHT)
    dark = _variables(palette.DARK)
    style = (
        f":root{{color-scheme:light;{colours}}}@media screen and (prefers-color-scheme:dark){{:root:not([data-theme=light])"
        f"{{color-scheme:dark;{dark}}}}}@media screen{{:root[data-theme=dark]{{color-scheme:dark;{dark}}}}}"
    )
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.name)} - load balance</title><link rel=icon href=data:,>"
        f"<style>{style}{here.joinpath('page.css').read_text()}</style></head><body>" + "\n".join(body) + "</body></html>\n"
    )


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise missing_package("the page needs", "plotly", instead="--format md, or --format png") from error
    return str(get_plotlyjs())


def _compressed(text: str) -> str:
    """Gzip in base64, the same for the same text."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _variables(colours: Mapping[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items() if "," not in value)


def _badges(origins: Sequence[Origin]) -> str:
    return " ".join(f'<span class="badge {o}" title="{escape(ORIGINS[o])}">{o}</span>' for o in origins)


def _summary(report: Report) -> str:
    numbers = "".join(
        f"<div class=number><span>{escape(name)}</span><b>{escape(value)}</b>{_badges([origin])}</div>"
        for name, value, origin in report.numbers
    )
    found = "".join(
        f"<li>{escape(f.text)} {_badges(f.origins)}"
        + (f' <a href="#{f.figure}">see</a></li>' if f.figure in {x.key for x in report.figures} else "</li>")
        for f in report.findings
    )
    listed = f"<h2>What matters most</h2><ol class=findings>{found}</ol>" if found else ""
    step = report.next_step
    return (
        f"<div id=summary class=numbers>{numbers}</div>"
        f"<section class=card>{listed}<h2 style='margin-top:1rem'>Next</h2><p>{escape(step.why)}</p>"
        f"<pre><code>{escape(step.command)}</code></pre></section>"
    )


def _section(figure: Figure) -> str:
    views = figure.views
    buttons = "".join(
        f"<button type=button aria-pressed={'true' if i == 0 else 'false'}>{escape(view.name)}</button>"
        for i, view in enumerate(views)
    )
    choice = (
        f'<div class=views role=group aria-label="views of {escape(figure.title)}">{buttons}</div>' if len(views) > 1 else ""
    )
    plot = ""
    if views:
        room = f"min-height:{height_of(views[0].chart)}px"
        plot = (
            f'{choice}<div class=plot role=img aria-label="{escape(figure.title)}" style="{room}"></div>'
            f"<p class=note>{escape(views[0].note)}</p>"
        )
    table = f"<details><summary>Figures as a table</summary>{_table(figure.table)}</details>" if figure.table else ""
    return (
        f"<section class=card id={figure.key}><figure><div class=head><h2>{escape(figure.title)}</h2>"
        f"<span class=badges>{_badges(views[0].origins if views else ())}</span></div>{plot}"
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>{table}</section>"
    )


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        marked = (f"<{tag} class=word>" if i < table.words else f"<{tag}>" for i in range(len(cells)))
        return "<tr>" + "".join(f"{start}{escape(cell)}</{tag}>" for start, cell in zip(marked, cells, strict=True)) + "</tr>"

    lines: list[Any] = [row(table.heads, "th"), *(row(cells, "td") for cells in table.rows)]
    return f"<div class=scroll><table>{''.join(lines)}</table></div>"


def _legend() -> str:
    return "".join(f"<p class=soft>{_badges([origin])} {escape(meaning)}</p>" for origin, meaning in ORIGINS.items())
