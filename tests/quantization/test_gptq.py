from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import EquipoiseError
from equipoise.precisions import Precision, precision
from equipoise.quantization.codes import spread_scales
from equipoise.quantization.gptq import gptq
from equipoise.quantization.hessian import quadratic_loss, second_moment
from equipoise.quantization.methods import METHODS
from equipoise.quantization.rtn import Grid, grids, nearest, on_grid, rtn

FORMATS = ["int8", "int8-g32-asym", "int4", "int4-g32-asym", "int3-g7", "int2", "int2-asym", "fp8"]


def random_case(
    rows: int, columns: int, tokens: int, seed: int = 0, batch: tuple[int, ...] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*batch, rows, columns, generator=generator)
    mix = torch.randn(*batch, columns, columns, generator=generator) / columns**0.5
    x = torch.randn(*batch, tokens, columns, generator=generator) @ mix
    return weight, x.transpose(-2, -1) @ x


def one_column_after_the_other(
    weight: torch.Tensor, hessian: torch.Tensor, form: Precision, damp: float, order: torch.Tensor
) -> torch.Tensor:
    """GPTQ as published: an explicit inverse, one column at a time, no blocks, in double precision."""
    columns = weight.shape[1]
    grid = grids(weight, form).spread(columns, form)
    left = weight.double().clone()
    damped = hessian.double() + damp * hessian.diagonal().mean().double() * torch.eye(columns, dtype=torch.float64)
    inverse, result = torch.linalg.inv(damped), torch.zeros_like(left)
    for k in order.tolist():
        own = Grid(grid.scale[:, k], None if grid.zero is None else grid.zero[:, k])
        result[:, k] = on_grid(nearest(left[:, k].float(), own, form), own).double()
        error = (left[:, k] - result[:, k]) / inverse[k, k]
        left -= torch.outer(error, inverse[k])
        inverse -= torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return result


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("order", ["natural", "activation"])
def test_blocks_equal_the_published_form(name: str, order: str) -> None:
    form = precision(name)
    weight, hessian = random_case(6, 300, 500)
    columns = torch.arange(300) if order == "natural" else hessian.diagonal().argsort(descending=True, stable=True)
    expected = one_column_after_the_other(weight, hessian, form, 0.01, columns)
    rounded = gptq(weight, form, hessian, damp=0.01, order=order, search=False, sweeps=0).values(form)
    # A target half-way between two codes may go either way; the columns after it then differ too.
    same_rows = (rounded.double() - expected).abs().amax(1) < 1e-5
    assert same_rows.sum() >= 5, f"{int(same_rows.sum())} of 6 rows agree"


@given(
    st.sampled_from(FORMATS),
    st.integers(1, 6),
    st.integers(1, 140),
    st.integers(0, 60),
    st.sampled_from(["natural", "activation"]),
    st.booleans(),
    st.integers(0, 2),
    st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_no_row_is_worse_than_rounded_to_nearest(
    name: str, rows: int, columns: int, tokens: int, order: str, search: bool, sweeps: int, seed: int
) -> None:
    form = precision(name)
    weight, hessian = random_case(rows, columns, tokens, seed)
    rounded = gptq(weight, form, hessian, order=order, search=search, sweeps=sweeps)
    better = quadratic_loss(weight - rounded.values(form), hessian)
    plain = quadratic_loss(weight - rtn(weight, form).values(form), hessian)
    # Losses are sums of `columns` squares in single precision.
    noise = 1e-5 * hessian.diagonal().mean() * (weight - rtn(weight, form).values(form)).square().sum(1)
    assert (better <= plain * (1 + 1e-4) + noise).all()


@pytest.mark.parametrize("name", FORMATS)
def test_sweeps_lower_the_damped_objective(name: str) -> None:
    form = precision(name)
    weight, hessian = random_case(12, 150, 300)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(150)
    losses = [quadratic_loss(weight - gptq(weight, form, hessian, sweeps=sweeps).values(form), damped) for sweeps in (0, 1, 3)]
    for before, after in pairwise(losses):
        assert (after <= before * (1 + 1e-4)).all()
    assert losses[1].sum() < 0.99 * losses[0].sum()


@pytest.mark.parametrize("name", ["int4-g16", "int3-g7-asym", "int2"])
def test_sweeps_end_where_no_single_code_can_be_better(name: str) -> None:
    form = precision(name)
    weight, hessian = random_case(8, 40, 100)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(40)
    rounded = gptq(weight, form, hessian, search=False, sweeps=30)  # on the grids of rtn, so that no row falls back to it
    error = weight - rounded.values(form)
    # One step more or less of code k changes the objective by step^2 H_kk +- 2 step (E H)_k.
    step = spread_scales(rounded.scales.float(), 40, form).abs()
    change = step.square() * damped.diagonal() - 2 * step * (error @ damped).abs()
    inside = rounded.codes.abs() < 2 ** (form.bits - 1) - 1 if form.bits > 2 else rounded.codes == 0
    assert inside.any()
    assert (change[inside] > -1e-3 * quadratic_loss(error, damped).mean()).all()


@pytest.mark.parametrize("name", FORMATS)
def test_correlated_inputs_are_worth_much(name: str) -> None:
    form = precision(name)
    weight, hessian = random_case(32, 128, 400)
    error = {
        method: float(quadratic_loss(weight - METHODS.get(method).round(weight, form, hessian).values(form), hessian).sum())
        for method in ("rtn", "rtn-clip", "gptq")
    }
    assert error["gptq"] < 0.7 * error["rtn-clip"]
    assert error["gptq"] < 0.6 * error["rtn"]


@pytest.mark.parametrize("name", FORMATS)
def test_independent_inputs_leave_nothing_to_make_up_for(name: str) -> None:
    form = precision(name)
    weight, _ = random_case(8, 40, 1)
    hessian = torch.diag(torch.linspace(0.5, 2, 40))
    rounded, plain = gptq(weight, form, hessian, search=False), rtn(weight, form)
    assert torch.equal(rounded.codes.float(), plain.codes.float())
    assert torch.equal(rounded.scales, plain.scales)


def test_columns_no_token_uses_are_rounded_to_nearest_and_move_nothing() -> None:
    form = precision("int4-g16")
    weight, _ = random_case(8, 64, 1)
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(1)) @ torch.randn(64, 64)
    dead = torch.tensor([0, 17, 63])
    x[:, dead] = 0
    rounded = gptq(weight, form, second_moment(x), search=False)
    assert torch.equal(rounded.codes[:, dead], rtn(weight, form).codes[:, dead])
    other = weight.clone()
    other[:, dead] *= 0.5  # other weights there, on the same grids: nothing else may change
    moved = gptq(other, form, second_moment(x), search=False)
    kept = [k for k in range(64) if k not in dead.tolist()]
    same = (rounded.scales == moved.scales).all(1)
    assert same.any()
    assert torch.equal(rounded.codes[same][:, kept], moved.codes[same][:, kept])


