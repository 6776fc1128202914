"""The command to run next, decided from what a report has and what it shows."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from equipoise.artifacts import Plan, Profile
from equipoise.artifacts.evaluation import Contender
from equipoise.reporting.evidence import Evidence, is_placement, mean, raw_lis
from equipoise.reporting.findings import harm

BALANCED = 1.05
"""LIS below which there is little to win."""
HARM = 0.005
"""Loss of perplexity or of a task's score, as a fraction and beyond chance, above which a model does not hold up."""


@dataclass(frozen=True)
class NextStep:
    """A command line, and why it is the next."""

    command: str
    why: str


def next_step(evidence: Evidence) -> NextStep:
    """What to do next: record, plan, try, prove, mend, or put to use; words in capitals are for the reader to fill in."""
    profile = evidence.profile
    if profile is None:
        return NextStep(
            _command("profile", evidence.name, "--text", "FILE", "--out", "x.profile.safetensors"),
            "A profile tells where the tokens go, and so what a plan does to the load.",
        )
    if not evidence.plans:
        return _first_plan(evidence, profile)
    if evidence.evaluation is None:
        return _try_out(evidence)
    return _after_proof(evidence)


def _command(*words: str) -> str:
    return "equipoise " + " ".join(shlex.quote(word) for word in words)


def _file(evidence: Evidence, name: str, otherwise: str) -> str:
    return evidence.files.get(name, otherwise)


def _first_plan(evidence: Evidence, profile: Profile) -> NextStep:
    source = _file(evidence, "profile", "PROFILE")
    score = mean(raw_lis(profile.load, evidence.widths, profile.model.max_experts))
    if score < BALANCED:
        again = _command("profile", evidence.name, "--text", "FILE", "--out", "other.profile.safetensors")
        return NextStep(
            again, f"With an LIS of {score:.3f} there is little to win on this text; try the traffic that you serve."
        )
    if not profile.model.sized:
        return NextStep(
            _command("plan", source, "--ranks", "RANKS", "--out", "robust.plan.json"),
            "The records do not tell how large the experts are, so they can be placed on ranks, but not stored in fewer bits.",
        )
    return NextStep(
        _command("plan", source, "--out", "rq.plan.json"),
        f"With an LIS of {score:.2f}, copies in fewer bits pay; this decides which, within the same memory.",
    )


def _try_out(evidence: Evidence) -> NextStep:
    best = evidence.best_plan()
    assert best is not None, "only called with plans"
    name, plan = best
    if is_placement(plan):
        alike = [n for n, p in evidence.plans.items() if is_placement(p) and p.units == plan.units]
        given = [word for n in alike for word in ("--plan", f"{n}={_file(evidence, n, 'PLAN')}")]
        return NextStep(
            _command("simulate", *given, "--profile", _file(evidence, "profile", "PROFILE"), "--batch", "512"),
            "Balance of the whole text is not balance of a batch: this replays batches through the plans.",
        )
    return NextStep(
        _command("apply", plan.model.name, _file(evidence, name, "PLAN"), *_rounded(plan), "--out", f"{name}-model")
        + " && "
        + _command("evaluate", plan.model.name, f"{name}-model", "--text", "FILE", "--out", "x.eval.json"),
        f"What {name} does to perplexity and balance is predicted so far; apply it, and measure on held-out text.",
    )


def _after_proof(evidence: Evidence) -> NextStep:
    evaluation = evidence.evaluation
    assert evaluation is not None, "only called with an evaluation"
    judged = [c for c in evaluation.contenders if c.texts or c.tasks]
    fine = [c for c in judged if c.promise_kept is not False and harm(c) <= HARM]
    source = _file(evidence, "profile", "PROFILE")
    if judged and not fine:
        bound = _tighter_bound(evidence, judged)
        return NextStep(
            _command("plan", source, "--error-bound", f"{bound:.2g}", "--out", "gentler.plan.json"),
            "Every balanced model is worse than the base by more than chance; allow less error.",
        )
    if not judged:
        return _try_out(evidence)
    best = min(fine, key=lambda c: c.texts[-1].lis if c.texts else c.tasks[-1].lis)
    plan = evidence.plan_of(best.name, best.plan_method)
    names = [name for name, own in evidence.plans.items() if own is plan]
    if not evidence.frontier and names and plan is not None and not is_placement(plan):
        return NextStep(
            _command("frontier", source, "--json") + " > frontier.json",
            f"'{best.name}' holds up. This shows what other bytes and error bounds would buy; give the file to this report.",
        )
    there = evidence.models.get(best.name)
    directory = there or (f"{names[0]}-model" if names else best.name)
    file = _file(evidence, names[0] if names else "", "PLAN")
    write = _command("apply", evaluation.base, file, *_rounded(plan), "--out", directory)
    if not best.tasks:
        judged_on_tasks = _command("evaluate", evaluation.base, directory, "--task", "hellaswag", "--task", "arc_easy")
        return NextStep(
            judged_on_tasks if there else f"{write} && {judged_on_tasks}",
            f"'{best.name}' holds up on text; tasks tell whether it does on what the model is used for.",
        )
    judge = "text and tasks" if best.texts else "tasks"
    if there:
        return NextStep(
            _command("inspect", f"{directory}/equipoise.plan.json"),
            f"'{best.name}' holds up on {judge}. `from_pretrained('{directory}')` loads it once equipoise is imported; this "
            "prints what it holds.",
        )
    return NextStep(write, f"'{best.name}' holds up on {judge}; this writes the model that `from_pretrained` loads.")


def _rounded(plan: Plan | None) -> tuple[str, ...]:
    """Rounding on text, as `balance` does it; the published form is rounded to nearest, and a placement rounds nothing."""
    return () if plan is None or plan.method == "rq-paper" or is_placement(plan) else ("--method", "agq", "--text", "FILE")


def _tighter_bound(evidence: Evidence, judged: list[Contender]) -> float:
    """Half the predicted error of the least harmful model; 0.01 where no error was predicted."""
    gentlest = min(judged, key=harm)
    plan = evidence.plan_of(gentlest.name, gentlest.plan_method)
    error = None if plan is None or plan.predicted is None else plan.predicted.output_error
    return error / 2 if error else 0.01
