"""Colours of reports, in light and dark: told apart by colour-blind readers, and readable on their ground.

Series are those of Okabe and Ito (2008), lightened for dark ground; the ratio scale parts blue from orange, which all common
kinds of colour blindness keep apart, and is neutral at the mean.
"""

from __future__ import annotations

import numpy as np

SERIES = 6
"""Colours of series; further series take the first again, with other symbols."""

LIGHT: dict[str, str] = {
    "ground": "#f7f7f5", "surface": "#ffffff", "ink": "#1b1b1a", "soft": "#5b5a56", "line": "#dcdbd6", "grid": "#e9e8e4",
    "accent": "#0b5fa5", "raw": "#6f6e69",
    "c0": "#0072b2", "c1": "#d55e00", "c2": "#009e73", "c3": "#b0578d", "c4": "#b97f00", "c5": "#3d9bd6",
    "measured": "#0b6e4f", "predicted": "#8a5a00", "decided": "#4a4aa8", "quoted": "#6b6b6b",
    "ratio": "#08306b,#2171b5,#6baed6,#c3dbee,#f3f2ee,#fdd0a2,#fb8d3c,#d94801,#7f2704",
    "amount": "#f4f6f8,#bfdcec,#74b3d8,#2f7fb8,#0b4a82",
    "copies": "#f3f2ee,#b9d8ea,#6aaed6,#2171b5,#08306b",
    "bits": "#a63603,#e6651a,#fb9d59,#fdd0a2,#efeeea",
}  # fmt: skip
DARK: dict[str, str] = {
    "ground": "#141413", "surface": "#1d1d1b", "ink": "#f1f0ec", "soft": "#b3b1aa", "line": "#3a3936", "grid": "#2e2d2b",
    "accent": "#6cb6f2", "raw": "#a9a7a0",
    "c0": "#56b4e9", "c1": "#f28b46", "c2": "#2fc49a", "c3": "#e08cc0", "c4": "#e6b13a", "c5": "#9a9af0",
    "measured": "#5fd0a5", "predicted": "#e6b35a", "decided": "#a9a9ff", "quoted": "#bdbdbd",
    "ratio": "#9ecbff,#58a0e8,#2c6cb5,#22405f,#2b2a28,#6b3d18,#b85f14,#f28b2e,#ffc48a",
    "amount": "#22262b,#23425c,#2b6a9b,#4f9ed6,#a9d5f7",
    "copies": "#2b2a28,#23507a,#3b82c4,#7fb9ea,#cfe8ff",
    "bits": "#ffc48a,#f08a35,#b85f14,#6b3d18,#343330",
}  # fmt: skip


def series(colour: int) -> str:
    """The palette's name for a colour number of a chart: "raw" for -1, else one of the series."""
    return "raw" if colour < 0 else f"c{colour % SERIES}"


def scale(palette: dict[str, str], name: str) -> list[str]:
    """The colours of a scale, from its low end to its high end."""
    return palette[name].split(",")


def steps(palette: dict[str, str], name: str, count: int) -> list[str]:
    """So many colours from a scale, evenly spaced from end to end; a single one is the end that stands for no change."""
    colours = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in scale(palette, name)], float)
    neutral = len(colours) - 1.0 if name == "bits" else 0.0
    at = np.linspace(0, len(colours) - 1, count) if count > 1 else np.array([neutral])
    mixed = np.stack([np.interp(at, np.arange(len(colours)), colours[:, channel]) for channel in range(3)], 1)
    return ["#" + "".join(f"{round(v):02x}" for v in colour) for colour in mixed]
