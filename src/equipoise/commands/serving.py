"""Commands for those who serve on many ranks: simulate, export. Neither loads a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from equipoise.arguments import Json, Options, Seed, assignments, refuse_given
from equipoise.commands.show import show
from equipoise.errors import EquipoiseError, unknown_name

if TYPE_CHECKING:
    from equipoise.artifacts import Plan, Profile
    from equipoise.simulation.trace import Trace


def export(
    plan: Annotated[Path, typer.Argument(help="a plan; for checkpoints also the directory of a balanced model")],
    engine: Annotated[
        str,
        typer.Option(
            "--to",
            help="engine: sglang, vllm, tensorrt-llm, vllm-ascend, omni, lmdeploy, deepseek; or a model that any tool loads: "
            "compressed-tensors (quantized), checkpoint (16 bits)",
        ),
    ],
    out: Annotated[Path, typer.Option(help="file to write; a new directory for checkpoints")],
    config: Annotated[
        Path | None, typer.Option(help="the model's config.json, for a plan that does not know its dense layers")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="loads, for engines that plan by themselves, vllm-permuted and --round-per-layer")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="checkpoint to reorder, for vllm-permuted; for checkpoints, a balanced model or the plan's original"),
    ] = None,
    round_layers: Annotated[
        bool, typer.Option("--round-per-layer", help="for compressed-tensors: round the plan to one precision per layer first")
    ] = False,
    options: Options = None,
    as_json: Json = False,
) -> None:
    """Write a plan as the file that a serving engine loads and print the flags to give beside it, or a model for any tool."""
    from equipoise.artifacts import Plan
    from equipoise.commands.exporting import CHECKPOINTS, export_model
    from equipoise.engines.registry import WRITERS, write_plan

    if engine not in (known := [*CHECKPOINTS, *WRITERS.names()]):
        raise unknown_name("target", engine, known)
    if engine in CHECKPOINTS:
        refuse_given(f"--to {engine} reads the model's own config.json", {"--config": config})
        if engine == "checkpoint":
            refuse_given("a plain checkpoint holds any mixture", {"--round-per-layer": round_layers or None})
        refuse_given("it tells the error of --round-per-layer", {"--profile": None if round_layers else profile})
        rows, lines = export_model(
            plan,
            engine,
            out,
            model=model,
            profile=profile,
            round_layers=round_layers,
            options=assignments(options),
            quiet=as_json,
        )
        show(as_json, rows, lines, out)
        return
    refuse_given(f"--to {engine} writes a plan's placement, not its precisions", {"--round-per-layer": round_layers or None})
    named = {"config": config, "profile": profile, "model": model}
    given = assignments(options) | {name: value for name, value in named.items() if value is not None}
    written = write_plan(Plan.load_file(plan), engine, out, **given)
    files = [str(file) for file in written.files]
    show(as_json, {"engine": engine, "files": files, "flags": written.flags}, [written.flags], out)


def simulate(
    plans: Annotated[list[str], typer.Option("--plan", help="a plan, as FILE or NAME=FILE; may be repeated")],
    profile: Annotated[
        Path | None, typer.Option(help="the profile that the plans were made from: batches are drawn from it")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="per-token routing that the plans were made from (.npz with topk_ids): replayed")
    ] = None,
    heldout_profile: Annotated[Path | None, typer.Option(help="a profile of other traffic")] = None,
    heldout_trace: Annotated[Path | None, typer.Option(help="per-token routing of other traffic")] = None,
    batch: Annotated[int, typer.Option(help="tokens of a batch, over all ranks")] = 512,
    batches: Annotated[int, typer.Option(help="most batches of each traffic")] = 32,
    rule: Annotated[str, typer.Option(help="which copy serves which token; `equipoise methods` lists the rules")] = "even",
    cost: Annotated[
        str, typer.Option(help="what a rank's work costs: tokens, activated, or a table of measured latencies (.parquet, .csv)")
    ] = "tokens",
    phase: Annotated[
        str, typer.Option(help="batches of consecutive tokens (prefill) or of one token a request (decode)")
    ] = "prefill",
    link: Annotated[float | None, typer.Option(help="GB/s at which weights reach a rank, for rules that send them")] = None,
    plot: Annotated[Path | None, typer.Option(help="figure to draw (.png, .svg)")] = None,
    out: Annotated[Path | None, typer.Option(help="report to write, as JSON")] = None,
    options: Options = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Tell what plans are worth before a GPU is touched: the same batches through each, and through no plan at all."""
    from equipoise.reporting.simulation import simulation_tables
    from equipoise.simulation.simulate import simulate as run

    named = dict(_plan(given) for given in plans)
    first = next(iter(named.values()))
    report = run(
        _traffic(profile, trace, first, "--profile", "--trace"), named,
        held_out=_traffic(heldout_profile, heldout_trace, first, "--heldout-profile", "--heldout-trace"),
        batch=batch, batches=batches, rule=rule, cost=cost, phase=phase, link_gbs=link,  # type: ignore[arg-type]
        rule_options=assignments(options), seed=seed,
    )  # fmt: skip
    rows = report.model_dump(mode="json", by_alias=True)
    if out:
        report.save(out)
    if plot:
        from equipoise.reporting.simulation_plot import simulation_plot

        simulation_plot(rows, plot)
    show(as_json, rows, simulation_tables(rows), out or plot)


