"""Plans side by side on the same batches, in and out of sample, with what each improves and what it worsens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise import __version__
from equipoise.artifacts import LayerPlan, ModelFacts, Plan, Profile
from equipoise.dispatch.choice import check_rule
from equipoise.errors import PlanError
from equipoise.planning.cost import CostModel
from equipoise.planning.cost_measured import GroupCost
from equipoise.planning.latency_tables import cost_model
from equipoise.simulation.draw import draw_batches
from equipoise.simulation.replay import replay, result
from equipoise.simulation.report import Part, PlanResult, Sample, SimulationReport
from equipoise.simulation.trace import Phase, Trace, batches_of

DEFAULT = "no plan"
"""How reports call the engines' own placement: expert after expert, evenly over the ranks, no copies."""
POOR_FIT = 0.2
"""Median error of a cost table's roofline from which the report warns."""
NOTABLE = 0.01
"""Relative change from which a finding speaks of it."""
Traffic = Profile | Trace


def simulate(
    source: Traffic | None,
    plans: Mapping[str, Plan],
    *,
    batch: int = 512,
    rule: str = "even",
    cost: str | CostModel = "tokens",
    seed: int = 0,
    held_out: Traffic | None = None,
    phase: Phase = "prefill",
    batches: int = 32,
    rule_options: Mapping[str, Any] | None = None,
    link_gbs: float | None = None,
) -> SimulationReport:
    """What plans are worth: the same batches through each, and through the engines' own placement.

    A `Trace` is replayed token by token. Of a `Profile` only counts are known: batches are drawn from them, and all that
    follows is an estimate.

    Args:
        source: the traffic that the plans were made from; None to look at other traffic alone.
        plans: by the name that the report calls them.
        batch: tokens of a batch, over all ranks.
        rule: which copy serves which token: a name in `choice.RULES`.
        cost: `tokens`, `activated`, the path of a table of measured latencies, or a cost model.
        seed: of the order of documents, of draws, and of what a rule leaves to chance.
        held_out: traffic that the plans were not made from.
        phase: batches of consecutive tokens (prefill), or of one token of each of many requests (decode).
        batches: most batches of each traffic.
        rule_options: of the rule.
        link_gbs: GB/s at which a rank receives weights that the dispatcher sends; None leaves their time out.

    Returns:
        The report: one part per traffic.

    Raises:
        EquipoiseError: unknown rule or option.
        PlanError: no plan, plans of different models, ranks or nodes, nothing to replay, a number out of range, or
            held-out traffic that a plan was made from.
        ProfileError: traffic of another model, or too little of it.
    """
    options = dict(rule_options or {})
    check_rule(rule, options)
    first = _check(plans, source, held_out)
    for label, number in (("batch", batch), ("batches", batches)):
        if isinstance(number, bool) or number < 1:
            raise PlanError(f"{label}: {number} given; allowed is a whole number from 1.")
    if phase not in ("prefill", "decode"):
        raise PlanError(f"phase: '{phase}' given; allowed are prefill and decode.")
    model = cost_model(cost, first.model) if isinstance(cost, str) else cost
    contenders = dict(plans)
    reference = next((name for name, plan in plans.items() if plan.method == "contiguous"), DEFAULT)
    if reference == DEFAULT:
        contenders = {DEFAULT: default_plan(first.model, first.units, first.nodes), **contenders}
    parts = []
    notes = _notes(rule, phase, model)
    for traffic, stated in ((source, "in"), (held_out, "out")):
        if traffic is None:
            continue
        drawn = isinstance(traffic, Profile)
        ids = _batches(traffic, batch, phase, batches, seed)
        results = []
        for name, plan in contenders.items():
            happened = replay(plan, ids, rule, options, seed)
            sample: Sample = "in" if stated == "in" and name in plans and not _elsewhere(plan, traffic) else "out"
            results.append(result(name, plan, happened, batch, model, sample, drawn=drawn, link_gbs=link_gbs))
        parts.append(
            Part(
                name=_name(traffic),
                origin="estimated" if drawn else "replayed",
                sample="in" if stated == "in" else "out",
                batches=len(ids[0]),
                tokens=len(ids[0]) * batch,
                results=tuple(results),
                findings=tuple(findings(results, reference, model.unit)),
            )
        )
    return SimulationReport(
        model=first.model.name,
        ranks=first.units,
        nodes=first.nodes,
        batch=batch,
        phase=phase,
        rule=rule,
        rule_options=options,
        cost=model.name,
        unit=model.unit,
        reference=reference,
        seed=seed,
        equipoise_version=__version__,
        parts=tuple(parts),
        notes=tuple(notes),
    )


