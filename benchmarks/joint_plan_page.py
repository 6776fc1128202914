"""The pages of `joint_plan.py`: what an evaluation says, as rows of Markdown."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from equipoise.artifacts import Evaluation, Plan
from equipoise.artifacts.evaluation import Contender
from equipoise.artifacts.files import write_atomic

TABLE_HEAD = (
    "| model | plan | LIS over units | imbalance removed | bytes | perplexity change | KL, nats | predicted error | slots |",
    "|---|---|---:|---:|---:|---|---:|---:|---:|",
)
FRONTIER_HEAD = (
    "| model | bytes allowed | error bound | bytes | LIS over units | KL, nats | perplexity change | slots |",
    "|---|---:|---:|---:|---:|---:|---|---:|",
)


def figures(contender: Contender, found: Evaluation, plan: Plan) -> dict[str, Any]:
    """What is told of one contender, on all texts together."""
    text = contender.texts[-1]
    predicted = plan.predicted
    assert predicted is not None, "planned plans carry their prediction"
    change = text.perplexity_change
    return {
        "lis_base": text.lis_base,
        "lis": text.lis,
        "removed": 1 - (text.lis - 1) / (text.lis_base - 1),
        "bytes": contender.expert_bytes / found.base_expert_bytes,
        "change": [change.value, change.low, change.high],
        "kl": text.kl.value,
        "predicted_error": predicted.output_error,
        "slots": sum(layer.num_slots for layer in plan.layers),
        "units": plan.units * len(plan.layers),
    }


def table_page(rows: Sequence[Mapping[str, Any]], told: argparse.Namespace) -> str:
    """All rows; figures of several seeds as mean (least..most), perplexity's interval of the first seed."""
    lines = list(TABLE_HEAD)
    for row in rows:
        seeds = row["seeds"]
        error = seeds[0]["predicted_error"]
        lines.append(
            f"| `{row['model']}` | {row['plan']} | {_mean(seeds, 'lis', '{:.3f}')} of {seeds[0]['lis_base']:.3f} "
            f"| {_mean(seeds, 'removed', '{:.1f}', 100)} % | {100 * seeds[0]['bytes']:.1f} % | {_change(seeds)} "
            f"| {_mean(seeds, 'kl', '{:.4f}')} | {'assumed' if error is None else f'{error:.4f}'} "
            f"| {seeds[0]['slots'] / seeds[0]['units']:.2f} a unit |"
        )
    return "\n".join([*lines, "", _note(told)])


def frontier_page(points: Sequence[Mapping[str, Any]], told: argparse.Namespace) -> str:
    """All points of the frontier."""
    lines = list(FRONTIER_HEAD)
    for point in points:
        value, low, high = (100 * number for number in point["change"])
        lines.append(
            f"| `{point['model']}` | {point['bytes_fraction']:g} | {point['error_bound']:g} | {100 * point['bytes']:.1f} % "
            f"| {point['lis']:.3f} of {point['lis_base']:.3f} | {point['kl']:.4f} | {value:+.2f} % ({low:+.2f}..{high:+.2f}) "
            f"| {point['slots'] / point['units']:.2f} a unit |"
        )
    return "\n".join([*lines, "", _note(told)])


def replace_part(path: Path, kind: str, page: str) -> None:
    """Put a page between a Markdown file's marks of its kind."""
    begin, end = f"<!-- joint {kind}: begin -->", f"<!-- joint {kind}: end -->"
    before, _, rest = path.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{path} has no '{begin}' and '{end}' to write between")
    write_atomic(path, f"{before}{begin}\n{page}\n{end}{after}")


def _mean(seeds: Sequence[Mapping[str, Any]], key: str, form: str, factor: float = 1.0) -> str:
    values = [factor * seed[key] for seed in seeds]
    mean = form.format(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({form.format(min(values))}..{form.format(max(values))})"


def _change(seeds: Sequence[Mapping[str, Any]]) -> str:
    """Change of perplexity in per cent: with its interval for one seed, with the seeds' range for several."""
    if len(seeds) > 1:
        values = [100 * seed["change"][0] for seed in seeds]
        return f"{sum(values) / len(values):+.2f} % (seeds {min(values):+.2f}..{max(values):+.2f})"
    value, low, high = (100 * number for number in seeds[0]["change"])
    return f"{value:+.2f} % ({low:+.2f}..{high:+.2f})"


def _note(told: argparse.Namespace) -> str:
    judged = "held-out documents" if told.split == "report" else "documents that settings were chosen on"
    return (
        f"Judged on {judged}, {told.heldout_tokens:,} tokens of each domain, all together; planned from {told.tokens:,} of "
        f"each domain's training documents; rounded by `{told.rounding}`; {told.seeds} seed{'s' if told.seeds > 1 else ''}; "
        f"torch {torch.__version__}, {platform.machine()}."
    )
