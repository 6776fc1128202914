"""Routing policies: other rules than the model's own for which experts a token is sent to. All are of class `routing`.

A policy answers the router's choice (`pick`), or drops some of the experts that were chosen (`keep`), or both. It never makes
gate weights: those of other choices come from the model's own code (`models.choice`), and those of fewer experts are divided
by what is left of their mass where the model divides by their sum. A token whose experts stay the same keeps its ids and
weights bit for bit.

Shapes: T rows, W classes that the router ranks (E experts first), K top-k, C experts that are picked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any, ClassVar

import torch
from torch import Tensor

from equipoise.artifacts.routing import LayerRouting
from equipoise.errors import EquipoiseError, ModelError
from equipoise.models.choice import Choice
from equipoise.models.tokens import TokenBatch
from equipoise.registry import Registry


@dataclass(eq=False)
class Here:
    """The layer that a policy decides for.

    Attributes:
        index, path: of the layer.
        num_experts, top_k: E and K.
        numbers: what was fitted.
        tokens: the rows of the call in progress, from their number.
        state: what a policy carries from forward to forward.
    """

    index: int
    path: str
    num_experts: int
    top_k: int
    numbers: LayerRouting
    tokens: Callable[[int], TokenBatch]
    state: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Seen:
    """What one layer's router did with the real tokens of a text, under its own rule.

    Attributes:
        ranked_TW, score_TW, kind: as `models.choice.Choice` has them.
        experts_TK, weights_TK: what reached the experts.
    """

    ranked_TW: Tensor
    score_TW: Tensor | None
    kind: str
    experts_TK: Tensor
    weights_TK: Tensor


@dataclass(frozen=True)
class Policy:
    """Options of a policy; subclasses are frozen dataclasses whose fields are the options.

    Attributes:
        picks: it answers the router's choice.
        drops: it may leave out experts that were chosen.
        needs_tokens: it looks at positions or at which rows are real.
        batch_dependent: a token's experts depend on what else is in its batch.
        sweeps: how often the text of the fit is run, the policy of the last time being in force from the second on.
    """

    picks: ClassVar[bool] = False
    drops: ClassVar[bool] = False
    needs_tokens: ClassVar[bool] = False
    batch_dependent: ClassVar[bool] = False
    sweeps: ClassVar[int] = 1

    def columns(self, top_k: int) -> int:
        """Most experts of a token in a layer of this top-k."""
        return top_k

    def check(self, here: Here) -> None:
        """Raise `EquipoiseError` when the options cannot be met in a layer."""

    def fit(self, seen: Seen, here: Here) -> dict[str, Any]:
        """Fields of `LayerRouting` that are fitted on what a router did; nothing for policies without such numbers."""
        return {}

    def pick(self, choice: Choice, here: Here) -> Tensor | None:
        """[T, C] experts in place of the router's; None for its own."""
        return None

    def keep(self, mass_TC: Tensor, total_T: Tensor | None, here: Here) -> Tensor | None:
        """[T, C] which of the chosen experts are kept; None for all.

        Args:
            mass_TC: weights or scores of the chosen experts, as `LayerRouting.mass` says.
            total_T: sum of the scores of all experts, when masses are scores.
            here: the layer.
        """
        return None

    @property
    def identity(self) -> bool:
        """Whether these options leave the model as it is."""
        return False


POLICIES: Registry[Callable[..., Policy]] = Registry("routing policy")
"""Policies by name: f(**options) -> Policy."""


def make_policy(name: str, options: Mapping[str, Any] | None = None) -> Policy:
    """A policy of the registry with options, all others at their defaults.

    Raises:
        EquipoiseError: unknown name or option, or a value that is not allowed.
    """
    kind: Any = POLICIES.get(name)
    allowed = [field.name for field in fields(kind)]
    for key in options or {}:
        if key not in allowed:
            near = get_close_matches(key, allowed, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise EquipoiseError(f"policy '{name}' has no option '{key}'; it has: {', '.join(allowed) or 'none'}.{hint}")
    policy: Policy = kind(**(options or {}))
    return policy


def options_of(policy: Policy) -> dict[str, Any]:
    """Every option of a policy with its value."""
    return asdict(policy)


def require(ok: bool, name: str, value: Any, allowed: str) -> None:
    """Raise `EquipoiseError` for an option's value that is not allowed."""
    if not ok:
        raise EquipoiseError(f"{name}: {value!r} given; allowed is {allowed}.")


def whole(value: Any, least: int) -> bool:
    """Whether a value is a whole number from `least` on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def scores_of(choice: Choice, here: Here) -> Tensor:
    """[T, W] float32 scores of all classes, read where `LayerRouting.scores` says.

    Raises:
        ModelError: the router no longer computes them as it did when the policy was fitted.
    """
    wanted = here.numbers.scores
    if wanted == "choice":
        return choice.ranked_TW.float()
    if wanted == "logits":
        return choice.ranked_TW.float().softmax(-1)
    if choice.kind != wanted or choice.score_TW is None:
        raise ModelError(
            f"the router of {here.path} computes no {wanted} over its experts; fit the policy again on this model."
        )
    return choice.score_TW.float()


def allowed_classes(ranked_TW: Tensor) -> Tensor:
    """[T, W] classes that the router has not ruled out with its groups: it sets their rank to -inf, or to 0."""
    return ranked_TW.isfinite() & (ranked_TW != 0)


def largest(rank_TW: Tensor, allowed_TW: Tensor, choice: Choice, k: int) -> Tensor:
    """[T, k] the classes of largest rank among those allowed; the router's own where these are too few, or the same."""
    picked_TK = rank_TW.masked_fill(~allowed_TW, -torch.inf).topk(k, dim=-1).indices
    if k != choice.experts_TK.shape[1]:
        return picked_TK
    same_T = (picked_TK.sort(-1).values == choice.experts_TK.sort(-1).values).all(-1)
    native_T = same_T | (allowed_TW.sum(-1) < k)
    return torch.where(native_T[:, None], choice.experts_TK, picked_TK)


def uniform(position_T: Tensor, width: int, layer: int, seed: int) -> Tensor:
    """[T, width] numbers in [0, 1) that depend on a token's own position, the layer and the seed alone (splitmix64)."""
    column = torch.arange(width, device=position_T.device, dtype=torch.int64)
    z = position_T.to(torch.int64)[:, None] * 0x632BE59BD9B4E019 + column * 0x1F123BB5159A55E5
    z = z + (layer + 1) * 0x27D4EB2F165667C5 % (1 << 62) + seed * 0x165667B19E3779F9 % (1 << 62)
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * -0x6B2FB644ECCEEE15
    z = z ^ ((z >> 31) & ((1 << 33) - 1))
    return ((z >> 11) & ((1 << 53) - 1)).to(torch.float64) / (1 << 53)
