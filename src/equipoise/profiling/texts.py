"""Calibration text: documents from plain and JSON-lines files, with errors that say where a file is wrong."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from equipoise.errors import TextError

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")

SAMPLER_FIELD = "equipoise_sampler"
"""Key of a JSON line that a model wrote itself: how its text was chosen."""

FIELD = "text"
CHAT_FIELD = "messages"
"""Key that engines log a chat under; read where a line has it and no `FIELD`."""

ChatWriter = Callable[[Sequence[Mapping[str, Any]]], str]
"""Makes the text that a model reads from the messages of a chat."""


class BalancedText(str):
    """A document that was sampled so that it uses all experts evenly; good for calibration, never for the load."""

    __slots__ = ()


def refuse_balanced(scenarios: Mapping[str, Iterable[str]]) -> None:
    """Refuse text that was balanced by design where a load is to be measured.

    Args:
        scenarios: name -> documents; those that `read_documents` or a sampler gave are known by their type.

    Raises:
        TextError: a scenario holds such text.
    """
    for name, documents in scenarios.items():
        if any(isinstance(document, BalancedText) for document in documents):
            raise TextError(
                f"scenario '{name}' holds text that was sampled to use all experts evenly, so its load says nothing about real "
                "traffic. Give it as calibration text, and measure the load on real text or on plain samples (sampler 'plain')."
            )


def read_documents(paths: Iterable[str | Path], *, field: str = FIELD, write_chat: ChatWriter | None = None) -> list[str]:
    """Read the documents of one scenario, in order of files and lines.

    A `.txt` file is one document, a line of a `.jsonl` file is one document; both may be gzipped. A chat is one document too.
    Documents of white space alone are left out. A line that says it was balanced by its sampler gives a `BalancedText`.

    Args:
        paths: files to read.
        field: key of a JSON line that holds the document, as text or as a chat: a list of objects with `role` and `content`.
        write_chat: makes the text of a chat, which depends on the model; chats are refused without it.

    Raises:
        TextError: a file is missing, not UTF-8 text, of another format, holds a bad line (its number is named), or
            there is no text at all.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    files = [Path(path) for path in paths]
    if not files:
        raise TextError(f"no text files given; give at least one file ending in {', '.join(SUFFIXES)}.")
    documents = [document for path in files for document in _documents(path, field, write_chat) if document.strip()]
    if not documents:
        raise TextError(f"no text in {', '.join(repr(str(path)) for path in files)}: every document is empty.")
    return documents


def read_rows(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """The lines of JSON-lines files as objects, in order of files and lines.

    Args:
        paths: files that end in .jsonl or .jsonl.gz.

    Raises:
        TextError: a file is missing, of another format, empty, or holds a line that is no JSON object (its number is named).
    """
    rows = []
    for path in map(Path, paths):
        if not path.name.lower().endswith((".jsonl", ".jsonl.gz")):
            raise TextError(f"'{path}' does not end in .jsonl or .jsonl.gz; one JSON object a line is expected.")
        rows += [_row(line, where) for line, where in _lines(path)]
    if not rows:
        raise TextError(f"no lines in {', '.join(repr(str(path)) for path in paths) or 'no files'}; give at least one.")
    return rows


def _documents(path: Path, field: str, write_chat: ChatWriter | None) -> Iterator[str]:
    if not path.name.lower().endswith(SUFFIXES):
        raise TextError(f"cannot tell the format of text file '{path}'; allowed endings are {', '.join(SUFFIXES)}.")
    if ".jsonl" not in path.name.lower():
        yield _read(path)
        return
    for line, where in _lines(path):
        yield _json_document(_row(line, where), field, where, write_chat)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a file that hold something, each with how to name it."""
    # Not str.splitlines: JSON strings may hold U+2028 and other characters that it takes for line ends.
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if line.strip():
            yield line, f"'{path}' line {number}"


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise TextError(
            f"{where} is not JSON ({error.msg} at column {error.colno}); one JSON object a line is expected."
        ) from error
    if not isinstance(row, dict):
        raise TextError(f"{where} is a JSON {type(row).__name__}, not an object with named fields.")
    return row


def _json_document(row: Mapping[str, Any], field: str, where: str, write_chat: ChatWriter | None) -> str:
    if field == FIELD and FIELD not in row and CHAT_FIELD in row:
        field = CHAT_FIELD
    if field not in row:
        raise TextError(f"{where} has no field '{field}'; it has: {', '.join(sorted(row)) or 'none'}. Choose one with --field.")
    held = row[field]
    if _is_chat(held):
        if write_chat is None:
            raise TextError(f"{where}: field '{field}' holds a chat, and only a model's tokenizer tells its text; give text.")
        try:
            return write_chat(held)
        except TextError as error:
            raise TextError(f"{where}: {error}") from error
    if not isinstance(held, str):
        raise TextError(
            f"{where}: field '{field}' holds {type(held).__name__}, neither text nor a chat (a list of objects with role and "
            "content). Choose another with --field."
        )
    return BalancedText(held) if row.get(SAMPLER_FIELD, "plain") != "plain" else held


def _is_chat(held: Any) -> bool:
    return isinstance(held, list) and bool(held) and all(isinstance(said, dict) and "role" in said for said in held)


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            data = gzip.decompress(data)
    except FileNotFoundError as error:
        raise TextError(f"text file '{path}' does not exist.") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise TextError(f"text file '{path}' is not a whole gzip file ({error}); copy it again.") from error
    except OSError as error:
        raise TextError(f"cannot read text file '{path}': {error.strerror or error}.") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(
            f"text file '{path}' is not UTF-8 text (byte {error.start}); convert it, or give another file."
        ) from error
    if "\0" in text:
        raise TextError(f"text file '{path}' holds binary data (a zero byte at {text.index(chr(0))}); give a text file.")
    return text.replace("\r\n", "\n")
