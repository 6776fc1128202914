"""Figures of what was proved: quality with paired intervals, and measured balance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import nan

from equipoise.artifacts.evaluation import Contender, Interval, TaskResult, TextResult
from equipoise.reporting.charts import RAW, Estimate, Figure, Intervals, Table, View
from equipoise.reporting.evidence import Evidence
from equipoise.reporting.numbers import fixed, percent, span_text

Result = TextResult | TaskResult


def quality_figure(evidence: Evidence) -> Figure | None:
    """Perplexity, KL, agreement and task scores of the balanced models against the base, with paired intervals."""
    evaluation = evidence.evaluation
    if evaluation is None or not evaluation.contenders:
        return None
    all_of = evaluation.contenders
    views = []
    none = (0.0, "no change")
    if any(c.texts for c in all_of):
        views += [
            _intervals(
                evidence, "perplexity", lambda c: c.texts, lambda t: t.perplexity_change, "change of perplexity, %", none, 100
            ),
            _intervals(
                evidence, "KL", lambda c: c.texts, lambda t: t.kl, "KL(base || balanced), nats per token", none, 1, ".2g"
            ),
            _intervals(
                evidence,
                "top-1",
                lambda c: c.texts,
                lambda t: t.top1_agreement,
                "tokens with the same first choice, %",
                None,
                100,
                ".2f",
            ),
        ]
    if any(c.tasks for c in all_of):
        views.append(
            _intervals(evidence, "tasks", lambda c: c.tasks, lambda t: t.difference, "change of score, points", none, 100)
        )
    if views:
        views.append(_balance(evidence))
    caption = (
        "The balanced models against the model as it is, on the same text or items in one run. Bars are paired 95 % intervals: "
        "one that crosses the line of no change is not told apart from chance."
    )
    return Figure("quality", "What it costs in quality", caption, views, _quality_table(_contenders(evidence)))


def _intervals(
    evidence: Evidence, name: str, results: Callable[[Contender], Sequence[Result]], value: Callable[..., Interval],
    x_name: str, reference: tuple[float, str] | None, scale: float, spec: str = "+.2f",
) -> View:  # fmt: skip
    found = [
        Estimate(result.name, c.name, colour_of(evidence, c), *(scale * v for v in (own.value, own.low, own.high)))
        for c in _contenders(evidence)
        for result in results(c)
        for own in (value(result),)
    ]
    return View(name, Intervals(found, x_name, reference, spec), ("measured",))


def _balance(evidence: Evidence) -> View:
    """LIS on the evaluation's texts and tasks, measured from the slots that served."""
    found = []
    for k, c in enumerate(_contenders(evidence)):
        results: list[Result] = [*c.texts, *c.tasks]
        for result in results:
            if k == 0:
                found.append(Estimate(result.name, "as it is", RAW, result.lis_base, nan, nan))
            found.append(Estimate(result.name, c.name, colour_of(evidence, c), result.lis, nan, nan))
    return View("balance", Intervals(found, "LIS over units, mean over layers", (1.0, "balance"), ".3f"), ("measured",))


def _contenders(evidence: Evidence) -> list[Contender]:
    """The evaluated models, in the order of the plans."""
    assert evidence.evaluation is not None, "only called with an evaluation"
    return sorted(evidence.evaluation.contenders, key=lambda c: colour_of(evidence, c))


def colour_of(evidence: Evidence, contender: Contender) -> int:
    """The colour number of a contender: its plan's where that is on the page, else one after all plans'."""
    plan = evidence.plan_of(contender.name, contender.plan_method)
    for k, own in enumerate(evidence.plans.values()):
        if own is plan:
            return k
    assert evidence.evaluation is not None, "a contender is of an evaluation"
    return len(evidence.plans) + [c.name for c in evidence.evaluation.contenders].index(contender.name)


def _quality_table(contenders: Sequence[Contender]) -> Table:
    """Every result in one row: balance before and after, quality before and after, and the paired difference."""
    rows = []
    for c in contenders:
        for t in c.texts:
            change = t.perplexity_change
            rows.append(
                [t.name, c.name, f"perplexity, {t.tokens:,} tokens", fixed(t.perplexity_base), fixed(t.perplexity),
                 f"{percent(change.value, 2, sign=True)} ({span_text(change.low, change.high, 100, '+.2f')})",
                 f"{t.kl.value:.3g}", percent(t.top1_agreement.value, 2), fixed(t.lis_base), fixed(t.lis), fixed(t.lis_paper)]
            )  # fmt: skip
        for task in c.tasks:
            own = task.difference
            rows.append(
                [task.name, c.name, f"{task.metric.split(',')[0]}, {task.items:,} items", percent(task.score_base),
                 percent(task.score), f"{100 * own.value:+.1f} points ({span_text(own.low, own.high, 100, '+.1f')})", "-", "-",
                 fixed(task.lis_base), fixed(task.lis), fixed(task.lis_paper)]
            )  # fmt: skip
    heads = ["text or task", "model", "measure", "before", "after", "change (95 %)", "KL", "top-1"]
    return Table([*heads, "LIS before", "LIS", "LIS as the paper counts"], rows, 3)
