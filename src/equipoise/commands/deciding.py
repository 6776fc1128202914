"""Commands that need no model: plan, frontier, inspect, methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from equipoise.arguments import (
    BytesFraction,
    Dispatch,
    ErrorBound,
    Json,
    Nodes,
    Options,
    Phase,
    Ranks,
    Seed,
    Units,
    numbers,
    plan_options,
    slot_counts,
)
from equipoise.commands.serving import redundant_slots
from equipoise.commands.show import show, show_evaluation
from equipoise.errors import EquipoiseError


def plan(
    profile: Annotated[Path, typer.Argument(help="a profile")],
    out: Annotated[Path | None, typer.Option(help="file to write, such as x.plan.json")] = None,
    method: Annotated[
        str | None,
        typer.Option(help="planning method; `equipoise methods` lists them", show_default="robust with --ranks, else rq"),
    ] = None,
    units: Units = None,
    ranks: Ranks = None,
    nodes: Nodes = 1,
    slots: Annotated[
        str | None, typer.Option(help="physical slots per layer, or one number per layer", show_default="no copies")
    ] = None,
    redundancy: Annotated[
        int | None,
        typer.Option(help="let the planner choose each layer's slots, with at most so many per rank over all layers"),
    ] = None,
    cost: Annotated[
        str, typer.Option(help="with --redundancy: what a rank's work costs: tokens, activated, or a table of latencies")
    ] = "tokens",
    batch: Annotated[int, typer.Option(help="with --redundancy: tokens of a batch, which matters beside cost tokens")] = 4096,
    current: Annotated[Path | None, typer.Option(help="plan in force: moves are counted against it")] = None,
    phase: Phase = "all",
    error_bound: ErrorBound = None,
    bytes_fraction: BytesFraction = None,
    prune: Annotated[
        str | None,
        typer.Option(help="leave experts out by this score: easy-ep, reap, gate, frequency, leave-one-out or random"),
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="with --prune: part of each layer's experts to keep", show_default="0.5")
    ] = None,
    options: Options = None,
    dispatch: Annotated[
        str | None, typer.Option(help="which copy serves which token: even, least_loaded or gate_aware", show_default="even")
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Decide from a profile: copies, bits and units of experts, their placement on an engine's ranks, or which to leave out."""
    from equipoise.artifacts import Plan, Profile
    from equipoise.planning.methods import make_plan
    from equipoise.reporting.rows import plan_rows
    from equipoise.reporting.tables import plan_tables

    if ranks is not None and units is not None and ranks != units:
        raise EquipoiseError(f"--ranks is {ranks} and --units is {units}: they name the same thing; give one.")
    chosen = method or ("rq" if ranks is None else "robust")
    measured = Profile.load_file(profile)
    given = plan_options(error_bound, bytes_fraction, options)
    wanted = slot_counts(slots)
    note = ""
    if redundancy is not None:
        if wanted is not None:
            raise EquipoiseError("--slots and --redundancy both say how many slots a layer has; give one.")
        wanted, note = redundant_slots(
            measured, chosen, ranks, nodes=nodes, most=redundancy, phase=phase, cost=cost, batch=batch
        )
    placement = {
        "slots": wanted,
        "nodes": nodes if nodes != 1 else None,
        "current": None if current is None else Plan.load_file(current),
        "phase": phase if phase != "all" else None,
        "dispatch": dispatch,
    }
    given |= {name: value for name, value in placement.items() if value is not None}
    if prune is not None:
        if method is not None or ranks is not None:
            raise EquipoiseError("--prune decides which experts stay, and nothing else; leave out --method and --ranks.")
        chosen, given = "prune", given | {"score": prune.replace("_", "-")}
    if keep is not None:
        given["keep"] = keep
    result = make_plan(measured, chosen, units=units if ranks is None else ranks, seed=seed, **given)
    if note and result.predicted is not None:
        notes = f"{note}. {result.predicted.note}".strip()
        result = result.model_copy(update={"predicted": result.predicted.model_copy(update={"note": notes})})
    if out:
        result.save(out)
    told: list[str] = []
    if result.prunes:
        from equipoise.planning.prune import score_kept, warning

        held = score_kept(measured, result)
        told = [
            f"part of the score that the experts kept hold: {held.mean():.3f} (mean over layers), {held.min():.3f} (least); "
            "it is no measure of quality",
            warning(result),
        ]
    show(as_json, plan_rows(result) | ({"notes": told} if told else {}), [*plan_tables(result), *told], out)


