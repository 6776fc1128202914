"""The frontier: what balance can be had for how many bytes and how much error, beside the plans of the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Literal

import numpy as np

from equipoise.reporting.charts import RAW, Cloud, Figure, Points, Table, View
from equipoise.reporting.evidence import Evidence, is_placement, mean
from equipoise.reporting.frontier_points import FrontierPoint
from equipoise.reporting.numbers import binary_unit, fixed, percent

SYMBOLS: tuple[Literal["circle", "square", "diamond", "triangle", "cross"], ...] = (
    "circle", "square", "diamond", "triangle", "cross",
)  # fmt: skip


def frontier_figure(evidence: Evidence) -> Figure | None:
    """LIS against bytes, against error, and against the divergence that the error comes to, where that is known."""
    points = [p for p in evidence.frontier if p.lis is not None and p.bytes is not None]
    if not points:
        return None

    size, unit = binary_unit(max(p.bytes or 0.0 for p in points))

    def view(name: str, x_name: str, x_of: Callable[[FrontierPoint], float | None], by_bound: bool) -> View | None:
        known = [p for p in points if x_of(p) is not None]
        group_of = attrgetter("error_bound" if by_bound else "bytes_fraction")
        clouds = []
        for k, group in enumerate(sorted({group_of(p) for p in known})):
            own = sorted((p for p in known if group_of(p) == group), key=lambda p: float(x_of(p) or 0.0))
            title = f"error up to {group:g}" if by_bound else f"{group:.0%} of the bytes"
            clouds.append(_cloud(title, own, x_of, k))
        if not clouds:
            return None
        clouds += _plans(evidence, name, size)
        return View(name, Points(clouds, x_name, "LIS over units", (1.0, "balance")), ("predicted",))

    views = [
        view("by bytes", f"all slots, {unit}", lambda p: None if p.bytes is None else p.bytes / size, True),
        view("by error", "relative error of the layers' output", lambda p: p.output_error, False),
        view("by KL", "KL that the error comes to, nats per token", lambda p: p.kl, False),
    ]
    rows = [
        [percent(p.bytes_fraction), f"{p.error_bound:g}", fixed(p.lis), fixed(p.lower_bound),
         fixed(p.output_error, 4), fixed(p.kl, 5), "yes" if p.efficient else ""]
        for p in evidence.frontier
    ]  # fmt: skip
    caption = "Plans over a grid of bytes and error bounds: what balance can be had for how much memory and how much error."
    heads = ["bytes allowed", "error allowed", "LIS", "lower bound", "error", "KL", "not beaten by another"]
    return Figure("frontier", "What can be had", caption, [v for v in views if v is not None], Table(heads, rows, 0))


def _cloud(name: str, points: Sequence[FrontierPoint], x_of: Callable[[FrontierPoint], float | None], k: int) -> Cloud:
    x = np.array([np.nan if (value := x_of(p)) is None else value for p in points])
    y = np.array([np.nan if p.lis is None else p.lis for p in points])
    return Cloud(name, x, y, [p.label for p in points], k, SYMBOLS[k % len(SYMBOLS)], joined=True)


def _plans(evidence: Evidence, view: str, size: int) -> list[Cloud]:
    """The plans of the page in the same plane, as far as their prediction reaches."""
    found = []
    for name, plan in evidence.plans.items():
        predicted = plan.predicted
        if predicted is None or is_placement(plan):
            continue
        x = {"by bytes": predicted.bytes / size, "by error": predicted.output_error, "by KL": predicted.kl}[view]
        if x is not None:
            score = predicted.lis if evidence.profile is None else mean(plan.lis(evidence.profile.load))
            found.append((x, score, f"plan {name}"))
    if not found:
        return []
    xs, ys, labels = zip(*found, strict=True)
    return [Cloud("plans of this page", np.array(xs), np.array(ys), labels, RAW, "cross")]
