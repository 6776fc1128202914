"""Filters of updates: their formulas, no effect where old and new text share nothing, less drift where they do."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from equipoise.errors import EquipoiseError
from equipoise.lab.recipes.curvature import expert_filter, gather, principal, router_filter
from equipoise.lab.recipes.same import Keeper, Settings, fine_tune, freeze_scores
from equipoise.models.layers import expert_matrices, find_moe_layers
from equipoise.models.recorder import record
from equipoise.profiling.sequences import Batch


def rotated(sigma, seed=0):
    """A second moment with these eigenvalues, and its directions."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(len(sigma), len(sigma), generator=generator, dtype=torch.float64)).Q
    return (vectors * torch.tensor(sigma, dtype=torch.float64)) @ vectors.T, vectors


def test_the_directions_that_reach_the_energy():
    moment, vectors = rotated([8.0, 6.0, 2.0, 0.0])  # squares: 64, 36, 4 of 104; the mean eigenvalue is 4
    found, sigma = principal(moment, 0.9, 64)
    assert sigma.tolist() == pytest.approx([2.0, 1.5])
    torch.testing.assert_close(found @ found.T, vectors[:, :2] @ vectors[:, :2].T)
    assert len(principal(moment, 1.0, 64)[1]) >= 3
    assert len(principal(moment, 0.9, 1)[1]) == 1
    assert principal(torch.zeros(4, 4), 0.9, 64)[1].shape == (0,)
    torch.testing.assert_close(principal(1000 * moment, 0.9, 64)[1], sigma)


def test_the_expert_filter_is_the_damped_inverse():
    """SAME: (C + mu I)^-1, low rank, times mu: unused directions keep their step."""
    moment, vectors = rotated([8.0, 6.0, 2.0, 0.0])
    whole = expert_filter(moment, mu=0.5, energy=1.0)
    torch.testing.assert_close(whole, 0.5 * torch.linalg.inv(moment / 4 + 0.5 * torch.eye(4, dtype=torch.float64)))
    part = expert_filter(moment, mu=0.5, energy=0.9)
    gains = torch.linalg.solve(vectors, part @ vectors).diagonal()
    assert gains.tolist() == pytest.approx([0.5 / 2.5, 0.5 / 2.0, 1, 1])


def test_the_router_filter_passes_unused_directions_and_damps_the_others():
    """SAME: dW V_par g V_par^T + dW V_perp V_perp^T, g = 1 / sliding average."""
    moment, vectors = rotated([8.0, 6.0, 2.0, 0.0])
    gains = torch.linalg.solve(vectors, router_filter(moment, energy=0.9) @ vectors).diagonal()
    assert gains.tolist() == pytest.approx([1 / 1.75, 1 / 1.75, 1, 1])
    narrow = torch.linalg.solve(vectors, router_filter(moment, energy=0.9, window=1) @ vectors).diagonal()
    assert narrow.tolist() == pytest.approx([1 / 2, 1 / 1.5, 1, 1])
    held = torch.linalg.solve(vectors, router_filter(moment, energy=0.9, window=1, clamp=(0.8, 1.0)) @ vectors).diagonal()
    assert held.tolist() == pytest.approx([0.8, 0.8, 1, 1])