def payback(
    current: Annotated[Path, typer.Argument(help="the plan in force")],
    plan: Annotated[Path, typer.Argument(help="the new plan")],
    profile: Annotated[Path, typer.Option(help="traffic to come; better not what the new plan was made from")],
    balanced_ms: Annotated[float, typer.Option(help="time of the expert layers in one step if all ranks had the same load")],
    steps: Annotated[int, typer.Option(help="steps until the plan is next changed")],
    link: Annotated[float, typer.Option(help="GB/s of one rank's link, in each direction")],
    as_json: Json = False,
) -> None:
    """Tell whether moving to a new plan pays: time won per step times steps, against the time to move its experts."""
    from dataclasses import asdict

    from equipoise.artifacts import Plan, Profile
    from equipoise.planning.moves import pay_back, step_seconds

    before, after, load = Plan.load_file(current), Plan.load_file(plan), Profile.load_file(profile).scenario_load
    seconds = [step_seconds(one, load, balanced_ms / 1e3) for one in (before, after)]
    found = pay_back(
        before, after, seconds_before=seconds[0], seconds_after=seconds[1], steps=steps, bytes_per_second=link * 1e9
    )
    show(as_json, {**asdict(found), "net_seconds": found.net_seconds, "pays": found.pays}, [str(found)], None)


def redundant_slots(
    profile: Profile, method: str, ranks: int | None, *, nodes: int, most: int, phase: str, cost: str, batch: int
) -> tuple[list[int], str]:
    """Each layer's slots, chosen on traffic held out within so many redundant slots per rank over all layers, and why."""
    from equipoise.planning.latency_tables import cost_model
    from equipoise.planning.redundancy import choose_redundancy

    if ranks is None:
        raise EquipoiseError(f"--redundancy is for placement on ranks; give --ranks, and not method '{method}' without them.")
    chosen = choose_redundancy(
        profile, ranks=ranks, nodes=nodes, most_rows=most, phase=phase,  # type: ignore[arg-type]
        cost=cost_model(cost, profile.model), batch=batch,
    )  # fmt: skip
    return list(chosen.slots), chosen.note


def _plan(given: str) -> tuple[str, Plan]:
    from equipoise.artifacts import Plan

    name, equals, path = given.partition("=")
    file = Path(path if equals else given)
    return (name if equals else file.name.removesuffix(".json").removesuffix(".plan")), Plan.load_file(file)


def _traffic(profile: Path | None, trace: Path | None, plan: Plan, one: str, other: str) -> Profile | Trace | None:
    from equipoise.artifacts import Profile
    from equipoise.simulation.trace import load_trace

    if profile is not None and trace is not None:
        raise EquipoiseError(f"{one} and {other} both name the same traffic; give one of them.")
    if profile is not None:
        return Profile.load_file(profile)
    return None if trace is None else load_trace(trace, plan.model)
