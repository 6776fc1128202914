from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from equipoise.errors import EquipoiseError, ModelError
from equipoise.precisions import precision
from equipoise.quantization.codes import FP8, largest_code
from equipoise.quantization.formats import QuantizedMatrix, empty_storage, quantize, round_trip, store, to_float
from equipoise.quantization.methods import Rounded

SYMMETRIC = ["int8", "int8-g16", "int4", "int4-g7", "int4-g128", "int3", "int3-g5", "int2", "int2-g64"]
ASYMMETRIC = ["int8-asym", "int8-g16-asym", "int4-asym", "int4-g7-asym", "int3-g64-asym", "int2-asym", "int2-g5-asym"]
INTEGER = [*SYMMETRIC, *ASYMMETRIC]
QUANTIZED = [*INTEGER, "fp8"]
ALL = [*QUANTIZED, "fp32", "fp16", "bf16"]


def random_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 40), st.integers(1, 130), st.sampled_from(QUANTIZED))
@settings(max_examples=80, deadline=None)
def test_bytes_are_those_the_planner_counts(rows: int, columns: int, name: str) -> None:
    form = precision(name)
    quantized = quantize(random_weight(rows, columns), name)
    assert quantized.nbytes == form.matrix_bytes(rows, columns)
    assert quantized.dequantize().shape == (rows, columns)
    found = {part: getattr(quantized, part) for part in ("packed", "scales", "zeros")}
    stored = {part: (tuple(t.shape), t.dtype) for part, t in found.items() if t is not None}
    assert stored == empty_storage(rows, columns, form)


@pytest.mark.parametrize("name", QUANTIZED)
def test_bytes_on_disk_are_those_the_planner_counts(name: str, tmp_path: Path) -> None:
    quantized = quantize(random_weight(21, 77), name)
    found = {part: getattr(quantized, part) for part in ("packed", "scales", "zeros")}
    tensors = {part: tensor for part, tensor in found.items() if tensor is not None}
    save_file(tensors, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    assert len(content) - header == precision(name).matrix_bytes(21, 77)
    again = QuantizedMatrix(**{"zeros": None} | load_file(tmp_path / "a.safetensors"), columns=77, precision=precision(name))
    assert torch.equal(again.dequantize(), quantized.dequantize())


@given(st.integers(1, 6), st.integers(1, 70), st.sampled_from(INTEGER), st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_reading_is_code_minus_zero_times_scale(rows: int, columns: int, name: str, seed: int) -> None:
    form, random = precision(name), torch.Generator().manual_seed(seed)
    low, high, groups = -(2 ** (form.bits - 1)), 2 ** (form.bits - 1), form.groups(columns)
    codes = torch.randint(low, high, (rows, columns), generator=random).to(torch.int8)
    scales = torch.rand(rows, groups, generator=random).bfloat16()
    zeros = None if form.symmetric else torch.randint(low, high, (rows, groups), generator=random).to(torch.int8)
    back = store(Rounded(codes, scales, zeros), columns, form).dequantize(torch.float64)
    for row in range(rows):
        for column in range(columns):
            group = column // (form.group or columns)
            zero = 0 if zeros is None else int(zeros[row, group])
            assert float(back[row, column]) == (int(codes[row, column]) - zero) * float(scales[row, group])


@given(
    st.integers(1, 4), st.integers(1, 70), st.sampled_from(ASYMMETRIC), st.integers(0, 100), st.sampled_from([-3.0, 0.0, 3.0])
)
@settings(max_examples=60, deadline=None)
def test_error_of_asymmetric_formats_is_at_most_a_step(rows: int, columns: int, name: str, seed: int, mean: float) -> None:
    weight, form = random_weight(rows, columns, seed) + mean, precision(name)
    error = (quantize(weight, name).dequantize() - weight).abs()
    for start in range(0, columns, form.group or columns):
        part = weight[:, start : start + (form.group or columns)]
        span = part.amax(1, keepdim=True).clamp_min(0) - part.amin(1, keepdim=True).clamp_max(0)
        # Half a step of rounding the weight, half of rounding zero, and bf16's 1/256 of the range.
        assert (error[:, start : start + part.shape[1]] <= span / (2**form.bits - 1) + span / 200).all()


def test_fp8_errs_by_at_most_a_sixteenth() -> None:
    weight = random_weight(16, 200)
    quantized = quantize(weight, "fp8")
    assert quantized.packed.dtype is FP8
    error = (quantized.dequantize() - weight).abs()
    # Three bits behind the leading one, or the smallest step there is for the row; the largest weight may fall short by 1/256.
    step = weight.abs().amax(1, keepdim=True) / largest_code(precision("fp8")) * 2**-9
    assert (error <= weight.abs() / 16 + weight.abs() / 200 + step).all()


@given(st.integers(1, 4), st.integers(1, 70), st.sampled_from(SYMMETRIC), st.integers(0, 100))
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
    for name in QUANTIZED:
        together = quantize(weights, name)
        for i, weight in enumerate(weights):
            alone = quantize(weight, name)
            assert torch.equal(together.packed[i].view(torch.uint8), alone.packed.view(torch.uint8))
            assert torch.equal(together.scales[i], alone.scales)
            assert alone.zeros is None or torch.equal(together.zeros[i], alone.zeros)


def test_zero_rows_and_tiny_weights_survive() -> None:
    weight = torch.zeros(3, 40)
    weight[1, 3] = 1e-41  # below the smallest scale
    weight[2] = 1e30
    for name in QUANTIZED:
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
    names = ("int8", "fp8", "int4-asym", "int4", "int4-g128", "int3-asym", "int3", "int2-asym", "int2")
    errors = [float((round_trip(weight, name) - weight).norm() / weight.norm()) for name in names]
    assert errors == sorted(errors)
    assert errors[0] < 0.02 < errors[1] < 0.05 < errors[2]
    assert errors[4] < 0.2 < errors[6] < 0.3 < errors[-2] < errors[-1]


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
