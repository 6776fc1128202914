"""A simulation's report as a picture: how full each rank is under every plan, and how long steps take."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.artifacts.files import write_atomic
from equipoise.errors import EquipoiseError, missing_package

FORMATS = ("png", "svg")


def simulation_plot(rows: Mapping[str, Any], path: str | Path) -> None:
    """Write a picture of a simulation: one row per traffic.

    Left, the load of the ranks over their mean, fullest first; right, the distribution of step times over batches.

    Args:
        rows: the report as a dictionary (`SimulationReport.model_dump(mode="json")`).
        path: a .png or .svg file.

    Raises:
        EquipoiseError: another ending, or matplotlib is not installed.
    """
    path = Path(path)
    ending = path.suffix.lower().lstrip(".")
    if ending not in FORMATS:
        raise EquipoiseError(f"plot: '{path.name}' given; allowed endings are {', '.join('.' + f for f in FORMATS)}.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_package("plots need", "matplotlib", instead="use --json") from error
    parts = rows["parts"]
    figure = Figure(figsize=(11, 3.6 * len(parts)), layout="constrained")
    axes = figure.subplots(len(parts), 2, squeeze=False)
    for (left, right), part in zip(axes, parts, strict=True):
        where = f"{'in sample' if part['sample'] == 'in' else 'out of sample'}: {part['name']} ({part['origin']})"
        for result in part["results"]:
            profile, times = result["rank_profile"], np.sort(result["step_times"])
            left.plot(range(1, len(profile) + 1), profile, marker="o", markersize=3, label=result["name"])
            right.step(times, np.arange(1, len(times) + 1) / len(times), where="post", label=result["name"])
        left.axhline(1.0, color="grey", linewidth=0.8, linestyle="--")
        left.set(title=where, xlabel="ranks, fullest first", ylabel="load over mean")
        right.set(title=f"step time, {rows['cost']}", xlabel=rows["unit"], ylabel="share of batches", ylim=(0, 1.02))
        left.legend(fontsize="small")
    figure.suptitle(
        f"{rows['model']}: {rows['ranks']} ranks, {rows['phase']} batches of {rows['batch']:,} tokens, rule {rows['rule']}"
    )
    picture = io.BytesIO()
    figure.savefig(picture, format=ending, dpi=120)
    write_atomic(path, picture.getvalue())
