from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.precisions import precision
from equipoise.quantization.codes import (
    FP8,
    code_dtype,
    code_range,
    float_from_fp8,
    group_columns,
    largest_code,
    pack,
    pack_zeros,
    spread_scales,
    unpack,
    unpack_zeros,
)

NAMES = ["int8", "int4", "int3", "int2"]


def random_codes(shape: tuple[int, ...], name: str, seed: int) -> torch.Tensor:
    low, high = code_range(precision(name))
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


SHAPES = st.lists(st.integers(1, 3), max_size=2).flatmap(
    lambda lead: st.tuples(st.integers(1, 40), st.integers(1, 200)).map(lambda matrix: (*lead, *matrix))
)


@given(SHAPES, st.sampled_from(NAMES), st.integers(0, 100))
@settings(max_examples=100, deadline=None)
def test_pack_and_unpack_are_inverse(shape: tuple[int, ...], name: str, seed: int) -> None:
    form, codes = precision(name), random_codes(shape, name, seed)
    packed = pack(codes, form)
    assert packed.shape == (*shape[:-1], form.packed_columns(shape[-1]))
    assert packed.is_contiguous()
    assert torch.equal(unpack(packed, shape[-1], form), codes)
    zeros = pack_zeros(codes, form)
    assert zeros.shape == (*shape[:-2], precision(f"{name}-asym").zero_rows(shape[-2]), shape[-1])
    assert torch.equal(unpack_zeros(zeros, shape[-2], form), codes)


@given(SHAPES, st.sampled_from(NAMES), st.integers(0, 100))
@settings(max_examples=100, deadline=None)
def test_words_are_those_of_compressed_tensors(shape: tuple[int, ...], name: str, seed: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers", reason="not installed")
    form, codes = precision(name), random_codes(shape, name, seed)
    theirs = helpers.pack_to_int32(codes, form.bits)
    if form.bits == 8:  # stored as bytes; `pack_to_int32` adds 128 and takes four bytes as a word
        filled = torch.nn.functional.pad((codes.to(torch.int16) + 128).to(torch.uint8), (0, -shape[-1] % 4))
        assert torch.equal(filled.contiguous().view(torch.int32), theirs)
        return
    assert torch.equal(pack(codes, form), theirs)
    for matrix, zeros in zip(codes.flatten(0, -3) if codes.ndim > 2 else [codes], pack_all(codes, form), strict=True):
        assert torch.equal(zeros, helpers.pack_to_int32(matrix, form.bits, packed_dim=0))


def pack_all(codes: torch.Tensor, form) -> torch.Tensor:
    zeros = pack_zeros(codes, form)
    return zeros.flatten(0, -3) if zeros.ndim > 2 else zeros.unsqueeze(0)


def test_layout_by_hand() -> None:
    """Codes from the lowest bit up; bits behind the last code are zero."""
    assert pack(torch.tensor([[-8, -7, 7]], dtype=torch.int8), precision("int4")).tolist() == [[0xF10]]
    assert pack(torch.tensor([[-4, -3, 3]], dtype=torch.int8), precision("int3")).tolist() == [[0b111_001_000]]
    assert pack(torch.tensor([[1, 0, -1, -2]], dtype=torch.int8), precision("int2")).tolist() == [[0b00_01_10_11]]
    eleven = torch.full((1, 11), -4, dtype=torch.int8)
    eleven[0, 10] = 3  # bits 30 to 32: two in the first word, one in the second
    first, second = pack(eleven, precision("int3")).tolist()[0]
    assert (first & (2**32 - 1), second) == (0b11 << 30, 1)


def test_a_slice_of_stored_rows_can_be_read() -> None:
    for name in NAMES:
        form, codes = precision(name), random_codes((6, 50), name, 0)
        packed = pack(codes, form)
        assert torch.equal(unpack(packed[1::2], 50, form), codes[1::2])
        assert torch.equal(unpack(packed[[5, 0]], 50, form), codes[[5, 0]])
        assert torch.equal(pack(codes, form), packed)  # reading changes nothing


def test_reading_bytes_leaves_them_as_they_are() -> None:
    form, codes = precision("int8"), random_codes((3, 5), "int8", 0)
    unpack(codes, 5, form).clone().mul_(2)
    assert torch.equal(codes, random_codes((3, 5), "int8", 0))


def test_ranges_and_groups() -> None:
    assert [code_range(precision(name)) for name in NAMES] == [(-128, 127), (-8, 7), (-4, 3), (-2, 1)]
    assert [largest_code(precision(name)) for name in (*NAMES, "fp8")] == [127, 7, 3, 1, 448]
    assert code_dtype(precision("fp8")).is_floating_point
    assert [group_columns(40, precision(name)) for name in ("int8", "int4", "int4-g64")] == [40, 32, 40]
    scales = torch.tensor([[1.0, 2.0]])
    assert spread_scales(scales, 5, precision("int4-g3")).tolist() == [[1, 1, 1, 2, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_fp8_is_read_as_torch_reads_it(dtype: torch.dtype) -> None:
    every = torch.arange(256).to(torch.uint8).view(FP8)
    finite = torch.isfinite(every.to(torch.float32))
    assert int(finite.sum()) == 254
    found = float_from_fp8(every, dtype)
    assert found.dtype is dtype
    assert torch.equal(found[finite], every.to(dtype)[finite])
