"""Table 2 of the paper: LIS and accuracy of every task as the model is, under R&Q as published and under `rq`, with intervals.

    python benchmarks/paper/tables_tasks.py --data DIRECTORY --write docs/paper.md
    python benchmarks/paper/tables_tasks.py --data DIRECTORY --models reference --items 57 --tasks piqa hellaswag winogrande

As in the paper, the plan of a task is made from that task's own text; here from items that are not judged. One request of each
such item is read, prompt and one of its answers in turn. GSM8K is generated, so fewer items of it are judged.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import Cells, Subject, arguments, machine, publish, quoted, subjects
from scipy.stats import binomtest
from tables_parts import KIN, OURS, PLANNED, PRINTED, PUBLISHED, apart, carried_out, measured, plan_of, points

from equipoise.errors import EquipoiseError
from equipoise.evaluation.evaluate import evaluate
from equipoise.evaluation.harness import quiet
from equipoise.evaluation.tasks import LoadedTask, load_tasks
from equipoise.models.reference import demo_task_dir

TASKS = ("gsm8k", "truthfulqa_mc1", "winogrande", "hellaswag", "mmlu", "piqa")
"""The paper's tasks, in its order."""
GENERATED = ("gsm8k",)
READ = 600
"""Items of a task that may be read to plan from: more than the tokens to plan from hold."""


def task_directory(data: Path | None) -> Path:
    """Where the tasks' rows are: the folder `eval` of `--data`, or the demo's evaluation sets."""
    return demo_task_dir() if data is None else data / "eval"


def available(names: Sequence[str], directory: Path) -> list[LoadedTask]:
    """The tasks whose rows are in a directory, whole; the others are named and left out."""
    loaded = []
    for name in names:
        try:
            loaded += load_tasks([name], task_dir=directory, limit=None, num_fewshot=0)
        except EquipoiseError as error:
            print(f"{name} left out: {error}", file=sys.stderr)
    return loaded


def limit_of(task: LoadedTask, items: int) -> int:
    """Items of each part of a task, so that all its parts together have about as many as asked for, and some are left over."""
    with quiet():
        smallest = min(len(part.test_docs()) for part in task.parts)
    return max(1, min(math.ceil(items / len(task.parts)), smallest - 1))


def requests_of(part: Any, limit: int) -> dict[int, list[Any]]:
    """lm-eval's requests of the first items of a task: number of the item -> one request for each choice."""
    with quiet():
        part.build_all_requests(limit=limit)
    by_item: dict[int, list[Any]] = {}
    for request in part.instances:
        by_item.setdefault(request.doc_id, []).append(request)
    return by_item


def unjudged(task: LoadedTask, limit: int) -> list[str]:
    """Text of the items of a task that are not judged: of each item one request, prompt and answer.

    Args:
        task: with all its items.
        limit: the first items of each part, which are judged.
    """
    texts = []
    for part in task.parts:
        for item, requests in requests_of(part, limit + math.ceil(READ / len(task.parts))).items():
            if item >= limit:
                chosen = requests[item % len(requests)]
                # A request to generate holds its prompt and options; the answer that the data set gives follows it.
                answer = chosen.args[1] if isinstance(chosen.args[1], str) else part.doc_to_target(chosen.doc)
                texts.append(f"{chosen.args[0]} {str(answer).lstrip()}")
    return texts


def chance(task: LoadedTask, limit: int) -> float | None:
    """Expected accuracy of guessing among each judged item's choices; None where answers are generated."""
    if task.name in GENERATED:
        return None
    return float(np.mean([1 / len(requests) for part in task.parts for requests in requests_of(part, limit).values()]))


