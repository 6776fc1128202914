"""Commands that change a model's experts, layer by layer from the files: apply a plan, or quantize all alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from equipoise.arguments import (
    BatchSize,
    Device,
    Dtype,
    Field,
    Json,
    Model,
    Options,
    PolicyFile,
    Quiet,
    Scenario,
    Seed,
    SeqLen,
    TextOrSelf,
    assignments,
    read,
    refuse_given,
    text_sources,
)
from equipoise.commands.show import show
from equipoise.precisions import precision as precision_of

if TYPE_CHECKING:
    from equipoise.artifacts import ModelFacts, Plan
    from equipoise.execution.layerwise import Calibration


Rounding = Annotated[str, typer.Option("--method", help="rounding: agq, agq2, gptq or rtn-clip on text; rtn without")]
RoundingTokens = Annotated[int, typer.Option("--tokens", help="tokens per scenario to round on")]
Workers = Annotated[int | None, typer.Option(help="cores that round experts at the same time", show_default="all")]
SpillTo = Annotated[Path | None, typer.Option(help="directory for the activations of the text, which stay in memory otherwise")]


def apply(
    model: Model,
    plan: Annotated[Path, typer.Argument(help="a plan made for this model")],
    out: Annotated[Path, typer.Option(help="directory to write the balanced model to")],
    method: Rounding = "rtn",
    text: TextOrSelf = None,
    scenario: Scenario = None,
    field: Field = "text",
    tokens: RoundingTokens = 32768,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 4,
    seed: Seed = 0,
    options: Options = None,
    workers: Workers = None,
    spill: SpillTo = None,
    policy: PolicyFile = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Carry a plan out on a model and save the balanced model; with a method that rounds on text, give --text.

    The model is read, rounded and written layer by layer, so it may be larger than memory. A run that is interrupted goes
    on from the layers that it has finished.
    """
    from equipoise.artifacts import Plan

    decided = Plan.load_file(plan)
    rows = _Text(text, scenario, field, tokens, seq_len, batch_size, seed)
    calibration = _calibration(model, method, rows, assignments(options), workers, spill, device, dtype, quiet)
    _carry_out(model, lambda facts: decided, out, method, calibration, device, dtype, as_json, quiet, policy)


def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="directory to write the quantized model to")],
    precision: Annotated[
        str, typer.Option(help="format of all experts: int8, int4-g128, int3-g64-asym, fp8, ...")
    ] = "int4-g32",
    method: Rounding = "agq",
    text: TextOrSelf = None,
    scenario: Scenario = None,
    field: Field = "text",
    tokens: RoundingTokens = 32768,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 4,
    seed: Seed = 0,
    options: Options = None,
    workers: Workers = None,
    spill: SpillTo = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Store all of a model's experts in one format, rounded on what each of them is sent when text runs through the model.

    The model is read, rounded and written layer by layer, so it may be larger than memory. A run that is interrupted goes
    on from the layers that it has finished. The result loads as any balanced model.
    """
    from equipoise.planning.uniform import uniform_plan

    rows = _Text(text, scenario, field, tokens, seq_len, batch_size, seed)
    calibration = _calibration(model, method, rows, assignments(options), workers, spill, device, dtype, quiet)
    _carry_out(model, lambda facts: uniform_plan(facts, precision), out, method, calibration, device, dtype, as_json, quiet)


@dataclass(frozen=True)
class _Text:
    """What text to round on: files or the model's own, and how much of it."""

    text: list[str] | None
    scenario: list[str] | None
    field: str
    tokens: int
    seq_len: int
    batch_size: int
    seed: int


