from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equipoise.errors import EquipoiseError
from equipoise.evaluation.balance import measure
from equipoise.evaluation.local_tasks import LOCAL_TASKS
from equipoise.evaluation.tasks import LoadedTask, load_tasks, run_task

pytest.importorskip("lm_eval", reason="tasks need the extra equipoise[eval]")

WORDS = ["water", "stone", "light", "paper", "river", "cloud", "metal", "glass", "wood", "sand"]


def phrase(i: int, length: int) -> str:
    return " ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(length))


def question(i: int, choices: int = 4) -> dict[str, Any]:
    options = [phrase(i + c, 1 + (i + c) % 3) for c in range(choices)]
    return {"id": i, "question": f"What is {phrase(i, 3)}?", "choices": options, "label": i % choices}


def caption(i: int) -> dict[str, Any]:
    choices = [f"sees {phrase(i + c, 2)}." for c in range(4)]
    return {"activity": "Resting", "context": "A man sits. he", "choices": choices, "label": i % 4}


def goal(i: int) -> dict[str, Any]:
    return {"context": f"To get {phrase(i, 2)},", "choices": [phrase(i, 4), phrase(i + 3, 5)], "label": i % 2}


ROWS: dict[str, list[dict[str, Any]]] = {
    "hellaswag_val": [caption(i) for i in range(6)],
    "piqa_val": [goal(i) for i in range(6)],
    "arc_easy_test": [question(i) for i in range(12)],
    "arc_easy_train": [question(i + 50) for i in range(4)],
    "arc_challenge_test": [question(i, 3) for i in range(4)],
    "winogrande_xl_val": [{"sentence": "The stone hit the glass so _ broke.", "choices": ["stone", "glass"], "label": 1}] * 3,
    "truthfulqa": [{"question": "What is sand?", "mc1_choices": ["small stones", "water", "light"], "mc1_label": 0}] * 3,
    "mmlu_validation": [{**question(i), "subject": ("virology", "anatomy")[i % 2]} for i in range(6)],
    "gsm8k_test": [{"question": "One and one?", "answer": "1 + 1 = 2\n#### 2"}] * 2,
}
ARC = (f"Question: {question(0)['question']}\nAnswer:", f" {question(0)['choices'][0]}")
SECOND = question(1)["choices"]
PROMPTS = {
    "hellaswag": ("Resting: A man sits. He", f" sees {phrase(0, 2)}."),
    "piqa": (f"Question: To get {phrase(0, 2)},\nAnswer:", f" {phrase(0, 4)}"),
    "arc_easy": ARC,
    "arc_challenge": ARC,
    "winogrande": ("The stone hit the glass so stone", " broke."),
    "truthfulqa_mc1": ("Barcelona, Spain.\n\nQ: What is sand?\nA:", " small stones"),
    "mmlu": (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        f"{question(1)['question']}\nA. {SECOND[0]}\nB. {SECOND[1]}\nC. {SECOND[2]}\nD. {SECOND[3]}\nAnswer:",
        " A",
    ),
    "gsm8k": ("Question: One and one?\nAnswer:", None),
}
"""How the first request of each task ends: lm-eval's own prompts."""


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tasks")
    for name, rows in ROWS.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def load(name: str, task_dir: Path | None, num_fewshot: int = 0, limit: int | None = None) -> LoadedTask:
    (task,) = load_tasks([name], task_dir=task_dir, limit=limit, num_fewshot=num_fewshot)
    return task


def run(task: LoadedTask, model: Any, tokenizer: Any, batch_size: int = 4, num_fewshot: int = 0) -> Any:
    return run_task(task, model, tokenizer, batch_size=batch_size, limit=None, num_fewshot=num_fewshot, seed=0)


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_every_local_task_runs_with_lm_evals_own_prompts(name: str, task_dir: Path, model: Any, tokenizer: Any) -> None:
    task = load(name, task_dir)
    found = run(task, model, tokenizer)
    context, continuation = PROMPTS[name]
    arguments = task.parts[0].instances[0].args
    assert arguments[0].endswith(context)
    assert continuation is None or arguments[1] == continuation
    expected = next(len(rows) for stem, rows in ROWS.items() if stem.startswith(name.split("_mc1")[0]))
    assert len(found.scores) == len(set(found.items)) == expected
    assert set(found.scores) <= {0.0, 1.0}
    metric = {"hellaswag": "acc_norm", "piqa": "acc_norm", "gsm8k": "exact_match,flexible-extract"}
    metric |= {"arc_easy": "acc_norm", "arc_challenge": "acc_norm"}
    assert found.metric == metric.get(name, "acc")


@pytest.mark.parametrize(("name", "metric"), [("arc_easy", "acc_norm"), ("mmlu", "acc")])
def test_scores_equal_lm_evals_own_wrapper(name: str, metric: str, task_dir: Path, model: Any, tokenizer: Any) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    task = load(name, task_dir)
    found = run(task, model, tokenizer)
    theirs = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3),
        tasks=list(load(name, task_dir).parts),
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    for part, result in theirs["results"].items():
        mine = [score for (of, _), score in zip(found.items, found.scores, strict=True) if of == part]
        assert np.mean(mine) == pytest.approx(result[f"{metric},none"])
        answers = [[resp[0][0] for resp in sample["resps"]] for sample in theirs["samples"][part]]
        parts = {p.config.task: p for p in task.parts}
        own = [[i.resps[0][0] for i in parts[part].instances if i.doc_id == d] for d in range(len(mine))]
        np.testing.assert_allclose(own, answers, rtol=1e-4)
    assert 0 < found.scores.mean() < 1