def judged(tested: Subject, task: LoadedTask, told: argparse.Namespace) -> dict[str, Any]:
    """One model on one task: plans made from what is not judged, all three models on what is."""
    limit = limit_of(task, told.generated if task.name in GENERATED else told.items)
    planned = {task.name: unjudged(task, limit)}
    made = measured(tested, planned, told.tokens, told.seed, told.out / "profiles")
    plans = {name: plan_of(made, name, told.seed) for name in PLANNED}
    found = evaluate(
        tested.model, {name: carried_out(tested, plan, planned, told.seed) for name, plan in plans.items()}, tested.tokenizer,
        tasks=[task.name], task_dir=task_directory(told.data), limit=limit, batch_size=8, seed=told.seed, base_name=tested.name,
    )  # fmt: skip
    contenders = {c.name: c for c in found.contenders}
    return {
        "units": found.units,
        "planned_tokens": int(made.tokens.sum()),
        "chance": chance(task, limit),
        "base_bytes": found.base_expert_bytes,
        "contenders": {
            name: {"bytes": c.expert_bytes, "seconds": c.seconds} | c.tasks[0].model_dump() for name, c in contenders.items()
        },
    }


def found_tasks(told: argparse.Namespace) -> Iterator[tuple[Subject, str, Mapping[str, Any]]]:
    """All models and tasks, from earlier runs where they were judged already."""
    loaded = available(told.tasks, task_directory(told.data))
    cells = Cells(told.out, "tasks")
    for tested in subjects(told):
        for task in loaded:
            key = {
                "task": task.name,
                "items": told.generated if task.name in GENERATED else told.items,
                "tokens": told.tokens,
                "seed": told.seed,
                "rows": "demo" if told.data is None else "data",
            }
            yield tested, task.name, cells.get(tested, key, lambda t=tested, k=task: judged(t, k, told))


def at_chance(cell: Mapping[str, Any]) -> bool:
    """Whether guessing explains the raw score (exact binomial interval, 95 %)."""
    row = cell["contenders"][PUBLISHED]
    if cell["chance"] is None:
        return bool(row["score_base"] == 0)
    limits = binomtest(round(row["score_base"] * row["items"]), row["items"]).proportion_ci(0.95)
    return bool(limits.low <= cell["chance"] <= limits.high)


def printed(model: str, task: str) -> str:
    """The paper's figures for its model of the same layout."""
    row = PRINTED.get(KIN.get(model, ""), {}).get(task)
    if row is None:
        return ""
    raw, balanced, before, after = row
    accuracy = "" if before is None or after is None else f", {after - before:+.1f} points"
    return quoted(f"{raw:.2f} to {balanced:.2f}{accuracy}")


def page(rows: Sequence[tuple[str, str, Mapping[str, Any]]]) -> str:
    """The table, and what it says in counts."""
    lines = [
        "| model | task (items) | LIS raw | `rq-paper` | its `lis_paper` | `rq` | accuracy raw, % | chance, % | `rq-paper`, "
        "points | `rq`, points | the paper's model: LIS, accuracy |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|---|---|",
    ]
    last = ""
    for model, task, cell in rows:
        one, ours = cell["contenders"][PUBLISHED], cell["contenders"][OURS]
        guess = "-" if cell["chance"] is None else f"{100 * cell['chance']:.1f}"
        accuracy = f"{100 * one['score_base']:.1f}{' (chance)' if at_chance(cell) and cell['chance'] is not None else ''}"
        lines.append(
            f"| {'' if model == last else f'`{model}`'} | {task} ({one['items']}) | {one['lis_base']:.3f} | {one['lis']:.3f} "
            f"| {one['lis_paper']:.3f} | {ours['lis']:.3f} | {accuracy} | {guess} | {points(one['difference'])} "
            f"| {points(ours['difference'])} | {printed(model, task)} |"
        )
        last = model
    return "\n".join([*lines, "", *says(rows)])


def ratios(found: Sequence[Mapping[str, Any]], reading: str) -> str:
    """Raw over balanced LIS: geometric mean, least and greatest."""
    values = np.array([row["lis_base"] / row[reading] for row in found])
    return f"{np.exp(np.log(values).mean()):.2f} ({values.min():.2f} to {values.max():.2f})"