def _calibration(
    model: str,
    method: str,
    told: _Text,
    options: dict[str, Any],
    workers: int | None,
    spill: Path | None,
    device: str,
    dtype: str,
    quiet: bool,
) -> Calibration | None:
    """The text of a method that rounds on text; None for one that does not, which is then given none."""
    from equipoise.quantization.methods import METHODS

    if not METHODS.get(method).reads_hessian:
        given = {"--text": told.text, "--scenario": told.scenario, "--spill": spill, "--set": options or None}
        refuse_given(f"method '{method}' does not look at text", given)
        return None
    from equipoise.execution.layerwise import Calibration
    from equipoise.profiling.loading import load_config, load_model, load_tokenizer
    from equipoise.profiling.self_sampled import self_texts
    from equipoise.profiling.sequences import Framing, text_batches

    tokenizer = load_tokenizer(model)
    own, files = text_sources(told.text, told.scenario)
    documents = read(files, told.field, model)
    if own:
        # Token by token, a model that is read layer by layer would be read once for each token.
        whole = load_model(model, dtype=dtype, device=device)
        sentences = -(-told.tokens // told.seq_len)
        documents |= self_texts(whole, tokenizer, sentences=sentences, length=told.seq_len, seed=told.seed, progress=not quiet)
    framing = Framing.of(tokenizer, load_config(model))
    batches = text_batches(
        documents, tokenizer, framing,
        tokens=told.tokens, seq_len=told.seq_len, batch_size=told.batch_size, seed=told.seed,
    )  # fmt: skip
    return Calibration(batches, method, options, workers or os.cpu_count() or 1, spill)


def _carry_out(
    model: str,
    decide: Callable[[ModelFacts], Plan],
    out: Path,
    method: str,
    calibration: Calibration | None,
    device: str,
    dtype: str,
    as_json: bool,
    quiet: bool,
    policy: Path | None = None,
) -> None:
    """Open the model to be read layer by layer, put the plan on it, and show what is known of the rounding."""
    from equipoise.artifacts.routing import RoutingPolicy
    from equipoise.execution.routing.attach import attach_policy
    from equipoise.execution.streamed import apply_streamed
    from equipoise.models.layers import model_facts
    from equipoise.profiling.loading import load_model, load_tokenizer
    from equipoise.profiling.progress import ProgressBar

    with ProgressBar(not quiet) as bar:
        bar.stage("reading all weights once", 1, "pass")
        streamed = load_model(model, dtype=dtype, device=device, memory=0)
        facts = model_facts(streamed, model)
        decided = decide(facts)
        if policy is not None:
            attach_policy(streamed, RoutingPolicy.load_file(policy))
        bar.stage("rounding", len(decided.layers), "MoE layers")
        reports = apply_streamed(
            streamed, load_tokenizer(model), decided, out, method=method, calibration=calibration, progress=bar.set
        )
    rows = {
        "directory": str(out),
        "method": method,
        "text": calibration.record() if calibration else None,
        "expert_bytes_before": sum(layer.num_experts * layer.expert_bytes(precision_of(facts.dtype)) for layer in facts.layers),
        "expert_bytes": int(decided.bytes_by_unit().sum()),
        "exactness": decided.exactness,
        "layers": [_row(report) for report in reports],
    }
    show(as_json, rows, _tables(rows), out)


def _row(report: Mapping[str, Any]) -> dict[str, Any]:
    """One layer: its tokens, its experts with few of them, and the mean error of their outputs."""
    errors = [expert["output_error"] for expert in report["experts"] if expert["output_error"] is not None]
    served = [expert["tokens"] for expert in report["experts"]]
    return {
        "layer": report["path"],
        "tokens": report["tokens"],
        "fewest_tokens": min(served, default=0),
        "experts_with_few_tokens": report["few"],
        "mean_output_error": sum(errors) / len(errors) if errors else None,
    }


def _tables(rows: Mapping[str, Any]) -> list[Any]:
    from equipoise.reporting.style import new_table

    tables: list[Any] = [f"bytes of experts: {rows['expert_bytes_before']:,} before, {rows['expert_bytes']:,} after"]
    if rows["layers"]:
        heads = ("tokens", "fewest of an expert", "experts with few", "output error")
        table = new_table(f"rounded by {rows['method']} (measured on the calibration text)", ["layer"], heads)
        for row in rows["layers"]:
            error = row["mean_output_error"]
            table.add_row(
                row["layer"], f"{row['tokens']:,}", f"{row['fewest_tokens']:,}", str(len(row["experts_with_few_tokens"])),
                "-" if error is None else f"{error:.5f}",
            )  # fmt: skip
        few = (
            "few: fewer tokens than an expert has inputs; such experts are rounded on some of the layer's mean beside their own"
        )
        tables = [table, few, *tables]
    return tables
