from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import EquipoiseError
from equipoise.quantization import hessian as module
from equipoise.quantization.hessian import factor, gate_weights, quadratic_loss, refitted, second_moment


def inputs(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 30), st.integers(1, 12), st.integers(0, 100), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_h_is_the_explicit_weighted_sum(tokens: int, columns: int, seed: int, at_once: int) -> None:
    x, weight = inputs(tokens, columns, seed), inputs(tokens, 1, seed + 1).abs()[:, 0]
    whole, module.TOKENS_AT_ONCE = module.TOKENS_AT_ONCE, at_once
    try:
        plain, weighted = second_moment(x), second_moment(x, weight)
    finally:
        module.TOKENS_AT_ONCE = whole
    for total, c in ((plain, torch.ones(tokens)), (weighted, weight)):
        explicit = torch.zeros(columns, columns, dtype=torch.float64)
        for t in range(tokens):
            explicit += c[t].double() * torch.outer(x[t].double(), x[t].double())
        torch.testing.assert_close(total.double(), explicit, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(total, total.T)


def test_half_precision_inputs_are_summed_in_single() -> None:
    x = inputs(1000, 8).to(torch.bfloat16)
    torch.testing.assert_close(second_moment(x), x.float().T @ x.float(), rtol=1e-5, atol=1e-3)


@given(st.floats(1e-6, 1e6), st.integers(1, 50), st.sampled_from([0, 1, 2]))
@settings(max_examples=50, deadline=None)
def test_equal_gates_weigh_exactly_one(gate: float, tokens: int, power: int) -> None:
    assert torch.equal(gate_weights(torch.full((tokens,), gate), power), torch.ones(tokens))


def test_gates_weigh_by_their_power_and_one_on_average() -> None:
    gates = torch.tensor([0.1, 0.2, 0.7])
    for power in (1, 2):
        torch.testing.assert_close(gate_weights(gates, power), gates**power / (gates**power).mean())
    assert torch.equal(gate_weights(torch.zeros(3), 1), torch.ones(3))
    assert gate_weights(torch.zeros(0), 2).shape == (0,)


def test_the_factor_multiplies_back() -> None:
    hessian = torch.stack([second_moment(inputs(40, 24, seed)) for seed in range(3)])
    parts = factor(hessian, 0.01)
    upper = parts.transposed.transpose(-2, -1)
    assert torch.equal(upper, upper.triu())
    assert torch.equal(upper.diagonal(dim1=-2, dim2=-1), torch.ones(3, 24))
    back = upper @ torch.diag_embed(parts.pivots) @ parts.transposed
    damped = hessian + parts.damping[:, None, None] * torch.eye(24)
    torch.testing.assert_close(back, damped, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(parts.damping, 0.01 * hessian.diagonal(dim1=-2, dim2=-1).mean(-1))


def test_damping_rises_only_where_it_must() -> None:
    singular = second_moment(inputs(2, 24))
    regular = second_moment(inputs(400, 24))
    parts = factor(torch.stack([singular - 1e-3 * torch.eye(24), regular]), 0.0)
    assert parts.damping[0] > 1e-3
    assert parts.damping[1] == 0
    assert (parts.pivots > 0).all()


def test_no_tokens_at_all_mean_the_identity() -> None:
    parts = factor(torch.zeros(2, 5, 5), 0.01)
    assert torch.equal(parts.transposed, torch.eye(5).expand(2, 5, 5))
    assert torch.equal(parts.pivots, torch.ones(2, 5))


def test_what_cannot_be_factored_is_refused() -> None:
    broken = torch.eye(4)
    broken[2, 2] = float("nan")
    with pytest.raises(EquipoiseError, match="NaN or infinite"):
        factor(broken, 0.01)
    with pytest.raises(EquipoiseError, match="must not be negative"):
        factor(torch.eye(4), -0.1)


def test_the_objective_is_the_error_on_the_tokens() -> None:
    x, error = inputs(50, 12), inputs(7, 12, seed=3)
    explicit = (error @ x.T).square().sum(1)
    torch.testing.assert_close(quadratic_loss(error, second_moment(x)), explicit, rtol=1e-4, atol=1e-4)


def test_a_refit_minimises_the_damped_error_of_changed_inputs() -> None:
    x, noise, weight = inputs(80, 12), inputs(80, 12, seed=1), inputs(5, 12, seed=2)
    y = x + 0.3 * noise
    cross, hessian = second_moment(x, None, y), second_moment(y)
    fitted = refitted(weight, cross, hessian, 0.01)
    damping = 0.01 * float(hessian.diagonal().mean())
    # The same as least squares on the tokens and, for the damping, one row for each column.
    rows = torch.cat([y, damping**0.5 * torch.eye(12)])
    aims = torch.cat([x @ weight.T, damping**0.5 * weight.T])
    torch.testing.assert_close(fitted, torch.linalg.lstsq(rows, aims).solution.T, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(refitted(weight, hessian, hessian, 0.01), weight, rtol=1e-4, atol=1e-4)


def test_a_refit_of_nothing_is_the_weights() -> None:
    weight = inputs(5, 12)
    assert torch.equal(refitted(weight, torch.zeros(12, 12), torch.zeros(12, 12), 0.01), weight)
