from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import EquipoiseError, ModelError
from equipoise.precisions import precision
from equipoise.quantization.formats import pack, quantize, round_trip, to_float, unpack
from equipoise.quantization.methods import largest_code

INTEGER = ["int8", "int4", "int4-g7", "int4-g128"]
ALL = [*INTEGER, "fp32", "fp16", "bf16"]


def random_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 5), st.integers(1, 70), st.sampled_from(INTEGER), st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_pack_and_unpack_are_inverse(rows: int, columns: int, name: str, seed: int) -> None:
    form, top = precision(name), largest_code(precision(name))
    codes = torch.randint(-top, top + 1, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = pack(codes, form)
    assert packed.element_size() == 1
    assert torch.equal(unpack(packed, columns, form), codes)


@given(st.integers(1, 5), st.integers(1, 70), st.sampled_from(INTEGER))
@settings(max_examples=60, deadline=None)
def test_bytes_are_those_the_planner_counts(rows: int, columns: int, name: str) -> None:
    quantized = quantize(random_weight(rows, columns), name)
    assert quantized.nbytes == precision(name).matrix_bytes(rows, columns)
    assert quantized.dequantize().shape == (rows, columns)


@given(st.integers(1, 4), st.integers(1, 70), st.sampled_from(INTEGER), st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_error_is_at_most_half_a_step(rows: int, columns: int, name: str, seed: int) -> None:
    weight, form = random_weight(rows, columns, seed), precision(name)
    quantized = quantize(weight, name)
    group = form.group or columns
    for start in range(0, columns, group):
        part = weight[:, start : start + group]
        step = part.abs().amax(1, keepdim=True) / largest_code(form)
        error = (quantized.dequantize()[:, start : start + group] - part).abs()
        # bf16 keeps 8 bits of the scale, so the largest code may fall short by 1/256 of the largest weight.
        slack = part.abs().amax(1, keepdim=True) / 256
        assert (error <= step / 2 * (1 + 1 / 256) + slack * 1.01).all()


def test_leading_axes_equal_one_matrix_at_a_time() -> None:
    weights = torch.stack([random_weight(6, 45, seed) for seed in range(4)])
    for name in INTEGER:
        together = quantize(weights, name)
        for i, weight in enumerate(weights):
            alone = quantize(weight, name)
            assert torch.equal(together.packed[i], alone.packed)
            assert torch.equal(together.scales[i], alone.scales)


def test_zero_rows_and_tiny_weights_survive() -> None:
    weight = torch.zeros(3, 40)
    weight[1, 3] = 1e-41  # below the smallest scale
    weight[2] = 1e30
    for name in INTEGER:
        back = round_trip(weight, name)
        assert torch.isfinite(back).all()
        assert torch.equal(back[0], weight[0])
        torch.testing.assert_close(back[2], weight[2], rtol=0.01, atol=0)


def test_storing_twice_changes_nothing() -> None:
    weight = random_weight(8, 64)
    for name in ALL:
        once = round_trip(weight, name)
        again = round_trip(once, name)
        # The grid of a stored matrix holds it, up to the rounding of its own scale.
        torch.testing.assert_close(again, once, rtol=1 / 128, atol=0)


def test_more_bits_and_smaller_groups_err_less() -> None:
    weight = random_weight(64, 256)
    error = {name: float((round_trip(weight, name) - weight).norm() / weight.norm()) for name in ("int8", "int4", "int4-g128")}
    assert error["int8"] < 0.02 < error["int4"] < error["int4-g128"] < 0.2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ALL)
def test_unusable_weights_are_refused(bad: float, name: str) -> None:
    weight = random_weight(4, 8)
    weight[2, 5] = bad
    with pytest.raises(ModelError, match="1 of 32 expert weights are NaN or infinite"):
        round_trip(weight, name)


def test_fp16_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ModelError, match="65504"):
        to_float(torch.full((2, 2), 1e6), precision("fp16"))


def test_unknown_names_are_named() -> None:
    with pytest.raises(EquipoiseError, match="unknown precision 'int9'"):
        quantize(random_weight(2, 2), "int9")
    with pytest.raises(EquipoiseError, match=r"unknown quantization method 'rtm'.*rtn"):
        quantize(random_weight(2, 2), "int8", "rtm")
    with pytest.raises(EquipoiseError, match="float format"):
        quantize(random_weight(2, 2), "bf16")


def test_keeps_the_dtype_it_was_given() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert round_trip(random_weight(4, 8).to(dtype), "int8").dtype is dtype