@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize("name", FORMATS)
def test_fewer_tokens_than_columns(tokens: int, name: str) -> None:
    form = precision(name)
    weight, hessian = random_case(5, 60, tokens)
    rounded = gptq(weight, form, hessian)
    values = rounded.values(form)
    assert torch.isfinite(values).all()
    # What no token tells is left near its value: the error stays of the size of rounding.
    assert (values - weight).norm() < 3 * (rtn(weight, form).values(form) - weight).norm()


def test_a_scale_of_the_hessian_changes_nothing() -> None:
    weight, hessian = random_case(4, 32, 100)
    form = precision("int4")
    assert torch.equal(gptq(weight, form, hessian).codes, gptq(weight, form, hessian * 4096).codes)


def test_leading_axes_are_matrices_of_their_own() -> None:
    weight, hessian = random_case(4, 40, 80, batch=(2, 3))
    for name in ("int4-g16", "int3-asym", "fp8"):
        form = precision(name)
        together = gptq(weight, form, hessian)
        assert together.damping is not None
        assert together.damping.shape == (2, 3)
        alone = gptq(weight[1, 2], form, hessian[1, 2])
        same = (together.codes[1, 2].float() == alone.codes.float()).all(1)
        assert same.sum() >= 3  # sums in another order may tip a tie


def test_damping_that_had_to_rise_is_told() -> None:
    weight, hessian = random_case(4, 24, 200)
    broken = hessian - 2 * torch.linalg.eigvalsh(hessian).max() * torch.outer(torch.ones(24), torch.ones(24)) / 24 / 2
    told = gptq(weight, precision("int4"), torch.stack([broken, hessian])[0], damp=0.01).damping
    assert told is not None
    assert float(told) > 0.01
    usual = gptq(weight, precision("int4"), hessian, damp=0.01).damping
    assert usual is not None
    assert float(usual) == pytest.approx(0.01)


def test_mistakes_are_named() -> None:
    weight, hessian = random_case(4, 24, 30)
    with pytest.raises(EquipoiseError, match=r"needs a Hessian of shape \[24, 24\].*got none"):
        gptq(weight, precision("int4"))
    with pytest.raises(EquipoiseError, match=r"got one of shape \[23, 23\]"):
        gptq(weight, precision("int4"), hessian[:23, :23])
    with pytest.raises(EquipoiseError, match="'desc_act'; allowed: activation, natural"):
        gptq(weight, precision("int4"), hessian, order="desc_act")


def test_the_registry_says_what_each_method_needs() -> None:
    assert METHODS.names() == ["rtn", "rtn-clip", "gptq", "agq", "agq2"]
    assert {entry.name: entry.function.gate_power for entry in METHODS if entry.function.needs_hessian} == {
        "gptq": 0,
        "agq": 1,
        "agq2": 2,
    }
