"""Command that runs a plan over several processes: parallel. Started by torchrun, it prints on rank 0 alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from equipoise.arguments import (
    BatchSize,
    Dtype,
    Field,
    Json,
    Model,
    Options,
    Quiet,
    Scenario,
    Seed,
    SeqLen,
    Text,
    Tokens,
    assignments,
    read,
    refuse_given,
    scenario_files,
)
from equipoise.commands.show import show

if TYPE_CHECKING:
    from equipoise.artifacts import Plan

MEASURES = (
    ("token-expert pairs of the fullest rank", "rank_rows_max", ",.1f"),
    ("token-expert pairs of the mean rank", "rank_rows_mean", ",.1f"),
    ("largest over mean", "imbalance", ".3f"),
    ("replicas that served, on the busiest rank", "activated_max", ".1f"),
    ("bytes of weights read, on the busiest rank", "read_bytes_max", ",.0f"),
    ("token-expert pairs that another rank served", "rows_moved", ",.1f"),
    ("bytes of weights sent between ranks", "weight_bytes_moved", ",.0f"),
    ("bytes of tokens sent between ranks", "token_bytes_moved", ",.0f"),
    ("ms of the slowest rank", "layer_ms", ".2f"),
    ("ms in experts, slowest rank", "compute_ms_max", ".2f"),
    ("ms in experts, mean rank", "compute_ms_mean", ".2f"),
    ("ms to decide, exchange of counts included", "decide_ms", ".2f"),
)
"""Figures of a phase: what they are, their key, their format."""
CONTEXT_MEASURES = (
    ("bytes of context sent between ranks, in a forward", "context_bytes_moved", ",.0f"),
    ("ms to exchange the context, in a forward", "context_ms", ".2f"),
)
"""As `MEASURES`, of a coherent context."""


def parallel(
    model: Model,
    plan: Annotated[
        Path | None,
        typer.Option(
            help="plan to carry out; a balanced model brings its own", show_default="experts in order, as engines place them"
        ),
    ] = None,
    text: Text = None,
    scenario: Scenario = None,
    dispatch: Annotated[
        str,
        typer.Option(
            help="which rank serves which token: plan, even, least_loaded, llep, quota, metro, or prefill=NAME,decode=NAME"
        ),
    ] = "plan",
    context: Annotated[
        str,
        typer.Option(
            help="own: each rank holds keys and values of its own texts; coherent: all ranks hold all, and a token in decode "
            "stays where its expert ran (models of top-k 1)"
        ),
    ] = "own",
    mixed: Annotated[
        str, typer.Option(help="plans whose copies of an expert differ in precision, under rules by counts: refuse or label")
    ] = "refuse",
    generate: Annotated[int, typer.Option(help="tokens to generate as well, for the figures of decode")] = 0,
    options: Options = None,
    field: Field = "text",
    tokens: Tokens = 8192,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 4,
    seed: Seed = 0,
    timeout: Annotated[float, typer.Option(help="seconds after which a rank that does not answer is taken for lost")] = 60.0,
    device: Annotated[str, typer.Option(help="cpu, or cuda for one GPU a process")] = "cpu",
    dtype: Dtype = "auto",
    out: Annotated[Path | None, typer.Option(help="file to write the figures to, as JSON")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run text through a plan over processes, each with its own experts: torchrun --nproc-per-node 4 -m equipoise parallel ...

    Tells the loss, the load of the ranks, what was sent between them, and how long the layers took.
    """
    from equipoise.execution.expert_parallel.ranks import start_ranks
    from equipoise.execution.expert_parallel.runtime import parallelize, unlike_copies
    from equipoise.profiling.loading import load_tokenizer
    from equipoise.profiling.progress import ProgressBar
    from equipoise.profiling.sequences import Framing, text_batches

    documents = read(scenario_files(text, scenario), field, model)
    with start_ranks(device=device, timeout_s=timeout) as ranks, ProgressBar(not quiet and ranks.rank == 0) as bar:
        bar.stage("loading", 1, "model")
        loaded, decided = _load(model, plan, dtype, ranks.device, ranks.size)
        tokenizer = load_tokenizer(model)
        batches = text_batches(
            documents, tokenizer, Framing.of(tokenizer, loaded.config),
            tokens=tokens, seq_len=seq_len, batch_size=batch_size, seed=seed,
        )  # fmt: skip
        parallelize(
            loaded, ranks, decided, dispatch=dispatch, options=assignments(options),
            context=context, mixed=mixed,  # type: ignore[arg-type]
        )  # fmt: skip
        from equipoise.evaluation.parallel import run_parallel

        bar.stage("running", -(-len(batches) // ranks.size), "forwards")
        result = run_parallel(loaded, batches, generate=generate, progress=bar.set)
    if ranks.rank:
        return
    rows = {
        "model": model,
        "plan": decided.method,
        "ranks": ranks.size,
        "context": context,
        "dispatch": decided.dispatch if dispatch == "plan" else dispatch,
        "exactness": decided.exactness,
        "depends_on_batch": mixed == "label" and bool(unlike_copies(decided)),
        **result.rows(),
    }
    if out:
        from equipoise.artifacts.files import write_atomic

        write_atomic(out, json.dumps(rows, indent=2) + "\n")
    show(as_json, rows, _tables(rows), out)


def _load(name: str, plan: Path | None, dtype: str, device: str, ranks: int) -> tuple[Any, Plan]:
    """The model with the plan that it carries, that is given, or that engines have by default."""
    from equipoise.artifacts import Plan
    from equipoise.execution.balanced_config import plan_of
    from equipoise.models.layers import model_facts
    from equipoise.profiling.loading import load_model
    from equipoise.simulation.simulate import default_plan

    model = load_model(name, dtype=dtype, device=device)
    own = plan_of(model)
    if own is not None:
        refuse_given("the model is balanced and carries its plan", {"--plan": plan})
        return model, own
    return model, default_plan(model_facts(model, name), ranks) if plan is None else Plan.load_file(plan)


def _tables(rows: dict[str, Any]) -> list[Any]:
    from equipoise.reporting.style import new_table

    phases = [phase for phase in ("prefill", "decode") if rows[phase] is not None]
    ranks = "1 rank" if rows["ranks"] == 1 else f"{rows['ranks']} ranks"
    context = ", coherent context" if rows["context"] == "coherent" else ""
    title = f"{ranks}, {rows['plan']}, {rows['dispatch']}{context}: a MoE layer in a forward (measured)"
    table = new_table(title, [""], phases)
    for name, key, style in MEASURES + (CONTEXT_MEASURES if rows["context"] == "coherent" else ()):
        table.add_row(name, *(format(rows[phase][key], style) for phase in phases))
    label = "depends on the batch" if rows["depends_on_batch"] else "does not depend on the batch"
    return [
        table,
        f"loss {rows['loss']:.5f} nats per token, perplexity {rows['perplexity']:.4f}, {rows['tokens']:,} tokens; "
        f"class {rows['exactness']}, {label}",
        f"bytes of experts on each rank: {', '.join(f'{held:,}' for held in rows['expert_bytes_by_rank'])}",
    ]
