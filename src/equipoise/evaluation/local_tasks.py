"""Task data from local files, in the columns that lm-eval's own task definitions read.

A file holds one JSON object a line, plain or gzipped, with the answer as an index into the choices. The definitions themselves
(prompts, metrics, filters) are lm-eval's: only where the rows come from is replaced, so prompts cannot drift apart.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from equipoise.errors import EquipoiseError

Row = dict[str, Any]


@dataclass(frozen=True)
class LocalTask:
    """Where a task's rows come from and how they become the columns of the hub's data set.

    Attributes:
        folder: lm-eval's folder of the task's definition.
        files: names of the file to evaluate on, without suffix; the first that exists is read.
        examples: names of the file from which few-shot examples are drawn.
        fields: what each row must have.
        convert: a row in the hub's columns.
        by_subject: the task is a group of one task per subject (MMLU); rows carry `subject`.
    """

    folder: str
    files: tuple[str, ...]
    examples: tuple[str, ...]
    fields: tuple[str, ...]
    convert: Callable[[Row], Row]
    by_subject: bool = False


def _hellaswag(row: Row) -> Row:
    # The hub splits the context: a caption's unfinished last sentence is `ctx_b`; how-to texts end whole and have none.
    context = str(row["context"])
    whole, part = context, ""
    if not context.rstrip().endswith("."):
        match = re.fullmatch(r"(.*[.!?])\s+(.*?)", context, re.DOTALL)
        whole, part = match.groups() if match else ("", context)
    return {
        "activity_label": row["activity"],
        "ctx_a": whole,
        "ctx_b": part,
        "endings": row["choices"],
        "label": str(row["label"]),
    }


def _piqa(row: Row) -> Row:
    return {"goal": row["context"], "sol1": row["choices"][0], "sol2": row["choices"][1], "label": row["label"]}


def _arc(row: Row) -> Row:
    labels = [chr(ord("A") + i) for i in range(len(row["choices"]))]
    return {
        "question": row["question"],
        "choices": {"text": row["choices"], "label": labels},
        "answerKey": labels[row["label"]],
    }


def _winogrande(row: Row) -> Row:
    first, second = row["choices"]
    return {"sentence": row["sentence"], "option1": first, "option2": second, "answer": str(row["label"] + 1)}


def _truthfulqa(row: Row) -> Row:
    # lm-eval takes the first choice for the right one, as the hub's data set lists it first.
    choices = list(row["mc1_choices"])
    choices.insert(0, choices.pop(row["mc1_label"]))
    return {"question": row["question"], "mc1_targets": {"choices": choices, "labels": [1] + [0] * (len(choices) - 1)}}


def _mmlu(row: Row) -> Row:
    return {"question": row["question"], "subject": row["subject"], "choices": row["choices"], "answer": row["label"]}


def _gsm8k(row: Row) -> Row:
    return {"question": row["question"], "answer": row["answer"]}


_ARC = ("question", "choices", "label")
LOCAL_TASKS: Mapping[str, LocalTask] = {
    "hellaswag": LocalTask(
        "hellaswag", ("hellaswag_val",), ("hellaswag_train",), ("activity", "context", "choices", "label"), _hellaswag
    ),
    "piqa": LocalTask("piqa", ("piqa_val",), ("piqa_train",), ("context", "choices", "label"), _piqa),
    "arc_easy": LocalTask("arc", ("arc_easy_test",), ("arc_easy_train", "arc_easy_val"), _ARC, _arc),
    "arc_challenge": LocalTask("arc", ("arc_challenge_test",), ("arc_challenge_train", "arc_challenge_val"), _ARC, _arc),
    "winogrande": LocalTask(
        "winogrande", ("winogrande_xl_val",), ("winogrande_xl_train",), ("sentence", "choices", "label"), _winogrande
    ),
    "truthfulqa_mc1": LocalTask("truthfulqa", ("truthfulqa",), (), ("question", "mc1_choices", "mc1_label"), _truthfulqa),
    "mmlu": LocalTask(
        "mmlu/default",
        ("mmlu_test", "mmlu_validation"),
        ("mmlu_dev",),
        ("question", "subject", "choices", "label"),
        _mmlu,
        True,
    ),
    "gsm8k": LocalTask("gsm8k", ("gsm8k_test",), ("gsm8k_train",), ("question", "answer"), _gsm8k),
}
"""The tasks known by name; with lm-eval's own data sets when no directory of files is given."""


def task_file(directory: Path, task: str, stems: tuple[str, ...]) -> Path:
    """The first of `stems` that is in a directory, plain or gzipped.

    Raises:
        EquipoiseError: none is there; the message names the files looked for.
    """
    for stem in stems:
        for suffix in (".jsonl", ".jsonl.gz"):
            path = directory / f"{stem}{suffix}"
            if path.is_file():
                return path
    wanted = " or ".join(f"'{stem}.jsonl[.gz]'" for stem in stems)
    raise EquipoiseError(f"task '{task}' needs the file {wanted} in '{directory}'; it is not there.")


def read_rows(path: Path, task: LocalTask, limit: int | None = None) -> list[Row]:
    """Rows of a file in the hub's columns; with subjects, at most `limit` rows of each.

    Raises:
        EquipoiseError: unreadable file, a line that is not JSON, a missing field, or no rows; the message names the line.
    """
    rows = _convert(path, task)
    if task.by_subject and limit is not None:
        seen: dict[str, int] = {}
        kept = []
        for row in rows:
            seen[row["subject"]] = seen.get(row["subject"], 0) + 1
            if seen[row["subject"]] <= limit:
                kept.append(row)
    else:
        kept = list(islice(rows, limit))
    if not kept:
        raise EquipoiseError(f"task file '{path}' has no rows.")
    return kept


def _convert(path: Path, task: LocalTask) -> Iterator[Row]:
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _row(json.loads(line), task, path, number)
    except (OSError, EOFError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise EquipoiseError(f"task file '{path}' cannot be read after line {number}: {error}") from error


def _row(row: Row, task: LocalTask, path: Path, number: int) -> Row:
    missing = [field for field in task.fields if field not in row]
    if missing:
        raise EquipoiseError(f"task file '{path}', line {number}: no field '{missing[0]}'; a row has {', '.join(task.fields)}.")
    try:
        return task.convert(row)
    except (IndexError, TypeError, ValueError) as error:
        raise EquipoiseError(f"task file '{path}', line {number}: the answer does not fit the choices ({error}).") from error
