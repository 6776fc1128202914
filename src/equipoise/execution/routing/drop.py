"""Policies that drop experts after the choice: the mass that a token needs, and its random control.

Shapes: T rows, C experts that were picked, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from equipoise.errors import EquipoiseError
from equipoise.execution.routing.policies import POLICIES, Here, Policy, Seen, require, scores_of, uniform, whole
from equipoise.models.choice import Choice

MASSES = ("topk", "full")


@POLICIES.register(
    "top_p",
    summary="as many experts as hold a share p of a token's mass: fewer for clear tokens, more for unclear ones",
    source="Dynamic MoE (arXiv:2403.07652) section 3, after the fact on a model trained with top-k",
)
@dataclass(frozen=True)
class TopP(Policy):
    """Keep a token's first experts until their mass reaches p: t = min{k : sum of the k largest >= p}.

    Attributes:
        p: mass to keep, for all layers; calibrated to `mean_k` when None.
        mean_k: experts of a token that each layer is calibrated to, on the text of the fit.
        mass: "topk": of the model's own top-k, whose masses add up to 1; "full": of all experts, from which as many as
            `k_max` are taken.
        k_min, k_max: fewest and most experts of a token; the model's top-k when `k_max` is None.
    """

    drops: ClassVar[bool] = True
    sweeps: ClassVar[int] = 2

    p: float | None = None
    mean_k: float | None = None
    mass: str = "topk"
    k_min: int = 1
    k_max: int | None = None

    def __post_init__(self) -> None:
        require(self.mass in MASSES, "mass", self.mass, "topk or full")
        require(self.p is None or 0 <= self.p <= 1, "p", self.p, "a share from 0 to 1")
        require(self.p is None or self.mean_k is None, "p", self.p, "either p or mean_k, not both")
        require(whole(self.k_min, 1), "k_min", self.k_min, "a whole number from 1")
        require(self.k_max is None or whole(self.k_max, self.k_min), "k_max", self.k_max, f"a whole number from {self.k_min}")

    @property
    def picks(self) -> bool:  # type: ignore[override]
        """Masses over all experts are the router's to tell, and more experts than top-k its to pick."""
        return self.mass == "full"

    def columns(self, top_k: int) -> int:
        """`k_max`."""
        return min(self.k_max or top_k, top_k) if self.mass == "topk" else self.k_max or top_k

    def check(self, here: Here) -> None:
        """k_max within what there is, mean_k within k_min and k_max."""
        most = here.top_k if self.mass == "topk" else here.num_experts
        require((self.k_max or 1) <= most, "k_max", self.k_max, f"at most {most} in {here.path} with mass '{self.mass}'")
        require(self.k_min <= self._most(here), "k_min", self.k_min, f"at most {self._most(here)} in {here.path}")
        if self.mean_k is not None:
            within = self.k_min <= self.mean_k <= self._most(here)
            require(within, "mean_k", self.mean_k, f"a number from k_min = {self.k_min} to k_max = {self._most(here)}")

    def fit(self, seen: Seen, here: Here) -> dict[str, Any]:
        """The threshold of a layer, and how many tokens it sends to how many experts."""
        mass_TC, total_T = self._masses(seen, here)
        before_TC, _ = mass_before(mass_TC, total_T)
        most = self._most(here)
        threshold = self.p if self.p is not None else calibrated(before_TC, self.k_min, most, self.mean_k)
        kept_T = kept_count(before_TC, threshold, self.k_min, most)
        histogram = torch.bincount(kept_T, minlength=most + 1) / len(kept_T)
        return {"threshold": threshold, "histogram": tuple(histogram.tolist())}

    def pick(self, choice: Choice, here: Here) -> Tensor | None:
        """As many as may be kept, in the router's order."""
        k = self.columns(here.top_k)
        return None if k == here.top_k or self.mass == "topk" else choice.ranked_TW.topk(k, dim=-1).indices

    def keep(self, mass_TC: Tensor, total_T: Tensor | None, here: Here) -> Tensor | None:
        """The first whose masses reach the threshold."""
        assert here.numbers.threshold is not None, "a fitted policy has its threshold"
        if here.numbers.threshold >= 1 and self._most(here) == mass_TC.shape[1]:
            return None
        before_TC, order_TC = mass_before(mass_TC, total_T)
        kept_T = kept_count(before_TC, here.numbers.threshold, self.k_min, self._most(here))
        return keep_first(order_TC, kept_T)

    def _most(self, here: Here) -> int:
        return self.k_max or here.top_k

    def _masses(self, seen: Seen, here: Here) -> tuple[Tensor, Tensor | None]:
        choice = Choice(seen.ranked_TW, seen.experts_TK, seen.score_TW, seen.kind)
        if self.mass == "full":
            score_TW = scores_of(choice, here)
            picked_TC = choice.ranked_TW.topk(self.columns(here.top_k), dim=-1).indices
            return score_TW.gather(1, picked_TC), score_TW.sum(-1)
        if here.numbers.mass == "scores":
            return scores_of(choice, here).gather(1, seen.experts_TK), None
        return seen.weights_TK.float(), None

    @property
    def identity(self) -> bool:
        """All of the mass of the model's own top-k."""
        return self.mass == "topk" and self.k_max is None and (self.p == 1 or (self.p is None and self.mean_k is None))


