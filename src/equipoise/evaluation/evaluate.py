"""One run that proves what balancing did: quality and balance of several balanced models beside their base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import equipoise
from equipoise.artifacts.evaluation import Contender, Evaluation, TaskResult, TextResult
from equipoise.artifacts.plan import Plan
from equipoise.errors import EquipoiseError, ModelError, PlanError
from equipoise.evaluation import language
from equipoise.evaluation.balance import Balance, measure
from equipoise.evaluation.permutation import batch_order_kl
from equipoise.evaluation.statistics import paired_difference
from equipoise.evaluation.tasks import ItemScores, LoadedTask, load_tasks, run_task
from equipoise.execution.apply import expert_bytes
from equipoise.execution.hf_quantizer import plan_of
from equipoise.models.layers import model_facts
from equipoise.models.policy_marks import policy_of
from equipoise.profiling.forward import evaluation_mode
from equipoise.profiling.progress import ProgressBar
from equipoise.profiling.sequences import Rows

ALL_TEXTS = "all texts"
"""Name under which several texts are reported together."""
NO_PLAN = "none"
"""`plan_method` and `exactness` of a contender that was not balanced by a plan."""
EXACT_KL = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 1e-2}
"""Mean KL in nats up to which an `exact` plan's predictions count as unchanged: room for another order of summation."""


@dataclass
class _Entrant:
    """A model under evaluation, and what was found so far."""

    name: str
    model: Any
    plan: Plan | None
    texts: list[TextResult] = field(default_factory=list)
    tasks: list[TaskResult] = field(default_factory=list)
    batch_order_kl: float | None = None
    seconds: float = 0.0


