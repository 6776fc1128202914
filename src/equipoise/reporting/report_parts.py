"""A report as a whole, whatever it is written as: findings, next step, figures in order, and what it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from equipoise.reporting.charts import Figure, Origin, Table
from equipoise.reporting.evidence import Evidence
from equipoise.reporting.figures_frontier import frontier_figure
from equipoise.reporting.figures_importance import importance_figure
from equipoise.reporting.figures_load import drift_figure, lis_figure, load_figure
from equipoise.reporting.figures_plan import memory_figure, slots_figure, units_figure
from equipoise.reporting.figures_quality import quality_figure
from equipoise.reporting.findings import Finding, findings, summary_numbers
from equipoise.reporting.next_step import NextStep, next_step
from equipoise.reporting.numbers import plural

FIGURES = (
    load_figure,
    lis_figure,
    importance_figure,
    slots_figure,
    units_figure,
    memory_figure,
    quality_figure,
    frontier_figure,
    drift_figure,
)
"""Makers of the figures in the order of the page; each gives None where the values that it needs are absent."""


@dataclass(frozen=True, eq=False)
class Report:
    """Everything that a report says.

    Attributes:
        name: the model.
        about: one line on the model.
        numbers: name, value and origin of the few figures at the head.
        findings: the ones that matter most.
        next_step: the command to run next.
        figures: in the order of the page.
        sources: what the report was made from, one row a file.
    """

    name: str
    about: str
    numbers: Sequence[tuple[str, str, Origin]]
    findings: Sequence[Finding]
    next_step: NextStep
    figures: Sequence[Figure]
    sources: Table


def make_report(evidence: Evidence) -> Report:
    """Everything that a report says about some values.

    Args:
        evidence: a profile, plans, an evaluation and a frontier, whichever there are.
    """
    figures = [figure for make in FIGURES if (figure := make(evidence)) is not None]
    return Report(
        evidence.name, _about(evidence), summary_numbers(evidence), findings(evidence), next_step(evidence), figures,
        _sources(evidence),
    )  # fmt: skip


def _about(evidence: Evidence) -> str:
    model = evidence.model
    if model is None:
        return "known from an evaluation alone"
    stacks = sorted({layer.stack for layer in model.layers})
    top_k = sorted({layer.top_k for layer in model.layers})
    where = f" in {' and '.join(stacks)}" if len(stacks) > 1 else ""
    return (
        f"{model.model_type}: {plural(len(model.layers), 'MoE layer')}{where}, up to {plural(model.max_experts, 'expert')}, "
        f"{' or '.join(map(str, top_k))} a token, stored in {model.dtype}"
    )


def _sources(evidence: Evidence) -> Table:
    rows = []
    if evidence.profile is not None:
        source = evidence.profile.source
        what = f"{int(evidence.profile.tokens.sum()):,} tokens of {', '.join(source.scenarios)}; from {source.origin}"
        rows.append(["profile", evidence.files.get("profile", "-"), what])
    for name, plan in evidence.plans.items():
        origin = ""
        if evidence.profile is not None and plan.profile_sha256 != evidence.profile.source.text_sha256:
            origin = "; made from another text than this profile's"
        what = f"method {plan.method}, {plural(plan.units, 'unit')}, dispatch {plan.dispatch}, class {plan.exactness}{origin}"
        rows.append([f"plan {name}", evidence.files.get(name, "-"), what])
    if evidence.evaluation is not None:
        judged = ", ".join(c.name for c in evidence.evaluation.contenders)
        rows.append(["evaluation", evidence.files.get("evaluation", "-"), f"{judged} against {evidence.evaluation.base}"])
    if evidence.frontier:
        rows.append(["frontier", evidence.files.get("frontier", "-"), plural(len(evidence.frontier), "point")])
    return Table(["value", "file", "what it is"], rows, 3)
