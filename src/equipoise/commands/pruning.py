"""Commands that leave experts out: demonstrations, prune."""

from __future__ import annotations

import shlex
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
    Quiet,
    Seed,
    SeqLen,
    read,
    scenario_files,
)
from equipoise.commands.show import show
from equipoise.errors import EquipoiseError

if TYPE_CHECKING:
    from equipoise.artifacts import Evaluation, Plan
    from equipoise.execution.prune import Pruned

ANSWERS = ("given", "self")
EVALUATION = "equipoise.eval.json"
IN, OUT = "in domain", "out of domain"


def demonstrations(
    model: Model,
    text: Annotated[list[Path], typer.Option(help="JSON lines of one domain with a prompt, and an answer if it has one")],
    out: Annotated[Path, typer.Option(help="file to write, such as math.jsonl, for `profile --scenario math=math.jsonl`")],
    answers: Annotated[str, typer.Option(help="given (of the file), or self (the model writes them)")] = "self",
    count: Annotated[int, typer.Option(help="demonstrations to draw at random")] = 25,
    prompt_field: Annotated[str, typer.Option(help="key of a line that holds the prompt")] = "prompt",
    answer_field: Annotated[str, typer.Option(help="key of a line that holds the answer")] = "answer",
    answer_tokens: Annotated[int, typer.Option(help="most tokens of an answer that the model writes")] = 512,
    temperature: Annotated[float, typer.Option(help="of the model's answers; 0 = the most likely token")] = 0.6,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make demonstrations of a domain, prompts with answers, from which experts for that domain are chosen."""
    from equipoise.profiling.demonstrations import answer_all, read_demonstrations, save_demonstrations, token_counts
    from equipoise.profiling.loading import load_model, load_tokenizer
    from equipoise.profiling.progress import ProgressBar

    if answers not in ANSWERS:
        raise EquipoiseError(f"--answers is '{answers}'; allowed: {', '.join(ANSWERS)}.")
    tokenizer = load_tokenizer(model)
    found = read_demonstrations(
        text, tokenizer, count=count, seed=seed, prompt_field=prompt_field, answer_field=answer_field
    )  # fmt: skip
    if answers == "self":
        loaded = load_model(model, dtype=dtype, device=device)
        with ProgressBar(not quiet) as bar:
            bar.stage("answering", len(found), "prompts")
            found = answer_all(
                loaded, tokenizer, found, most_tokens=answer_tokens, temperature=temperature, seed=seed, advance=bar.set
            )
    save_demonstrations(found, out)
    tokens, answered = token_counts(found, tokenizer)
    rows: dict[str, Any] = {
        "demonstrations": len(found), "tokens": tokens, "answer_tokens": answered,
        "answered": sum(bool(d.answer) for d in found), "answers": answers, "seed": seed,
    }  # fmt: skip
    line = f"{rows['demonstrations']} demonstrations of {tokens:,} tokens, {answered:,} of them in {rows['answered']} answers"
    show(as_json, rows, [line], out)


def prune(
    model: Model,
    plan: Annotated[Path, typer.Argument(help="a plan that leaves out experts: `equipoise plan PROFILE --prune easy-ep`")],
    out: Annotated[Path, typer.Option(help="a new directory; it becomes a stock model that loads anywhere")],
    scenario: Annotated[
        list[str] | None,
        typer.Option(
            help="text to judge on: NAME=FILE[,FILE...]; names of the plan's domains are in domain, others out of it; may be "
            "repeated"
        ),
    ] = None,
    field: Field = "text",
    tokens: Annotated[int, typer.Option(help="tokens per scenario to judge on")] = 4096,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 4,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a model without the experts that a plan leaves out, layer by layer, and judge it in its domain and outside."""
    from equipoise.artifacts import Plan
    from equipoise.execution.prune import prune_streamed
    from equipoise.planning.prune import warning
    from equipoise.profiling.loading import load_model, load_tokenizer
    from equipoise.profiling.progress import ProgressBar

    decided = Plan.load_file(plan)
    documents = read(scenario_files(None, scenario), field, model) if scenario else {}
    tokenizer = load_tokenizer(model)
    with ProgressBar(not quiet) as bar:
        bar.stage("pruning", len(decided.layers), "layers")
        done = prune_streamed(load_model(model, dtype=dtype, memory=0), tokenizer, decided, out, progress=bar.set)
    evaluation = None
    if documents:
        from equipoise.evaluation.pruned import evaluate_pruned

        whole, small = (load_model(str(name), dtype=dtype, device=device) for name in (model, out))
        evaluation = evaluate_pruned(
            whole, small, tokenizer, decided, documents, tokens=tokens, seq_len=seq_len, batch_size=batch_size, seed=seed,
            base_name=model, progress=not quiet,
        )  # fmt: skip
        evaluation.save(out / EVALUATION)
    rows = _rows(decided, done, evaluation) | {"warning": warning(decided)}
    show(as_json, rows, _tables(rows), out)


def _rows(plan: Plan, done: Pruned, evaluation: Evaluation | None) -> dict[str, Any]:
    """What was written and measured."""
    fraction = done.expert_bytes_before / done.expert_bytes
    texts = []
    if evaluation is not None:
        from equipoise.evaluation.pruned import in_and_out

        inside, outside = in_and_out(evaluation, plan)
        for text in evaluation.contenders[0].texts:
            if text.name in (*inside, *outside):
                where = IN if text.name in inside else OUT
                texts.append({"where": where, **text.model_dump(mode="json", exclude={"lis", "lis_base", "lis_paper"})})
    return {
        "directory": str(done.directory), "config": done.changed, "experts_before": done.experts_before,
        "experts": done.experts, "expert_bytes_before": done.expert_bytes_before, "expert_bytes": done.expert_bytes,
        "bytes": done.bytes, "left_out_tensors": done.left_out, "score": plan.options.get("score"),
        "domains": plan.options.get("domains"), "texts": texts,
        "balance": f"equipoise balance {shlex.quote(str(done.directory))} --units {done.experts_before} --bytes {fraction:.6g} "
        "--text FILE --out DIRECTORY",
    }  # fmt: skip


def _tables(rows: dict[str, Any]) -> list[Any]:
    from equipoise.reporting.numbers import bytes_text, fixed
    from equipoise.reporting.style import new_table

    lines: list[Any] = [
        f"{rows['experts']} of {rows['experts_before']} experts in every layer ({rows['config']}); experts take "
        f"{bytes_text(rows['expert_bytes'])} of {bytes_text(rows['expert_bytes_before'])} before"
    ]
    if rows["left_out_tensors"]:
        lines.append(
            f"{rows['left_out_tensors']} tensors that transformers does not load were left out, such as extra predictors'"
        )
    if rows["texts"]:
        heads = ("where", "tokens", "perplexity", "pruned", "change, % (95 %)", "KL, nats", "same top token")
        table = new_table("the pruned model beside the whole one (measured)", ["text"], heads)
        for text in rows["texts"]:
            change, kl, same = text["perplexity_change"], text["kl"], text["top1_agreement"]
            table.add_row(
                text["name"], text["where"], f"{text['tokens']:,}", fixed(text["perplexity_base"]), fixed(text["perplexity"]),
                f"{100 * change['value']:+.2f} ({100 * change['low']:+.2f}..{100 * change['high']:+.2f})", f"{kl['value']:.4f}",
                f"{100 * same['value']:.1f} %",
            )  # fmt: skip
        lines.append(table)
    for where in (IN, OUT):
        if not any(text["where"] == where for text in rows["texts"]):
            lines.append(f"not measured {where}: give such text with --scenario NAME=FILE")
    lines += [rows["warning"], f"to spend the freed memory on copies: {rows['balance']}"]
    return lines
