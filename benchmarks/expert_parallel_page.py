"""The tables and the picture of `expert_parallel.py`."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.artifacts import Profile
from equipoise.artifacts.files import write_atomic
from equipoise.dispatch.deal import deal
from equipoise.dispatch.placement import layer_maps
from equipoise.planning.methods import make_plan
from equipoise.precisions import precision
from equipoise.simulation.simulate import default_plan

HEADS = (
    "", "max / mean rows", "replicas", "experts MB", "tokens KB", "weights KB", "experts ms", "decide ms", "layer ms",
    "time / contiguous",
)  # fmt: skip
NOT_BALANCED = ("contiguous", "transformers all_to_all")
PAYS = 0.95
"""Ratio of times below which a contender is said to pay, where the quartiles agree."""
FLOOR = 1e-3
"""Least excess that is drawn apart, as its axis is logarithmic."""
FRACTIONS = (1.0, 1.1, 1.25, 1.5, 2.0)
CAPACITIES = ((2.0, 1024), (1.5, 512), (1.25, 256), (1.1, 128), (1.0, 128), (1.0, 32))
"""LLEP from few weights moved to many: alpha and m."""


def tables(result: Mapping[str, Any]) -> str:
    """All rows as Markdown: what was run, a table for each number of ranks, phase and case, and what did not pay."""
    layer, machine, tokens = result["layer"], result["machine"], result["tokens"]
    said = [
        f"One layer of {layer['experts']} experts ({layer['width']} x {layer['inner']}, top-{layer['top_k']}, "
        f"{layer['dtype']}); batches of {tokens['prefill']:,} tokens in prefill and {tokens['decode']:,} in decode, over all "
        f"ranks; {result['rounds']} rounds, gloo, one thread a process on {machine['cores']} cores: where ranks outnumber "
        "cores they take turns, and balance shows in rows, not in time. Measured: medians over rounds; of the ratio also the "
        "quartiles."
    ]
    keys = list(dict.fromkeys((row["ranks"], row["phase"], row["case"]) for row in result["rows"]))
    for ranks, phase, case in keys:
        mine = [row for row in result["rows"] if (row["ranks"], row["phase"], row["case"]) == (ranks, phase, case)]
        said += ["", f"**{ranks} ranks, {phase}, {case}**", "", "| " + " | ".join(HEADS) + " |"]
        said.append("|---|" + "---:|" * (len(HEADS) - 1))
        said += [_line(row) for row in mine]
    pays = [row for row in result["rows"] if row["ratio_q3"] < PAYS]
    costs = [row for row in result["rows"] if row["ratio_q1"] > 1 / PAYS]
    said += ["", f"Faster than contiguous by 5 % and more, quartiles included: {_named(pays)}."]
    said += ["", f"Slower by 5 % and more, quartiles included, so that balancing did not pay: {_named(costs)}."]
    return "\n".join(said)


def _line(row: Mapping[str, Any]) -> str:
    cells = [row["contender"]]
    if "rank_rows_max" in row:
        cells += [
            f"{row['rank_rows_max']:,.0f} / {row['rank_rows_mean']:,.0f}",
            f"{row['activated_max']:.0f}",
            f"{row['expert_bytes'] / 1e6:.1f}",
            f"{row['token_bytes_moved'] / 1e3:,.0f}",
            f"{row['weight_bytes_moved'] / 1e3:,.0f}",
            f"{row['compute_ms_max']:.1f}",
            f"{row['decide_ms']:.1f}",
        ]
    else:  # transformers' own: only its time is told
        cells += [""] * (len(HEADS) - 3)
    cells += [f"{row['layer_ms']:.1f}", f"{row['ratio']:.2f} ({row['ratio_q1']:.2f}..{row['ratio_q3']:.2f})"]
    return "| " + " | ".join(cells) + " |"


def _named(rows: Sequence[Mapping[str, Any]]) -> str:
    by_place: dict[str, list[str]] = {}
    for row in rows:
        if row["contender"] not in NOT_BALANCED:
            by_place.setdefault(f"{row['ranks']} ranks, {row['phase']}, {row['case']}", []).append(row["contender"])
    return "; ".join(f"{place}: {', '.join(names)}" for place, names in by_place.items()) or "none"


def curves(profile: Profile, counts_BE: NDArray[np.int64], ranks: int, least: int) -> list[dict[str, Any]]:
    """What balance costs in memory and in traffic, from the batches' counts (loads under these rules follow from them).

    Args:
        profile: what plans are made from.
        counts_BE: [B, E] tokens of each expert in the batches that are served.
        ranks: R.
        least: m of LLEP where it goes with a plan.

    Returns:
        Points: method, bytes held beyond one 16-bit copy of each expert, bytes of weights moved per batch, and the largest
        over the mean load.
    """
    facts = profile.model
    expert = facts.layers[0].expert_bytes(precision(facts.dtype))
    whole = facts.layers[0].num_experts * expert
    contiguous = default_plan(facts, ranks)
    points = [_point("contiguous", contiguous, "least_loaded", {}, counts_BE, whole)]
    for alpha, m in CAPACITIES:
        options = {"alpha": alpha, "least": m, "gate": 1.0}
        points.append(_point("LLEP", contiguous, "llep", options, counts_BE, whole))
    for fraction in FRACTIONS:
        plan = make_plan(profile, "rq", units=ranks, bytes_fraction=fraction)
        points.append(_point("R&Q", plan, "least_loaded", {}, counts_BE, whole))
        if fraction == 1.0:
            options = {"least": least, "gate": 1.0}
            points.append(_point("R&Q + LLEP", plan, "llep", options, counts_BE, whole))
    for slots in sorted({-(-int(facts.layers[0].num_experts * f) // ranks) * ranks for f in FRACTIONS}):
        plan = make_plan(profile, "eplb", units=ranks, slots=slots)
        points.append(_point("EPLB", plan, "least_loaded", {}, counts_BE, whole))
    return points


def _point(
    method: str, plan: Any, rule: str, options: Mapping[str, Any], counts_BE: NDArray[np.int64], whole: int
) -> dict[str, Any]:
    place = layer_maps(plan)[0]
    moved, ratio = [], []
    for count_E in counts_BE:
        found = deal(rule, place, count_E, options)
        load_R = found.quota_ER.sum(0)
        ratio.append(load_R.max() / load_R.mean())
        moved.append(sum(int(place.bytes_P[place.slot_ER[expert, source]]) for expert, source, _ in found.transfers))
    return {
        "method": method, "options": dict(options), "held_bytes": int(place.bytes_P.sum()) - whole,
        "moved_bytes": float(np.mean(moved)), "imbalance": float(np.mean(ratio)),
    }  # fmt: skip


def trade_off(points: Sequence[Mapping[str, Any]], path: Path, ranks: int) -> None:
    """Draw imbalance against bytes: held more than before (bought once), or moved with every batch, on one axis."""
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(point["case"] for point in points))
    figure = Figure(figsize=(4.0 * len(cases), 3.6), layout="constrained")
    looks = {
        "contiguous": ("black", "*"), "R&Q": ("tab:blue", "o"), "EPLB": ("tab:green", "s"), "LLEP": ("tab:red", "^"),
        "R&Q + LLEP": ("tab:purple", "D"),
    }  # fmt: skip
    for axis, case in zip(np.atleast_1d(figure.subplots(1, len(cases), sharey=True)), cases, strict=True):
        for method, (color, marker) in looks.items():
            mine = [point for point in points if point["case"] == case and point["method"] == method]
            moved = method in ("LLEP", "R&Q + LLEP")
            x = [point["moved_bytes" if moved else "held_bytes"] / 1e6 for point in mine]
            style = "--" if moved else "-"
            name = f"{method}: MB moved per batch" if moved else f"{method}: MB held beyond contiguous"
            y = [max(point["imbalance"] - 1, FLOOR) for point in mine]
            axis.plot(x, y, style, color=color, marker=marker, markersize=5, label=name)
        axis.set_title(case)
        axis.set_xlabel("MB of experts in one layer")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel(f"largest over mean load of {ranks} ranks, less 1")
    figure.axes[0].legend(fontsize=7)
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.lstrip("."), dpi=120)
    write_atomic(path, picture.getvalue())