def printed_ratios() -> str:
    """The same of the paper's table."""
    values = np.array([raw / balanced for tasks in PRINTED.values() for raw, balanced, _, _ in tasks.values()])
    return f"{np.exp(np.log(values).mean()):.2f} ({values.min():.2f} to {values.max():.2f})"


def beyond(found: Sequence[Mapping[str, Any]]) -> str:
    """How many differences of accuracy have an interval that leaves zero out."""
    better = sum(row["difference"]["low"] > 0 for row in found)
    worse = sum(row["difference"]["high"] < 0 for row in found)
    return f"{better} better and {worse} worse of {len(found)}"


def says(rows: Sequence[tuple[str, str, Mapping[str, Any]]]) -> list[str]:
    """Counts and ranges over the whole table."""
    cells = [cell for _, _, cell in rows]
    paper = [cell["contenders"][PUBLISHED] for cell in cells]
    ours = [cell["contenders"][OURS] for cell in cells]
    lower = sum(row["lis_paper"] < row["lis_base"] for row in paper)
    level = sum(row["lis"] < row["lis_base"] for row in paper)
    outside = sum(apart(row["difference"]) for row in [*paper, *ours])
    expected = 0.05 * 2 * len(rows)
    guessed = sum(at_chance(cell) for cell in cells)
    units = {cell["units"] for cell in cells}
    most = [
        max(100 * row["bytes"] / cell["base_bytes"] for cell, row in zip(cells, found, strict=True)) for found in (paper, ours)
    ]
    lines = [
        f"- **LIS**: `rq-paper` lowers the paper's own score in {lower} and LIS over units in {level} of {len(rows)} cells. "
        f"Raw / balanced, geometric mean (range): {ratios(paper, 'lis_paper')} by the paper's score, {ratios(paper, 'lis')} "
        f"over units; `rq` {ratios(ours, 'lis')} over units. The paper's own: {printed_ratios()}, computed from quoted "
        "figures.",
        f"- **Accuracy**: the interval leaves zero out in {outside} of {2 * len(rows)} differences, where chance alone gives "
        f"about {expected:.2g}: `rq-paper` {beyond(paper)}, `rq` {beyond(ours)}. The raw score is explained by guessing, or "
        f"is 0, in {guessed} of {len(rows)} cells; there a difference says nothing, and nor do the paper's +2.2 and +2.0 "
        "points for Switch on MMLU (quoted), from 23 % among four choices.",
        f"- LIS is over {f'{units.pop()} units' if len(units) == 1 else 'as many units as routed experts'}, `lis_paper` "
        "gives every copy a unit of its own. The plan of a task is made from items of it that are not judged. Intervals: 95 "
        f"%, paired over items. Bytes: at most {most[0]:.1f} % (`rq-paper`) and {most[1]:.1f} % (`rq`) of the original. "
        f"Zero-shot; {machine()}.",
    ]
    decoded = [cell["contenders"][OURS]["lis"] for _, task, cell in rows if task in GENERATED]
    if decoded:
        lines.insert(
            1,
            f"- {', '.join(GENERATED).upper()} is generated one prompt at a time: a step has one token, of which "
            f"`least_loaded`, the dispatch of `rq`, can level nothing (LIS {min(decoded):.2f} to {max(decoded):.2f}); `even` "
            "levels over time (Generation).",
        )
    return lines


def with_tasks(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Options of what is judged."""
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--items", type=int, default=400, help="of each task (about as many where a task has subjects)")
    parser.add_argument("--generated", type=int, default=16, help="items of a task that is generated")
    parser.add_argument("--tokens", type=int, default=8192, help="of each task's other items, to plan from")
    return parser


def main() -> None:
    """Run, print, keep."""
    told = with_tasks(arguments(__doc__, "out/paper")).parse_args()
    rows = [(tested.name, task, cell) for tested, task, cell in found_tasks(told)]
    Cells(told.out, "tasks").keep(f"table-2{told.mark}", [{"model": m, "task": t} | cell for m, t, cell in rows])
    publish({f"paper-table-2{told.mark}": page(rows)}, told.write)


if __name__ == "__main__":
    main()
