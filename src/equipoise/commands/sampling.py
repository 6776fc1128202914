"""The command `sample`: text that a model writes itself, and how good it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from equipoise.arguments import Device, Dtype, Field, Json, Model, Options, Quiet, Seed, Text, assignments, read
from equipoise.commands.show import show

if TYPE_CHECKING:
    from equipoise.profiling.self_sampled_report import TextReport


def sample(
    model: Model,
    out: Annotated[Path, typer.Option(help="file to write, such as own.jsonl; balanced text is marked as such in it")],
    sampler: Annotated[
        str, typer.Option(help="balanced (ours), ebss (as published), or plain (temperature 1: unbiased traffic)")
    ] = "balanced",
    sentences: Annotated[int, typer.Option(help="sentences to write")] = 128,
    length: Annotated[int, typer.Option(help="tokens of a sentence")] = 512,
    batch_size: Annotated[int, typer.Option(help="sentences written at once; rows are this times the branches")] = 16,
    options: Options = None,
    text: Text = None,
    field: Field = "text",
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Let a model write text for its own calibration, and report balance, perplexity and compressibility.

    With --text, the same is measured on that text, on as many tokens. sigma: deviation of the experts' selections per token,
    mean over layers; LIS: over experts, mean and worst layer; unused: experts without a token; zlib ratio: compressed over raw
    bytes of a row, median; loops: rows below 0.1.
    """
    from equipoise.profiling.loading import load_model, load_tokenizer
    from equipoise.profiling.self_sampled import cached_self_text
    from equipoise.profiling.self_sampled_report import measure_text

    given = read({"text": text}, field, model) if text else {}
    loaded, tokenizer = load_model(model, dtype=dtype, device=device), load_tokenizer(model)
    found = cached_self_text(
        loaded, tokenizer, sampler=sampler, sentences=sentences, length=length, batch_size=batch_size, seed=seed,
        progress=not quiet, **assignments(options),
    )  # fmt: skip
    found.save(out)
    reports = {sampler: found.report}
    for name, documents in given.items():
        reports[name] = measure_text(
            loaded, tokenizer, documents, tokens=found.report.tokens, seq_len=length, batch_size=batch_size, seed=seed,
            progress=not quiet,
        )  # fmt: skip
    rows: dict[str, Any] = {name: report.as_dict() for name, report in reports.items()}
    show(as_json, {"options": found.options, "text": rows}, [_table(reports)], out)


def _table(reports: dict[str, TextReport]) -> Any:
    from equipoise.reporting.style import new_table

    heads = ("tokens", "sigma", "LIS", "worst", "unused", "perplexity", "zlib ratio", "loops")
    table = new_table("text as profiling reads it (measured)", ["text"], heads)
    for name, r in reports.items():
        table.add_row(
            name, f"{r.tokens:,}", f"{r.sigma:.4f}", f"{r.lis:.3f}", f"{r.lis_max:.2f}", f"{r.unused:.1%}",
            f"{r.perplexity:.2f}", f"{r.compressibility:.3f}", f"{r.degenerate:.1%}",
        )  # fmt: skip
    return table
