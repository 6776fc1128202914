"""Charts as PNG pictures, drawn by matplotlib in the light colours; no browser is needed.

Shapes: R rows, C columns.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from equipoise.errors import missing_package
from equipoise.reporting import palette
from equipoise.reporting.charts import (
    Bars,
    Chart,
    Figure,
    Grid,
    Intervals,
    Lines,
    Points,
    axis_name,
    doublings,
    height_of,
    ratio_limit,
    ratio_ticks,
)

DPI = 120
MARKERS = ("o", "s", "D", "^", "x", "P", "*")
SYMBOLS = {"circle": "o", "diamond": "D", "square": "s", "cross": "X", "triangle": "^"}
MOST_TICKS = 20


def pictures(figure: Figure) -> dict[str, bytes]:
    """PNG of every view of a figure: name of the view -> bytes; its title says where the figures come from.

    Args:
        figure: what to draw.

    Raises:
        EquipoiseError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise missing_package("pictures need", "matplotlib", instead="--format md") from error
    limit = ratio_limit(figure.views)
    out = {}
    for view in figure.views:
        canvas = Canvas(figsize=(9, max(height_of(view.chart), 320) / 100), layout="constrained")
        FigureCanvasAgg(canvas)
        axes = canvas.subplots()
        _draw(axes, view.chart, limit)
        axes.set_title(f"{figure.title}: {view.name} ({', '.join(view.origins)})", loc="left", fontsize=11)
        picture = io.BytesIO()
        canvas.savefig(picture, format="png", dpi=DPI, metadata={"Software": None})
        out[view.name] = picture.getvalue()
    return out


def _draw(axes: Any, chart: Chart, limit: float) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if isinstance(chart, Grid):
        _grid(axes, chart, limit)
    elif isinstance(chart, Lines):
        _lines(axes, chart)
    elif isinstance(chart, Points):
        _points(axes, chart)
    elif isinstance(chart, Bars):
        _bars(axes, chart)
    else:
        _intervals(axes, chart)


def _colour(number: int) -> str:
    return palette.LIGHT[palette.series(number)]


