from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.artifacts import LayerPlan
from equipoise.dispatch.flow import spread_evenly
from equipoise.execution.dispatch import Copies, even, gate_aware, least_loaded

# Expert 0: three copies of which slot 4 has the fewest bits; expert 1: two; expert 2: one.
PLAN = LayerPlan(
    experts=(0, 1, 2, 0, 0, 1),
    precisions=("bf16", "bf16", "bf16", "int8", "int4", "int8"),
    units=(0, 1, 2, 1, 2, 0),
    shares=(0.5, 0.75, 1.0, 0.3, 0.2, 0.25),
)
COPIES = Copies.of(PLAN, layer=3)


def slot_shares(slots: torch.Tensor, expert: int, experts: torch.Tensor) -> np.ndarray:
    mine = slots[experts == expert]
    return np.bincount(mine.numpy(), minlength=PLAN.num_slots) / max(len(mine), 1)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=50), st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_every_policy_serves_an_expert_by_its_own_slots(experts: list[int], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    expert = torch.tensor(experts)
    position = torch.randint(0, 1000, (len(experts),), generator=random)
    weight = torch.rand(len(experts), generator=random)
    real = torch.rand(len(experts), generator=random) > 0.2
    holder = torch.tensor(PLAN.experts)
    for slots in (
        even(COPIES, expert, position),
        gate_aware(COPIES, expert, position, weight, real),
        least_loaded(COPIES, expert, real, 3),
    ):
        assert torch.equal(holder[slots], expert)


def test_even_depends_on_nothing_but_position_and_expert() -> None:
    position = torch.arange(200)
    expert = position % 3
    alone = torch.stack([even(COPIES, expert[i : i + 1], position[i : i + 1])[0] for i in range(200)])
    shuffled = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    assert torch.equal(even(COPIES, expert, position), alone)
    assert torch.equal(even(COPIES, expert[shuffled], position[shuffled]), alone[shuffled])


@pytest.mark.parametrize("tokens", [10, 100, 1000, 10_000])
def test_even_realises_the_shares_quickly(tokens: int) -> None:
    for expert in range(2):
        chosen = torch.full((tokens,), expert)
        shares = slot_shares(even(COPIES, chosen, torch.arange(tokens)), expert, chosen)
        wanted = np.where(np.array(PLAN.experts) == expert, PLAN.shares, 0)
        # Random splitting would be off by about 1/sqrt(n); the golden-ratio walk by about log(n)/n.
        assert np.abs(shares - wanted).max() <= (2 + np.log(tokens)) / tokens


def test_even_splits_layers_and_experts_differently() -> None:
    position = torch.arange(500)
    two = LayerPlan(experts=(0, 0, 1, 1), precisions=("bf16",) * 4, units=(0, 1, 0, 1), shares=(0.5,) * 4)
    first, other = Copies.of(two, 0), Copies.of(two, 1)
    zero = torch.zeros(500, dtype=torch.long)
    picks = [even(first, zero, position), even(first, zero + 1, position) - 2, even(other, zero, position)]
    for a, b in itertools.combinations(picks, 2):
        assert 0.1 < (a == b).float().mean() < 0.9


def test_gate_aware_gives_the_fewest_bits_to_the_smallest_weights() -> None:
    tokens = 100
    weight = torch.rand(tokens, generator=torch.Generator().manual_seed(5))
    expert, position, real = torch.zeros(tokens, dtype=torch.long), torch.arange(tokens), torch.ones(tokens, dtype=torch.bool)
    slots = gate_aware(COPIES, expert, position, weight, real)
    int4, int8, bf16 = (weight[slots == slot] for slot in (4, 3, 0))
    assert (len(int4), len(int8), len(bf16)) == (20, 30, 50)
    assert int4.max() < int8.min()
    assert int8.max() < bf16.min()


def test_gate_aware_ranks_real_tokens_only_and_keeps_shares_over_single_tokens() -> None:
    tokens = 40
    weight = torch.linspace(0, 1, tokens)
    real = torch.arange(tokens) % 2 == 0
    expert, position = torch.ones(tokens, dtype=torch.long), torch.arange(tokens)
    slots = gate_aware(COPIES, expert, position, weight, real)
    assert np.bincount(slots[real].numpy(), minlength=6).tolist() == [0, 15, 0, 0, 0, 5]
    one = torch.ones(1, dtype=torch.bool)
    single = torch.cat([gate_aware(COPIES, expert[:1], position[i : i + 1], weight[i : i + 1], one) for i in range(tokens)])
    assert abs((single == 5).float().mean() - 0.25) < 0.1


def layer_loads(split_EC: np.ndarray, units_EC: np.ndarray, units: int) -> np.ndarray:
    return np.bincount(units_EC.ravel(), weights=split_EC.ravel(), minlength=units)


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_spread_evenly_is_optimal(seed: int) -> None:
    random = np.random.default_rng(seed)
    experts, units = int(random.integers(1, 5)), int(random.integers(2, 4))
    number = random.integers(1, units + 1, experts)
    at = np.zeros((experts, units), np.int64)
    for e in range(experts):
        chosen = random.permutation(units)[: number[e]]
        at[e] = np.concatenate([chosen, np.repeat(chosen[-1], units - number[e])])
    count = random.integers(0, 6, experts)

    split = spread_evenly(count, at, number, units)
    assert (split >= 0).all()
    assert (split.sum(1) == count).all()
    assert all(not split[e, number[e] :].any() for e in range(experts))
    best = min(
        np.bincount([u for units_of in choice for u in units_of], minlength=units).max(initial=0)
        for choice in itertools.product(
            *(itertools.combinations_with_replacement(at[e, : number[e]], int(count[e])) for e in range(experts))
        )
    )
    load = layer_loads(split, at, units)
    assert load.max() == best
    for e in range(experts):  # below the largest unit too, no token would be better off on another copy
        for a, b in itertools.permutations(range(number[e]), 2):
            assert split[e, a] == 0 or load[at[e, a]] <= load[at[e, b]] + 1


def test_units_below_the_largest_are_leveled() -> None:
    # Expert 0 fills unit 0 alone; experts 1 and 2 share units 1 and 2, where any split meets the optimum of 9.
    split = spread_evenly(np.array([9, 5, 3]), np.array([[0, 0], [1, 2], [2, 1]]), np.array([1, 2, 2]), 3)
    assert layer_loads(split, np.array([[0, 0], [1, 2], [2, 1]]), 3).tolist() == [9, 4, 4]


def test_least_loaded_meets_the_optimal_split_and_skips_padding() -> None:
    random = torch.Generator().manual_seed(7)
    expert = torch.randint(0, 3, (300,), generator=random)
    real = torch.rand(300, generator=random) > 0.3
    slots = least_loaded(COPIES, expert, real, 3)
    load = np.bincount(np.array(PLAN.units)[slots[real].numpy()], minlength=3)
    assert load.max() == -(-int(real.sum()) // 3)  # these copies can level any counts near these


def test_without_copies_every_policy_is_a_lookup() -> None:
    plain = LayerPlan(experts=(2, 0, 1), precisions=("bf16",) * 3, units=(0, 1, 2), shares=(1.0,) * 3)
    copies, expert, real = Copies.of(plain, 0), torch.tensor([0, 1, 2, 2]), torch.ones(4, dtype=torch.bool)
    wanted = [1, 2, 0, 0]
    assert even(copies, expert, expert).tolist() == wanted
    assert gate_aware(copies, expert, expert, torch.rand(4), real).tolist() == wanted
    assert least_loaded(copies, expert, real, 3).tolist() == wanted
