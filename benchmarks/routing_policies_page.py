"""The tables of `routing_policies.py`, and its answer in words, from what was measured."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Mapping, Sequence
from typing import Any

LEVELS = (1.1, 1.25, 1.5)
"""Balance that the cheapest way to is asked for: LIS over units at most this."""
ALONE_HEAD = (
    "| model | policy | mean k | LIS over experts | over ranks of 4 | busiest expert | KL, nats | perplexity change "
    "| batch order, KL |",
    "|---|---|---:|---:|---:|---:|---:|---|---:|",
)
RQ_HEAD = (
    "| model | plan | LIS over units | busiest unit | KL, nats | perplexity change | bytes |",
    "|---|---|---:|---:|---:|---|---:|",
)
CHEAPEST_HEAD = (
    "| model | LIS over units at most | policy alone | KL | rq alone | KL | policy + rq | KL |",
    "|---|---:|---|---:|---|---:|---|---:|",
)
Row = Mapping[str, Any]


def brief(row: Row) -> str:
    """One line while it runs."""
    return f"{row['name']:44s} LIS {row['lis_base']:.3f} -> {row['lis']:.3f}  KL {row['kl']:.4f}  {change(row)}"


def change(row: Row) -> str:
    """Change of perplexity in percent with its interval."""
    value, low, high = (100 * x for x in row["change"])
    return f"{value:+.2f} % ({low:+.2f}..{high:+.2f})"


def page(found: Mapping[str, Mapping[str, Any]], told: argparse.Namespace, machine: str) -> str:
    """All tables."""
    parts = [answer(found), "", "Each policy by itself:", "", *ALONE_HEAD]
    for name, kept in found.items():
        efficient = frontier([row for row in kept["alone"] if row["policy"] != "native"])
        for row in kept["alone"]:
            order = "" if row["batch_order_kl"] is None else f"{row['batch_order_kl']:.1e}"
            changed = "" if row["policy"] == "native" else change(row)
            mark = " *" if row["name"] in efficient else ""
            parts.append(
                f"| `{name}` | {row['name']}{mark} | {row['mean_k']:.2f} | {row['lis']:.3f} | {row['lis_ranks']:.3f} "
                f"| {100 * busiest(row, kept):.0f} % | {row['kl']:.4f} | {changed} | {order} |"
            )
    parts += [
        "",
        "\\* no other policy has both less KL and a lower LIS. LIS is relative to the mean load, which falls with the experts "
        "of a token; *busiest expert* is its largest load (LIS times mean k), in parts of that under the model's own router.",
        "",
        "R&Q planned on a profile made under the policy:",
        "",
    ]
    parts += RQ_HEAD
    for name, kept in found.items():
        for row in kept["with_rq"]:
            size = f"{100 * row['bytes']:.1f} %"
            load = f"{100 * busiest(row, kept):.0f} %"
            parts.append(f"| `{name}` | {row['name']} | {row['lis']:.3f} | {load} | {row['kl']:.4f} | {change(row)} | {size} |")
    parts += ["", "The cheapest way to a balance, by the KL that it takes:", "", *CHEAPEST_HEAD]
    for name, kept in found.items():
        for level in LEVELS:
            cells = [cell for rows in families(kept) for cell in _cheapest(rows, level)]
            parts.append(f"| `{name}` | {level:g} | {' | '.join(cells)} |")
    parts += [
        "",
        "The bias fitted on one domain and judged on held-out documents of others: LIS over experts (without the bias).",
    ]
    for name, kept in found.items():
        domains = list(kept["across"][0]["by_text"])
        parts += ["", f"| `{name}`, fitted on | {' | '.join(domains)} |", f"|---|{'---:|' * len(domains)}"]
        for row in kept["across"]:
            cells = [f"{after:.3f} ({before:.3f})" for before, after in row["by_text"].values()]
            parts.append(f"| {row['fitted']} | {' | '.join(cells)} |")
    for name, kept in found.items():
        if tasks := _tasks(kept):
            parts += ["", f"Accuracy of `{name}` on {told.limit} items of tasks, paired with the model's own:", "", *tasks]
    domains = ", ".join(next(iter(found.values()))["domains"])
    parts += [
        "",
        f"{told.tokens:,} tokens of each domain ({domains}) to fit and plan on, {told.heldout_tokens:,} of other documents to "
        f"judge on; seed {told.seed}; intervals of 95 % over documents; {machine}, {platform.machine()}.",
    ]
    return "\n".join(parts)


def busiest(row: Row, kept: Mapping[str, Any]) -> float:
    """Largest load of a unit in parts of that under the model's own router without a plan: LIS times mean k."""
    native = kept["alone"][0]
    policy = row["name"].partition(" + rq")[0]
    mean_k = next((other["mean_k"] for other in kept["alone"] if other["name"] == policy), native["mean_k"])
    return float(row["lis"] * mean_k / (native["lis"] * native["mean_k"]))


