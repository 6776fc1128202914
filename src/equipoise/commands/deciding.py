"""Commands that need no model: plan, frontier, inspect, methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from equipoise.arguments import (
    Dispatch,
    Json,
    Method,
    Options,
    Seed,
    Units,
    numbers,
    plan_options,
)
from equipoise.commands.show import show, show_evaluation


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
    show(as_json, plan_rows(result), plan_tables(result), out)


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
    show(as_json, rows, [frontier_table(rows)], None)


def inspect(file: Annotated[Path, typer.Argument(help="a profile, a plan or an evaluation")], as_json: Json = False) -> None:
    """Print a profile, a plan or an evaluation as tables."""
    from equipoise.artifacts import Plan, Profile
    from equipoise.pipeline import read_artifact
    from equipoise.reporting import rows, tables

    value = read_artifact(file)
    if isinstance(value, Profile):
        show(as_json, rows.profile_rows(value), tables.profile_tables(value), None)
    elif isinstance(value, Plan):
        show(as_json, rows.plan_rows(value), tables.plan_tables(value), None)
    else:
        show_evaluation(as_json, value, None)


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
    show(as_json, rows, [methods_table(kind, entries) for kind, entries in rows.items()], None)
