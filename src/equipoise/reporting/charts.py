"""Charts as plain values: what is shown, whatever draws it (plotly in a page, matplotlib in a file), and the table beside it.

Shapes: R rows, C columns, N points of an axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Origin = Literal["measured", "predicted", "decided", "quoted"]
ORIGINS: dict[Origin, str] = {
    "measured": "counted or timed on a running model",
    "predicted": "computed from what was measured, not run",
    "decided": "what a plan prescribes",
    "quoted": "taken from a publication, not checked here",
}
RAW = -1
"""Colour number of the model as it was; plans have 0, 1, ..."""


@dataclass(frozen=True, eq=False)
class Detail:
    """A figure of every cell that is shown when pointed at: its name, values [R, C], and format as d3 and Python know it."""

    name: str
    values: Floats
    spec: str = ",.0f"


@dataclass(frozen=True, eq=False)
class Grid:
    """A map of cells [R, C]; nan where a cell does not exist.

    Attributes:
        values: [R, C].
        rows, columns: labels; columns are numbered when None.
        row_name, column_name, value_name: what they are.
        scale: `ratio` (1 is the mean; colours part below and above it, by doublings), `amount` (from zero up), `bits` (the
            most are neutral) or `copies` (one is neutral).
        levels: labels of a few ordered levels, of which `values` are then the indices; for `bits` and `copies`.
        details: further figures of each cell.
        notes: [R][C] words of each cell.
        numbers: format of the figures printed in the cells; empty for none.
    """

    values: Floats
    rows: Sequence[str]
    columns: Sequence[str] | None
    row_name: str
    column_name: str
    value_name: str
    scale: Literal["ratio", "amount", "bits", "copies"] = "ratio"
    levels: Sequence[str] = ()
    details: Sequence[Detail] = ()
    notes: Sequence[Sequence[str]] | None = None
    numbers: str = ""


@dataclass(frozen=True, eq=False)
class Line:
    """One series over the axis: its name, [N] values (nan leaves a gap), colour number, and whether it is dashed."""

    name: str
    values: Floats
    colour: int
    dashed: bool = False


@dataclass(frozen=True, eq=False)
class Lines:
    """Series over a common axis of labelled points, with a level to compare with."""

    labels: Sequence[str]
    lines: Sequence[Line]
    x_name: str
    y_name: str
    reference: tuple[float, str] | None = None


@dataclass(frozen=True, eq=False)
class Cloud:
    """One series of points: [N] x and y, a label for each, colour number and symbol."""

    name: str
    x: Floats
    y: Floats
    labels: Sequence[str]
    colour: int
    symbol: Literal["circle", "diamond", "square", "cross", "triangle"] = "circle"
    joined: bool = False


@dataclass(frozen=True, eq=False)
class Points:
    """Clouds of points in a plane, with a level of y to compare with; axes in per cent where asked."""

    clouds: Sequence[Cloud]
    x_name: str
    y_name: str
    reference: tuple[float, str] | None = None
    percent_x: bool = False
    percent_y: bool = False


@dataclass(frozen=True, eq=False)
class Bars:
    """Stacked bars, one a category.

    Attributes:
        categories: one bar each, from the top.
        parts: name and value of each category, from the start of the bar; coloured as the bits of a map, the first neutral.
        x_name: what the values are.
        marks: category, value and name of single marks on the bars.
    """

    categories: Sequence[str]
    parts: Sequence[tuple[str, Sequence[float]]]
    x_name: str
    marks: Sequence[tuple[int, float, str]] = ()


@dataclass(frozen=True)
class Estimate:
    """One estimate with its interval; low and high are nan where there is none."""

    group: str
    series: str
    colour: int
    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Intervals:
    """Estimates in groups, one below the other, against a level that means no change; format of the figures."""

    estimates: Sequence[Estimate]
    x_name: str
    reference: tuple[float, str] | None
    spec: str = "+.2f"


Chart: TypeAlias = Grid | Lines | Points | Bars | Intervals


@dataclass(frozen=True, eq=False)
class View:
    """One of the pictures of a figure: its name, the chart, where its figures come from, and a remark on this view alone."""

    name: str
    chart: Chart
    origins: tuple[Origin, ...]
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Figures as text: heads, rows, and how many of the first columns are words."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1


@dataclass(frozen=True, eq=False)
class Figure:
    """A figure of a report: its key (an anchor), title, one sentence on how to read it, its views, and its table."""

    key: str
    title: str
    caption: str
    views: Sequence[View] = ()
    table: Table | None = None

    @property
    def origins(self) -> tuple[Origin, ...]:
        """Where the figures of all views come from."""
        return tuple(dict.fromkeys(origin for view in self.views for origin in view.origins))


def axis_name(name: str, reference: tuple[float, str] | None) -> str:
    """What an axis shows, with the level to compare with where there is one."""
    return name if reference is None else f"{name} ({reference[0]:g} = {reference[1]})"


def height_of(chart: Chart) -> int:
    """Pixels that a chart wants on a screen."""
    if isinstance(chart, Grid):
        return int(np.clip(150 + 16 * len(chart.rows), 260, 620))
    if isinstance(chart, Bars):
        return 150 + 46 * len(chart.categories)
    if isinstance(chart, Intervals):
        return 130 + 20 * len(chart.estimates) + 12 * len({e.group for e in chart.estimates})
    return 360 if isinstance(chart, Lines) else 420


def ratio_limit(views: Sequence[View]) -> float:
    """Doublings from the mean to the end of the ratio scale that the views of a figure share: at least 1, at most 5."""
    largest = [
        float(np.nanmax(view.chart.values))
        for view in views
        if isinstance(view.chart, Grid) and view.chart.scale == "ratio" and np.isfinite(view.chart.values).any()
    ]
    return float(np.clip(np.ceil(np.log2(max([*largest, 2.0]))), 1, 5))


def ratio_ticks(limit: float) -> tuple[list[float], list[str]]:
    """Places (in doublings) and labels of a ratio scale."""
    places = [float(k) for k in range(-int(limit), int(limit) + 1)]
    return places, [f"{2**k:g}x" if k >= 0 else f"1/{2**-k:g}x" for k in places]


def doublings(values: Floats, limit: float) -> Floats:
    """Ratios as doublings from 1, held within the ends of the scale; nan stays nan."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.isnan(values), np.nan, np.clip(np.log2(values), -limit, limit))