@POLICIES.register(
    "random_k",
    summary="as many experts for as many tokens as top_p, but for tokens drawn at random: what adapting is worth; a control",
    source="Equipoise",
)
@dataclass(frozen=True)
class RandomK(TopP):
    """The control of `top_p`: the same options, fitted alike; which token gets how many experts is drawn for its position.

    Attributes:
        seed: of the draws.
    """

    needs_tokens: ClassVar[bool] = True

    seed: int = 0

    def keep(self, mass_TC: Tensor, total_T: Tensor | None, here: Here) -> Tensor | None:
        """The first k of each token, k drawn from the histogram of the fit."""
        histogram = here.numbers.histogram
        assert histogram is not None, "a fitted policy has its histogram"
        if histogram[-1] >= 1 and len(histogram) == mass_TC.shape[1] + 1:
            return None
        _, order_TC = mass_before(mass_TC, total_T)
        position_T = here.tokens(len(mass_TC)).position_T.to(mass_TC.device)
        draw_T = uniform(position_T, 1, here.index, self.seed)[:, 0]
        below_K = torch.tensor(histogram, dtype=torch.float64, device=mass_TC.device).cumsum(0)[:-1]
        return keep_first(order_TC, torch.bucketize(draw_T, below_K, right=True))


def mass_before(mass_TC: Tensor, total_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Share of the mass that lies in larger experts than each, by falling mass, and that order.

    Args:
        mass_TC: mass of each expert, not negative.
        total_T: what they are shares of; their sum when omitted.
    """
    sorted_TC, order_TC = mass_TC.float().sort(dim=-1, descending=True, stable=True)
    total_T = sorted_TC.sum(-1) if total_T is None else total_T
    share_TC = sorted_TC / total_T[:, None].clamp_min(torch.finfo(torch.float32).tiny)
    return share_TC.cumsum(-1) - share_TC, order_TC


def kept_count(before_TC: Tensor, p: float, k_min: int, k_max: int) -> Tensor:
    """[T] experts that are kept: those with less than p before them, at least k_min, at most k_max; all of those at p >= 1."""
    reached_T = (before_TC < p).sum(-1) if p < 1 else torch.full_like(before_TC[:, 0], before_TC.shape[1], dtype=torch.long)
    return reached_T.clamp(k_min, k_max)


def keep_first(order_TC: Tensor, count_T: Tensor) -> Tensor:
    """[T, C] the first `count_T` of each token in an order."""
    first_TC = torch.arange(order_TC.shape[1], device=order_TC.device) < count_T[:, None]
    return torch.zeros_like(first_TC).scatter(1, order_TC, first_TC)


def calibrated(before_TC: Tensor, k_min: int, k_max: int, mean_k: float | None) -> float:
    """The threshold at which tokens are sent to `mean_k` experts on average, as near as the tokens allow; 1 for all.

    The mean is a step function of p that grows by one expert of one token at each value of `before_TC`: what bisection would
    converge to is read off the sorted values.

    Raises:
        EquipoiseError: fewer tokens than it takes.
    """
    if mean_k is None or mean_k >= k_max:
        return 1.0
    steps = before_TC[:, k_min:k_max].reshape(-1).sort().values
    if not len(steps):
        raise EquipoiseError(f"mean_k: {mean_k} given; k_min and k_max are both {k_min}, so there is nothing to calibrate.")
    wanted = round((mean_k - k_min) * len(before_TC))
    if wanted <= 0:
        return float(steps[0])
    if wanted >= len(steps):
        return 1.0
    return float((steps[wanted - 1].double() + steps[wanted].double()) / 2)
