"""The tables of `recipes.py`: what it found of every arm, mean over seeds and their spread, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from quantization_page import write_between

GROUPS = ("balance", "simbal", "dynamic-moe", "chain-of-experts", "same")
Found = Mapping[str, Sequence[Mapping[str, Any]]]
Figure = Callable[[Mapping[str, Any]], float]


def page(arms: Sequence[Any], found: Found, same: Sequence[Mapping[str, Any]], write: Path | None) -> str:
    """All tables that there is anything to say in; put between the marks of a file if one is given.

    Args:
        arms: `recipes.Arm`s, in the order of the rows.
        found: arm -> figures of each seed.
        same: figures of the sequence of domains, of each seed.
        write: Markdown file with marks `<!-- NAME: begin -->` and `<!-- NAME: end -->` for each table.
    """
    here = [arm for arm in arms if arm.name in found]
    tables = {
        "balance": _table(_of(here, "balance"), found, BALANCE),
        "simbal": _table(
            [arm for arm in here if arm.group == "simbal" or arm.name in ("none", "aux-loss 0.01")], found, SIMBAL
        ),
        "dynamic-moe": _table(_of(here, "dynamic-moe"), found, DYNAMIC),
        "chain-of-experts": _table(_of(here, "chain-of-experts"), found, CHAIN),
        "same": _sequence(same),
        "left": _table(here, found, LEFT),
    }
    told = {name: table for name, table in tables.items() if table}
    if write is not None:
        for name, table in told.items():
            write_between(write, name, table)
    return "\n\n".join(f"## {name}\n\n{table}" for name, table in told.items())


def _of(arms: Sequence[Any], group: str) -> list[Any]:
    return [arm for arm in arms if arm.group == group]


def _table(arms: Sequence[Any], found: Found, columns: Mapping[str, tuple[Figure, int]]) -> str:
    if not arms:
        return ""
    lines = [f"| arm | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for arm in arms:
        cells = [spread([figure(one) for one in found[arm.name]], places) for figure, places in columns.values()]
        lines.append(f"| {arm.name}{f' ({arm.told})' if arm.told else ''} | {' | '.join(cells)} |")
    seeds = sorted({one["seed"] for arm in arms for one in found[arm.name]})
    steps = sorted({one["steps"] for arm in arms for one in found[arm.name]})
    fewest = min(len(found[arm.name]) for arm in arms)
    some = "" if fewest == len(seeds) else f", some arms {fewest} of them"
    foot = f"Mean ± standard deviation over seeds {', '.join(map(str, seeds))}{some}; {' or '.join(map(str, steps))} steps."
    return "\n".join([*lines, "", foot])


def _sequence(same: Sequence[Mapping[str, Any]]) -> str:
    """The last domain of the sequence of each arm, and what the first domains have lost over all of it."""
    if not same:
        return ""
    lines = [f"| arm | {' | '.join(SAME)} |", f"|---|{'---:|' * len(SAME)}"]
    for arm in same[0]["arms"]:
        cells = [spread([figure(one["arms"][arm]) for one in same], places) for figure, places in SAME.values()]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    missed = sum(not stage["reached"] for one in same for stages in one["arms"].values() for stage in stages)
    seeds = ", ".join(str(one["seed"]) for one in same)
    foot = f"Mean ± standard deviation over seeds {seeds}; an arm gave up on that loss {missed} times."
    return "\n".join([*lines, "", foot])


def spread(values: Sequence[float], places: int) -> str:
    """Mean ± standard deviation, or the value alone when there is one."""
    if any(np.isnan(values)):
        return ""
    mean = f"{np.mean(values):.{places}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{places}f}" if len(values) > 1 else mean


def _removed(before: float, after: float) -> float:
    """Share of the excess imbalance that is gone, in %."""
    return 100 * (1 - (after - 1) / (before - 1))


def _mean(values: Mapping[str, float]) -> float:
    return float(np.mean(list(values.values())))


def _hard_minus_easy(told: Mapping[str, Any]) -> float:
    """Experts per token on the domain that the model predicts worst, less those on the one it predicts best."""
    by_loss = sorted(told["loss"], key=told["loss"].__getitem__)
    return float(told["domains"][by_loss[-1]] - told["domains"][by_loss[0]])


BALANCE: dict[str, tuple[Figure, int]] = {
    "perplexity": (lambda one: one["perplexity"], 1),
    "on other domains": (lambda one: one["other_perplexity"], 1),
    "MaxVio, training text": (lambda one: one["maxvio_training"], 3),
    "MaxVio, held-out text": (lambda one: one["maxvio"], 3),
    "MaxVio, other domains": (lambda one: _mean(one["lis"]["outside"]) - 1, 3),
}
SIMBAL = {
    "perplexity": BALANCE["perplexity"],
    "PES": (lambda one: one["pes"], 4),
    "MaxVio, training text": BALANCE["MaxVio, training text"],
    "MaxVio, held-out text": BALANCE["MaxVio, held-out text"],
}
DYNAMIC: dict[str, tuple[Figure, int]] = {
    "perplexity": (lambda one: one["adaptive"]["own"]["perplexity"], 1),
    "experts per token, untrained": (lambda one: one["adaptive"]["start"], 2),
    "trained": (lambda one: one["adaptive"]["own"]["mean"], 2),
    "hardest less easiest domain": (lambda one: _hard_minus_easy(one["adaptive"]["own"]), 3),
    "same, dealt out": (lambda one: _hard_minus_easy(one["adaptive"]["dealt"]), 3),
    "rank correlation with loss": (lambda one: one["adaptive"]["own"]["correlation"], 3),
    "same, dealt out ": (lambda one: one["adaptive"]["dealt"]["correlation"], 3),
    "perplexity, dealt out": (lambda one: one["adaptive"]["dealt"]["perplexity"], 1),
    "MaxVio, held-out text": BALANCE["MaxVio, held-out text"],
}
CHAIN: dict[str, tuple[Figure, int]] = {
    "perplexity": BALANCE["perplexity"],
    "on other domains": BALANCE["on other domains"],
    "parameters": (lambda one: one["parameters"], 0),
    "steps": (lambda one: one["steps"], 0),
    "expert calls of a token and layer": (lambda one: _mean(one["experts_per_token"]), 1),
    "MaxVio, held-out text": BALANCE["MaxVio, held-out text"],
    "PES": SIMBAL["PES"],
}
SAME: dict[str, tuple[Callable[[Sequence[Mapping[str, Any]]], float], int]] = {
    "steps, German": (lambda stages: stages[0]["steps"], 0),
    "steps, chat": (lambda stages: stages[1]["steps"], 0),
    "perplexity, German": (lambda stages: np.exp(stages[0]["new_loss"]), 1),
    "rise of the old, nats": (lambda stages: stages[0]["old_loss"] - stages[0]["old_loss_before"], 3),
    "rise of the first four after chat": (lambda stages: stages[1]["first_loss"] - stages[0]["old_loss_before"], 3),
    "routing overlap": (lambda stages: stages[0]["overlap"], 3),
    "JS, bits": (lambda stages: stages[0]["divergence"], 4),
    "rise with the old routers": (lambda stages: stages[0]["old_routers"] - stages[0]["old_loss_before"], 3),
    "rise with new routers alone": (lambda stages: stages[0]["new_routers"] - stages[0]["old_loss_before"], 3),
}
LEFT: dict[str, tuple[Figure, int]] = {
    "excess LIS, all trained domains": (lambda one: one["lis"]["mix"] - 1, 2),
    "each alone": (lambda one: _mean(one["lis"]["inside"]) - 1, 2),
    "other domains": (lambda one: _mean(one["lis"]["outside"]) - 1, 2),
    "`rq` removes of these, %": (lambda one: _removed(one["lis"]["mix"], one["rq"]["mix"]), 0),
    "alone, %": (lambda one: _removed(_mean(one["lis"]["inside"]), _mean(one["rq"]["inside"])), 0),
    "other, %": (lambda one: _removed(_mean(one["lis"]["outside"]), _mean(one["rq"]["outside"])), 0),
    "perplexity change by `rq`, %": (lambda one: 100 * (one["rq"]["perplexity"] / one["perplexity"] - 1), 2),
}
