"""`equipoise report`: profile, plans, evaluation and frontier on one page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from equipoise.arguments import Json
from equipoise.commands.show import show
from equipoise.errors import EquipoiseError

if TYPE_CHECKING:
    from equipoise.reporting.evidence import Evidence
    from equipoise.reporting.frontier_points import FrontierPoint
    from equipoise.reporting.report_parts import Report

FORMATS = ("html", "md", "png")
ENDINGS = {"": "html", ".html": "html", ".htm": "html", ".md": "md", ".png": "png"}


def report(
    given: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...",
            help="a profile, plans (FILE or NAME=FILE), an evaluation, a frontier (frontier --json); told apart by content",
        ),
    ],
    out: Annotated[Path, typer.Option(help="file to write, such as report.html; a directory for --format png")],
    form: Annotated[str | None, typer.Option("--format", help="html, md or png", show_default="by the ending of --out")] = None,
    as_json: Json = False,
) -> None:
    """Show what is wrong with a model's balance and what plans did, on one page that needs no network."""
    chosen = form or ENDINGS.get(out.suffix.lower())
    if chosen is None:
        raise EquipoiseError(f"--out ends in '{out.suffix}', which tells no format; end it in .html or .md, or give --format.")
    if chosen not in FORMATS:
        raise EquipoiseError(f"--format is '{chosen}'; allowed are {', '.join(FORMATS)}.")
    from equipoise.artifacts.files import write_atomic
    from equipoise.reporting.report_parts import make_report

    made = make_report(read_evidence(given))
    if chosen == "png":
        files = _write_pictures(made, out)
    elif chosen == "md":
        from equipoise.reporting.page_markdown import markdown

        write_atomic(out, markdown(made))
        files = [out]
    else:
        from equipoise.reporting.page import page

        write_atomic(out, page(made))
        files = [out]
    rows = report_rows(made, files)
    lines = [made.name, *(f"{i}. {finding.text}" for i, finding in enumerate(made.findings, 1))]
    show(as_json, rows, ["\n".join(lines), f"next: {made.next_step.command}"], out)


def read_evidence(given: list[str]) -> Evidence:
    """The values in some files, told apart by their content.

    Args:
        given: FILE, or NAME=FILE for a plan.

    Raises:
        EquipoiseError: a file is none of the values, or there are two where one is allowed.
    """
    from equipoise.artifacts import Evaluation, Plan, Profile
    from equipoise.artifacts.routing import RoutingPolicy
    from equipoise.pipeline import read_artifact
    from equipoise.reporting.evidence import Evidence

    single: dict[str, Any] = {}
    plans: dict[str, Plan] = {}
    files: dict[str, str] = {}
    for word in given:
        name, equals, path = word.partition("=")
        file = Path(path if equals and not Path(word).exists() else word)
        points = _frontier(file)
        value = points if points is not None else read_artifact(file)
        if isinstance(value, RoutingPolicy):
            raise EquipoiseError(f"'{file}' is a routing policy, which a report does not show; print it with inspect.")
        if isinstance(value, Plan):
            label = name if str(file) != word else file.name.removesuffix(".json").removesuffix(".plan")
            if label in plans:
                raise EquipoiseError(f"two plans are named '{label}'; name them as NAME=FILE.")
            plans[label], files[label] = value, str(file)
            continue
        kind = "profile" if isinstance(value, Profile) else "evaluation" if isinstance(value, Evaluation) else "frontier"
        if kind in single:
            raise EquipoiseError(
                f"'{file}' is a second {kind}; a report has one. Plans are compared side by side, as many as you like."
            )
        single[kind], files[kind] = value, str(file)
    evidence = Evidence(plans=plans, files=files, **single)
    return replace(evidence, models=_directories(evidence))


def _directories(evidence: Evidence) -> dict[str, str]:
    """Where evaluated models lie: `evaluate` names them by directory, `balance` saves one beside the evaluation."""
    from equipoise.artifacts.plan import PLAN_FILE, Plan

    found: dict[str, str] = {}
    for contender in evidence.evaluation.contenders if evidence.evaluation else ():
        beside = Path(evidence.files["evaluation"]).parent / "model"
        for directory in (Path(contender.name), beside):
            plan = directory / PLAN_FILE
            if plan.is_file() and Plan.load_file(plan) == evidence.plan_of(contender.name, contender.plan_method):
                found.setdefault(contender.name, str(directory))
    return found


def _frontier(file: Path) -> list[FrontierPoint] | None:
    """The points of a frontier file; None when the file is something else."""
    from equipoise.reporting.frontier_points import frontier_points

    try:
        data = file.read_bytes()
        return frontier_points(json.loads(data)) if data.startswith(b"{") else None
    except (OSError, ValueError):  # whoever reads it as one of the other values tells what is wrong with it
        return None


def _write_pictures(made: Report, directory: Path) -> list[Path]:
    """A PNG for every view of every figure; drawn before the first is written."""
    from equipoise.artifacts.files import write_atomic
    from equipoise.reporting.charts_matplotlib import pictures

    if directory.is_file():
        raise EquipoiseError(f"--out is the file '{directory}'; pictures are many and need a directory.")
    drawn = {}
    for number, figure in enumerate(made.figures, 1):
        for view, picture in pictures(figure).items():
            word = "".join(letter if letter.isalnum() else "-" for letter in view).strip("-").lower()
            drawn[directory / f"{number:02d}-{figure.key}-{word}.png"] = picture
    for path, picture in drawn.items():
        write_atomic(path, picture)
    return list(drawn)


def report_rows(made: Report, files: list[Path]) -> dict[str, Any]:
    """A report as plain values: findings, the next command, and the table of every figure."""
    return {
        "model": made.name,
        "numbers": [{"name": name, "value": value, "origin": origin} for name, value, origin in made.numbers],
        "findings": [{"topic": f.topic, "text": f.text, "origins": list(f.origins), "figure": f.figure} for f in made.findings],
        "next": {"command": made.next_step.command, "why": made.next_step.why},
        "figures": [
            {
                "key": f.key,
                "title": f.title,
                "views": [{"name": v.name, "origins": list(v.origins)} for v in f.views],
                "table": None if f.table is None else {"heads": list(f.table.heads), "rows": [list(r) for r in f.table.rows]},
            }
            for f in made.figures
        ],
        "files": [str(file) for file in files],
    }
