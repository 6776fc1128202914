"""Commands for balance while a model runs: stream, watch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from equipoise.arguments import (
    BatchSize,
    Device,
    Dtype,
    Field,
    Json,
    Quiet,
    Scenario,
    Seed,
    SeqLen,
    Text,
    assignments,
    read,
    scenario_files,
)
from equipoise.commands.show import show
from equipoise.errors import EquipoiseError

if TYPE_CHECKING:
    from equipoise.execution.rebalance.rebalancer import Rebalancer, Report

TIMEOUT = 5.0
"""Seconds that an address has to answer in."""


def stream(
    model: Annotated[str, typer.Argument(help="the original model; or a balanced one, with the --store of its experts")],
    plan: Annotated[Path | None, typer.Option(help="the plan to start from; not for a model that carries one")] = None,
    profile: Annotated[
        Path | None, typer.Option(help="that the plan was made from: tells `adaptive` of errors and of how the load scatters")
    ] = None,
    text: Text = None,
    scenario: Scenario = None,
    policy: Annotated[str, typer.Option(help="adaptive, last_step, all_history or static")] = "adaptive",
    options: Annotated[
        list[str] | None, typer.Option("--set", help="option of the policy: NAME=VALUE; may be repeated")
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(help="directory of all experts in all formats; made if missing", show_default="a temporary one"),
    ] = None,
    step_tokens: Annotated[int, typer.Option(help="tokens after which the policy decides")] = 4096,
    staging_mb: Annotated[
        float | None, typer.Option(help="MB that new slots may take beside the plan's own", show_default="the largest layer")
    ] = None,
    tokens: Annotated[int, typer.Option(help="tokens of each scenario, in the order given: a stream with shifts")] = 32768,
    field: Field = "text",
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 4,
    seed: Seed = 0,
    background: Annotated[bool, typer.Option(help="plan and stage in another thread, as a server would")] = False,
    metrics: Annotated[
        str | None, typer.Option(help="Prometheus metrics: a port to serve them on, or a file that is written after each step")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="what became of every step, as JSON")] = None,
    save_plan: Annotated[Path | None, typer.Option(help="file for the plan in force at the end")] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run text through a balanced model as a stream, and change its slots while it runs, when that pays."""
    from tempfile import TemporaryDirectory

    files = scenario_files(text, scenario)
    from equipoise.artifacts import Profile
    from equipoise.execution.rebalance.rebalancer import Rebalancer, summary
    from equipoise.planning.streaming.policies import make_policy
    from equipoise.profiling.forward import evaluation_mode, run_batch
    from equipoise.profiling.loading import load_tokenizer
    from equipoise.profiling.progress import ProgressBar
    from equipoise.profiling.sequences import Framing, text_batches

    documents = read(files, field, model)
    known = Profile.load_file(profile) if profile else None
    with TemporaryDirectory(prefix="equipoise-store-") as temporary:
        net, experts = _ready(model, plan, store, Path(temporary), dtype, device)
        tokenizer = load_tokenizer(model)
        batches = text_batches(
            documents, tokenizer, Framing.of(tokenizer, net.config), tokens=tokens, seq_len=seq_len, batch_size=batch_size,
            seed=seed,
        )  # fmt: skip
        tell, attach = _metrics(metrics)
        rebalancer = Rebalancer(
            net, make_policy(policy, known, _plan_of(net), **assignments(options)), experts, step_tokens=step_tokens,
            staging_bytes=None if staging_mb is None else int(staging_mb * 1e6), background=background, on_report=tell,
        )  # fmt: skip
        attach(rebalancer)
        with evaluation_mode(net), ProgressBar(not quiet) as bar, rebalancer:
            bar.stage("streaming", sum(batch.tokens for batch in batches), "tokens")
            for batch in batches:
                run_batch(net, batch, all_logits=False)
                if not background:
                    rebalancer.advance()
                bar.describe(f"streaming {batch.scenario}")
                bar.advance(batch.tokens)
            if not background:
                rebalancer.advance(close=True)
    reports = list(rebalancer.reports)
    rows = summary(reports, rebalancer.ledger) | {"policy": policy, "scenarios": list(files)}
    rows["reports"] = [report.row() for report in reports]
    if out:
        import json

        from equipoise.artifacts.files import write_atomic

        write_atomic(out, json.dumps(rows, indent=2, allow_nan=False) + "\n")
    if save_plan:
        rebalancer.plan.save(save_plan)
    from equipoise.reporting.live import stream_tables

    show(as_json, rows, stream_tables(rows), out or save_plan)


