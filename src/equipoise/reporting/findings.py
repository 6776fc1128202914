"""What matters most in a report, in plain language and computed from its values.

Every candidate has a weight: an urgency (3: the result cannot be relied on; 2: the size of the problem and of what was done;
1: worth knowing) plus a magnitude between 0 and 1. The three heaviest are shown, one a topic.

Shapes: S scenarios, L MoE layers, E logical experts of the widest layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from equipoise.artifacts import Plan, Profile
from equipoise.artifacts.evaluation import Contender
from equipoise.reporting.charts import Origin
from equipoise.reporting.evidence import Evidence, is_placement, mean, raw_lis
from equipoise.reporting.figures_importance import rank_correlation_L
from equipoise.reporting.figures_load import busiest_scenarios, drift_LSS, mean_drift
from equipoise.reporting.figures_quality import colour_of
from equipoise.reporting.numbers import bytes_text, fixed, listed, percent

CANNOT_RELY, SIZE, WORTH_KNOWING = 3.0, 2.0, 1.0
FEW = 0.01
"""Part of the experts that must be unused to be worth a sentence."""
WORSE_PERPLEXITY = 0.01
"""Relative loss of perplexity that counts as a harm of full magnitude."""


TOPICS = (
    "promise", "chance", "imbalance", "concentration", "unused", "importance", "drift", "plan", "worse", "traffic", "quality",
    "memory",
)  # fmt: skip
"""Topics in the order in which a reader wants them."""


@dataclass(frozen=True)
class Finding:
    """One sentence or two on one topic, where its figures come from, the figure that shows it, and its weight."""

    topic: str
    text: str
    origins: tuple[Origin, ...]
    figure: str
    weight: float


def findings(evidence: Evidence, most: int = 3) -> list[Finding]:
    """The findings that weigh most, one a topic: what cannot be relied on, then the problem, the remedy and its price.

    Args:
        evidence: the values of the report.
        most: how many.
    """
    ranked = sorted(candidates(evidence), key=lambda f: -f.weight)
    heaviest = {f.topic: f for f in reversed(ranked)}  # the last to be entered of a topic is its heaviest
    chosen = [f for f in ranked if heaviest[f.topic] is f][:most]
    return sorted(chosen, key=lambda f: (f.weight < CANNOT_RELY, TOPICS.index(f.topic)))


def candidates(evidence: Evidence) -> Iterator[Finding]:
    """Every finding that the values bear out, in no order."""
    profile = evidence.profile
    if profile is not None and profile.load.any():
        yield imbalance(evidence, profile)
        yield from chance(evidence, profile)
        yield concentration(evidence, profile)
        yield from unused(evidence, profile)
        yield from importance(profile)
        yield from drift(evidence, profile)
        yield from relief(evidence, profile)
    best = evidence.best_plan()
    if best is not None:
        if profile is not None:
            yield from other_traffic(evidence, profile, *best)
        yield from memory(*best)
    if evidence.evaluation is not None:
        yield from quality(evidence, evidence.evaluation.contenders)
        for contender in evidence.evaluation.contenders:
            yield from promise(contender)


def _units(evidence: Evidence, profile: Profile) -> int:
    return next((plan.units for plan in evidence.plans.values()), profile.model.max_experts)


def imbalance(evidence: Evidence, profile: Profile) -> Finding:
    """How long the mean unit waits for the busiest, and the worst layer with its busiest expert."""
    units = _units(evidence, profile)
    score_L = raw_lis(profile.load, evidence.widths, units)
    worst = int(np.nanargmax(score_L))
    average = mean(score_L)
    own = profile.load[worst, : evidence.widths[worst]]
    busiest = int(own.argmax())
    text = (
        f"As it is, the busiest of {units} units serves {average:.2f} times the mean load (LIS, mean over layers): while it "
        f"works, the mean unit is idle {percent(1 - 1 / average, 0)} of the time. Worst is layer "
        f"{evidence.layer_labels[worst]} (LIS {score_L[worst]:.2f}); its expert {busiest} takes "
        f"{percent(own[busiest] / own.sum())} of the selections, where an even share is {percent(1 / len(own))}."
    )
    return Finding("imbalance", text, ("measured",), "load", SIZE + (1 - 1 / average) * 0.9)


def chance(evidence: Evidence, profile: Profile) -> Iterator[Finding]:
    """A text so short that a perfectly even router would look uneven.

    The largest of E independent counts of mean m stands about sqrt(2 ln E / m) above it, so that is the least excess that
    chance explains; tokens of one text are not independent, so it is more.
    """
    load_L, width_L = profile.load.sum(1), evidence.widths
    served = load_L > 0
    if not served.any():
        return
    noise = np.sqrt(2 * np.log(np.maximum(width_L, 2)) * width_L / np.maximum(load_L, 1))[served]
    excess = raw_lis(profile.load, width_L, profile.model.max_experts)[served] - 1
    part = float(np.median(noise) / max(float(np.median(excess)), 1e-9))
    if part > 0.25 and np.median(noise) > 0.05:
        text = (
            f"The text is short: with {int(np.median(load_L[served])):,} selections a layer, an even router would show an LIS "
            f"of about {1 + float(np.median(noise)):.2f} by chance, and {1 + float(np.median(excess)):.2f} was measured "
            "(medians over layers). Record more tokens."
        )
        yield Finding("chance", text, ("measured",), "load", CANNOT_RELY + min(part, 1.0))


def concentration(evidence: Evidence, profile: Profile) -> Finding:
    """How few experts serve half of the tokens, in the median layer."""
    served = [(load[:n], int(n)) for load, n in zip(profile.load, evidence.widths, strict=True) if load.any()]
    needed = [int(np.searchsorted(np.cumsum(np.sort(own)[::-1]), own.sum() / 2) + 1) for own, _ in served]
    k, n = int(np.median(needed)), int(np.median([n for _, n in served]))
    text = f"Half of all selections go to {k} of {n} experts (median layer); an even router would need {-(-n // 2)}."
    return Finding("concentration", text, ("measured",), "load", WORTH_KNOWING + max(0.0, 1 - 2 * k / n) * 0.5)


def unused(evidence: Evidence, profile: Profile) -> Iterator[Finding]:
    """Experts that no token chose."""
    load, width = profile.load, evidence.widths
    idle = np.array([(load[i, :n] == 0).sum() if load[i].any() else 0 for i, n in enumerate(width)])
    part = idle.sum() / width.sum()
    if part >= FEW:
        text = (
            f"{int(idle.sum()):,} of {int(width.sum()):,} experts ({percent(part)}) served no token; layer "
            f"{evidence.layer_labels[int(idle.argmax())]} has most of them ({int(idle.max())} of {int(width[idle.argmax()])})."
        )
        yield Finding("unused", text, ("measured",), "load", WORTH_KNOWING + float(part))


def importance(profile: Profile) -> Iterator[Finding]:
    """How importance goes with load, by the estimator whose correlation with it is the weakest."""
    correlation = {name: mean(rank_correlation_L(profile, name)) for name in sorted(profile.importance) if name != "frequency"}
    known = {name: value for name, value in correlation.items() if np.isfinite(value)}
    if not known:
        return
    name = min(known, key=lambda n: abs(known[n]))
    value = known[name]
    meaning = (
        "busy experts are not the important ones, so bits must not follow the load alone"
        if abs(value) < 0.5
        else "busy experts are also the important ones"
        if (value > 0) != (name == "wanda")
        else "busy experts are the less important ones"
    )
    text = f"Load and importance by {name} have a rank correlation of {value:+.2f} (mean over layers): {meaning}."
    yield Finding("importance", text, ("measured",), "importance", WORTH_KNOWING + 0.5 * (1 - abs(value)))


def drift(evidence: Evidence, profile: Profile) -> Iterator[Finding]:
    """The two scenarios that are furthest apart, against what halves of one scenario differ by."""
    if len(profile.source.scenarios) < 2:
        return
    chosen = busiest_scenarios(profile)
    average = mean_drift(drift_LSS(profile, chosen))
    pairs = [(i, j) for i in range(len(chosen)) for j in range(i) if np.isfinite(average[i, j])]
    if not pairs:
        return
    i, j = max(pairs, key=lambda pair: float(average[pair]))
    floor = mean(np.diagonal(average)[[i, j]])
    names = [profile.source.scenarios[chosen[k]] for k in (j, i)]
    against = f", where two halves of the same traffic differ by {floor:.3f}" if np.isfinite(floor) else ""
    real = float(average[i, j]) - (floor if np.isfinite(floor) else 0.0)
    advice = "plan from all traffic that is served" if real > 0.02 else "one plan serves both"
    text = (
        f"'{names[0]}' and '{names[1]}' are the furthest apart: their loads differ by {average[i, j]:.3f} bits "
        f"(Jensen-Shannon, 0 is the same, 1 disjoint){against}; {advice}."
    )
    yield Finding("drift", text, ("measured",), "drift", WORTH_KNOWING + min(max(real, 0.0) / 0.2, 1.0))


def relief(evidence: Evidence, profile: Profile) -> Iterator[Finding]:
    """What the best plan does to the imbalance, predicted on the profile and measured where an evaluation tells; the others."""
    best = evidence.best_plan()
    if best is None:
        return
    name, plan = best
    before, after = mean(raw_lis(profile.load, evidence.widths, plan.units)), mean(plan.lis(profile.load))
    gone = (before - after) / (before - 1) if before > 1 else 0.0
    if gone < 0:
        text = f"Plan {name} makes the load less even: LIS {before:.3f} to {after:.3f}, predicted on this profile."
        yield Finding("worse", text, ("predicted",), "lis", CANNOT_RELY + min(-gone, 1.0))
        return
    text = (
        f"Plan {name} removes {percent(gone, 0)} of the imbalance: LIS {before:.3f} to {after:.3f}, predicted on this profile."
    )
    origins: tuple[Origin, ...] = ("predicted",)
    measured = _measured_balance(evidence, plan)
    if measured:
        text += f" Measured on held-out text: {measured[0]:.3f} to {measured[1]:.3f}."
        origins = ("predicted", "measured")
    forecast = _held_out(plan)
    if forecast is not None:
        text += f" On scenarios held out it is expected at {forecast:.3f}."
    if plan.predicted is not None and not is_placement(plan) and after - plan.predicted.lower_bound > 0.02:
        text += f" Its proven lower bound within its bytes and error is {plan.predicted.lower_bound:.3f}."
    others = [_in_brief(evidence, profile, n, p, plan.units) for n, p in evidence.plans.items() if p is not plan]
    if others:
        text += f" Beside it: {listed(others)}."
    yield Finding("plan", text, origins, "lis", SIZE + min(gone, 1.0))


def _in_brief(evidence: Evidence, profile: Profile, name: str, plan: Plan, units: int) -> str:
    """Another plan's LIS, with its units where they are others, and whether no plan at all is better."""
    before, after = mean(raw_lis(profile.load, evidence.widths, plan.units)), mean(plan.lis(profile.load))
    told = f"{name} {after:.3f}" + (f" of {plan.units} units" if plan.units != units else "")
    return told + (" (less even than as it is)" if after > before else "")


