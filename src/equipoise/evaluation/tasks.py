"""Tasks of lm-eval: loading them from the hub or from local files, and the score of every item.

lm-eval itself is an extra; it is imported when a task is asked for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.errors import EquipoiseError, missing_package, unknown_name
from equipoise.evaluation.local_tasks import LOCAL_TASKS, LocalTask, Row, read_rows, task_file

PREFERRED_METRICS = ("acc_norm", "acc", "exact_match")
"""The metric of a table's row: the first of these that the task reports (length-normalised accuracy where lm-eval has it)."""
PREFERRED_FILTER = "flexible-extract"
"""GSM8K: the last number of the answer counts, since without examples no model knows the strict '#### N' form."""


@dataclass(frozen=True, eq=False)
class LoadedTask:
    """A task that is ready to run: its name and lm-eval's task objects (one, or one per subject)."""

    name: str
    parts: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class ItemScores:
    """The scores of one model on one task.

    Attributes:
        metric: name of the metric, with lm-eval's filter when it has one.
        items: (part of the task, index of the item in it), in order.
        scores: [N] score of each item; their mean is the number that lm-eval reports.
    """

    metric: str
    items: tuple[tuple[str, int], ...]
    scores: NDArray[np.float64]


def load_tasks(
    names: Sequence[str | LoadedTask], *, task_dir: Path | None, limit: int | None, num_fewshot: int
) -> list[LoadedTask]:
    """Load tasks by name before anything is run, so that a mistake shows at once.

    Args:
        names: one of `LOCAL_TASKS`; without `task_dir` any task or group of lm-eval; what was loaded before stays as it is.
        task_dir: directory with the tasks' rows; None reads them from the hub (or its cache).
        limit: items of each task (of each subject where a task has subjects); None for all.
        num_fewshot: worked examples before each item; a task that fixes its own prompt (TruthfulQA) keeps it.

    Raises:
        EquipoiseError: lm-eval is not installed, unknown task, missing file, or the hub is out of reach.
    """
    if not names:
        return []
    if find_spec("lm_eval") is None:
        raise missing_package("tasks need", "lm-eval")
    if limit is not None and limit < 1:
        raise EquipoiseError(f"a limit of {limit} items leaves nothing to evaluate; give at least 1.")
    loaded = []
    for name in dict.fromkeys(names):
        if isinstance(name, LoadedTask):
            loaded.append(name)
        elif task_dir is None:
            loaded.append(LoadedTask(name, tuple(_from_hub(name))))
        elif name not in LOCAL_TASKS:
            raise unknown_name("task with local files", name, LOCAL_TASKS)
        else:
            loaded.append(LoadedTask(name, tuple(_from_files(name, LOCAL_TASKS[name], Path(task_dir), limit, num_fewshot))))
    return loaded