def frontier(
    profile: Annotated[Path, typer.Argument(help="a profile")],
    bytes_fractions: Annotated[str, typer.Option("--bytes", help="fractions of the original bytes")] = "0.5,0.75,1.0,1.25",
    error_bounds: Annotated[str, typer.Option(help="bounds on the predicted error")] = "0,0.01,0.02,0.03,0.06,0.12",
    units: Units = None,
    dispatch: Dispatch = "even",
    plot: Annotated[Path | None, typer.Option(help="picture to write, .png or .svg (needs matplotlib)")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Show what balance costs: one `rq` plan for each number of bytes and each error bound; predicted, not measured."""
    from equipoise.artifacts import Profile
    from equipoise.planning.frontier import frontier as compute
    from equipoise.planning.frontier import frontier_rows
    from equipoise.reporting.frontier_plot import frontier_plot
    from equipoise.reporting.listing import frontier_table

    points = compute(
        Profile.load_file(profile), bytes_fractions=numbers(bytes_fractions), error_bounds=numbers(error_bounds),
        units=units, seed=seed, dispatch=dispatch,
    )  # fmt: skip
    rows = frontier_rows(points)
    if plot:
        drawn = [{**row, "model": "predicted"} for row in rows["points"] if row["lis"] is not None]
        frontier_plot(drawn, plot, quality="output_error", label="predicted relative error of layers' output")
    show(as_json, rows, [frontier_table(rows)], None)


def inspect(
    file: Annotated[Path, typer.Argument(help="a profile, a plan, a routing policy or an evaluation")], as_json: Json = False
) -> None:
    """Print a profile, a plan, a routing policy or an evaluation as tables."""
    from equipoise.artifacts import Plan, Profile
    from equipoise.artifacts.routing import RoutingPolicy
    from equipoise.pipeline import read_artifact
    from equipoise.reporting import rows, tables
    from equipoise.reporting.routing import policy_rows, policy_tables

    value = read_artifact(file)
    if isinstance(value, Profile):
        show(as_json, rows.profile_rows(value), tables.profile_tables(value), None)
    elif isinstance(value, Plan):
        show(as_json, rows.plan_rows(value), tables.plan_tables(value), None)
    elif isinstance(value, RoutingPolicy):
        told = policy_rows(value)
        show(as_json, told, policy_tables(told), None)
    else:
        show_evaluation(as_json, value, None)


def methods(as_json: Json = False) -> None:
    """List methods, estimators, dispatch rules, routing and streaming policies and engines by name, with their sources."""
    from equipoise.dispatch.choice import RULES
    from equipoise.engines.registry import READERS, WRITERS
    from equipoise.execution.routing.attach import POLICIES
    from equipoise.planning.methods import METHODS
    from equipoise.planning.prune_scores import PRUNING
    from equipoise.planning.streaming.policies import POLICIES as STREAMING
    from equipoise.profiling.importance import IMPORTANCE
    from equipoise.quantization.methods import METHODS as ROUNDING
    from equipoise.reporting.listing import methods_table

    registries = (METHODS, PRUNING, IMPORTANCE, ROUNDING, RULES, POLICIES, STREAMING, READERS, WRITERS)
    rows = {
        registry.kind: [{"name": e.name, "summary": e.summary, "source": e.source} for e in registry] for registry in registries
    }
    show(as_json, rows, [methods_table(kind, entries) for kind, entries in rows.items()], None)
