"""Products of sorted rows with experts, by every kernel of the CPU, against one row at a time."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from equipoise.execution import kernels, kernels_nibbles
from equipoise.execution.kernels import (
    ROW_UNIT,
    UNIT_ELEMENTS,
    ConvertedKernel,
    FloatKernel,
    blocks,
    compute_dtype,
    grouped_linear,
    in_units,
    spread,
)
from equipoise.execution.kernels_int8 import Int8Kernel, byte_rows, has_int8_kernel
from equipoise.execution.kernels_nibbles import NibbleKernel, fits_nibbles, has_nibble_kernel
from equipoise.precisions import precision
from equipoise.quantization.formats import quantize

needs_int8 = pytest.mark.skipif(not has_int8_kernel(), reason="this CPU has no int8 dot-product instructions")
needs_nibbles = pytest.mark.skipif(not has_nibble_kernel(), reason="this CPU or torch has no packed int4 kernel")
COUNTS = st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(any)


def one_by_one(x_NI: Tensor, weight_GOI: Tensor, counts: list[int]) -> Tensor:
    slot_N = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return torch.stack([weight_GOI[slot].double() @ row.double() for slot, row in zip(slot_N, x_NI, strict=True)])


def active(counts: list[int]) -> tuple[list[int], list[int]]:
    slots = [slot for slot, count in enumerate(counts) if count]
    return slots, [counts[slot] for slot in slots]


@pytest.mark.parametrize("inner", [3, 16])  # the grouped kernel needs rows of multiples of 16 bytes; there must be another way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_linear(inner: int, dtype: torch.dtype) -> None:
    counts = [2, 0, 3, 1]
    x, weight = torch.randn(6, inner, dtype=dtype), torch.randn(4, 5, inner, dtype=dtype)
    got = grouped_linear(x, weight, torch.tensor(counts))
    torch.testing.assert_close(got.double(), one_by_one(x, weight, counts), rtol=0.02, atol=0.02)


@given(COUNTS, st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_float_kernels(counts: list[int], dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(sum(counts), 12, generator=generator), torch.randn(len(counts), 7, 12, generator=generator)
    wanted = one_by_one(x, weight, counts)
    scales = torch.rand(len(counts), 7, generator=generator) + 0.5
    plain, converted = FloatKernel(weight.to(dtype)), ConvertedKernel(lambda s, r, d: weight[s, r].to(d), 7, dtype)
    scaled = ConvertedKernel(lambda s, r, d: (weight / scales.unsqueeze(-1))[s, r].to(d), 7, dtype, scales)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.1}
    for kernel in (plain, converted, scaled):
        got = kernel.linear(kernel.rows(x), *active(counts))
        torch.testing.assert_close(got.double(), wanted, **tolerance)


@pytest.mark.parametrize("name", ["int8", "int8-g16-asym", "int4-g32-asym", "int3-g32-asym", "int2", "fp8"])
def test_conversion_in_chunks(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    counts = [1, 2, 0, 3, 1, 0, 7, 1]
    x, form = torch.randn(sum(counts), 32), precision(name)
    stored = quantize(torch.randn(8, 96, 32), form)
    whole = stored.dequantize(torch.float32)
    read = lambda slots, rows, dtype: whole[slots, rows].to(dtype)  # noqa: E731
    kernel = ConvertedKernel(read, 96, torch.float32)
    wanted = one_by_one(x, whole, counts)
    for chunk in (1, 32, 40, 96, 2 * 96, 5 * 96):  # outputs that fit: parts of a slot, one slot, several
        monkeypatch.setattr(kernels, "CHUNK_BYTES", chunk * 32 * 4)
        got = kernel.linear(kernel.rows(x), *active(counts))
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 20))
def test_blocks_hold_all_rows_in_order(counts: list[int], limit: int) -> None:
    found = list(blocks(counts, limit))
    assert [(s, c) for slots, rows in found for s, c in zip(slots, rows, strict=True)] == [
        (slot, count) for slot, count in enumerate(counts) if count
    ]
    assert all(sum(rows) <= limit or len(rows) == 1 for _, rows in found)
    assert all(sum(a[1]) + b[1][0] > limit for a, b in pairwise(found)), "a block could hold more"


@given(counts=st.lists(st.integers(0, 70), min_size=1, max_size=6).filter(any))
def test_rows_come_in_units_with_neighbours_beside_them(counts: list[int]) -> None:
    x_NI = torch.arange(1.0, 1 + sum(counts))[:, None]
    assert [len(rows) for rows, _ in in_units(x_NI, counts, UNIT_ELEMENTS + 1)] == counts, "large matrices"
    start = 0
    for (rows, own), count in zip(in_units(x_NI, counts, 8), counts, strict=True):
        assert torch.equal(rows[own], x_NI[start : start + count])
        assert len(rows) == count if count <= ROW_UNIT else len(rows) % ROW_UNIT == 0 and len(rows) < count + ROW_UNIT
        start += count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_fills_rows_up_reaches_no_product(dtype: torch.dtype) -> None:
    counts, generator = [20, 3, 37], torch.Generator().manual_seed(0)
    weight_GOI = torch.randn(3, 24, 32, generator=generator).to(dtype)
    x_NI = torch.randn(60, 32, generator=generator).to(dtype)
    expected = torch.cat([part @ w.t() for part, w in zip(x_NI.float().split(counts), weight_GOI.float(), strict=True)])
    x_NI[23:] = torch.nan
    found = FloatKernel(weight_GOI).linear(x_NI, [0, 1, 2], counts)
    torch.testing.assert_close(found[:23].float(), expected[:23], atol=0.05, rtol=0.02)
    assert found[23:].isnan().all()


def test_spread_repeats_the_row_of_the_slot() -> None:
    table = torch.arange(8.0).view(4, 2)
    assert spread(table, [1, 3], [2, 1]).tolist() == [[2, 3], [2, 3], [6, 7]]
    assert spread(table, [2], [2]).tolist() == [[4, 5], [4, 5]]


@pytest.mark.parametrize("unit", [True, False])
def test_compute_dtype(monkeypatch: pytest.MonkeyPatch, unit: bool) -> None:
    monkeypatch.setattr(kernels, "has_bfloat16_unit", lambda: unit)
    fp32, bf16, fp16 = (torch.zeros(1, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16))
    assert compute_dtype(fp32, rounded=False) is torch.float32
    assert compute_dtype(fp32, rounded=True) is (torch.bfloat16 if unit else torch.float32)
    assert compute_dtype(bf16, rounded=False) is (torch.bfloat16 if unit else torch.float32)
    assert compute_dtype(fp16, rounded=True) is torch.float32


@needs_int8
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_int8_codes_survive_packing(outputs: int, inputs: int, slots: int, seed: int) -> None:
    codes = torch.randint(-128, 128, (slots, outputs, inputs), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    assert torch.equal(Int8Kernel.pack(codes, torch.ones(slots, outputs)).codes(), codes)


@needs_int8
@given(COUNTS, st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_rounded_inputs_err_by_at_most_half_a_step(counts: list[int], inputs: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(counts), inputs, generator=generator).to(dtype)
    x[0] = 0  # a row of zeros has no scale
    codes = torch.randint(-127, 128, (len(counts), 6, inputs), generator=generator).to(torch.int8)
    scales = torch.rand(len(counts), 6, generator=generator).bfloat16()
    kernel = Int8Kernel.pack(codes, scales)
    got = kernel.linear(kernel.rows(x), *active(counts))
    weight = codes.float() * scales.float().unsqueeze(-1)
    slot = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    step = x.float().abs().amax(1, keepdim=True) / 127
    bound = torch.stack([weight[s].abs().sum(1) for s in slot]) * step / 2
    assert ((got - one_by_one(x, weight, counts)).abs() <= bound * 1.001 + 1e-4).all()
    assert not got[0].any()


@needs_int8
def test_a_row_does_not_see_its_batch_in_int8() -> None:
    x, codes = torch.randn(40, 64), torch.randint(-127, 128, (1, 32, 64)).to(torch.int8)
    kernel = Int8Kernel.pack(codes, torch.rand(1, 32))
    together = kernel.linear(kernel.rows(x), [0], [40])
    alone = torch.cat([kernel.linear(kernel.rows(row[None]), [0], [1]) for row in x])
    assert torch.equal(together, alone)


@needs_int8
def test_rows_that_are_not_finite_stay_so() -> None:
    x = torch.tensor([[1.0, float("nan")], [float("inf"), 1.0], [1.0, 2.0]])
    kernel = Int8Kernel.pack(torch.tensor([[[1, 2]]], dtype=torch.int8), torch.ones(1, 1))
    assert torch.isfinite(kernel.linear(kernel.rows(x), [0], [3])).squeeze(1).tolist() == [False, False, True]
    assert len(byte_rows(x)) == 3


@needs_nibbles
@given(
    st.sampled_from([2, 3, 4]),
    st.sampled_from([64, 128, 192]),
    st.sampled_from([(32, 32), (96, 32), (128, 64), (256, 256)]),
    st.booleans(),
    COUNTS,
    st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_nibbles(
    bits: int, outputs: int, inputs_group: tuple[int, int], asymmetric: bool, counts: list[int], seed: int
) -> None:
    (inputs, group), generator = inputs_group, torch.Generator().manual_seed(seed)
    assert fits_nibbles(bits, outputs, inputs, group)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, (len(counts), outputs, inputs), generator=generator).to(torch.int8)
    scales = (torch.rand(len(counts), outputs, inputs // group, generator=generator) + 0.1).bfloat16()
    zeros = torch.randint(low, high, scales.shape, generator=generator).to(torch.int8) if asymmetric else None
    kernel = NibbleKernel.pack(bits, codes, scales, zeros)
    assert sum(plane.nbytes for plane in kernel.packed) * 8 == codes.nbytes * bits
    assert torch.equal(kernel.codes(), codes)
    assert torch.equal(kernel.row_scales(), scales)
    shifted = codes.float() - (0 if zeros is None else zeros.float().repeat_interleave(group, -1))
    weight = shifted * scales.float().repeat_interleave(group, -1)
    x = torch.randn(sum(counts), inputs, generator=generator)
    wanted = one_by_one(x.bfloat16(), weight, counts)
    # Expanded to floats, by slot, multiplied as packed; with and without a unit for bf16.
    for limit, unit in ((0, True), (0, False), (2, True), (100, True)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels_nibbles, "has_bfloat16_unit", lambda unit=unit: unit)
            patch.setattr(kernels_nibbles, "PACKED_ROWS", limit)
            patch.setattr(kernels_nibbles, "PACKED_ROWS_NO_UNIT", limit)
            patch.setattr(kernels_nibbles, "CHUNK_BYTES", 64 * inputs * 2)
            got = kernel.linear(kernel.rows(x), *active(counts))
        assert float((got.double() - wanted).norm() / wanted.norm()) < 0.008


def test_shapes_that_the_nibble_kernel_does_not_take() -> None:
    assert fits_nibbles(4, 64, 64, 32)
    assert not fits_nibbles(4, 64, 64, 16)
    assert not fits_nibbles(4, 64, 48, 32)
    assert not fits_nibbles(4, 48, 64, 32)
    assert not fits_nibbles(4, 64, 64, None)
    assert not fits_nibbles(8, 64, 64, 32)
