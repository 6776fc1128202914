from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.precisions import precision
from equipoise.quantization.codes import code_range
from equipoise.quantization.rtn import Grid, grids, nearest, on_grid, rtn, rtn_clip

INTEGER = ["int8", "int8-g32", "int8-asym", "int4", "int4-g7", "int4-g32-asym", "int3", "int3-asym", "int2", "int2-g16-asym"]
FORMATS = [*INTEGER, "fp8"]


def random_weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.sampled_from(FORMATS), st.integers(1, 4), st.integers(1, 70), st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_no_other_code_is_nearer(name: str, rows: int, columns: int, seed: int) -> None:
    form, weight = precision(name), random_weight(rows, columns, seed=seed)
    grid = grids(weight, form).spread(columns, form)
    code = nearest(weight, grid, form)
    if form.is_fp8:
        every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        every = every[torch.isfinite(every)]
    else:
        low, high = code_range(form)
        assert low <= code.min() <= code.max() <= high
        every = torch.arange(low, high + 1).float()
    points = on_grid(every, Grid(grid.scale[..., None], None if grid.zero is None else grid.zero[..., None]))
    least = (points - weight[..., None]).abs().amin(-1)
    torch.testing.assert_close((on_grid(code, grid) - weight).abs(), least, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_the_search_never_costs_error_on_its_own_objective(name: str) -> None:
    form, weight, importance = precision(name), random_weight(40, 100), random_weight(100, seed=1).square()

    def loss(rounded_values: torch.Tensor) -> torch.Tensor:
        return ((rounded_values - weight).square() * importance).sum(-1)

    hessian = torch.diag(importance)
    searched = loss(rtn_clip(weight, form, hessian).values(form))
    assert (searched <= loss(rtn(weight, form).values(form)) * (1 + 1e-5)).all()


def test_the_search_gains_more_the_fewer_the_bits() -> None:
    weight = random_weight(64, 256)
    gain = {}
    for name in ("int4", "int3", "int2"):
        form = precision(name)
        plain, searched = ((f(weight, form).values(form) - weight).square().sum() for f in (rtn, rtn_clip))
        gain[name] = float(1 - searched / plain)
    assert 0.1 < gain["int4"] < gain["int3"] < gain["int2"]


def test_important_columns_are_rounded_better() -> None:
    form, weight = precision("int3"), random_weight(64, 32)
    importance = torch.ones(32)
    importance[:4] = 1000.0
    alike = (rtn_clip(weight, form).values(form) - weight).square()
    weighed = (rtn_clip(weight, form, torch.diag(importance)).values(form) - weight).square()
    assert weighed[:, :4].sum() < 0.8 * alike[:, :4].sum()
    assert weighed[:, 4:].sum() > alike[:, 4:].sum()


@pytest.mark.parametrize("method", [rtn, rtn_clip])
@pytest.mark.parametrize("name", FORMATS)
def test_zeros_tiny_and_huge_weights_survive(name: str, method) -> None:  # type: ignore[no-untyped-def]
    weight = torch.zeros(4, 40)
    weight[1, 3] = 1e-41  # below the smallest scale
    weight[2] = 1e30
    weight[3] = -2.5
    form = precision(name)
    values = method(weight, form).values(form)
    assert torch.isfinite(values).all()
    assert torch.equal(values[0], weight[0])
    torch.testing.assert_close(values[2:], weight[2:], rtol=0.01, atol=0)


def test_asymmetric_grids_serve_weights_of_one_sign() -> None:
    weight = random_weight(16, 64).abs()
    errors = {n: float((rtn(weight, precision(n)).values(precision(n)) - weight).norm()) for n in ("int4", "int4-asym")}
    assert errors["int4-asym"] < 0.6 * errors["int4"]


def test_leading_axes_are_matrices_of_their_own() -> None:
    weight = random_weight(2, 3, 5, 45)
    for name in ("int4", "int3-asym", "fp8"):
        form = precision(name)
        together = rtn_clip(weight, form)
        alone = rtn_clip(weight[1, 2], form)
        assert torch.equal(together.codes[1, 2].float(), alone.codes.float())
        assert torch.equal(together.scales[1, 2], alone.scales)
