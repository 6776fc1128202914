from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from equipoise.errors import EquipoiseError
from equipoise.evaluation.local_tasks import LOCAL_TASKS, read_rows, task_file


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


ROW = {"question": "Which?", "choices": ["this", "that", "neither"], "label": 1}


@pytest.mark.parametrize(
    ("context", "whole", "part"),
    [
        ("A man sits on a roof. he", "A man sits on a roof.", "he"),
        ("Is it done? Yes. then, the man", "Is it done? Yes.", "then, the man"),
        ("a lady", "", "a lady"),
        ("[header] How to rest [title] Sit. [step] Sit down on a chair.", None, ""),
    ],
)
def test_hellaswag_context_is_split_as_on_the_hub(context: str, whole: str | None, part: str) -> None:
    row = {"activity": "Resting", "context": context, "choices": ["a", "b", "c", "d"], "label": 2}
    found = LOCAL_TASKS["hellaswag"].convert(row)
    assert (found["ctx_a"], found["ctx_b"]) == (context if whole is None else whole, part)
    assert found["label"] == "2"


def test_answers_become_the_hubs_own() -> None:
    assert LOCAL_TASKS["arc_easy"].convert(ROW)["answerKey"] == "B"
    assert LOCAL_TASKS["winogrande"].convert({"sentence": "a _ b", "choices": ["x", "y"], "label": 0})["answer"] == "1"
    truth = LOCAL_TASKS["truthfulqa_mc1"].convert({"question": "q", "mc1_choices": ["w", "r", "v"], "mc1_label": 1})
    assert truth["mc1_targets"] == {"choices": ["r", "w", "v"], "labels": [1, 0, 0]}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_rows_are_read_plain_or_gzipped_up_to_a_limit(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"arc_easy_test{suffix}", [ROW] * 5)
    path = task_file(tmp_path, "arc_easy", LOCAL_TASKS["arc_easy"].files)
    assert len(read_rows(path, LOCAL_TASKS["arc_easy"])) == 5
    assert len(read_rows(path, LOCAL_TASKS["arc_easy"], 3)) == 3


def test_a_limit_holds_for_each_subject(tmp_path: Path) -> None:
    rows = [{**ROW, "subject": subject} for subject in ("anatomy", "anatomy", "virology", "anatomy")]
    path = write(tmp_path / "mmlu_test.jsonl", rows)
    assert [row["subject"] for row in read_rows(path, LOCAL_TASKS["mmlu"], 2)] == ["anatomy", "anatomy", "virology"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EquipoiseError, match=r"task 'mmlu' needs the file 'mmlu_test.jsonl\[.gz\]' or 'mmlu_validation"):
        task_file(tmp_path, "mmlu", LOCAL_TASKS["mmlu"].files)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ('{"question": "q"}\n', "line 1: no field 'choices'"),
        ('{"question": "q", "choices": ["a"], "label": 3}\n', "line 1: the answer does not fit"),
        ("{broken\n", "cannot be read after line 1"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "arc_easy_test.jsonl"
    path.write_text(text)
    with pytest.raises(EquipoiseError, match=message):
        read_rows(path, LOCAL_TASKS["arc_easy"])


def test_a_truncated_file_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "arc_easy_test.jsonl.gz", [ROW] * 50)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(EquipoiseError, match="cannot be read"):
        read_rows(path, LOCAL_TASKS["arc_easy"])
