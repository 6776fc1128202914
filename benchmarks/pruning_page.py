"""The tables of `pruning.py`, as Markdown."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from equipoise.artifacts import Evaluation

Rows = Sequence[Mapping[str, Any]]
AGAINST = ("random", "frequency", "gate")
"""Scores that the others are compared with, draw by draw."""


def pages(found: Mapping[str, Rows], told: argparse.Namespace, domains: Sequence[str], judged: Sequence[str]) -> dict[str, str]:
    """Mark -> what stands between it."""
    foot = (
        f"Domains pruned for: {', '.join(domains)}; judged on {told.tokens:,} held-out tokens of each of {', '.join(judged)}. "
        f"{told.seeds} draws of 25 demonstrations; fp32 on CPU, torch {torch.__version__}, {platform.machine()}."
    )
    return {
        "pruning scores": "\n".join([*score_table(found["scores"]), "", *orders(found["scores"]), "", foot]),
        "pruning overlap": "\n".join(overlap_table(found["overlap"])),
        "pruning balance": "\n".join(balance_table(found["balance"])),
    }


def score_table(rows: Rows) -> list[str]:
    """Change of perplexity by model, experts kept and score: mean and range over draws, domains averaged within a draw."""
    lines = [
        "| model | kept | score | perplexity in domain | out of domain | better in domain than random | frequency | gate |",
        "|---|---:|---|---|---|---:|---:|---:|",
    ]
    for model, keep in dict.fromkeys((row["model"], row["keep"]) for row in rows):
        here = [row for row in rows if (row["model"], row["keep"]) == (model, keep)]
        scores = sorted(dict.fromkeys(row["score"] for row in here), key=lambda s: _mean(here, s, "in"))
        for score in scores:
            wins = [_wins(here, score, other) if other != score else "" for other in AGAINST]
            cells = [f"`{model}`", f"{keep:.0%}", score, _spread(here, score, "in"), _spread(here, score, "out"), *wins]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def orders(rows: Rows) -> list[str]:
    """The order found in each case, best first."""
    lines = []
    for model, keep in dict.fromkeys((row["model"], row["keep"]) for row in rows):
        here = [row for row in rows if (row["model"], row["keep"]) == (model, keep)]
        scores = sorted(dict.fromkeys(row["score"] for row in here), key=lambda s: _mean(here, s, "in"))
        lines.append(f"- `{model}`, {keep:.0%} kept, in domain, best first: {', '.join(scores)}.")
    return lines


def overlap_table(rows: Rows) -> list[str]:
    """Share of the experts that 100 other demonstrations keep, by how many were seen."""
    lines = ["| model | domain | demonstrations | of the experts that 100 others keep |", "|---|---|---:|---|"]
    for key in dict.fromkeys((row["model"], row["domain"], row["count"]) for row in rows):
        values = [row["overlap"] for row in rows if (row["model"], row["domain"], row["count"]) == key]
        lines.append(f"| `{key[0]}` | {key[1]} | {key[2]} | {np.mean(values):.1%} ({min(values):.1%}..{max(values):.1%}) |")
    return lines


def balance_rows(name: str, found: Evaluation, model: str, domain: str) -> list[dict[str, Any]]:
    """What an evaluation of one base, whole or pruned, says of it and of its plans."""
    rows = []
    for contender in found.contenders:
        texts = [text for text in contender.texts if text.name in ("in", "out")]
        for label in (name, contender.name) if contender is found.contenders[0] else (contender.name,):
            raw = label == name
            row = {"model": model, "domain": domain, "plan": label}
            row["bytes"] = found.base_expert_bytes if raw else contender.expert_bytes
            for text in texts:
                row[f"lis_{text.name}"] = text.lis_base if raw else text.lis
                row[f"perplexity_{text.name}"] = text.perplexity_base if raw else text.perplexity
            rows.append(row)
    return rows


def balance_table(rows: Rows) -> list[str]:
    """Whole and pruned models, as they are and with plans, over equal units."""
    lines = [
        "| model | domain | plan | bytes of experts | LIS in domain | out | perplexity in domain | out |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    whole = {(row["model"], row["domain"]): row["bytes"] for row in rows if row["plan"] == "whole"}
    for row in rows:
        cells = [f"`{row['model']}`", row["domain"], row["plan"], f"{row['bytes'] / whole[row['model'], row['domain']]:.1%}"]
        cells += [
            f"{row['lis_in']:.3f}",
            f"{row['lis_out']:.3f}",
            f"{row['perplexity_in']:.2f}",
            f"{row['perplexity_out']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _draws(rows: Rows, score: str, where: str) -> list[float]:
    """One figure a draw: the mean over domains of log perplexity ratios."""
    seeds = sorted({row["seed"] for row in rows})
    return [
        float(np.mean([np.log1p(row[where]) for row in rows if (row["score"], row["seed"]) == (score, seed)])) for seed in seeds
    ]


def _mean(rows: Rows, score: str, where: str) -> float:
    return float(np.mean(_draws(rows, score, where)))


def _spread(rows: Rows, score: str, where: str) -> str:
    draws = np.expm1(_draws(rows, score, where)) * 100
    digits = 3 if np.abs(draws).max() < 0.5 else 1
    middle = float(np.expm1(_mean(rows, score, where)) * 100)
    return f"{middle:+.{digits}f} % ({draws.min():+.{digits}f}..{draws.max():+.{digits}f})"


def _wins(rows: Rows, score: str, other: str) -> str:
    """In how many draws and domains the score's perplexity in domain is lower than another's; equal ones count half."""
    found = {(row["score"], row["domain"], row["seed"]): row["in"] for row in rows}
    pairs = [(value, found[other, d, s]) for (name, d, s), value in found.items() if name == score and (other, d, s) in found]
    wins = sum(1.0 if mine < theirs else 0.5 if mine == theirs else 0.0 for mine, theirs in pairs)
    return f"{wins:g} of {len(pairs)}"
