"""What an expert is worth to a domain, by several scores under one registry; all read from a profile.

Shapes: D domains, L MoE layers, E logical experts of the widest layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from equipoise.artifacts import Profile
from equipoise.errors import PlanError
from equipoise.registry import Registry

Floats = NDArray[np.float64]
Score = Callable[[Profile, Sequence[str], int], Floats]

PRUNING: Registry[Score] = Registry("pruning score")
"""Scores by name: f(profile, domains, seed) -> [D, L, E], or [1, L, E] where the profile does not tell domains apart.

More is worth more. Domains are scenarios of the profile.
"""


@PRUNING.register(
    "easy-ep",
    summary="gate weight times norm of the expert's output, times how far the token's routed experts turn its residual stream",
    source="EASY-EP (arXiv:2504.06792)",
)
def easy_ep(profile: Profile, domains: Sequence[str], seed: int) -> Floats:
    """[D, L, E] sums over a domain's tokens of c * s, as the importance estimator `easy_ep` measured them.

    Raises:
        PlanError: the profile was not measured with that estimator.
    """
    if "easy_ep" not in profile.scenario_importance:
        raise _not_measured("easy-ep", "easy_ep", profile)
    return np.asarray(profile.scenario_importance["easy_ep"][_rows(profile, domains)])


@PRUNING.register(
    "reap",
    summary="gate weight times norm of the expert's output, mean over the tokens that chose it",
    source="REAP (arXiv:2510.13999), saliency score",
)
def reap(profile: Profile, domains: Sequence[str], seed: int) -> Floats:
    """[1, L, E] the importance estimate `gate_norm`, of all scenarios together.

    Raises:
        PlanError: not measured, or not of these domains alone.
    """
    return _pooled(profile, domains, "reap", "gate_norm")


@PRUNING.register("gate", summary="sum of the gate weights of an expert's selections", source="baseline of EASY-EP, Table 2")
def gate(profile: Profile, domains: Sequence[str], seed: int) -> Floats:
    """[D, L, E] gate mass.

    Raises:
        PlanError: the profile has none, as those of an engine's records.
    """
    mass = profile.gate_mass[_rows(profile, domains)]
    if not mass.any():
        raise PlanError("score 'gate': the profile holds no gate weights; profile the model itself, or prune by 'frequency'.")
    return np.asarray(mass)


@PRUNING.register("frequency", summary="how often an expert is selected", source="baseline of EASY-EP, Table 2")
def frequency(profile: Profile, domains: Sequence[str], seed: int) -> Floats:
    """[D, L, E] selections."""
    return np.asarray(profile.scenario_load[_rows(profile, domains)], np.float64)


@PRUNING.register(
    "leave-one-out",
    summary="increase of the loss without the expert: an oracle of single removals, for a forward pass per expert",
    source="R&Q (arXiv:2602.19938), the expert-removal study",
)
def leave_one_out(profile: Profile, domains: Sequence[str], seed: int) -> Floats:
    """[1, L, E] the importance estimate `leave_one_out`, of all scenarios together.

    Raises:
        PlanError: not measured, or not of these domains alone.
    """
    return _pooled(profile, domains, "leave-one-out", "leave_one_out")


@PRUNING.register("random", summary="experts drawn by lot: the control that every other score must beat", source="Equipoise")
def random(profile: Profile, domains: Sequence[str], seed: int) -> Floats:
    """[1, L, E] numbers from the seed alone."""
    return np.random.default_rng([seed, 3]).random((1, *profile.load.shape))


def _rows(profile: Profile, domains: Sequence[str]) -> list[int]:
    return [profile.source.scenarios.index(name) for name in domains]


def _pooled(profile: Profile, domains: Sequence[str], score: str, estimator: str) -> Floats:
    if estimator not in profile.importance:
        raise _not_measured(score, estimator, profile)
    if len(domains) < len(profile.source.scenarios):
        raise PlanError(
            f"score '{score}' is of all scenarios of the profile together ({', '.join(profile.source.scenarios)}), not of "
            f"{', '.join(domains)} alone; profile that text by itself."
        )
    return np.asarray(profile.importance[estimator])[None]


def _not_measured(score: str, estimator: str, profile: Profile) -> PlanError:
    have = ", ".join(profile.importance) or "none"
    return PlanError(
        f"score '{score}' needs the importance estimate '{estimator}', which this profile lacks (it has: {have}); "
        f"profile again with --importance {estimator}."
    )
