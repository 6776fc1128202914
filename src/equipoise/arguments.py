"""What the command's options are and what their text means."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from equipoise.errors import EquipoiseError, TextError

Model = Annotated[str, typer.Argument(help="model: a local directory, or a hub name")]
SELF = "self"
"""What --text takes in place of a file for text that the model writes itself."""

Text = Annotated[list[str] | None, typer.Option("--text", help="text file (.txt, .jsonl, .gz); may be repeated")]
TextOrSelf = Annotated[
    list[str] | None,
    typer.Option(
        "--text", help="text file (.txt, .jsonl, .gz), or `self` for text that the model writes itself; may be repeated"
    ),
]
Scenario = Annotated[list[str] | None, typer.Option("--scenario", help="a named traffic: NAME=FILE[,FILE...]; may be repeated")]
Field = Annotated[
    str, typer.Option(help="key of a .jsonl line that holds the document, as text or as a chat of role and content")
]
Tokens = Annotated[int, typer.Option(help="tokens per scenario to measure on")]
SeqLen = Annotated[int, typer.Option(help="longest sequence, in tokens")]
BatchSize = Annotated[int, typer.Option(help="sequences per forward pass")]
Seed = Annotated[int, typer.Option(help="order of the text and every random sample")]
Device = Annotated[str, typer.Option(help="where the model runs, as torch names it: cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), fp32, bf16 or fp16")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress on standard error")]
Units = Annotated[
    int | None, typer.Option(help="parallel units U, such as the ranks of a deployment", show_default="the routed experts")
]
Method = Annotated[str, typer.Option(help="planning method; `equipoise methods` lists them")]
ErrorBound = Annotated[float | None, typer.Option(help="largest predicted relative RMS error of the layers' output")]
BytesFraction = Annotated[float | None, typer.Option("--bytes", help="bytes to use, as a fraction of the original's")]
Ranks = Annotated[int | None, typer.Option(help="ranks to place experts on (expert-parallel devices)")]
Nodes = Annotated[int, typer.Option(help="machines that the ranks are divided among evenly")]
Phase = Annotated[str, typer.Option(help="traffic to go by: all, prefill or decode")]
Options = Annotated[
    list[str] | None, typer.Option("--set", help="option of the method: NAME=VALUE, VALUE as JSON; may be repeated")
]
Dispatch = Annotated[str, typer.Option(help="which copy serves which token: even, least_loaded or gate_aware")]
Tasks = Annotated[list[str] | None, typer.Option("--task", help="lm-eval task such as hellaswag; may be repeated")]
TaskDir = Annotated[
    Path | None, typer.Option(help="directory with the tasks' rows as local files, when the hub is out of reach")
]
PolicyFile = Annotated[
    Path | None, typer.Option("--policy", help="routing policy to run the model under, of `equipoise policy fit`")
]
Limit = Annotated[int | None, typer.Option(help="items of each task", show_default="all")]


def scenario_files(text: list[str] | None, scenarios: list[str] | None) -> dict[str, list[str]]:
    """Scenario -> files, from --text (one scenario named "text") and --scenario NAME=FILE[,FILE...]."""
    if SELF in (text or ()):
        raise TextError("this command needs text of files: `--text self` is no measure of anything here (./self is a file).")
    files: dict[str, list[str]] = {"text": list(text)} if text else {}
    for given in scenarios or ():
        name, equals, paths = given.partition("=")
        if not equals or not name or not paths:
            raise TextError(f"--scenario is '{given}'; it must be NAME=FILE or NAME=FILE,FILE.")
        files.setdefault(name, []).extend(paths.split(","))
    if not files:
        raise TextError("no text given; use --text FILE, or --scenario NAME=FILE for several kinds of traffic.")
    return files


def text_sources(text: list[str] | None, scenarios: list[str] | None) -> tuple[bool, dict[str, list[str]]]:
    """Whether `--text self` asks for text that the model writes itself, and scenario -> files of the text given beside it.

    The files may be none only if the model writes its own.
    """
    files = [path for path in text or () if path != SELF]
    if len(files) < len(text or ()) and not files and not scenarios:
        return True, {}
    return len(files) < len(text or ()), scenario_files(files, scenarios)


def read(files: Mapping[str, list[str]], field: str, model: str) -> dict[str, list[str]]:
    """The documents of each scenario's files; chats among them as `model` reads them, whose tokenizer is loaded only then."""
    from equipoise.profiling.texts import read_documents

    @cache
    def tokenizer() -> Any:
        from equipoise.profiling.loading import load_tokenizer

        return load_tokenizer(model)

    def write_chat(messages: Sequence[Mapping[str, Any]]) -> str:
        from equipoise.profiling.chats import chat_text

        return chat_text(tokenizer(), messages)

    return {name: read_documents(paths, field=field, write_chat=write_chat) for name, paths in files.items()}


def one_model(given: list[str]) -> str:
    """The model of a command that could also be given files of an engine."""
    if len(given) != 1:
        raise EquipoiseError(
            f"{len(given)} models given ({', '.join(given[:3])}); give one, or --from ENGINE to read its records."
        )
    return given[0]


def refuse_given(why: str, options: Mapping[str, Any]) -> None:
    """Raise when an option was given that the rest of the command has no use for, instead of passing over it."""
    for name, value in options.items():
        if value is not None:
            raise EquipoiseError(f"{name} is of no use here: {why}; leave it out.")


def names(given: str) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(name.strip() for name in given.split(",") if name.strip())


def slot_counts(given: str | None) -> int | list[int] | None:
    """Physical slots per layer, from "288" or one number per layer separated by commas."""
    if given is None:
        return None
    try:
        counts = [int(part) for part in names(given)]
    except ValueError as error:
        raise EquipoiseError(
            f"--slots is '{given}'; it must be a whole number, or one per layer separated by commas."
        ) from error
    return counts[0] if len(counts) == 1 else counts


def numbers(given: str) -> list[float]:
    """Numbers separated by commas."""
    try:
        return [float(part) for part in names(given)]
    except ValueError as error:
        raise EquipoiseError(f"'{given}' is not a list of numbers separated by commas.") from error


def plan_options(error_bound: float | None, bytes_fraction: float | None, options: list[str] | None) -> dict[str, Any]:
    """Options of a planning method: those that have a flag of their own, and --set NAME=VALUE."""
    named = {"error_bound": error_bound, "bytes_fraction": bytes_fraction}
    return {name: value for name, value in named.items() if value is not None} | assignments(options)


def estimator_options(options: list[str] | None) -> dict[str, dict[str, Any]]:
    """Estimator -> its options, from --set ESTIMATOR.NAME=VALUE."""
    nested: dict[str, dict[str, Any]] = {}
    for path, value in assignments(options).items():
        estimator, dot, name = path.partition(".")
        if not dot or not name:
            raise EquipoiseError(f"--set names '{path}'; here it must be ESTIMATOR.NAME=VALUE, such as wanda.fraction=0.3.")
        nested.setdefault(estimator, {})[name] = value
    return nested


def assignments(options: list[str] | None) -> dict[str, Any]:
    """Name -> value, from --set NAME=VALUE; a value that is not JSON is a word."""
    given: dict[str, Any] = {}
    for option in options or ():
        name, equals, value = option.partition("=")
        if not equals or not name:
            raise EquipoiseError(f"--set is '{option}'; it must be NAME=VALUE.")
        try:
            given[name.replace("-", "_")] = json.loads(value)
        except json.JSONDecodeError:
            given[name.replace("-", "_")] = value
    return given
