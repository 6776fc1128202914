"""What a routing policy leaves on a model, so that those who watch or run it know: its name, and what its layers are sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from equipoise.artifacts.routing import NATIVE

if TYPE_CHECKING:
    from equipoise.artifacts.routing import RoutingPolicy

POLICY = "_equipoise_policy"
"""Attribute of a model: the `RoutingPolicy` that it runs under."""
MARK = "_equipoise_routing"
"""Attribute of an experts module: its `RoutingMark`."""


@dataclass(frozen=True)
class RoutingMark:
    """What a layer is sent under a policy.

    Attributes:
        columns: most experts of a token.
        drops: some of them may be none (id E, weight 0).
    """

    columns: int
    drops: bool


def policy_of(model: Any) -> RoutingPolicy | None:
    """The policy that a model runs under; None when its own router decides."""
    policy: RoutingPolicy | None = getattr(model, POLICY, None)
    return policy


def policy_id(model: Any) -> str:
    """Name of the policy that a model runs under, as profiles and plans carry it; "native" for its own router's."""
    policy = policy_of(model)
    return NATIVE if policy is None else policy.id
