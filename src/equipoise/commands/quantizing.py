"""The command `quantize`: a model's experts in few bits, rounded on text, layer by layer from the files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from equipoise.arguments import (
    BatchSize,
    Device,
    Dtype,
    Field,
    Json,
    Model,
    Options,
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


def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="directory to write the quantized model to")],
    precision: Annotated[
        str | None, typer.Option(help="format of all experts: int8, int4-g128, int3-g64-asym, fp8, ...  [default: int4-g32]")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="a plan made for this model, in place of one format for all")] = None,
    method: Annotated[str, typer.Option(help="rounding: gptq, agq, agq2 or rtn-clip on text; rtn without")] = "gptq",
    text: TextOrSelf = None,
    scenario: Scenario = None,
    field: Field = "text",
    tokens: Annotated[int, typer.Option(help="tokens per scenario to round on")] = 32768,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 4,
    seed: Seed = 0,
    options: Options = None,
    workers: Annotated[int | None, typer.Option(help="cores that round experts at the same time  [default: all]")] = None,
    spill: Annotated[
        Path | None, typer.Option(help="directory for the activations of the text, which stay in memory otherwise")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Store a model's experts in few bits, rounded on what each of them is sent when text runs through the model.

    The model is read, rounded and written layer by layer, so it may be larger than memory. A run that is interrupted goes
    on from the layers that it has finished. The result loads as any balanced model.
    """
    if plan is not None:
        refuse_given("--plan says the format of every expert", {"--precision": precision})
    from equipoise.execution.layerwise import Calibration
    from equipoise.execution.streamed import apply_streamed
    from equipoise.models.layers import model_facts
    from equipoise.profiling.loading import load_model, load_tokenizer
    from equipoise.profiling.progress import ProgressBar
    from equipoise.quantization.methods import METHODS

    tokenizer = load_tokenizer(model)
    calibration = None
    if METHODS.get(method).reads_hessian:
        documents = _texts(model, tokenizer, text, scenario, field, tokens, seq_len, seed, dtype, device, quiet)
        batches = _batches(model, tokenizer, documents, tokens, seq_len, batch_size, seed)
        calibration = Calibration(batches, method, assignments(options), workers or os.cpu_count() or 1, spill)
    else:
        refuse_given(f"method '{method}' does not look at text", {"--text": text, "--scenario": scenario, "--spill": spill})
    with ProgressBar(not quiet) as bar:
        bar.stage("reading all weights once", 1, "pass")
        streamed = load_model(model, dtype=dtype, device=device, memory=0)
        decided = _plan(plan, precision, model_facts(streamed, model))
        bar.stage("rounding", len(decided.layers), "MoE layers")
        reports = apply_streamed(
            streamed, tokenizer, decided, out, method=method, calibration=calibration, progress=lambda n, of: bar.set(n, of)
        )
    rows = {
        "directory": str(out),
        "method": method,
        "text": calibration.record() if calibration else None,
        "expert_bytes": int(decided.bytes_by_unit().sum()),
        "layers": [_row(report) for report in reports],
    }
    show(as_json, rows, _tables(rows), out)


def _plan(path: Path | None, precision: str | None, facts: Any) -> Any:
    from equipoise.artifacts import Plan
    from equipoise.planning.uniform import uniform_plan

    return uniform_plan(facts, precision or "int4") if path is None else Plan.load_file(path)


def _texts(
    model: str,
    tokenizer: Any,
    text: list[str] | None,
    scenario: list[str] | None,
    field: str,
    tokens: int,
    seq_len: int,
    seed: int,
    dtype: str,
    device: str,
    quiet: bool,
) -> dict[str, list[str]]:
    """The documents of the files given, and those that the model writes itself."""
    own, files = text_sources(text, scenario)
    documents = read(files, field)
    if own:
        from equipoise.profiling.loading import load_model
        from equipoise.profiling.self_sampled import self_texts

        # Token by token, a model that is read layer by layer would be read once for each token.
        whole = load_model(model, dtype=dtype, device=device)
        sentences = -(-tokens // seq_len)
        documents |= self_texts(whole, tokenizer, sentences=sentences, length=seq_len, seed=seed, progress=not quiet)
    return documents


def _batches(
    model: str,
    tokenizer: Any,
    documents: Mapping[str, Sequence[str]],
    tokens: int,
    seq_len: int,
    batch_size: int,
    seed: int,
) -> list[Any]:
    from transformers import AutoConfig

    from equipoise.profiling.sequences import Framing, build_rows, make_batches

    framing = Framing.of(tokenizer, AutoConfig.from_pretrained(model, trust_remote_code=False))
    rows = [
        build_rows(texts, tokenizer, framing, scenario=name, tokens=tokens, seq_len=seq_len, seed=seed)
        for name, texts in documents.items()
    ]
    return [batch for part in rows for batch in make_batches(part, batch_size)]


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

    tables: list[Any] = [f"bytes of experts: {rows['expert_bytes']:,}"]
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
