"""Charts as plotly figures: plain dictionaries that plotly.js draws, with arrays as base64.

A colour is a pair {"light": ..., "dark": ...} that the page's script resolves; so is a scale of colours.
Shapes: R rows, C columns.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

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

Spec = dict[str, Any]
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
SYMBOLS = {"circle": "circle", "diamond": "diamond", "square": "square", "cross": "x", "triangle": "triangle-up"}
LINE_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star")
MOST_MARKED = 40
"""Points of a line that are marked one by one."""


def figure_spec(figure: Figure) -> Spec:
    """A figure for the page's script: its key and views, each with plotly's data and layout, origins and note."""
    limit = ratio_limit(figure.views)
    views = [
        {"name": view.name, "origins": list(view.origins), "note": view.note, **chart_spec(view.chart, limit)}
        for view in figure.views
    ]
    return {"key": figure.key, "title": figure.title, "views": views}


def chart_spec(chart: Chart, limit: float) -> Spec:
    """Plotly's data and layout of one chart.

    Args:
        chart: what to draw.
        limit: end of the ratio scale, in doublings.
    """
    height = height_of(chart)
    if isinstance(chart, Grid):
        return _grid(chart, limit, height)
    if isinstance(chart, Lines):
        return _lines(chart, height)
    if isinstance(chart, Points):
        return _points(chart, height)
    return _bars(chart, height) if isinstance(chart, Bars) else _intervals(chart, height)


def themed(name: str) -> dict[str, str]:
    """A colour of the palette in both themes."""
    return {"light": palette.LIGHT[name], "dark": palette.DARK[name]}


def packed(values: NDArray[Any], kind: str = "f4", bits: int = 10) -> Spec:
    """An array as plotly.js reads it: raw little-endian numbers in base64, with its shape where it is no row.

    Args:
        values: numbers.
        kind: of the stored numbers, as numpy and plotly.js call it.
        bits: of a number that is not whole that are kept, so that many compress well; 10 are an error of at most 0.1 %.
    """
    array = np.ascontiguousarray(values, np.dtype(f"<{kind}"))
    with np.errstate(invalid="ignore"):
        mantissa, exponent = np.frexp(array)
        rounded = np.ldexp(np.round(mantissa * 2**bits), exponent - bits)
        array = np.where(array == np.floor(array), array, rounded).astype(array.dtype)
    out: Spec = {"dtype": kind, "bdata": base64.b64encode(array.tobytes()).decode()}
    return out if array.ndim == 1 else out | {"shape": ",".join(str(n) for n in array.shape)}


def _layout(height: int, x_name: str, y_name: str, **more: Any) -> Spec:
    axis = {"gridcolor": themed("grid"), "zeroline": False, "automargin": True, "linecolor": themed("line"), "ticks": ""}
    small = {"size": 12, "color": themed("soft")}
    layout: Spec = {
        "height": height,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": 12, "color": themed("ink")},
        "margin": {"l": 8, "r": 10, "t": 10, "b": 46},
        "xaxis": {**axis, "title": {"text": x_name, "font": small}, "tickfont": small},
        "yaxis": {**axis, "title": {"text": y_name, "font": small, "standoff": 8}, "tickfont": small},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "font": {"size": 12}},
        "hoverlabel": {
            "bgcolor": themed("surface"), "bordercolor": themed("line"), "font": {"color": themed("ink"), "size": 12},
            "align": "left",
        },
        "showlegend": True,
        "dragmode": False,
    }  # fmt: skip
    for name, value in more.items():
        layout[name] = layout[name] | value if isinstance(layout.get(name), dict) else value
    return layout


def _category(labels: Sequence[str], **more: Any) -> Spec:
    return {"type": "category", "categoryorder": "array", "categoryarray": list(labels), "nticks": 18, **more}


def _grid(chart: Grid, limit: float, height: int) -> Spec:
    names = [chart.value_name]
    trace: Spec = {
        "type": "heatmap",
        "y": list(chart.rows),
        "hoverongaps": False,
        "xgap": 1 if chart.values.shape[1] <= 64 else 0,
        "ygap": 1 if len(chart.rows) <= 32 and chart.values.shape[1] <= 64 else 0,
    }
    columns = chart.columns
    trace |= {"x": list(columns)} if columns is not None else {"x0": 0, "dx": 1}
    bar: Spec = {
        "orientation": "h", "x": 0, "xanchor": "left", "y": 1.03, "yanchor": "bottom", "ypad": 0, "thickness": 10, "len": 1.0,
        "outlinewidth": 0, "tickfont": {"size": 11, "color": themed("soft")}, "ticklabelposition": "outside bottom",
        "title": {"text": chart.value_name, "side": "top", "font": {"size": 12, "color": themed("soft")}},
    }  # fmt: skip
    details = list(chart.details)
    extra = [d.values for d in details]
    hover = f"{chart.row_name} %{{y}}, {chart.column_name} %{{x}}"
    if chart.scale == "ratio":
        places, labels = ratio_ticks(limit)
        trace |= {
            "z": packed(doublings(chart.values, limit), bits=7),
            "zmin": -limit,
            "zmax": limit,
            "colorscale": _scale("ratio"),
        }
        bar |= {"tickvals": places, "ticktext": labels}
        extra.insert(0, chart.values)
        hover += "<br><b>%{customdata[0]:.3g}</b> " + names[0]
        first = 1
    else:
        trace["z"] = packed(chart.values, bits=20)
        first = 0
        if chart.levels:
            n = len(chart.levels)
            trace |= {"zmin": -0.5, "zmax": n - 0.5, "colorscale": _steps(chart.scale, n)}
            bar |= {"tickvals": list(range(n)), "ticktext": list(chart.levels), "len": min(1.0, 0.12 * n + 0.1)}
        else:
            trace |= {"zmin": 0, "zmax": float(np.nanmax(chart.values, initial=0)), "colorscale": _scale(chart.scale)}
            hover += f"<br><b>%{{z:{chart.numbers or '.4g'}}}</b> {chart.value_name}"
    for k, detail in enumerate(details):
        hover += f"<br>%{{customdata[{first + k}]:{detail.spec}}} {detail.name}"
    if extra:
        stacked = np.stack(extra, -1)
        exact = np.nanmax(stacked, initial=0) < 2**24  # what 32-bit floats count one by one
        trace["customdata"] = packed(stacked, "f4" if exact else "f8")
    if chart.notes is not None:
        trace["text"] = [list(row) for row in chart.notes]
        hover += "<br>%{text}"
    if chart.numbers and chart.values.size <= 100:
        trace |= {"texttemplate": f"%{{z:{chart.numbers}}}", "textfont": {"size": 11}}
    trace |= {"hovertemplate": hover + "<extra></extra>", "colorbar": bar}
    xaxis: Spec = {"showgrid": False, **(_category(columns, tickangle=-35) if columns is not None else {"dtick": None})}
    return {
        "data": [trace],
        "layout": _layout(
            height, chart.column_name, chart.row_name, showlegend=False, xaxis=xaxis,
            yaxis=_category(chart.rows, autorange="reversed", showgrid=False),
        ),
    }  # fmt: skip


def _scale(name: str) -> Spec:
    def even(colours: list[str]) -> list[list[Any]]:
        return [[i / (len(colours) - 1), colour] for i, colour in enumerate(colours)]

    return {"light": even(palette.scale(palette.LIGHT, name)), "dark": even(palette.scale(palette.DARK, name))}


def _steps(name: str, count: int) -> Spec:
    def flat(colours: list[str]) -> list[list[Any]]:
        return [[(i + end) / count, colour] for i, colour in enumerate(colours) for end in (0, 1)]

    return {"light": flat(palette.steps(palette.LIGHT, name, count)), "dark": flat(palette.steps(palette.DARK, name, count))}


def _level(reference: tuple[float, str] | None, axis: str) -> list[Spec]:
    if reference is None:
        return []
    along, across = ("x", "y") if axis == "y" else ("y", "x")
    return [
        {
            "type": "line", "layer": "below", f"{along}ref": "paper", f"{along}0": 0, f"{along}1": 1, f"{across}ref": across,
            f"{across}0": reference[0], f"{across}1": reference[0],
            "line": {"color": themed("soft"), "width": 1, "dash": "dot"},
        }
    ]  # fmt: skip


def _lines(chart: Lines, height: int) -> Spec:
    few = len(chart.labels) <= MOST_MARKED
    data = []
    for line in chart.lines:
        colour = themed(palette.series(line.colour))
        data.append(
            {
                "type": "scatter", "mode": "lines+markers" if few else "lines", "name": line.name, "x": list(chart.labels),
                "y": packed(line.values, "f8", 20), "connectgaps": False,
                "line": {"color": colour, "width": 2, "dash": "dash" if line.dashed else "solid"},
                "marker": {"symbol": LINE_SYMBOLS[(line.colour + 1) % len(LINE_SYMBOLS)], "size": 6, "color": colour},
                "hovertemplate": "%{y:.3f}<extra>%{fullData.name}</extra>",
            }
        )  # fmt: skip
    layout = _layout(
        height, chart.x_name, axis_name(chart.y_name, chart.reference), hovermode="x unified",
        xaxis=_category(chart.labels, showgrid=False), shapes=_level(chart.reference, "y"),
    )  # fmt: skip
    return {"data": data, "layout": layout}


def _points(chart: Points, height: int) -> Spec:
    data = []
    for cloud in chart.clouds:
        colour = themed(palette.series(cloud.colour))
        many = len(cloud.x) > 100
        data.append(
            {
                "type": "scatter", "mode": "lines+markers" if cloud.joined else "markers", "name": cloud.name,
                "x": packed(cloud.x, "f8", 20), "y": packed(cloud.y, "f8", 20), "text": list(cloud.labels),
                "marker": {
                    "symbol": SYMBOLS[cloud.symbol], "size": 5 if many else 8, "color": colour, "opacity": 0.6 if many else 1,
                },
                "line": {"color": colour, "width": 1.5},
                "hovertemplate": "%{text}<br>%{x}, %{y}<extra></extra>",
            }
        )  # fmt: skip
    layout = _layout(
        height, chart.x_name, axis_name(chart.y_name, chart.reference), shapes=_level(chart.reference, "y"),
        hovermode="closest", showlegend=len(chart.clouds) > 1,
        xaxis={"tickformat": ".0%" if chart.percent_x else ""}, yaxis={"tickformat": ".0%" if chart.percent_y else ""},
    )  # fmt: skip
    return {"data": data, "layout": layout}


def _bars(chart: Bars, height: int) -> Spec:
    n = len(chart.parts)
    shades = {"light": palette.steps(palette.LIGHT, "bits", n)[::-1], "dark": palette.steps(palette.DARK, "bits", n)[::-1]}
    colours = [{theme: own[k] for theme, own in shades.items()} for k in range(n)]
    data: list[Spec] = [
        {
            "type": "bar", "orientation": "h", "name": name, "y": list(chart.categories), "x": list(values),
            "marker": {"color": colours[k], "line": {"width": 1, "color": themed("soft")}},
            "hovertemplate": "%{y}: %{x:,.2f} in " + name + "<extra></extra>",
        }
        for k, (name, values) in enumerate(chart.parts)
    ]  # fmt: skip
    for k, name in enumerate(dict.fromkeys(mark[2] for mark in chart.marks)):
        own = [mark for mark in chart.marks if mark[2] == name]
        data.append(
            {
                "type": "scatter", "mode": "markers", "name": name, "x": [mark[1] for mark in own],
                "y": [chart.categories[mark[0]] for mark in own],
                "marker": {
                    "symbol": ("line-ns-open", "diamond-open")[k % 2], "size": (26, 11)[k % 2], "color": themed("ink"),
                    "line": {"width": 2, "color": themed("ink")},
                },
                "hovertemplate": "%{y}: %{x:,.2f}, " + name + "<extra></extra>",
            }
        )  # fmt: skip
    layout = _layout(
        height, chart.x_name, "", barmode="stack", bargap=0.35, hovermode="closest", xaxis={"rangemode": "tozero"},
        yaxis=_category(chart.categories, autorange="reversed", showgrid=False),
    )  # fmt: skip
    return {"data": data, "layout": layout}


def _intervals(chart: Intervals, height: int) -> Spec:
    groups = list(dict.fromkeys(e.group for e in chart.estimates))
    series = list(dict.fromkeys(e.series for e in chart.estimates))
    data = []
    for k, name in enumerate(series):
        own = [e for e in chart.estimates if e.series == name]
        colour = themed(palette.series(own[0].colour))
        place = [groups.index(e.group) + 0.8 * ((k + 0.5) / len(series) - 0.5) for e in own]
        known = not any(np.isnan(e.low) for e in own)
        spec = chart.spec.lstrip("+")
        span = f" ({{low:{spec}}} to {{high:{spec}}})" if known else ""
        text = [f"{e.group}, {name}: {e.value:{chart.spec}}" + span.format(low=e.low, high=e.high) for e in own]
        trace: Spec = {
            "type": "scatter", "mode": "markers", "name": name, "x": [e.value for e in own], "y": place, "text": text,
            "marker": {"symbol": LINE_SYMBOLS[(own[0].colour + 1) % len(LINE_SYMBOLS)], "size": 8, "color": colour},
            "hovertemplate": "%{text}<extra></extra>",
        }  # fmt: skip
        if known:
            trace["error_x"] = {
                "type": "data", "symmetric": False, "array": [e.high - e.value for e in own],
                "arrayminus": [e.value - e.low for e in own], "color": colour, "thickness": 1.8, "width": 4,
            }  # fmt: skip
        data.append(trace)
    bands = [
        {
            "type": "rect", "layer": "below", "xref": "paper", "x0": 0, "x1": 1, "yref": "y", "y0": g - 0.5, "y1": g + 0.5,
            "line": {"width": 0}, "fillcolor": themed("grid"), "opacity": 0.45,
        }
        for g in range(0, len(groups), 2)
    ]  # fmt: skip
    yaxis = {
        "tickvals": list(range(len(groups))), "ticktext": groups, "range": [len(groups) - 0.5, -0.5], "showgrid": False,
    }  # fmt: skip
    layout = _layout(
        height, axis_name(chart.x_name, chart.reference), "", hovermode="closest", yaxis=yaxis,
        shapes=[*bands, *_level(chart.reference, "x")],
    )  # fmt: skip
    return {"data": data, "layout": layout}