def test_encoder_decoder_scores_equal_lm_evals_own_wrapper(task_dir: Path, encoder_decoder: Any, tokenizer: Any) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    task = load("arc_easy", task_dir)
    run(task, encoder_decoder, tokenizer)
    theirs = simple_evaluate(
        HFLM(pretrained=encoder_decoder, tokenizer=tokenizer, batch_size=1, backend="seq2seq"),
        tasks=list(load("arc_easy", task_dir).parts),
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    answers = [[resp[0][0] for resp in sample["resps"]] for sample in theirs["samples"]["arc_easy"]]
    own = [[i.resps[0][0] for i in task.parts[0].instances if i.doc_id == d] for d in range(len(answers))]
    np.testing.assert_allclose(own, answers, rtol=1e-4)


def test_batch_size_changes_neither_scores_nor_balance(task_dir: Path, model: Any, tokenizer: Any) -> None:
    balances, scores = [], []
    for batch_size in (1, 5):
        with measure(model, None, 8) as balance:
            scores.append(run(load("arc_easy", task_dir), model, tokenizer, batch_size).scores.tolist())
        balances.append(balance.lis)
    assert scores[0] == scores[1]
    assert balances[0] == pytest.approx(balances[1], rel=1e-3)


def test_generation_counts_no_padding(task_dir: Path, model: Any, tokenizer: Any) -> None:
    balances = []
    for batch_size in (1, 2):
        with measure(model, None, 8) as balance:
            run(load("gsm8k", task_dir), model, tokenizer, batch_size)
        balances.append(balance.lis)
    assert balances[0] == balances[1]


def test_fewshot_examples_come_from_their_own_file(task_dir: Path, model: Any, tokenizer: Any) -> None:
    task = load("arc_easy", task_dir, num_fewshot=2)
    run(task, model, tokenizer, num_fewshot=2)
    prompt = task.parts[0].instances[0].args[0]
    examples = {row["question"] for row in ROWS["arc_easy_train"]}
    assert sum(f"Question: {q}\nAnswer: " in prompt for q in examples) == 2
    with pytest.raises(EquipoiseError, match=r"'piqa with examples' needs the file 'piqa_train.jsonl"):
        load("piqa", task_dir, num_fewshot=2)


def test_progress_reaches_the_number_of_requests(task_dir: Path, model: Any, tokenizer: Any) -> None:
    seen: list[tuple[int, int]] = []
    run_task(
        load("piqa", task_dir), model, tokenizer, batch_size=4, limit=None, num_fewshot=0, seed=0,
        advance=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert sum(done for done, _ in seen) == 12
    assert {total for _, total in seen} == {12}


def test_nothing_is_printed(
    task_dir: Path,
    model: Any,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)  # no repository here, of which git would complain
    run(load("piqa", task_dir), model, tokenizer)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_mistakes_are_named(task_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(EquipoiseError, match="Did you mean 'hellaswag'"):
        load("hellaswagg", task_dir)
    with pytest.raises(EquipoiseError, match=r"'piqa_val.jsonl\[.gz\]' in '.*'; it is not there"):
        load("piqa", tmp_path)
    with pytest.raises(EquipoiseError, match="limit of 0 items"):
        load("piqa", task_dir, limit=0)
    (tmp_path / "mmlu_test.jsonl").write_text(json.dumps({**question(1), "subject": "virologie"}))
    with pytest.raises(EquipoiseError, match="unknown subject of mmlu 'virologie'"):
        load("mmlu", tmp_path)


def test_an_unreachable_hub_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(EquipoiseError, match=r"task 'piqa' cannot be had from the hub .*give --task-dir"):
        load("piqa", None)


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, task_dir: Path) -> None:
    found: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr("equipoise.evaluation.tasks.find_spec", lambda name: None if name == "lm_eval" else found(name))
    with pytest.raises(EquipoiseError, match="pip install lm-eval"):
        load("piqa", task_dir)


def test_published_files_load_as_they_are() -> None:
    root = Path(__file__).parents[2]
    directory = Path(os.environ.get("EQUIPOISE_SHARED_DATA", root.parent / "shared" / "data")) / "eval"
    if not directory.is_dir():
        pytest.skip(f"no published task files in '{directory}' (set EQUIPOISE_SHARED_DATA)")
    tasks = {task.name: task for task in load_tasks(list(LOCAL_TASKS), task_dir=directory, limit=2, num_fewshot=0)}
    assert len(tasks["mmlu"].parts) == 57
    for task in tasks.values():
        assert all(len(part.eval_docs) == 2 for part in task.parts)
    (hellaswag,) = tasks["hellaswag"].parts
    assert hellaswag.doc_to_text(hellaswag.eval_docs[0]) == "Roof shingle removal: A man is sitting on a roof. He"