def families(kept: Mapping[str, Any]) -> tuple[list[Row], list[Row], list[Row]]:
    """Policies alone, rq alone, and both together."""
    controls = ("native", "load_only", "random_pool", "random_k")
    alone = [row for row in kept["alone"] if row["policy"] not in controls]
    plain = [row for row in kept["with_rq"] if row["policy"] == "native"]
    both = [row for row in kept["with_rq"] if row["policy"] != "native"]
    return alone, plain, both


def cheapest(rows: Sequence[Row], level: float) -> Row | None:
    """Of the rows that reach a balance, the one of least KL."""
    return min((row for row in rows if row["lis"] <= level), key=lambda row: row["kl"], default=None)


def _cheapest(rows: Sequence[Row], level: float) -> tuple[str, str]:
    best = cheapest(rows, level)
    return ("none", "") if best is None else (best["name"], f"{best['kl']:.4f}")


def frontier(rows: Sequence[Row]) -> set[str]:
    """Names of the rows that no other beats in both balance and KL."""
    return {
        row["name"]
        for row in rows
        if not any(
            (r["lis"] <= row["lis"] and r["kl"] < row["kl"]) or (r["lis"] < row["lis"] and r["kl"] <= row["kl"]) for r in rows
        )
    }


def answer(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Which is the best frontier, a paragraph a model."""
    paragraphs = []
    for name, kept in found.items():
        sentences = []
        alone, plain, both = families(kept)
        tried = {"a policy alone": alone, "rq alone": plain, "a policy with rq": both}
        wins = []
        for level in LEVELS:
            best = {kind: row for kind, rows in tried.items() if (row := cheapest(rows, level)) is not None}
            if not best:
                wins.append(f"nothing tried reaches {level:g}")
                continue
            kind, row = min(best.items(), key=lambda item: item[1]["kl"])
            others = "; ".join(f"{k} {r['kl']:.4f}" for k, r in best.items() if k != kind) or "nothing else gets there"
            wins.append(f"{level:g} is reached cheapest by {kind} ({row['name']}, KL {row['kl']:.4f}; {others})")
        sentences.append(
            f"On `{name}`, whose own router gives LIS {kept['alone'][0]['lis']:.3f}: a LIS over units of {', '.join(wins)}."
        )
        least = [min(rows, key=lambda row: busiest(row, kept)) for rows in (plain, both)]
        loads = [f"{100 * busiest(row, kept):.0f} % with {row['name']} (KL {row['kl']:.4f})" for row in least]
        sentences.append(f"The busiest unit's load comes down to {loads[0]} of what it was, and to {loads[1]}.")
        for row in kept["alone"]:
            control = row["name"].replace("top_p,", "random_k,")
            other = next((r for r in kept["alone"] if r["name"] == control and r is not row), None)
            if row["policy"] == "top_p" and other is not None:
                less = row["kl"] < other["kl"]
                sentences.append(
                    f"At {row['name'].removeprefix('top_p, ')}, `top_p` has {'less' if less else 'no less'} KL than its random "
                    f"control ({row['kl']:.4f}, {other['kl']:.4f})."
                )
        level = next((r for r in kept["alone"] if r["name"] == "bias, strength 1"), None)
        load = next((r for r in kept["alone"] if r["name"] == "load_only"), None)
        if level is not None and load is not None:
            sentences.append(
                f"The full bias has LIS {level['lis']:.3f} at KL {level['kl']:.4f}; going by load alone {load['lis']:.3f} at "
                f"{load['kl']:.4f}."
            )
        paragraphs.append(" ".join(sentences))
    return "\n\n".join(paragraphs)


def _tasks(kept: Mapping[str, Any]) -> list[str]:
    """A row for each policy, a column for each task; the model's own score in the first row."""
    rows = [row for row in [*kept["alone"], *kept["with_rq"]] if row["tasks"]]
    if not rows:
        return []
    tasks = list(rows[0]["tasks"])
    own = [f"{100 * rows[0]['tasks'][task][0]:.1f} %" for task in tasks]
    lines = [f"| policy | {' | '.join(tasks)} |", f"|---|{'---|' * len(tasks)}"]
    lines.append(f"| native | {' | '.join(own)} |")
    for row in rows:
        changes = [row["tasks"][task][1:] for task in tasks]
        told = [f"{100 * value:+.1f} points ({100 * low:+.1f}..{100 * high:+.1f})" for value, low, high in changes]
        lines.append(f"| {row['name']} | {' | '.join(told)} |")
    return lines