def drift_at_equal_loss(overlap, filtered):
    """Drift of old outputs when a linear expert is tuned on new inputs down to a tenth of the loss."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64)).Q
    old = torch.randn(400, 10, generator=generator, dtype=torch.float64) @ basis[:, :10].T
    mixed = overlap * basis[:, :10] + (1 - overlap) * basis[:, 10:20]
    new = torch.randn(400, 10, generator=generator, dtype=torch.float64) @ mixed.T
    weight = torch.zeros(6, 40, dtype=torch.float64)
    target = new @ torch.randn(6, 40, generator=generator, dtype=torch.float64).T
    passes = expert_filter(old.T @ old, mu=0.1, energy=0.99) if filtered else torch.eye(40, dtype=torch.float64)
    first = target.square().mean()
    for _ in range(100000):
        error = new @ weight.T - target
        if error.square().mean() <= 0.1 * first:
            break
        weight -= 0.05 * (error.T @ new / len(new)) @ passes
    assert error.square().mean() <= 0.1 * first, "the new text is learned either way"
    return float((old @ weight.T).square().mean())


def test_less_drift_at_equal_loss_and_no_effect_without_overlap():
    assert drift_at_equal_loss(0.0, filtered=False) < 1e-12
    assert drift_at_equal_loss(0.0, filtered=True) < 1e-12
    for overlap in (0.2, 0.5):
        plain, kept = (drift_at_equal_loss(overlap, filtered) for filtered in (False, True))
        assert kept < 0.6 * plain


def test_freeze_scores_by_hand():
    assert freeze_scores(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 4.0, 0.0])).tolist() == [1 - 0.25, 0.5 - 1, 0]


def batch(seed, low=2, high=48):
    ids = np.random.default_rng(seed).integers(low, high, (3, 12))
    return Batch("x", ids, np.ones_like(ids), np.hstack([ids[:, 1:], np.full((3, 1), -100)]))


def test_the_history_is_that_of_what_was_fed(tiny):
    model = tiny("qwen3_moe").eval()
    first, second = gather(model, [batch(0)]), gather(model, [batch(1)])
    whole = gather(model, [batch(0), batch(1)])
    for one, other, both in zip(first, second, whole, strict=True):
        joined = one + other
        torch.testing.assert_close(joined.router_DD, both.router_DD)
        torch.testing.assert_close(joined.inputs_E[1], both.inputs_E[1])
        torch.testing.assert_close(joined.mass_E, both.mass_E)
    seen = []
    model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.no_grad(), record(model) as recorder:
        model(torch.from_numpy(batch(0).input_ids))
    ((hidden, ids, weights),) = seen
    x = hidden.double()
    torch.testing.assert_close(first[0].router_DD, x.T @ x)
    chosen = (ids == 3).any(1)
    torch.testing.assert_close(first[0].inputs_E[0][3], x[chosen].T @ x[chosen])
    gate = (weights * (ids == 3)).sum(1).double()
    assert float(first[0].mass_E[3]) == pytest.approx(float((gate * x.square().sum(1)).sum()))
    used = recorder.counts.sum((0, 1))[0] > 0
    assert ((first[0].inputs_E[1].diagonal(dim1=1, dim2=2).sum(1) > 0).numpy() == used).all()


def test_the_keeper_makes_of_a_step_what_the_filters_leave(tiny):
    model = tiny("qwen3_moe")
    history = gather(model, [batch(0)])
    kept, plain = copy.deepcopy(model), copy.deepcopy(model)
    keeper = Keeper(kept, history, Settings(parts=("router", "experts")))
    assert fine_tune(kept, [batch(1)], learning_rate=0.01, keeper=keeper) == 1
    fine_tune(plain, [batch(1)], learning_rate=0.01)
    keeper.close()
    start = model.model.layers[0].mlp
    for name, passes in (
        ("gate.weight", router_filter(history[0].router_DD)),
        ("experts.gate_up_proj", torch.stack([expert_filter(m, mu=0.9) for m in history[0].inputs_E[0]])),
        ("experts.down_proj", torch.stack([expert_filter(m, mu=0.9) for m in history[0].inputs_E[1]])),
    ):
        old, free, held = (part.get_parameter(name) for part in (start, plain.model.layers[0].mlp, kept.model.layers[0].mlp))
        torch.testing.assert_close(held - old, (free - old) @ passes.float(), atol=1e-6, rtol=1e-4)
        assert not torch.equal(held, free)
    same = [n for n, p in model.named_parameters() if torch.equal(p, plain.get_parameter(n))]
    assert all("experts" not in name and "gate.weight" not in name for name in same)
    assert len(same) == len(list(model.named_parameters())) - 6


def test_frozen_experts_stay_as_they_were(tiny):
    model = tiny("qwen3_moe")
    history = gather(model, [batch(0)])
    history[0].mass_E = torch.tensor([0.0, 0, 0, 0, 1, 1, 1, 1], dtype=torch.float64)
    before = copy.deepcopy(model)
    keeper = Keeper(model, history, Settings(parts=("freeze",), tau=0.0, warmup=0))
    fine_tune(model, [batch(1)], learning_rate=0.01, keeper=keeper)
    frozen = keeper.frozen()[0]
    keeper.close()
    assert 0 < len(frozen) < 8
    for expert in range(8):
        pairs = [expert_matrices(find_moe_layers(m)[0], expert) for m in (before, model)]
        equal = all(torch.equal(old, new) for old, new in zip(*pairs, strict=True))
        assert equal or expert not in frozen
    moved = [
        e
        for e in range(8)
        if not torch.equal(before.model.layers[0].mlp.experts.down_proj[e], model.model.layers[0].mlp.experts.down_proj[e])
    ]
    assert moved


def test_what_does_not_fit_is_refused(tiny):
    with pytest.raises(EquipoiseError, match="unknown part 'gate'"):
        Settings(parts=("gate",))
    with pytest.raises(EquipoiseError, match="mu above 0"):
        Settings(mu=0.0)
    with pytest.raises(EquipoiseError, match="2 MoE layers, the model has 1"):
        Keeper(tiny("qwen3_moe", num_hidden_layers=1), gather(tiny("qwen3_moe"), [batch(0)]), Settings())