def watch(
    source: Annotated[str, typer.Argument(metavar="URL|FILE", help="where `equipoise stream --metrics` tells them")],
    interval: Annotated[float, typer.Option(help="seconds between looks")] = 1.0,
    once: Annotated[bool, typer.Option(help="look once and end")] = False,
    as_json: Json = False,
) -> None:
    """Show a stream live on the terminal: balance, drift, changes of plan, and what they cost and won."""
    import time

    from equipoise.reporting.live import live_view, read_metrics

    if not interval > 0:
        raise EquipoiseError(f"interval: {interval} given; allowed are seconds above 0.")
    samples = read_metrics(_fetch(source))
    if once or as_json:
        show(as_json, samples, [live_view(samples)], None)
        return
    from rich.console import Console
    from rich.live import Live

    history: list[float] = [samples["lis"][""]]
    steps = samples.get("steps_total", {}).get("", 0.0)
    with Live(live_view(samples, history), console=Console(), refresh_per_second=4) as live:
        while True:
            time.sleep(interval)
            samples = read_metrics(_fetch(source))
            now = samples.get("steps_total", {}).get("", 0.0)
            if now != steps:
                history, steps = [*history[-200:], samples["lis"][""]], now
            live.update(live_view(samples, history))


def _ready(model: str, plan: Path | None, store: Path | None, temporary: Path, dtype: str, device: str) -> tuple[Any, Any]:
    """A balanced model and the store of its experts."""
    from equipoise.artifacts import Plan
    from equipoise.execution.rebalance.store import ExpertStore, apply_from_store
    from equipoise.pipeline import load_balanced
    from equipoise.profiling.loading import load_model

    if plan is None:
        if store is None:
            raise EquipoiseError(
                "no plan given: give --plan PLAN with the original model, or a balanced model with --store DIR of its experts."
            )
        return load_balanced(model, dtype=dtype, device=device), ExpertStore(store)
    net, wanted = load_model(model, dtype=dtype, device=device), Plan.load_file(plan)
    formats = sorted({name for layer in wanted.layers for name in layer.precisions})
    experts = ExpertStore.create(net, store or temporary, formats, name=model)
    apply_from_store(net, wanted, experts)
    return net, experts


def _plan_of(model: Any) -> Any:
    from equipoise.execution.balanced_config import plan_of

    return plan_of(model)


def _metrics(target: str | None) -> tuple[Callable[[Report], None] | None, Callable[[Rebalancer], None]]:
    """What is told of each step, and how it gets to know the rebalancer."""
    if target is None:
        return None, lambda rebalancer: None
    from equipoise.execution.rebalance.metrics import StreamMetrics

    kept = StreamMetrics()
    if target.isdigit():
        kept.serve(int(target))
        return kept.update, kept.attach

    def tell(report: Report) -> None:
        kept.update(report)
        kept.write(target)

    return tell, kept.attach


def _fetch(source: str) -> str:
    """The text of metrics at an address or in a file."""
    if "://" not in source:
        try:
            return Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise EquipoiseError(f"cannot read metrics from '{source}': {error}; give a file or an http:// address.") from error
    from urllib.request import urlopen

    if not source.startswith(("http://", "https://")):
        raise EquipoiseError(f"'{source}' given; allowed are http:// and https:// addresses, and files.")
    address = source if source.rstrip("/").endswith("/metrics") else f"{source.rstrip('/')}/metrics"
    try:
        with urlopen(address, timeout=TIMEOUT) as answer:
            return str(answer.read().decode("utf-8"))
    except OSError as error:
        raise EquipoiseError(f"'{address}' does not answer ({error}); is `equipoise stream --metrics PORT` running?") from error