def run_task(
    task: LoadedTask,
    model: Any,
    tokenizer: Any,
    *,
    batch_size: int,
    limit: int | None,
    num_fewshot: int,
    seed: int,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> ItemScores:
    """Run one model on one task.

    Args:
        task: from `load_tasks`.
        model: as loaded by transformers.
        tokenizer: of the base model.
        batch_size: sequences of one forward pass.
        limit: as given to `load_tasks`.
        num_fewshot: as given to `load_tasks`.
        seed: of the choice of few-shot examples.
        advance: called with (requests just done, all requests).

    Raises:
        EquipoiseError: the task's metric is not a mean over items, so that two models cannot be paired.
    """
    from lm_eval import simple_evaluate

    from equipoise.evaluation.harness import MaskedLM, quiet

    with quiet():
        results = simple_evaluate(
            model=MaskedLM(model, tokenizer, batch_size, advance),
            tasks=list(task.parts),
            task_manager=_task_manager(None),
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return _item_scores(task.name, results)


def _item_scores(name: str, results: Any) -> ItemScores:
    by_filter: dict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    for part, samples in results["samples"].items():
        for sample in samples:
            by_filter[sample["filter"]].append((part, sample))
    chosen = PREFERRED_FILTER if PREFERRED_FILTER in by_filter else next(iter(by_filter))
    samples = by_filter[chosen]
    metrics = [m for m in PREFERRED_METRICS if all(m in sample for _, sample in samples)]
    if not metrics:
        raise EquipoiseError(f"task '{name}' reports none of {', '.join(PREFERRED_METRICS)}; models are paired on these alone.")
    metric = metrics[0]
    scores = np.array([float(sample[metric]) for _, sample in samples])
    for part in results["samples"]:
        mine = scores[[i for i, (other, _) in enumerate(samples) if other == part]]
        reported = results["results"][part][f"{metric},{chosen}"]
        if not np.isclose(mine.mean(), reported):
            raise EquipoiseError(f"task '{part}': '{metric}' is not a mean over items ({mine.mean():.6g}, {reported:.6g}).")
    label = metric if chosen == "none" else f"{metric},{chosen}"
    return ItemScores(label, tuple((part, int(sample["doc_id"])) for part, sample in samples), scores)


def _task_manager(folder: str | None) -> Any:
    """lm-eval's index of one folder of its definitions; of none for None; of all (thousands of files, seconds) for ""."""
    import lm_eval.tasks

    home = Path(lm_eval.tasks.__file__).parent
    return lm_eval.tasks.TaskManager(include_path=str(home / folder) if folder is not None else None, include_defaults=False)


def _from_hub(name: str) -> list[Any]:
    from equipoise.evaluation.harness import quiet

    local = LOCAL_TASKS.get(name)
    with quiet():
        manager = _task_manager(local.folder if local else "")
        if name not in manager.all_tasks:
            near = get_close_matches(name, manager.all_tasks, n=3)
            hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
            raise EquipoiseError(f"unknown task '{name}'; the usual ones: {', '.join(LOCAL_TASKS)}.{hint}")
        try:
            return list(manager.load([name])["tasks"].values())
        except (OSError, ValueError) as error:  # datasets answers a missing or unreachable data set with either
            wanted = f" with '{local.files[0]}.jsonl'" if local else ""
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise EquipoiseError(
                f"the data of task '{name}' cannot be had from the hub ({first}); "
                f"give --task-dir a directory{wanted}, or connect and unset HF_HUB_OFFLINE."
            ) from error


def _from_files(name: str, local: LocalTask, directory: Path, limit: int | None, num_fewshot: int) -> list[Any]:
    from equipoise.evaluation.harness import quiet

    rows = read_rows(task_file(directory, name, local.files), local, limit)
    examples: list[Row] = []
    if num_fewshot and local.examples:
        examples = read_rows(task_file(directory, f"{name} with examples", local.examples), local)
    with quiet():
        manager = _task_manager(local.folder)
        if not local.by_subject:
            return [_local_part(manager, name, rows, examples)]
        parts = []
        for subject in sorted({row["subject"] for row in rows}):
            part = f"{name}_{subject}"
            if part not in manager.all_tasks:
                raise unknown_name(f"subject of {name}", subject, [t.removeprefix(f"{name}_") for t in manager.all_subtasks])
            of_subject = [[row for row in table if row["subject"] == subject] for table in (rows, examples)]
            parts.append(_local_part(manager, part, *of_subject))
        return parts


def _local_part(manager: Any, name: str, rows: list[Row], examples: list[Row]) -> Any:
    """lm-eval's own task of that name, reading these rows instead of the hub's."""
    import datasets

    tables = {"rows": datasets.Dataset.from_list(rows)}
    if examples:
        tables["examples"] = datasets.Dataset.from_list(examples)
    overrides = {
        "task": name,
        "custom_dataset": lambda **_: tables,
        "training_split": "examples" if examples else None,
        "validation_split": None,
        "test_split": "rows",
        "fewshot_split": "examples" if examples else None,
    }
    # A member of a group may override what the index holds of it; a task given alone would have to be whole.
    return manager.load([{"group": "local", "task": [overrides]}])["tasks"][name]
