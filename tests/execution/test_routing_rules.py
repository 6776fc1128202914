"""The arithmetic of routing policies, without a model."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.artifacts.routing import LayerRouting
from equipoise.errors import EquipoiseError
from equipoise.execution.routing.drop import calibrated, keep_first, kept_count, mass_before
from equipoise.execution.routing.pick import LaserStyle, fit_bias, least_loaded
from equipoise.execution.routing.policies import Here, make_policy, uniform
from equipoise.models.choice import Choice
from equipoise.models.tokens import TokenBatch


def tokens(rows: int, real: torch.Tensor | None = None) -> TokenBatch:
    real = torch.ones(rows, dtype=torch.bool) if real is None else real
    return TokenBatch(real, torch.arange(rows), torch.zeros(rows, dtype=torch.long), False, bool(real.all()))


def here(experts: int = 8, k: int = 2, **numbers: object) -> Here:
    return Here(0, "experts", experts, k, LayerRouting(path="e", scores="softmax", weights="raw", **numbers), tokens)


def skewed(rows: int = 2000, experts: int = 8, skew: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, experts, generator=generator) + skew * torch.linspace(2, 0, experts)


def max_violation(rank_TE: torch.Tensor, bias_E: torch.Tensor, k: int) -> float:
    load = torch.bincount((rank_TE + bias_E).topk(k).indices.reshape(-1), minlength=rank_TE.shape[1]).float()
    return float(load.max() / load.mean() - 1)


@pytest.mark.parametrize(("p", "count"), [(0.0, 1), (0.49, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.999, 3), (1.0, 4)])
def test_top_p_keeps_the_fewest_whose_mass_reaches_p(p: float, count: int) -> None:
    mass = torch.tensor([[0.25, 0.5, 0.25, 0.0]])
    before, order = mass_before(mass)
    assert order[0].tolist() == [1, 0, 2, 3]  # ties in the order in which they came
    assert int(kept_count(before, p, 1, 4)) == count
    assert keep_first(order, kept_count(before, p, 1, 4))[0].nonzero().squeeze(1).tolist() == sorted(order[0, :count].tolist())


def test_top_p_over_all_experts_counts_their_mass_too() -> None:
    before, _ = mass_before(torch.tensor([[0.3, 0.2]]), torch.tensor([1.0]))
    assert kept_count(before, 0.5, 1, 2).tolist() == [2]
    assert kept_count(before, 0.29, 1, 2).tolist() == [1]


@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))
def test_mean_k_rises_with_p(seed: int, one: float, other: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    before, _ = mass_before(torch.rand(40, 6, generator=generator))
    low, high = sorted((one, other))
    assert (kept_count(before, low, 1, 6) <= kept_count(before, high, 1, 6)).all()


@given(st.integers(0, 10_000), st.floats(1, 6))
def test_calibration_meets_its_target_to_one_expert_of_one_token(seed: int, target: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    before, _ = mass_before(torch.rand(50, 6, generator=generator) ** 2)
    p = calibrated(before, 1, 6, target)
    assert abs(float(kept_count(before, p, 1, 6).double().mean()) - target) <= 0.5 / 50 + 1e-9


def test_a_bound_on_experts_holds_at_any_p() -> None:
    before, _ = mass_before(torch.rand(20, 6))
    assert (kept_count(before, 0.0, 2, 4) == 2).all()
    assert (kept_count(before, 1.0, 2, 4) == 4).all()


@pytest.mark.parametrize(("rule", "scores"), [("sign", torch.sigmoid), ("proportional", lambda x: x.softmax(-1))])
def test_the_bias_evens_out_a_skewed_load(rule: str, scores: object) -> None:
    rank = scores(skewed())  # type: ignore[operator]
    bias = fit_bias(rank, 8, 2, rule, 0.03, 300)
    assert max_violation(rank, torch.zeros(8), 2) > 0.5
    assert max_violation(rank, bias, 2) < 0.1
    assert max_violation(scores(skewed(seed=1)), bias, 2) < 0.2  # type: ignore[operator]  # other tokens of the same kind


def test_a_shuffled_bias_does_not_balance() -> None:
    rank = skewed().softmax(-1)
    bias = fit_bias(rank, 8, 2, "proportional", 0.03, 300)
    assert max_violation(rank, bias.roll(4), 2) > 0.5


def test_the_sign_rule_swings_in_proportion_to_its_step() -> None:
    rank = skewed().sigmoid()
    settled = fit_bias(rank, 8, 2, "sign", 0.03, 400)
    far = [float((fit_bias(rank, 8, 2, "sign", step, 2 * round(1 / step)) - settled).abs().max()) for step in (0.3, 0.03)]
    assert far[0] > 2 * far[1]


def test_experts_that_the_router_rules_out_get_no_tokens_from_the_bias() -> None:
    rank = skewed(experts=6).softmax(-1)
    rank[:, 3:] = 0.0  # a group that is ruled out
    choice = Choice(rank, rank.topk(2).indices, rank, "softmax")
    picked = make_policy("bias").pick(choice, here(6, bias=(0.0, 0.0, 0.0, 5.0, 5.0, 5.0)))
    assert picked is not None
    assert int(picked.max()) < 3


def test_load_only_is_level_for_one_expert_a_token() -> None:
    scores = skewed(101).softmax(-1)
    choice = Choice(scores, scores.topk(1).indices, scores, "softmax")
    picked = make_policy("load_only", {"chunk": 1}).pick(choice, here(k=1))
    assert picked is not None
    load = torch.bincount(picked.reshape(-1), minlength=8)
    assert load.max() - load.min() <= 1


def test_laser_keeps_to_its_pool_and_to_the_best_expert() -> None:
    scores = skewed(300).softmax(-1)
    choice = Choice(scores, scores.topk(2).indices, scores, "softmax")
    rule = LaserStyle(eps_high=2.0, t=0.3, c=4, chunk=1)
    picked = rule.pick(choice, here())
    assert picked is not None
    assert (picked == scores.argmax(-1, keepdim=True)).any(-1).all()
    chosen, rank = scores.gather(1, picked), scores.argsort(-1, descending=True).argsort(-1).gather(1, picked)
    assert ((chosen >= 0.3 * scores.amax(-1, keepdim=True)) | (rank < 2)).all()
    assert (rank < 4).all()
    assert any(sorted(a) != sorted(b) for a, b in zip(picked.tolist(), choice.experts_TK.tolist(), strict=True))


def test_laser_leaves_confident_tokens_alone() -> None:
    scores = skewed(300, skew=0.0).softmax(-1)
    choice = Choice(scores, scores.topk(2).indices, scores, "softmax")
    mass = scores.topk(2).values.sum(-1)
    eps = float(mass.median())
    picked = LaserStyle(eps_high=eps, t=0.0, chunk=4).pick(choice, here())
    assert picked is not None
    assert torch.equal(picked[mass >= eps], choice.experts_TK[mass >= eps])
    assert LaserStyle(eps_high=0).pick(choice, here()) is None


def test_padding_has_no_load() -> None:
    pool, tie = torch.ones(4, 2, dtype=torch.bool), torch.tensor([[0.0, 0.25]]).repeat(4, 1)
    native, sure = torch.zeros(4, 1, dtype=torch.long), torch.zeros(4, dtype=torch.bool)
    real = torch.tensor([True, False, False, True])
    picked, load = least_loaded(pool, tie, native, sure, real, 1, keep_first=False)
    assert picked[real].squeeze(1).tolist() == [0, 1]
    assert load.tolist() == [1, 1]


def test_draws_are_even_and_depend_on_position_layer_and_seed() -> None:
    position = torch.arange(20_000)
    draws = uniform(position, 4, 0, 0)
    assert torch.equal(draws[7], uniform(torch.tensor([7]), 4, 0, 0)[0])
    assert abs(float(draws.mean()) - 0.5) < 0.01
    assert abs(float(draws.std()) - math.sqrt(1 / 12)) < 0.01
    assert not torch.equal(draws, uniform(position, 4, 1, 0))
    assert not torch.equal(draws, uniform(position, 4, 0, 1))
    assert abs(float(torch.corrcoef(draws.T)[0, 1])) < 0.05


def test_random_k_has_the_histogram_of_its_fit() -> None:
    histogram = (0.0, 0.5, 0.3, 0.2)
    kept = make_policy("random_k").keep(torch.rand(20_000, 3), None, here(k=3, histogram=histogram))
    assert kept is not None
    share = torch.bincount(kept.sum(-1), minlength=4) / 20_000
    torch.testing.assert_close(share, torch.tensor(histogram), atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("top_q", {}, "unknown routing policy 'top_q'.*Did you mean 'top_p'"),
        ("top_p", {"meank": 2}, "no option 'meank'.*Did you mean 'mean_k'"),
        ("top_p", {"p": 1.5}, "p: 1.5 given"),
        ("top_p", {"p": 0.5, "mean_k": 2}, "either p or mean_k"),
        ("top_p", {"mass": "half"}, "topk or full"),
        ("bias", {"rule": "both"}, "auto, sign or proportional"),
        ("laser_style", {"share": 2}, "share: 2 given"),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(EquipoiseError, match=message):
        make_policy(name, options)