def _legend(axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        columns = min(len(labels), 4)
        axes.figure.legend(handles, labels, fontsize=8, frameon=False, ncols=columns, loc="outside lower left")


def _thinned(count: int) -> list[int]:
    return list(range(0, count, max(1, -(-count // MOST_TICKS))))


def _grid(axes: Any, chart: Grid, limit: float) -> None:
    from matplotlib.colors import LinearSegmentedColormap, ListedColormap

    values, bounds, ticks = chart.values, {}, None
    if chart.levels:
        n = len(chart.levels)
        colours: Any = ListedColormap(palette.steps(palette.LIGHT, chart.scale, n))
        bounds, ticks = {"vmin": -0.5, "vmax": n - 0.5}, ([float(k) for k in range(n)], list(chart.levels))
    else:
        colours = LinearSegmentedColormap.from_list(chart.scale, palette.scale(palette.LIGHT, chart.scale))
        bounds = {"vmin": 0.0}
        if chart.scale == "ratio":
            values, bounds, ticks = doublings(values, limit), {"vmin": -limit, "vmax": limit}, ratio_ticks(limit)
    image = axes.imshow(values, cmap=colours, aspect="auto", interpolation="nearest", **bounds)
    rows = _thinned(len(chart.rows))
    axes.set_yticks(rows, [chart.rows[i] for i in rows], fontsize=8)
    if chart.columns is not None:
        columns = _thinned(len(chart.columns))
        axes.set_xticks(columns, [chart.columns[i] for i in columns], fontsize=8, rotation=35, ha="right")
    if chart.numbers and values.size <= 100:
        middle = np.nanmax(values, initial=0) / 2
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                axes.text(
                    column, row, format(value, chart.numbers), ha="center", va="center", fontsize=8,
                    color="white" if value > middle else "black",
                )  # fmt: skip
    axes.set(xlabel=chart.column_name, ylabel=chart.row_name)
    bar = axes.figure.colorbar(image, ax=axes, label=chart.value_name, fraction=0.035, pad=0.01)
    if ticks is not None:
        bar.set_ticks(ticks[0], labels=ticks[1])


def _lines(axes: Any, chart: Lines) -> None:
    at = np.arange(len(chart.labels))
    for line in chart.lines:
        axes.plot(
            at, line.values, label=line.name, color=_colour(line.colour), linestyle="--" if line.dashed else "-",
            marker=MARKERS[(line.colour + 1) % len(MARKERS)], markersize=4 if len(at) <= 40 else 0,
        )  # fmt: skip
    ticks = _thinned(len(at))
    axes.set_xticks(ticks, [chart.labels[i] for i in ticks], fontsize=8)
    if chart.reference is not None:
        axes.axhline(chart.reference[0], color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel=chart.x_name, ylabel=axis_name(chart.y_name, chart.reference))
    axes.grid(axis="y", color=palette.LIGHT["grid"])
    _legend(axes)


def _points(axes: Any, chart: Points) -> None:
    from matplotlib.ticker import PercentFormatter

    for cloud in chart.clouds:
        many = len(cloud.x) > 100
        axes.plot(
            cloud.x, cloud.y, label=cloud.name, color=_colour(cloud.colour), marker=SYMBOLS[cloud.symbol],
            linestyle="-" if cloud.joined else "", markersize=3 if many else 6, alpha=0.6 if many else 1.0, linewidth=1,
        )  # fmt: skip
    for axis, percent in ((axes.xaxis, chart.percent_x), (axes.yaxis, chart.percent_y)):
        if percent:
            axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if chart.reference is not None:
        axes.axhline(chart.reference[0], color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel=chart.x_name, ylabel=axis_name(chart.y_name, chart.reference))
    axes.grid(color=palette.LIGHT["grid"])
    _legend(axes)


def _bars(axes: Any, chart: Bars) -> None:
    start = np.zeros(len(chart.categories))
    colours = palette.steps(palette.LIGHT, "bits", len(chart.parts))[::-1]
    for k, (name, values) in enumerate(chart.parts):
        axes.barh(range(len(start)), values, left=start, label=name, color=colours[k], edgecolor="grey", height=0.6)
        start += np.asarray(values)
    for k, name in enumerate(dict.fromkeys(mark[2] for mark in chart.marks)):
        own = [mark for mark in chart.marks if mark[2] == name]
        axes.plot(
            [mark[1] for mark in own], [mark[0] for mark in own], label=name, color="black", linestyle="",
            marker=("|", "D")[k % 2], markersize=(22, 7)[k % 2], markerfacecolor="none",
        )  # fmt: skip
    axes.set_yticks(range(len(start)), chart.categories)
    axes.set_xlim(0, 1.04 * max([*start, *(mark[1] for mark in chart.marks)]))
    axes.invert_yaxis()
    axes.set(xlabel=chart.x_name)
    _legend(axes)


def _intervals(axes: Any, chart: Intervals) -> None:
    groups = list(dict.fromkeys(e.group for e in chart.estimates))
    series = list(dict.fromkeys(e.series for e in chart.estimates))
    for k, name in enumerate(series):
        own = [e for e in chart.estimates if e.series == name]
        place = [groups.index(e.group) + 0.8 * ((k + 0.5) / len(series) - 0.5) for e in own]
        known = not any(np.isnan(e.low) for e in own)
        span = [[e.value - e.low for e in own], [e.high - e.value for e in own]] if known else None
        axes.errorbar(
            [e.value for e in own], place, xerr=span, label=name, color=_colour(own[0].colour), linestyle="", capsize=3,
            marker=MARKERS[(own[0].colour + 1) % len(MARKERS)], markersize=5,
        )  # fmt: skip
    if chart.reference is not None:
        axes.axvline(chart.reference[0], color="grey", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(groups)), groups)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set(xlabel=axis_name(chart.x_name, chart.reference))
    axes.grid(axis="x", color=palette.LIGHT["grid"])
    _legend(axes)