def evaluate(
    base: Any,
    contenders: Mapping[str, Any],
    tokenizer: Any,
    *,
    texts: Mapping[str, Sequence[str]] | None = None,
    tasks: Sequence[str | LoadedTask] = (),
    task_dir: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int = 0,
    batch_size: int = 4,
    seq_len: int = 512,
    tokens: int | None = None,
    seed: int = 0,
    units: int | None = None,
    base_name: str | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measure balanced models against their base on the same text and the same items, in one run.

    Args:
        base: the model as it was, with an LM head.
        contenders: name -> balanced model (or any model of the same vocabulary).
        tokenizer: of the base.
        texts: name -> documents, for perplexity, KL divergence and top-1 agreement; text that the plan was made from proves
            little.
        tasks: names of lm-eval tasks, see `tasks.LOCAL_TASKS`; or what `tasks.load_tasks` made of them.
        task_dir: directory with the tasks' rows as local files; None reads them from the hub or its cache.
        limit: items of each task, None for all.
        num_fewshot: worked examples before each item.
        batch_size: sequences of one forward pass; the results do not depend on it beyond float summation order.
        seq_len: tokens of a sequence of text.
        tokens: tokens of each text at most, None for all.
        seed: of the choice of few-shot examples.
        units: parallel units U over which balance is scored; by default those of the contenders' plans, else the number of
            experts.
        base_name: how the base is called in the result; its own name or path by default.
        progress: show a progress bar on stderr.

    Returns:
        Every contender's results, with paired 95 % intervals (see `statistics`).

    Raises:
        EquipoiseError: nothing to evaluate, an unknown task, a missing file, contradicting units.
        PlanError: a contender was made for another model.
        ModelError: no MoE layers, or weights that are not numbers.
        TextError: a text too short to predict anything or to state an interval.
    """
    texts = texts or {}
    if not contenders:
        raise EquipoiseError("there is no balanced model to compare with the base; give at least one.")
    if not texts and not tasks:
        raise EquipoiseError("there is nothing to evaluate on; give --text, --scenario or --task, or several of them.")
    if batch_size < 1:
        raise EquipoiseError(f"a batch of {batch_size} sequences is none; --batch-size must be at least 1.")
    entrants = [_Entrant(name, model, plan_of(model)) for name, model in contenders.items()]
    reference = _Entrant("base", base, None)
    if policy_of(base) is not None:
        raise ModelError("the base runs under a routing policy; take that off first (detach_policy), or load it again.")
    if plan_of(base) is not None:
        raise ModelError("the base is itself a balanced model; give the model it was made from as the base.")
    facts = model_facts(base, base_name or getattr(base.config, "_name_or_path", "") or type(base).__name__)
    for entrant in entrants:
        if entrant.plan is not None:
            entrant.plan.check_model(facts)
    units = _units(entrants, units, facts.max_experts)

    # Everything a user can have got wrong shows here, before hours of forward passes.
    cut = {
        name: language.cut(tokenizer, base.config, documents, name=name, seq_len=seq_len, tokens=tokens, seed=seed)
        for name, documents in texts.items()
    }
    directory = None if task_dir is None else Path(task_dir)
    loaded = load_tasks(tasks, task_dir=directory, limit=limit, num_fewshot=num_fewshot)

    with evaluation_mode(base, *contenders.values()), ProgressBar(progress) as bar:
        found = [_run_text(rows, reference, entrants, units, batch_size, bar) for rows in cut.values()]
        for text in [*found, _together(found)] if len(found) > 1 else found:
            _report_text(text, entrants)
        for entrant in entrants:
            if policy_of(entrant.model) is not None and cut:
                entrant.batch_order_kl = batch_order_kl(entrant.model, next(iter(cut.values())), batch_size, seed)
        for task in loaded:
            _run_task(
                task, reference, entrants, units, bar,
                tokenizer=tokenizer, batch_size=batch_size, limit=limit, num_fewshot=num_fewshot, seed=seed,
            )  # fmt: skip
    return Evaluation(
        base=facts.name,
        base_fingerprint=facts.fingerprint,
        base_expert_bytes=expert_bytes(base),
        base_seconds=reference.seconds,
        units=units,
        options={
            "texts": {name: len(documents) for name, documents in texts.items()},
            "tasks": [task.name for task in loaded],
            "task_dir": str(directory) if directory else None,
            "limit": limit,
            "num_fewshot": num_fewshot,
            "batch_size": batch_size,
            "seq_len": seq_len,
            "tokens": tokens,
            "seed": seed,
        },
        equipoise_version=equipoise.__version__,
        contenders=tuple(_contender(entrant, EXACT_KL[facts.dtype]) for entrant in entrants),
    )


def _contender(entrant: _Entrant, exact_kl: float) -> Contender:
    plan = entrant.plan
    exact = plan is not None and plan.exactness == "exact" and bool(entrant.texts)
    return Contender(
        name=entrant.name,
        plan_method=plan.method if plan else NO_PLAN,
        exactness=plan.exactness if plan else NO_PLAN if policy_of(entrant.model) is None else "routing",
        promise_kept=all(text.kl.value <= exact_kl for text in entrant.texts) if exact else None,
        expert_bytes=expert_bytes(entrant.model),
        texts=tuple(entrant.texts),
        tasks=tuple(entrant.tasks),
        batch_order_kl=entrant.batch_order_kl,
        seconds=entrant.seconds,
    )


def _units(entrants: list[_Entrant], given: int | None, num_experts: int) -> int:
    planned = {entrant.plan.units for entrant in entrants if entrant.plan is not None}
    if len(planned) > 1:
        raise PlanError(f"the plans have different numbers of units ({sorted(planned)}); evaluate them one by one.")
    units = given if given is not None else next(iter(planned), num_experts)
    if planned and units not in planned:
        raise PlanError(f"balance over {units} units was asked for, but the plans have {planned.pop()}; leave --units out.")
    if units < 1:
        raise EquipoiseError(f"balance over {units} units has no meaning; give at least 1.")
    return units


@dataclass(frozen=True)
class _TextRun:
    """One text, or all together: balance of the base and of each entrant, sums of each entrant, document of each row."""

    name: str
    balances: list[Balance]
    sums: list[language.Sums]
    documents: list[int]


def _run_text(rows: Rows, base: _Entrant, entrants: list[_Entrant], units: int, batch_size: int, bar: ProgressBar) -> _TextRun:
    by_name = {entrant.name: entrant for entrant in entrants}
    bar.stage(f"text {rows.scenario}", -(-len(rows.content) // batch_size) * (1 + len(entrants)), "passes")

    def spent(name: str | None, seconds: float) -> None:
        bar.advance(1)
        (base if name is None else by_name[name]).seconds += seconds

    with ExitStack() as stack:
        balances: list[Balance] = [stack.enter_context(measure(e.model, e.plan, units)) for e in (base, *entrants)]
        models = {name: entrant.model for name, entrant in by_name.items()}
        sums = language.compare(base.model, models, rows, batch_size=batch_size, spent=spent)
    return _TextRun(rows.scenario, balances, [sums[entrant.name] for entrant in entrants], list(rows.documents))


def _together(texts: list[_TextRun]) -> _TextRun:
    """All texts as one: their documents stay apart, their loads add up."""
    balances = [Balance.pooled(parts) for parts in zip(*(text.balances for text in texts), strict=True)]
    sums = [language.Sums.joined(parts) for parts in zip(*(text.sums for text in texts), strict=True)]
    documents: list[int] = []
    for text in texts:
        first = max(documents, default=-1) + 1
        documents += [first + document for document in text.documents]
    return _TextRun(ALL_TEXTS, balances, sums, documents)


def _report_text(text: _TextRun, entrants: list[_Entrant]) -> None:
    for entrant, sums, balance in zip(entrants, text.sums, text.balances[1:], strict=True):
        found = language.summarise(sums, text.documents)
        entrant.texts.append(
            TextResult(
                name=text.name,
                tokens=found.tokens,
                perplexity_base=found.perplexity_base,
                perplexity=found.perplexity,
                perplexity_change=found.perplexity_change,
                kl=found.kl,
                top1_agreement=found.top1_agreement,
                lis_base=text.balances[0].lis,
                lis=balance.lis,
                lis_paper=balance.lis_paper,
            )
        )


def _run_task(task: LoadedTask, base: _Entrant, entrants: list[_Entrant], units: int, bar: ProgressBar, **options: Any) -> None:
    def run(entrant: _Entrant) -> tuple[ItemScores, Balance]:
        bar.stage(f"task {task.name} ({entrant.name})", 0, "requests")
        done = 0

        def advance(count: int, total: int) -> None:
            nonlocal done
            done += count
            bar.set(done, total)

        start = perf_counter()
        with measure(entrant.model, entrant.plan, units) as balance:
            scores = run_task(task, entrant.model, advance=advance, **options)
        entrant.seconds += perf_counter() - start
        return scores, balance

    base_scores, base_balance = run(base)
    for entrant in entrants:
        scores, balance = run(entrant)
        assert scores.items == base_scores.items, "both models must have answered the same items in the same order"
        entrant.tasks.append(
            TaskResult(
                name=task.name,
                metric=scores.metric,
                items=scores.scores.size,
                score_base=float(base_scores.scores.mean()),
                score=float(scores.scores.mean()),
                difference=paired_difference(base_scores.scores, scores.scores),
                lis_base=base_balance.lis,
                lis=balance.lis,
                lis_paper=balance.lis_paper,
            )
        )