def _measured_balance(evidence: Evidence, plan: Plan) -> tuple[float, float] | None:
    """LIS before and after on the evaluation's last text, which is all of them together."""
    for contender in evidence.evaluation.contenders if evidence.evaluation is not None else ():
        if evidence.plan_of(contender.name, contender.plan_method) is plan and contender.texts:
            return contender.texts[-1].lis_base, contender.texts[-1].lis
    return None


def _held_out(plan: Plan) -> float | None:
    """Mean of a placement's forecast on scenarios held out; None when it was not cross-validated."""
    known = (
        [x.out_of_sample for x in plan.predicted.layers if x.out_of_sample is not None] if plan.predicted is not None else []
    )
    return sum(known) / len(known) if known else None


def other_traffic(evidence: Evidence, profile: Profile, name: str, plan: Plan) -> Iterator[Finding]:
    """The scenario on which a plan balances worst, where that is much worse than on all traffic together."""
    if len(profile.source.scenarios) < 2:
        return
    scores = {profile.source.scenarios[s]: mean(plan.lis(profile.scenario_load[s])) for s in range(len(profile.scenario_load))}
    known = {scenario: score for scenario, score in scores.items() if np.isfinite(score)}
    together = mean(plan.lis(profile.load))
    if not known:
        return
    worst = max(known, key=lambda scenario: known[scenario])
    raw = mean(raw_lis(profile.scenario_load[profile.source.scenarios.index(worst)], evidence.widths, plan.units))
    loss = (known[worst] - together) / max(raw - 1, 1e-9)
    if loss > 0.1:
        text = (
            f"Plan {name} balances all traffic together to {together:.3f}, but '{worst}' by itself only to {known[worst]:.3f} "
            f"(as it is: {raw:.3f}). Where traffic comes in such stretches, plan for it or dispatch to the least loaded copy."
        )
        yield Finding("traffic", text, ("predicted",), "drift", SIZE + min(loss, 1.0) * 0.5)


