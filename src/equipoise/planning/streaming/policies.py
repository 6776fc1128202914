"""The streaming policies by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from equipoise.artifacts import Plan, Profile
from equipoise.errors import PlanError
from equipoise.planning.streaming.adaptive import adaptive
from equipoise.planning.streaming.decision import Costs, Decision, Load, Policy
from equipoise.planning.streaming.published import Published
from equipoise.registry import Registry


class Static:
    """Keeps the plan."""

    def decide(self, load_LE: Load, plan: Plan, costs: Costs) -> Decision:
        """Nothing changes."""
        return Decision(None, "static")


@dataclass(frozen=True)
class PolicyInputs:
    """What a policy may be made from.

    Attributes:
        profile: of the plan, where there is one.
        plan: at the start.
        options: of the policy.
    """

    profile: Profile | None = None
    plan: Plan | None = None
    options: dict[str, Any] = field(default_factory=dict)


POLICIES: Registry[Callable[[PolicyInputs], Policy]] = Registry("streaming policy")
"""Policies by name: f(inputs) -> Policy."""

POLICIES.register(
    "static",
    summary="keeps the plan as it is: the control",
    source="Equipoise",
)(lambda given: Static(**given.options))
POLICIES.register(
    "all_history",
    summary="each step the copy goes to the expert that was heaviest over all steps so far",
    source="R&Q (arXiv:2602.19938) streaming, Option 1",
)(lambda given: Published(history=True, **given.options))
POLICIES.register(
    "last_step",
    summary="each step the copy goes to the expert that was heaviest in the step before",
    source="R&Q (arXiv:2602.19938) streaming, Option 2",
)(lambda given: Published(history=False, **given.options))
POLICIES.register(
    "adaptive",
    summary="window with decay and drift detection; other slots once keeping these has cost more than a change does",
    source="Equipoise",
)(lambda given: adaptive(given.profile, given.plan, **given.options))


def make_policy(name: str, profile: Profile | None = None, plan: Plan | None = None, **options: Any) -> Policy:
    """A policy by name.

    Args:
        name: one of `POLICIES`.
        profile: that the plan was made from; `adaptive` reads errors and scatter from it.
        plan: at the start of the stream.
        options: of the policy.

    Raises:
        EquipoiseError: unknown name.
        PlanError: an option that the policy does not have.
    """
    make = POLICIES.get(name)
    try:
        return make(PolicyInputs(profile, plan, dict(options)))
    except TypeError as error:
        raise PlanError(f"policy '{name}' does not take these options ({', '.join(options) or 'none'}): {error}.") from error
