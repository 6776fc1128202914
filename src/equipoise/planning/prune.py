"""Which experts a domain needs: the same number in every layer, the rest left out.

A plan of this kind is carried out by `execution.prune`, which writes a smaller model; its class is `capacity`.
Shapes: D domains, L MoE layers, E logical experts of the widest layer, G groups of group-limited routing, M experts kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from equipoise import __version__
from equipoise.artifacts import LayerPlan, ModelFacts, Plan, Profile
from equipoise.errors import PlanError
from equipoise.planning.prune_scores import PRUNING

Floats = NDArray[np.float64]
METHOD = "prune"


def prune(
    profile: Profile,
    *,
    units: int,
    seed: int,
    score: str = "easy-ep",
    keep: float = 0.5,
    domains: Sequence[str] | None = None,
) -> Plan:
    """Keep each layer's experts of the highest score.

    Several domains are mixed as EASY-EP does: each domain's scores of a layer are divided by their sum, then added.
    Where routing is limited to groups of experts, every group keeps as many, so that the router finds groups of equal size.

    Args:
        profile: measured on demonstrations of the domain; its scenarios are the domains.
        units: not used: a plan of this kind has a unit for each expert kept.
        seed: of the score "random".
        score: a name in `prune_scores.PRUNING`.
        keep: part of each layer's experts to keep.
        domains: scenarios of the profile to prune for; all of them when omitted.

    Returns:
        A plan of class `capacity` with one slot for each expert kept (of class `exact` if all are).

    Raises:
        EquipoiseError: unknown score.
        PlanError: a number or a domain out of range, a score that was not measured, another routing policy, or fewer experts
            than a token needs.
    """
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep <= 1:
        raise PlanError(f"keep: {keep!r} given; allowed is a part of the experts above 0, at most 1, such as 0.5.")
    if profile.source.routing_policy != "native":
        raise PlanError(
            f"this profile was made under the routing policy '{profile.source.routing_policy}', which a pruned stock model "
            "does not carry out; profile without --policy."
        )
    chosen = _domains(profile, domains)
    kept_LE = keep_experts(mixed(PRUNING.get(score)(profile, chosen, seed)), profile.model, keep)
    units = max(len(kept) for kept in kept_LE)
    layers = tuple(
        LayerPlan(
            experts=tuple(kept),
            precisions=(profile.model.dtype,) * len(kept),
            units=tuple(place * units // len(kept) for place in range(len(kept))),
            shares=(1.0,) * len(kept),
        )
        for kept in kept_LE
    )
    whole = all(len(kept) == facts.num_experts for kept, facts in zip(kept_LE, profile.model.layers, strict=True))
    plan = Plan(
        method=METHOD,
        options={"score": score, "keep": keep, "domains": list(chosen)},
        seed=seed,
        equipoise_version=__version__,
        profile_sha256=profile.source.text_sha256,
        routing_policy=profile.source.routing_policy,
        model=profile.model,
        units=units,
        unit_bytes=1,
        exactness="exact" if whole else "capacity",
        kept=tuple(tuple(kept) for kept in kept_LE),
        layers=layers,
    )
    return plan.model_copy(update={"unit_bytes": max(1, int(plan.bytes_by_unit().max()))}) if plan.model.sized else plan


def mixed(score_DLE: Floats) -> Floats:
    """[L, E] one score of several domains: each domain's divided by its layer's sum, then added (EASY-EP, mixed domains).

    A single domain's scores are returned as they are; a domain in which a layer served nothing has no say in that layer.
    """
    if len(score_DLE) == 1:
        return np.asarray(score_DLE[0])
    total = score_DLE.sum(-1, keepdims=True)
    return np.asarray(np.divide(score_DLE, total, out=np.zeros_like(score_DLE), where=total > 0).sum(0))


def keep_experts(score_LE: Floats, model: ModelFacts, keep: float) -> list[list[int]]:
    """The experts that each layer keeps, in rising order.

    Args:
        score_LE: [L, E] what an expert is worth; equal ones are kept in order of their ids.
        model: its layers' widths, and the groups G of its routing.
        keep: part of each layer's experts, rounded to whole experts of every group.

    Raises:
        PlanError: a token could not be sent to as many experts as its layer wants, or groups would be too small.
    """
    kept_LE = []
    for layer, (score_E, facts) in enumerate(zip(score_LE, model.layers, strict=True)):
        groups = model.expert_groups if facts.num_experts % model.expert_groups == 0 else 1
        each = max(1, int(keep * facts.num_experts / groups + 0.5))
        if each * groups < facts.top_k:
            raise PlanError(
                f"keep: {keep} leaves {each * groups} of {facts.num_experts} experts in layer {layer}, and a token is sent to "
                f"{facts.top_k}; keep at least {facts.top_k / facts.num_experts:.3g}."
            )
        if 1 < groups < facts.num_experts and each < 2:
            # The routers of this kind rank a group by its two best experts.
            raise PlanError(
                f"keep: {keep} leaves one expert in each of the {groups} groups of layer {layer}, and groups are ranked by "
                f"two; keep at least {2 * groups / facts.num_experts:.3g}."
            )
        score_GE = score_E[: facts.num_experts].reshape(groups, -1)
        best_GM = np.argsort(-score_GE, axis=1, kind="stable")[:, :each]
        first_G1 = np.arange(groups)[:, None] * score_GE.shape[1]
        kept_LE.append(sorted(int(e) for e in (best_GM + first_G1).reshape(-1)))
    return kept_LE


def score_kept(profile: Profile, plan: Plan) -> Floats:
    """[L] part of each layer's score, by which the plan was made, that the experts kept hold; negative scores count as none.

    Args:
        profile: that the plan was made from.
        plan: made by `prune`.
    """
    assert plan.kept is not None, "a plan of this method keeps experts"
    score_DLE = PRUNING.get(plan.options["score"])(profile, plan.options["domains"], plan.seed)
    score_LE = np.maximum(mixed(score_DLE), 0)
    held = np.array([score[list(kept)].sum() for score, kept in zip(score_LE, plan.kept, strict=True)])
    return np.asarray(held / np.maximum(score_LE.sum(1), 1e-300))


def warning(plan: Plan) -> str:
    """What everybody who prunes must read; empty for a plan that leaves out nothing."""
    if not plan.prunes:
        return ""
    domains = ", ".join(plan.options.get("domains", ())) or "its domain"
    return (
        f"warning: the experts were chosen for {domains} alone. Outside of it the pruned model may be far worse than this "
        "domain shows: judge it on other text too (equipoise prune --scenario NAME=FILE, with a NAME that is none of them)."
    )


def _domains(profile: Profile, given: Sequence[str] | None) -> tuple[str, ...]:
    have = profile.source.scenarios
    if given is None:
        return have
    wanted = (given,) if isinstance(given, str) else tuple(given)
    unknown = [name for name in wanted if name not in have]
    if unknown or not wanted:
        raise PlanError(
            f"domains: {', '.join(map(str, unknown)) or 'none'} given; the profile has: {', '.join(have)}. Name some of them."
        )
    return tuple(dict.fromkeys(wanted))