def memory(name: str, plan: Plan) -> Iterator[Finding]:
    """Bytes of a plan against what its units hold."""
    predicted = plan.predicted
    if plan.exactness == "exact" or predicted is None or not plan.model.sized:
        return
    if predicted.overrun_bytes > 0:
        over = predicted.overrun_bytes / plan.unit_bytes
        text = (
            f"Plan {name} does not fit: its fullest unit exceeds its share of the memory by "
            f"{bytes_text(predicted.overrun_bytes)} ({percent(over)})."
        )
        yield Finding(
            "memory", text, ("predicted",), "memory", (CANNOT_RELY if over > 0.02 else WORTH_KNOWING) + min(over, 1.0)
        )
        return
    part = predicted.bytes / predicted.budget_bytes
    text = f"Plan {name} needs {bytes_text(predicted.bytes)} for the experts, {percent(part)} of what its units hold."
    yield Finding("memory", text, ("predicted",), "memory", WORTH_KNOWING + min(max(1 - part, 0.0), 1.0))


def quality(evidence: Evidence, contenders: Sequence[Contender]) -> Iterator[Finding]:
    """What balancing cost: of the best plan's model where it was judged, and briefly of the others."""
    judged = [c for c in contenders if c.texts or c.tasks]
    if not judged:
        return
    best = evidence.best_plan()
    of_best = [c for c in judged if best is not None and evidence.plan_of(c.name, c.plan_method) is best[1]]
    first = of_best[0] if of_best else min(judged, key=harm)
    sentences = []
    if first.texts:
        result = first.texts[-1]
        sentences.append(
            f"'{first.name}' changes perplexity by {_change(first)} on {result.tokens:,} held-out tokens, {_meaning(first)}; "
            f"its first choice stays the same for {percent(result.top1_agreement.value)} of the tokens."
        )
    if first.tasks:
        worse = [f"{t.name} ({100 * t.difference.value:+.1f} points)" for t in first.tasks if t.difference.high < 0]
        told = (
            f"scores lower by more than chance on {listed(worse)}" if worse else "scores lower by more than chance on no task"
        )
        sentences.append(f"'{first.name}' {told}.")
    others = [f"'{c.name}' {_change(c)}, {_meaning(c)}" for c in judged if c is not first and c.texts]
    if others:
        sentences.append(f"Beside it: {'; '.join(others[:3])}.")
    magnitude = min(max(harm(first), 0.0) / WORSE_PERPLEXITY, 1.0)
    weight = (CANNOT_RELY if magnitude >= 1 else SIZE + 0.6) + 0.3 * magnitude
    yield Finding("quality", " ".join(sentences), ("measured",), "quality", weight)


