"""Importance against frequency: whether the experts that are chosen often are the ones that matter.

Shapes: L MoE layers, E logical experts of the widest layer, N experts of all layers together.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from equipoise.artifacts import Profile
from equipoise.reporting.charts import Cloud, Detail, Figure, Grid, Line, Lines, Points, Table, View
from equipoise.reporting.evidence import Evidence, mean
from equipoise.reporting.numbers import fixed

Floats = NDArray[np.float64]
MOST_POINTS = 1500
"""Experts drawn as points; more are counted in cells."""
CELLS = 20


def standing(values_E: NDArray[np.generic]) -> Floats:
    """[E] place of each value among them, 0 for the lowest and 1 for the highest; ties share their mean place."""
    from scipy.stats import rankdata  # takes longer to import than all else that reports need

    return np.asarray((rankdata(values_E) - 1) / max(len(values_E) - 1, 1))


def rank_correlation_L(profile: Profile, estimator: str) -> Floats:
    """[L] Spearman's correlation of importance with load; nan where one of them is the same for all experts."""
    out = np.full(len(profile.model.layers), np.nan)
    for i, layer in enumerate(profile.model.layers):
        score, load = (values[i, : layer.num_experts] for values in (profile.importance[estimator], profile.load))
        if np.ptp(score) > 0 and np.ptp(load) > 0:
            out[i] = np.corrcoef(standing(score), standing(load))[0, 1]
    return out


def importance_figure(evidence: Evidence) -> Figure | None:
    """Each expert's place by load and by importance, one view an estimator, and their correlation in every layer."""
    profile = evidence.profile
    if profile is None or not profile.importance:
        return None
    chosen = sorted(name for name in profile.importance if name != "frequency") or ["frequency"]
    correlation = {name: rank_correlation_L(profile, name) for name in chosen}
    lines = [Line(name, values, k) for k, (name, values) in enumerate(correlation.items())]
    by_layer = Lines(evidence.layer_labels, lines, "layer", "rank correlation", (0.0, "no relation"))
    views = [_experts(evidence, profile, name) for name in chosen]
    views.append(View("by layer", by_layer, ("measured",), "1: busy experts are the important ones; -1: the idle ones are."))
    rows = []
    for name, values in correlation.items():
        score = profile.importance[name]
        same = sum(
            int(score[i, :n].argmax() == profile.load[i, :n].argmax())
            for i, n in enumerate(evidence.widths)
            if profile.load[i].any()
        )
        rows.append([name, fixed(mean(values)), f"{same} of {len(values)}"])
    heads = ["estimator", "rank correlation with load", "layers whose busiest expert is the most important"]
    caption = (
        "Every expert by its place in its layer: to the right the busier, upwards the more important. On the diagonal, being "
        "chosen often and mattering are the same; far from it, experts that are rarely chosen must keep their bits."
    )
    return Figure("importance", "Busy or important", caption, views, Table(heads, rows))


def _experts(evidence: Evidence, profile: Profile, name: str) -> View:
    places_x, places_y, labels = [], [], []
    for i, layer in enumerate(profile.model.layers):
        n = layer.num_experts
        places_x.append(standing(profile.load[i, :n]))
        places_y.append(standing(profile.importance[name][i, :n]))
        labels += [f"layer {evidence.layer_labels[i]}, expert {e}" for e in range(n)]
    x, y = np.concatenate(places_x), np.concatenate(places_y)
    note = "Of this score the largest is the least important, as Replicate-and-Quantize reads it." if name == "wanda" else ""
    axes = "place by load, from least to most", f"place by {name}"
    if len(x) <= MOST_POINTS:
        cloud = Cloud("experts", x, y, labels, 0)
        return View(name, Points([cloud], *axes, percent_x=True, percent_y=True), ("measured",), note)
    counts, *_ = np.histogram2d(y, x, bins=CELLS, range=((0, 1), (0, 1)))
    ticks = [f"{100 * (i + 0.5) / CELLS:.0f} %" for i in range(CELLS)]
    share = Detail("of all experts", counts / len(x), ".2%")
    grid = Grid(counts[::-1], ticks[::-1], ticks, axes[1], axes[0], "experts", scale="amount", details=[share])
    return View(name, grid, ("measured",), note)
