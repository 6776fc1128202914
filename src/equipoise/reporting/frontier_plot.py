"""A frontier as a picture: balance against quality for several numbers of bytes, one panel per model."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from equipoise.artifacts.files import write_atomic
from equipoise.errors import EquipoiseError, missing_package
from equipoise.reporting.simulation_plot import FORMATS

FLOOR = 1e-3
"""Least excess imbalance that is drawn apart, as its axis is logarithmic."""
FLOOR_OF_QUALITY = 1e-5
"""The same of the other axis."""


def frontier_plot(
    points: Sequence[Mapping[str, Any]], path: str | Path, *, quality: str = "kl", label: str = "KL, nats per token"
) -> None:
    """Write a picture of frontiers.

    Args:
        points: rows with "model", "bytes_fraction", "lis", "lis_base" and the quality; rows whose quality is null are left out.
        path: a .png or .svg file.
        quality: key of what balance is paid with.
        label: of its axis.

    Raises:
        EquipoiseError: no points, another ending, or matplotlib is not installed.
    """
    path = Path(path)
    ending = path.suffix.lower().lstrip(".")
    if ending not in FORMATS:
        raise EquipoiseError(f"plot: '{path.name}' given; allowed endings are {', '.join('.' + f for f in FORMATS)}.")
    points = [point for point in points if point[quality] is not None]
    models = list(dict.fromkeys(point["model"] for point in points))
    if not models:
        raise EquipoiseError(
            "plot: there are no points to draw; allow more error or more bytes, and measure errors (profile --precisions)."
        )
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
    except ImportError as error:
        raise missing_package("plots need", "matplotlib", instead="use --json") from error
    columns = min(3, len(models))
    rows = -(-len(models) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, model in zip(axes, models, strict=False):
        mine = [point for point in points if point["model"] == model]
        for fraction in sorted({point["bytes_fraction"] for point in mine}):
            line = sorted(
                (max(point[quality], FLOOR_OF_QUALITY), max(point["lis"] - 1, FLOOR))
                for point in mine
                if point["bytes_fraction"] == fraction
            )
            axis.plot(*zip(*line, strict=True), marker="o", markersize=3, label=f"{fraction:g} of the bytes")
        axis.axhline(mine[0]["lis_base"] - 1, color="grey", linewidth=0.8, linestyle="--", label="no plan")
        axis.set(title=model, xlabel=label, ylabel="LIS over units - 1", xscale="log", yscale="log")
        for scale in (axis.xaxis, axis.yaxis):
            # An axis may span less than a decade: powers of ten alone would leave it with one label.
            scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
            scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            scale.set_minor_formatter(NullFormatter())
        axis.tick_params(labelsize="small")
    for axis in axes[len(models) :]:
        axis.set_axis_off()
    named = {name: line for axis in axes for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(
        named.values(), named.keys(), loc="outside lower center", ncols=min(len(named), 3 * columns), fontsize="x-small"
    )
    picture = io.BytesIO()
    figure.savefig(picture, format=ending, dpi=120)
    write_atomic(path, picture.getvalue())