def default_plan(model: ModelFacts, ranks: int, nodes: int = 1) -> Plan:
    """The engines' own placement: experts in order, evenly over the ranks, no copies."""
    layers = []
    for facts in model.layers:
        n = facts.num_experts
        layers.append(
            LayerPlan(
                experts=tuple(range(n)),
                precisions=(model.dtype,) * n,
                units=tuple(e * ranks // n for e in range(n)),
                shares=(1.0,) * n,
            )
        )
    return Plan(
        method="contiguous", model=model, units=ranks, nodes=nodes, unit_bytes=1, exactness="exact", layers=tuple(layers)
    )


def findings(results: Sequence[PlanResult], reference: str, unit: str) -> list[str]:
    """Sentences: what each plan improves and worsens against the reference, and where the rankings disagree."""
    base = next(r for r in results if r.name == reference)
    said = []
    for other in results:
        if other is base:
            continue
        better: list[str] = []
        worse: list[str] = []
        for label, now, before in _measures(other, base, unit):
            if before <= 0:
                if now > 0:
                    worse.append(f"{label} from none to {now:.3g}")
                continue
            change = now / before - 1
            if abs(change) >= NOTABLE:
                (better if change < 0 else worse).append(f"{label} {100 * change:+.1f} %")
        text = "; ".join(
            [*([f"better: {', '.join(better)}"] if better else []), *([f"WORSE: {', '.join(worse)}"] if worse else [])]
        )
        said.append(f"{other.name} against {base.name}: {text or 'no notable difference'}")
    by_tokens = min(results, key=lambda r: r.max_tokens.mean)
    by_activated = min(results, key=lambda r: r.max_activated.mean)
    if by_activated.max_activated.mean < by_tokens.max_activated.mean * (1 - NOTABLE):
        said.append(
            f"the fullest rank has fewest tokens under {by_tokens.name}, fewest activated replicas under {by_activated.name}: "
            "choose by what bounds the step (tokens in prefill, activated replicas in small decode batches)"
        )
    return said


def _measures(other: PlanResult, base: PlanResult, unit: str) -> list[tuple[str, float, float]]:
    rows = [
        ("tokens of the fullest rank", other.max_tokens.mean, base.max_tokens.mean),
        ("activated replicas of the fullest rank", other.max_activated.mean, base.max_activated.mean),
    ]
    if other.max_bytes and base.max_bytes:
        rows.append(("bytes read by the rank that reads most", other.max_bytes.mean, base.max_bytes.mean))
    if unit == "ms":
        rows.append(("step time", other.step.mean, base.step.mean))
    rows.append(("ranks a token is sent to", other.rank_sends, base.rank_sends))
    if base.node_sends > 0:
        rows.append(("nodes a token is sent to", other.node_sends, base.node_sends))
    if other.rank_hops is not None and base.rank_hops is not None:
        rows.append(("next experts on another rank", other.rank_hops, base.rank_hops))
    rows.append(("weights sent for a step", other.weights_moved, base.weights_moved))
    return rows


def _name(traffic: Traffic) -> str:
    if isinstance(traffic, Trace):
        return traffic.name
    names = traffic.source.scenarios
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _batches(traffic: Traffic, batch: int, phase: Phase, batches: int, seed: int) -> list[NDArray[np.integer[Any]]]:
    if isinstance(traffic, Profile):
        return list(draw_batches(traffic, batch, phase, batches, seed))
    return list(batches_of(traffic, batch, phase, batches, seed))


def _check(plans: Mapping[str, Plan], source: Traffic | None, held_out: Traffic | None) -> Plan:
    """The first plan, after all were found to be comparable with each other and with the traffic."""
    if not plans:
        raise PlanError("simulate needs at least one plan; give --plan FILE.")
    if source is None and held_out is None:
        raise PlanError("simulate needs traffic: give --profile, or a --trace of real tokens.")
    if DEFAULT in plans:
        raise PlanError(f"'{DEFAULT}' is how the report calls the engines' own placement; give that plan another name.")
    first = next(iter(plans.values()))
    for name, plan in plans.items():
        plan.check_model(first.model)
        plan.require_all_experts("simulated on the whole model's traffic")
        if (plan.units, plan.nodes) != (first.units, first.nodes):
            raise PlanError(
                f"plan '{name}' is for {plan.units} ranks on {plan.nodes} nodes, another for {first.units} on {first.nodes}; "
                "compare plans for the same machines."
            )
        for traffic in (source, held_out):
            if isinstance(traffic, Profile):
                plan.check_profile(traffic)
        if held_out is not None and _identity(held_out) and _identity(held_out) == plan.profile_sha256:
            raise PlanError(f"plan '{name}' was made from the very traffic that was given as held out; give other traffic.")
    for traffic in (source, held_out):
        if isinstance(traffic, Trace):
            traffic.check(first.model)
    if source is not None and held_out is not None and np.array_equal(_load(source, first.model), _load(held_out, first.model)):
        raise PlanError(
            "held-out traffic has the same counts as the traffic that the plans were made from; give other traffic."
        )
    return first


def _load(traffic: Traffic, model: ModelFacts) -> NDArray[np.int64]:
    """[L, E] selections."""
    if isinstance(traffic, Profile):
        return traffic.load
    return np.stack([np.bincount(ids.ravel(), minlength=model.max_experts) for ids in traffic.ids_LTK])


def _identity(traffic: Traffic) -> str:
    return traffic.source.text_sha256 if isinstance(traffic, Profile) else traffic.sha256


def _elsewhere(plan: Plan, traffic: Traffic) -> bool:
    """Whether a plan is known to be from another profile."""
    if not isinstance(traffic, Profile) or "" in (plan.profile_sha256, _identity(traffic)):
        return False
    return plan.profile_sha256 != _identity(traffic)


def _notes(rule: str, phase: Phase, cost: CostModel) -> list[str]:
    notes = [
        "replayed: from the experts that real tokens chose; estimated: from batches drawn from counts, in which tokens choose "
        "independently of each other, and in each layer anew",
        f"step: sum over layers of the slowest rank's time by the cost model '{cost.name}', in {cost.unit}; no GPU was run",
    ]
    if isinstance(cost, GroupCost) and cost.roofline.error > POOR_FIT:
        notes.append(
            f"the roofline fitted to that table is {100 * cost.roofline.error:.0f} % off in the median: differences of steps "
            "between plans are not to be trusted; go by tokens and activated replicas"
        )
    if phase == "prefill" and rule.startswith("metro"):
        notes.append("metro is made for decode: in prefill, sending all tokens of an expert to one copy gives up balance")
    if phase == "decode" and rule in ("quota", "llep"):
        notes.append(f"{rule} is made for prefill: in decode, sending weights costs more than the tokens that it moves")
    if phase == "decode" and cost.name == "tokens":
        notes.append("small decode batches are bound by reading weights: look at activated replicas, or use another cost model")
    return notes
