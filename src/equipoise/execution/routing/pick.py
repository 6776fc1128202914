"""Policies that answer the router's choice: fewer experts, a frozen bias, and the load of the batch.

Shapes: T rows, W classes that the router ranks (E experts first), K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from equipoise.errors import ModelError
from equipoise.execution.routing.policies import (
    POLICIES,
    Here,
    Policy,
    Seen,
    allowed_classes,
    largest,
    require,
    scores_of,
    uniform,
    whole,
)
from equipoise.models.choice import Choice

SIGN, PROPORTIONAL = "sign", "proportional"
BATCH = 2048
"""Tokens after which the bias is updated, or all there are."""


@POLICIES.register(
    "static_k",
    summary="the model's own router with a smaller top-k; control of top_p",
    source="Equipoise",
)
@dataclass(frozen=True)
class StaticK(Policy):
    """The k experts that the router ranks first; what the model computes with `k` in its configuration.

    Attributes:
        k: experts of a token; the model's own when None.
    """

    picks: ClassVar[bool] = True

    k: int | None = None

    def __post_init__(self) -> None:
        require(self.k is None or whole(self.k, 1), "k", self.k, "a whole number from 1, or nothing for the model's own")

    def columns(self, top_k: int) -> int:
        """`k`."""
        return self.k or top_k

    def check(self, here: Here) -> None:
        """No more experts than there are."""
        require((self.k or 1) <= here.num_experts, "k", self.k, f"at most the {here.num_experts} experts of {here.path}")

    def pick(self, choice: Choice, here: Here) -> Tensor | None:
        """The first k."""
        k = self.columns(here.top_k)
        return None if k == here.top_k else choice.ranked_TW.topk(k, dim=-1).indices

    @property
    def identity(self) -> bool:
        """No k given."""
        return self.k is None


@POLICIES.register(
    "bias",
    summary="a frozen bias for each expert, fitted to even out the load: changes the choice, never the weight; stateless",
    source="Loss-Free Balancing (arXiv:2408.15664) section 2, its rule run on gates of a text instead of in training",
)
@dataclass(frozen=True)
class Bias(Policy):
    """Rank by s + b in place of s.

    After each batch of the text's scores, e_i = 1 - load_i / mean load, and b_i grows by u * sign(e_i) ("sign", the paper's
    for sigmoid gates) or by u * e_i ("proportional", its choice for softmax gates). The paper leaves open what e_i is measured
    in; here it is a fraction of the mean load, at most 1. u is `step` times the spread of the scores (standard deviation over
    the experts of a token, mean over tokens), so that one value suits all models, and falls linearly to 0 over `steps`; the
    bias is the mean of the last quarter.

    Attributes:
        strength: factor of the fitted bias: 0 leaves the model as it is, 1 balances the text of the fit.
        rule: "sign" or "proportional"; "auto" takes the one that the paper advises for the kind of gate.
        step: u in spreads of the scores.
        steps: updates.
    """

    picks: ClassVar[bool] = True
    sweeps: ClassVar[int] = 2

    strength: float = 1.0
    rule: str = "auto"
    step: float = 0.03
    steps: int = 300

    def __post_init__(self) -> None:
        require(self.strength >= 0, "strength", self.strength, "a number from 0 (the model as it is)")
        require(self.rule in ("auto", SIGN, PROPORTIONAL), "rule", self.rule, "auto, sign or proportional")
        require(self.step > 0 and whole(self.steps, 1), "step", self.step, "a step above 0, and at least 1 of `steps`")

    def fit(self, seen: Seen, here: Here) -> dict[str, Any]:
        """The bias of a layer."""
        rule = self.rule if self.rule != "auto" else SIGN if seen.kind == "sigmoid" else PROPORTIONAL
        bias_E = fit_bias(seen.ranked_TW, here.num_experts, here.top_k, rule, self.step, self.steps)
        return {"bias": tuple((bias_E * self.strength).tolist())}

    def pick(self, choice: Choice, here: Here) -> Tensor | None:
        """The K of largest s + b."""
        bias = here.numbers.bias
        if bias is None or not any(bias):
            return None
        bias_W = bias_over(choice.ranked_TW, bias)
        return largest(choice.ranked_TW.float() + bias_W, allowed_classes(choice.ranked_TW), choice, here.top_k)

    @property
    def identity(self) -> bool:
        """Strength 0."""
        return self.strength == 0


def bias_over(ranked_TW: Tensor, bias: tuple[float, ...]) -> Tensor:
    """[W] the bias of the experts, and 0 for classes beyond them."""
    bias_W = torch.zeros(ranked_TW.shape[1], device=ranked_TW.device)
    bias_W[: len(bias)] = torch.tensor(bias, device=ranked_TW.device)
    return bias_W


def fit_bias(ranked_TW: Tensor, experts: int, k: int, rule: str, step: float, steps: int) -> Tensor:
    """The frozen bias that evens out the load of some tokens; see `Bias`.

    Args:
        ranked_TW: what the router ranks by; -inf or 0 where it has ruled a class out.
        experts: E, the classes that have load.
        k: top-k.
        rule: "sign" or "proportional".
        step: u in spreads of the scores.
        steps: updates.

    Returns:
        [E] float32.
    """
    allowed_TW = allowed_classes(ranked_TW)
    rank_TW = ranked_TW.float().masked_fill(~allowed_TW, -torch.inf)
    spread = float(ranked_TW[:, :experts].float().masked_fill(~allowed_TW[:, :experts], 0.0).std(-1).mean())
    bias_W, kept_W, kept = torch.zeros(rank_TW.shape[1]), torch.zeros(rank_TW.shape[1]), 0
    order_T = torch.randperm(len(rank_TW), generator=torch.Generator().manual_seed(0))
    for t in range(steps):
        rows = torch.arange(t * BATCH, (t + 1) * BATCH) % len(rank_TW) if len(rank_TW) > BATCH else slice(None)
        picked = (rank_TW[order_T[rows]] + bias_W).topk(k, dim=-1, sorted=False).indices
        load_E = torch.bincount(picked.reshape(-1), minlength=rank_TW.shape[1])[:experts].float()
        error_E = 1 - load_E / load_E.mean().clamp_min(1e-9)
        u = step * spread * (1 - t / steps)
        bias_W[:experts] += u * (error_E.sign() if rule == SIGN else error_E)
        if t >= steps - max(1, steps // 4):
            kept_W, kept = kept_W + bias_W, kept + 1
    return (kept_W / kept)[:experts]


@dataclass(frozen=True)
class _ByLoad(Policy):
    """Tokens whose top-k score mass is below a threshold are sent to others of a pool of their best experts.

    Attributes:
        eps_high: share of a token's score mass in its top-k from which on it is left alone; 0 leaves all alone.
        c: largest pool; 2 K when None.
    """

    picks: ClassVar[bool] = True
    needs_tokens: ClassVar[bool] = True

    eps_high: float | None = None
    c: int | None = None

    def check(self, here: Here) -> None:
        """A pool holds at least top-k experts; families with classes that are no experts have no load to go by."""
        require(self.c is None or whole(self.c, here.top_k), "c", self.c, f"a whole number from the model's top-{here.top_k}")

    def _pool(self, choice: Choice, here: Here) -> tuple[Tensor, Tensor, Tensor]:
        """score_TE, order_TE (classes by falling score, those ruled out last) and confident_T."""
        score_TW = scores_of(choice, here)
        if score_TW.shape[1] != here.num_experts:
            raise ModelError(
                f"the router of {here.path} ranks {score_TW.shape[1]} classes, of which {here.num_experts} are experts; the "
                "load of the others is no load, so this policy does not apply. Use bias or top_p."
            )
        score_TE = score_TW.masked_fill(~allowed_classes(choice.ranked_TW), -torch.inf)
        order_TE = score_TE.argsort(-1, descending=True)
        eps = here.numbers.threshold if self.eps_high is None else self.eps_high
        mass_T = score_TW.gather(1, choice.experts_TK).sum(-1) / score_TW.sum(-1)
        enough_T = score_TE.isfinite().sum(-1) >= here.top_k
        confident_T = (mass_T >= (eps if eps is not None else torch.inf)) | ~enough_T
        return score_TE, order_TE, confident_T

    @property
    def identity(self) -> bool:
        """A threshold of 0 leaves all tokens alone."""
        return self.eps_high == 0


@POLICIES.register(
    "laser_style",
    summary="tokens without a clear favourite go to the least loaded of their good experts; depends on the batch",
    source="Equipoise's reconstruction of LASER (arXiv:2510.03293), whose parameters are not published",
)
@dataclass(frozen=True)
class LaserStyle(_ByLoad):
    """Score-distribution-aware routing, reconstructed: the published description leaves much open, all of it an option here.

    A token whose top-k mass reaches the threshold keeps its experts. Any other is sent to the K least loaded of its pool: the
    experts of a score of at least t (times its best, if `relative`), filled up to K, cut to c. The load is of the real tokens
    before it in its forward, in steps of `chunk` tokens.

    Attributes:
        share: the threshold of each layer is set so that this share of the fit's tokens is below it; unused with `eps_high`.
        t: least score of the pool.
        relative: t is a fraction of the token's best score.
        keep_top1: the best expert is kept.
        chunk: tokens that see the same load; 1 is one after the other.
        carry: share of the load that stays for the next forward; 0 starts each forward anew.
    """

    batch_dependent: ClassVar[bool] = True

    share: float = 0.5
    t: float = 0.2
    relative: bool = True
    keep_top1: bool = True
    chunk: int = 16
    carry: float = 0.0

    def __post_init__(self) -> None:
        require(0 <= self.share <= 1, "share", self.share, "a share from 0 to 1")
        require(self.t >= 0, "t", self.t, "a score from 0")
        require(whole(self.chunk, 1), "chunk", self.chunk, "a whole number of tokens from 1")
        require(0 <= self.carry < 1, "carry", self.carry, "a share from 0 to below 1")

    def fit(self, seen: Seen, here: Here) -> dict[str, Any]:
        """The threshold of a layer: a quantile of the top-k mass."""
        score_TW = scores_of(Choice(seen.ranked_TW, seen.experts_TK, seen.score_TW, seen.kind), here)
        mass_T = score_TW.gather(1, seen.experts_TK).sum(-1) / score_TW.sum(-1)
        eps = 0.0 if self.share == 0 else torch.inf if self.share == 1 else float(torch.quantile(mass_T, self.share))
        return {} if self.eps_high is not None else {"threshold": min(eps, 2.0)}

    def pick(self, choice: Choice, here: Here) -> Tensor | None:
        """The least loaded of each uncertain token's pool, in the order of the rows."""
        if self.identity or (self.eps_high is None and here.numbers.threshold == 0):
            return None
        score_TE, order_TE, confident_T = self._pool(choice, here)
        best_T1 = score_TE.amax(-1, keepdim=True)
        good_TE = score_TE >= (self.t * best_T1 if self.relative else self.t)
        rank_TE = order_TE.argsort(-1)
        size = min(self.c or 2 * here.top_k, here.num_experts)
        pool_TE = ((good_TE & (rank_TE < size)) | (rank_TE < here.top_k)) & score_TE.isfinite()
        # Whole loads decide; ties go to the better score.
        tie_TE = rank_TE / (2 * here.num_experts)
        real_T = here.tokens(len(score_TE)).real_T.to(score_TE.device)
        picked_TK, here.state = least_loaded(
            pool_TE, tie_TE, choice.experts_TK, confident_T, real_T, self.chunk, keep_first=self.keep_top1,
            load_E=None if here.state is None or not self.carry else here.state * self.carry,
        )  # fmt: skip
        same_T = (picked_TK.sort(-1).values == choice.experts_TK.sort(-1).values).all(-1)
        return torch.where(same_T[:, None], choice.experts_TK, picked_TK)

    @property
    def identity(self) -> bool:
        """No token is below the threshold."""
        return self.eps_high == 0 or (self.eps_high is None and self.share == 0)


