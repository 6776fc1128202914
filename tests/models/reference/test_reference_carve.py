"""Carving against brute force, on random layers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.models.reference.carve import (
    Recipe,
    assign_balanced,
    carve,
    cluster_neurons,
    expert_norms,
    fit_router,
    neuron_energy,
    neuron_gates,
    refit_down,
    route,
    split_shared,
)


def layer(
    tokens: int = 200, width: int = 8, neurons: int = 40
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, width, generator=draw)
    hidden = torch.nn.functional.silu(x @ torch.randn(width, neurons, generator=draw)) * torch.randn(
        tokens, neurons, generator=draw
    )
    return x, hidden, torch.randn(width, neurons, generator=draw), torch.rand(tokens, generator=draw) + 0.5


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_assignment_is_balanced_and_ordered(groups: int, size: int, seed: int) -> None:
    score = np.random.default_rng(seed).normal(size=(groups * size, groups)).astype(np.float32)
    assigned = assign_balanced(score)
    assert assigned.shape == (groups, size)
    assert sorted(assigned.flatten().tolist()) == list(range(groups * size))
    assert (np.diff(assigned, axis=1) > 0).all()


def test_assignment_is_the_best_of_all() -> None:
    score = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    labels = [np.array(p) for p in set(itertools.permutations([0, 0, 1, 1, 2, 2]))]
    best = max(score[np.arange(6), label].sum() for label in labels)
    assigned = assign_balanced(score)
    assert sum(score[assigned[g], g].sum() for g in range(3)) == pytest.approx(best)


def test_clusters_find_neurons_that_answer_to_the_same_tokens() -> None:
    truth = np.random.default_rng(1).permutation(np.repeat(np.arange(4), 6))
    topic = np.random.default_rng(2).integers(0, 4, size=300)
    energy = np.random.default_rng(3).uniform(0.5, 1.0, size=(300, 24)) * np.where(topic[:, None] == truth, 1.0, 0.01)
    groups = cluster_neurons(energy.astype(np.float32), Recipe(experts=4, top_k=1))
    assert sorted(tuple(g) for g in groups) == sorted(tuple(np.flatnonzero(truth == t)) for t in range(4))


def test_energy_and_shared_neurons() -> None:
    _, hidden, down, weight = layer()
    energy = neuron_energy(hidden, down, weight)
    t, j = 17, 5
    assert energy[t, j].item() == pytest.approx((weight[t] * (hidden[t, j] * down[:, j]).square().sum()).item(), rel=1e-5)
    shared, others = split_shared(energy, 10)
    amplitude = energy.sqrt().mean(0)
    assert amplitude[shared].min() >= amplitude[others].max()
    assert sorted([*shared.tolist(), *others.tolist()]) == list(range(40))


def test_expert_norms_equal_the_norms_of_the_outputs() -> None:
    _, hidden, down, _ = layer()
    experts = torch.randperm(40, generator=torch.Generator().manual_seed(0)).view(5, 8)
    outputs = torch.stack([hidden[:, e] @ down[:, e].T for e in experts], 1)
    torch.testing.assert_close(expert_norms(hidden, down, experts), outputs.norm(dim=-1), rtol=1e-4, atol=1e-4)


def test_router_recovers_a_linear_need_and_scales_it() -> None:
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    x[:, 0] += 5  # so that the planted need is positive on average and relative size means something
    planted = torch.zeros(3, 8)
    planted[:, 0], planted[:, 1] = 1.0, torch.tensor([0.3, -0.1, 0.0])
    need = x @ planted.T
    router = fit_router(x, need, Recipe(router_ridge=0.0, temperature=0.5))
    torch.testing.assert_close(router, 0.5 * planted / need.mean(), rtol=1e-4, atol=1e-5)


def test_route_agrees_with_softmax_topk_normalize() -> None:
    x, router = torch.randn(20, 8), torch.randn(6, 8)
    gates = route(x, router, 2)
    for token in range(20):
        probability = torch.softmax(router @ x[token], 0)
        best = probability.argsort(descending=True)[:2]
        expected = torch.zeros(6)
        expected[best] = probability[best] / probability[best].sum()
        torch.testing.assert_close(gates[token], expected)


def test_refit_is_the_weighted_least_squares_solution() -> None:
    _, hidden, down, weight = layer()
    gates = (torch.rand(hidden.shape, generator=torch.Generator().manual_seed(5)) > 0.3).float()
    new = refit_down(hidden, gates, down, weight, ridge=1e-9)
    root = weight.sqrt()[:, None]
    expected = torch.linalg.lstsq((hidden * gates * root).double(), (hidden @ down.T * root).double()).solution.T
    torch.testing.assert_close(new.double(), expected, rtol=1e-3, atol=1e-3)


def test_refit_lowers_the_error_and_its_ridge_pulls_to_the_dense_layer() -> None:
    _, hidden, down, weight = layer()
    gates = (torch.rand(hidden.shape, generator=torch.Generator().manual_seed(5)) > 0.3).float()

    def error(w: torch.Tensor) -> float:
        return (weight[:, None] * ((hidden * gates) @ w.T - hidden @ down.T).square()).sum().item()

    assert error(refit_down(hidden, gates, down, weight, 3e-2)) < 0.8 * error(down)
    torch.testing.assert_close(refit_down(hidden, gates, down, weight, 1e6), down, rtol=1e-3, atol=1e-3)


def test_carving_covers_every_neuron_once_and_changes_nothing_when_all_are_visited_evenly() -> None:
    x, hidden, down, weight = layer()
    carving = carve(x, hidden, down, weight, Recipe(shared=16, experts=6, top_k=6, temperature=0.0, cluster_tokens=100))
    assert sorted([*carving.shared.tolist(), *carving.experts.flatten().tolist()]) == list(range(40))
    assert carving.experts.shape == (6, 4)
    gates = neuron_gates(route(x, carving.router, 6), carving.experts, 40)
    torch.testing.assert_close((hidden * gates) @ carving.down.T, hidden @ down.T, rtol=1e-4, atol=1e-4)


def test_carving_refuses_sizes_that_do_not_divide() -> None:
    x, hidden, down, weight = layer()
    with pytest.raises(ValueError, match="40 neurons less 15 shared ones do not divide into 4 experts"):
        carve(x, hidden, down, weight, Recipe(shared=15, experts=4))
