"""The pictures of the page on concepts: python docs/pictures/draw.py writes them beside this file.

Loads, shares and scores are computed by the library, so that a picture cannot say what the code does not.
Shapes: E experts, U units.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from equipoise.artifacts import LayerPlan
from equipoise.metrics import lis

LOAD_E = np.array([8.0, 4.0, 2.0, 2.0])
COLOURS = ("#d97706", "#0d9488", "#6366f1", "#be185d")
INK, PAPER, FAINT = "#1f2937", "#ffffff", "#9ca3af"
RAW = LayerPlan(experts=(0, 1, 2, 3), precisions=("bf16",) * 4, units=(0, 1, 2, 3), shares=(1, 1, 1, 1))
PUBLISHED = LayerPlan(
    experts=(0, 0, 1, 2, 3),
    precisions=("bf16", "int8", "bf16", "bf16", "int8"),
    units=(0, 3, 1, 2, 3),
    shares=(0.5, 0.5, 1, 1, 1),
)
OPTIMAL = LayerPlan(
    experts=(0, 0, 0, 1, 2, 3), precisions=("int8",) * 3 + ("bf16", "int8", "int8"), units=(0, 2, 3, 1, 2, 3),
    shares=(0.5, 0.25, 0.25, 1, 1, 1),
)  # fmt: skip


def words(x: float, y: float, content: str, size: int = 13, anchor: str = "start", fill: str = INK, weight: str = "400") -> str:
    """A line of text."""
    style = f'font-size="{size}" text-anchor="{anchor}" fill="{fill}" font-weight="{weight}"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{content}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none", dash: str = "") -> str:
    """A rectangle."""
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}" stroke="{stroke}"{dashes}/>'


def picture(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    """A whole SVG file on a light card, which reads alike on light and dark pages."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" role="img">'
    return "\n".join([head, f"<title>{title}</title>", box(0, 0, width, height, PAPER), *parts, "</svg>\n"])


def bars(plan: LayerPlan, x: float, y: float, title: str, per_slot: bool) -> list[str]:
    """One panel: the load of every unit, or of every slot as if each had a unit of its own, with its score."""
    scale, wide = 14.0, 40
    load_P = plan.slot_load(LOAD_E)
    columns = list(range(plan.num_slots)) if per_slot else list(plan.units)
    score = len(LOAD_E) * load_P.max() / LOAD_E.sum() if per_slot else float(lis(plan.unit_load(load_P, len(LOAD_E))))
    parts = [words(x, y - 150, title, 14, weight="600")]
    floor = dict.fromkeys(range(max(columns) + 1), y)
    for slot, column in enumerate(columns):
        height = load_P[slot] * scale
        floor[column] -= height
        left = x + column * (wide + 8)
        parts.append(box(left, floor[column], wide, height, COLOURS[plan.experts[slot]], PAPER))
        if height >= 20:
            bits = "16" if plan.precisions[slot] == "bf16" else "8"
            parts.append(words(left + wide / 2, floor[column] + height / 2 + 4, f"{bits} bit", 11, "middle", PAPER))
    for column in floor:
        name = f"slot {column}" if per_slot else f"unit {column}"
        parts.append(words(x + column * (wide + 8) + wide / 2, y + 15, name, 11, "middle", FAINT))
    mean = y - LOAD_E.sum() / len(LOAD_E) * scale
    right = x + len(floor) * (wide + 8)
    parts.append(f'<line x1="{x}" y1="{mean}" x2="{right}" y2="{mean}" stroke="{INK}" stroke-dasharray="4 3"/>')
    name = "lis_paper" if per_slot else "LIS"
    parts.append(words(x, y + 38, f"{name} = 4 x {score / 4 * LOAD_E.sum():g} / {LOAD_E.sum():g} = {score:g}", 13))
    return parts


def units() -> str:
    """Raw, the published plan counted both ways, and an optimal one."""
    legend = []
    for expert, colour in enumerate(COLOURS):
        legend += [
            box(40 + expert * 110, 18, 14, 14, colour),
            words(60 + expert * 110, 30, f"expert {expert}: {LOAD_E[expert]:g}"),
        ]
    panels = [
        *bars(RAW, 40, 215, "as it is", False),
        *bars(PUBLISHED, 360, 215, "the published plan, over units", False),
        *bars(PUBLISHED, 40, 445, "the same plan, counted per slot", True),
        *bars(OPTIMAL, 360, 445, "copies where units have room", False),
    ]
    note = words(480, 30, "dashed: the mean of a unit", 12, fill=FAINT)
    return picture(680, 500, "Four experts on four units: what a copy does, and how it is counted", [*legend, note, *panels])


def stored() -> str:
    """What fits into the bytes of a unit."""
    parts = [words(30, 34, "A unit has the bytes of one original expert, scales counted, pooled over layers", 14, weight="600")]
    rows = [("16 bits", 1, 1.0), ("8 bits", 2, 0.5), ("4 bits", 4, 0.25), ("8, 4 and 4 bits", 3, 0.0)]
    for row, (name, number, part) in enumerate(rows):
        y = 60 + row * 44
        parts += [words(30, y + 20, name), box(170, y, 440, 30, "none", FAINT, "4 3")]
        widths = [part] * number if part else [0.5, 0.25, 0.25]
        left = 170.0
        for slot, width in enumerate(widths):
            parts.append(box(left + 1, y + 1, width * 440 - 2, 28, COLOURS[slot % 4]))
            parts.append(words(left + width * 220, y + 20, f"slot {slot}", 11, "middle", PAPER))
            left += width * 440
    return picture(640, 250, "What the bytes of one unit hold", parts)


def classes() -> str:
    """The classes of exactness as steps."""
    steps = [
        ("exact", "placement, copies in the model's own precision", "equal output, up to the order of summation"),
        ("weights", "experts and copies in fewer bits", "perplexity, KL and tasks, with intervals"),
        ("routing", "another rule for which experts a token visits", "as weights, and under permuted batches"),
        ("capacity", "experts left out", "as weights, on the domain and outside it"),
    ]
    parts = [words(190, 30, "what is done", 12, fill=FAINT), words(500, 30, "what is checked", 12, fill=FAINT)]
    for step, (name, done, checked) in enumerate(steps):
        y = 44 + step * 52
        parts += [box(20, y, 790, 42, "#f3f4f6"), box(20, y, 8 + 6 * step, 42, COLOURS[(step + 1) % 4])]
        parts += [words(60, y + 26, name, 15, weight="600"), words(190, y + 26, done), words(500, y + 26, checked)]
    return picture(830, 262, "Classes of exactness: the strongest promise that still holds", parts)


PICTURES = {"units.svg": units, "bytes.svg": stored, "classes.svg": classes}


def main() -> None:
    """Write all pictures beside this file."""
    for name, draw in PICTURES.items():
        (Path(__file__).parent / name).write_text(draw())
        print(name, file=sys.stderr)


if __name__ == "__main__":
    main()