def harm(contender: Contender) -> float:
    """What is certainly lost: the low end of the change of perplexity, or of the largest loss on a task, as fractions."""
    losses = [-task.difference.high for task in contender.tasks]
    return max([contender.texts[-1].perplexity_change.low] * bool(contender.texts) + losses)


def _change(contender: Contender) -> str:
    change = contender.texts[-1].perplexity_change
    return f"{percent(change.value, 2, sign=True)} (95 % interval {100 * change.low:+.2f} to {100 * change.high:+.2f})"


def _meaning(contender: Contender) -> str:
    change = contender.texts[-1].perplexity_change
    if change.low > 0:
        return "worse by more than chance"
    return "better by more than chance" if change.high < 0 else "not told apart from no change"


def promise(contender: Contender) -> Iterator[Finding]:
    """A promise of equal predictions that was broken."""
    if contender.promise_kept is False:
        text = f"'{contender.name}' promised the same predictions (class exact) and did not keep it. Do not serve it."
        yield Finding("promise", text, ("measured",), "quality", CANNOT_RELY + 1.0)


def summary_numbers(evidence: Evidence) -> list[tuple[str, str, Origin]]:
    """The few figures at the head of a report: name, value, origin."""
    out: list[tuple[str, str, Origin]] = []
    profile = evidence.profile
    if profile is not None:
        out.append(("tokens recorded", f"{int(profile.tokens.sum()):,}", "measured"))
        counts = sorted({plan.units for plan in evidence.plans.values()}) or [profile.model.max_experts]
        for units in counts:
            label = "LIS as it is" if len(counts) == 1 else f"LIS as it is, {units} units"
            out.append((label, fixed(mean(raw_lis(profile.load, evidence.widths, units)), 2), "measured"))
        out += [(f"LIS {name}", fixed(mean(plan.lis(profile.load)), 2), "predicted") for name, plan in evidence.plans.items()]
    if evidence.evaluation is not None:
        base = max(evidence.evaluation.base_expert_bytes, 1)
        for c in sorted(evidence.evaluation.contenders, key=lambda c: colour_of(evidence, c)):
            if c.texts:
                out.append((f"perplexity {c.name}", percent(c.texts[-1].perplexity_change.value, 2, sign=True), "measured"))
            out.append((f"bytes {c.name}", percent(c.expert_bytes / base), "measured"))
    return out