def least_loaded(
    pool_TE: Tensor,
    tie_TE: Tensor,
    native_TK: Tensor,
    confident_T: Tensor,
    real_T: Tensor,
    chunk: int,
    *,
    keep_first: bool,
    load_E: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Send tokens, in order, to the least loaded experts of their pools.

    Args:
        pool_TE: experts that a token may be sent to, at least K.
        tie_TE: below 1; the smaller is taken of two experts of one load; the smallest is the token's best.
        native_TK: experts of tokens that are left alone.
        confident_T: which those are.
        real_T: False for padding, which counts for nothing.
        chunk: tokens that see the same load.
        keep_first: the best of the pool is taken whatever its load.
        load_E: load at the start; none when omitted.

    Returns:
        experts_TK, and the load at the end.
    """
    tokens, k = native_TK.shape
    load_E = torch.zeros(pool_TE.shape[1], device=pool_TE.device) if load_E is None else load_E
    key_TE = tie_TE.masked_fill(~pool_TE, torch.inf)
    if keep_first:
        key_TE = key_TE.scatter(1, key_TE.argmin(-1, keepdim=True), -torch.inf)
    picked_TK = native_TK.clone()
    for start in range(0, tokens, chunk):
        rows = slice(start, start + chunk)
        picked = (key_TE[rows] + load_E).topk(k, dim=-1, largest=False).indices
        picked = torch.where(confident_T[rows, None], native_TK[rows], picked)
        picked_TK[rows] = picked
        load_E = load_E + torch.bincount(picked[real_T[rows]].reshape(-1), minlength=len(load_E))
    return picked_TK, load_E


@POLICIES.register(
    "load_only",
    summary="the least loaded experts whatever their score: the best balance and the worst quality; a control",
    source="Equipoise; the baseline of LASER (arXiv:2510.03293)",
)
@dataclass(frozen=True)
class LoadOnly(LaserStyle):
    """`laser_style` with a pool of all experts and no regard for scores."""

    eps_high: float | None = 2.0
    t: float = 0.0
    keep_top1: bool = False

    def check(self, here: Here) -> None:
        """Any layer will do."""

    def pick(self, choice: Choice, here: Here) -> Tensor | None:
        """As `laser_style`, from all experts."""
        wide = LaserStyle(self.eps_high, here.num_experts, self.share, 0.0, True, self.keep_top1, self.chunk, self.carry)
        return wide.pick(choice, here)


@POLICIES.register(
    "random_pool",
    summary="K experts drawn by their scores from a token's c best: what choosing among them costs by itself; a control",
    source="a review of LASER (arXiv:2510.03293)",
)
@dataclass(frozen=True)
class RandomPool(_ByLoad):
    """K of the c best experts of each token, drawn without replacement by score (Gumbel top-k), for its position.

    Attributes:
        weighted: by score; alike otherwise.
        seed: of the draws.
    """

    eps_high: float | None = 2.0
    weighted: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        require(whole(self.seed, 0), "seed", self.seed, "a whole number from 0")

    def pick(self, choice: Choice, here: Here) -> Tensor | None:
        """The K of largest log score plus Gumbel noise in the pool."""
        if self.identity:
            return None
        score_TE, order_TE, confident_T = self._pool(choice, here)
        size = min(self.c or 2 * here.top_k, here.num_experts)
        pool_TE = (order_TE.argsort(-1) < size) & score_TE.isfinite()
        position_T = here.tokens(len(score_TE)).position_T.to(score_TE.device)
        noise_TE = uniform(position_T, here.num_experts, here.index, self.seed).clamp(1e-12, 1 - 1e-12)
        gumbel_TE = -(-noise_TE.log()).log()
        log_TE = score_TE.clamp_min(1e-30).double().log() if self.weighted else torch.zeros_like(gumbel_TE)
        picked_TK = largest(log_TE + gumbel_TE, pool_TE, choice, here.top_k)
        return torch.where(confident_T[:, None], choice.experts_TK, picked_TK)
