"""Pictures of the benchmarks: one legend below all panels, and files that do not change where the figures do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def save_figure(figure: Any, path: Path, columns: int) -> None:
    """Write a figure whose panels all draw what the first one does.

    Args:
        figure: of matplotlib.
        path: .svg or .png.
        columns: of the legend.
    """
    from matplotlib import rc_context

    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize="x-small")
    with rc_context({"svg.hashsalt": "equipoise"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
