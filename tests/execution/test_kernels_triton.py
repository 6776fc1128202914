"""The GPU kernels under Triton's interpreter, on a CPU, and compiled for GPUs that need not be there.

Triton decides at its import whether kernels are interpreted, so this file runs itself in a process of its own for that.
The interpreter has no products of bf16 (it takes their bits for integers): fp16 stands for 16 bits here.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from equipoise.execution.mixed_launch import mixed_experts, stored_for_launch
from equipoise.execution.slot_group import SlotGroup
from equipoise.precisions import precision
from equipoise.quantization.formats import quantize

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed (pip install triton)", allow_module_level=True)

from equipoise.execution import kernels_triton
from equipoise.execution.kernels_triton import BYTES, FLOAT, NIBBLES, Stored, mixed_linear, tiles_of

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_in_the_interpreter starts")


def stored_as(name: str, weight: Tensor) -> tuple[Stored, Tensor]:
    """A format's storage, and the floats that it stands for."""
    if name == "float":
        return Stored(FLOAT, weight), weight
    matrix = quantize(weight, name)
    kind = BYTES if name == "int8" else NIBBLES
    return Stored(kind, matrix.packed, matrix.scales, precision(name).group or 0), matrix.dequantize(torch.float32)


@interpreted
@pytest.mark.parametrize("names", [("int8",), ("int4-g64", "float"), ("float", "int8", "int4")])
@pytest.mark.parametrize(("outputs", "inputs"), [(80, 64), (24, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_mixed_formats_in_one_launch(names: tuple[str, ...], outputs: int, inputs: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    counts, parts, dense = [], [], []
    for number, name in enumerate(names):
        stored, floats = stored_as(name, torch.randn(3, outputs, inputs, generator=generator))
        parts.append(stored)
        dense.append(floats)
        counts += [(5, 0, 18), (0, 1, 2), (3, 3, 0)][number]
    weight, count_P, total = torch.cat(dense), torch.tensor(counts), sum(counts)
    x = torch.randn(7, inputs, generator=generator).to(dtype)
    row_N = torch.randint(0, 7, (total,), generator=generator)
    slot_N = torch.arange(len(counts)).repeat_interleave(count_P)
    wanted = torch.stack([weight[slot].double() @ x[row].double() for slot, row in zip(slot_N, row_N, strict=True)])
    tiles = tiles_of(count_P, total)
    got = mixed_linear(x, row_N, parts, tiles, total)
    assert got.dtype is dtype
    error = float((got.double() - wanted).norm() / wanted.norm())
    assert error < (1e-5 if dtype is torch.float32 else 0.002)
    assert torch.equal(mixed_linear(x[row_N], None, parts, tiles, total), got)


@interpreted
@pytest.mark.parametrize("biases", [False, True])
def test_mixed_formats_as_a_layer(biases: bool) -> None:
    shapes, generator = [(64, 40), (40, 32)], torch.Generator().manual_seed(3)
    groups = []
    for name in ("int4", "fp32", "int8"):
        group = SlotGroup(
            precision(name), 2, shapes, native=name == "fp32", biases=biases, dtype=torch.float32, device=torch.device("cpu")
        )
        for slot in range(2):
            vectors = [torch.randn(shape[0], generator=generator) for shape in shapes] if biases else []
            group.write(slot, [torch.randn(shape, generator=generator) / 6 for shape in shapes], vectors)
        groups.append(group)
    x, row_N, count_P = (
        torch.randn(5, 40, generator=generator),
        torch.tensor([0, 1, 2, 3, 4, 0, 1]),
        torch.tensor([1, 2, 0, 1, 2, 1]),
    )
    got = mixed_experts(groups, x, row_N, count_P, lambda up: up[:, :32] * up[:, 32:])
    parts = [
        group(x, rows, counts, lambda up: up[:, :32] * up[:, 32:])
        for group, rows, counts in zip(groups, row_N.split([3, 1, 3]), count_P.split(2), strict=True)
    ]
    torch.testing.assert_close(got, torch.cat(parts), rtol=1e-4, atol=1e-4)
    assert mixed_experts(groups[1:2], x, row_N[:3], torch.tensor([1, 2]), torch.relu) is None, (
        "floats alone have a kernel of torch's"
    )
    assert mixed_experts([groups[0], groups[0]], x, row_N[:3], torch.tensor([1, 2, 0, 0]), torch.relu) is None


TAKEN = {"int8": True, "int4-g64": True, "bf16": True, "fp32": False, "fp8": False, "int3": False}
TAKEN |= {"int4-g32-asym": False, "int4-g16": False, "int8-g32": False}


@pytest.mark.parametrize(("name", "takes"), TAKEN.items())
def test_formats_that_the_kernels_take(name: str, takes: bool) -> None:
    group = SlotGroup(
        precision(name), 1, [(64, 64), (64, 32)], native=False, biases=False, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    assert (stored_for_launch(group, "up", torch.bfloat16) is not None) == takes


@pytest.mark.parametrize("rows", [1, 4, 16, None])
@pytest.mark.parametrize("counts", [(3, 0, 9, 1), (0, 0, 5), (1,), (16, 17)])
def test_tiles_cover_every_row_once(counts: tuple[int, ...], rows: int | None) -> None:
    tiles = tiles_of(torch.tensor(counts), sum(counts), rows)
    seen = []
    for slot, first, stop in zip(*(t.tolist() for t in (tiles.slot_M, tiles.first_M, tiles.stop_M)), strict=True):
        if slot < len(counts):
            seen += [(slot, row) for row in range(first, min(first + tiles.rows, stop))]
    assert seen == [(slot, row) for row, slot in enumerate(s for s, count in enumerate(counts) for _ in range(count))]


def test_a_launch_takes_each_kind_once() -> None:
    part = Stored(FLOAT, torch.zeros(1, 16, 32))
    with pytest.raises(AssertionError, match="each kind"):
        mixed_linear(torch.zeros(1, 32), None, [part, part], tiles_of(torch.tensor([1, 0]), 1), 1)


@pytest.mark.skipif(INTERPRETED, reason="starts the process that this one is")
def test_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-k",
        "mixed_formats",
        "--no-header",
        "-rN",
        "-o",
        "addopts=",
        "--import-mode=importlib",
        __file__,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "14 passed" in done.stdout, done.stdout


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_compiles_without_a_gpu(capability: int, dtype: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    kernel = kernels_triton._mixed_kernel
    pointers = {"x": dtype, "row": "i64", "y": dtype, "weight": dtype, "codes": "i8", "code_scales": "bf16", "pairs": "u8"}
    pointers |= {
        "pair_scales": "bf16",
        "kind_of": "i32",
        "place_of": "i32",
        "slot_of": "i64",
        "first_of": "i64",
        "stop_of": "i64",
    }
    fixed = {"INDEXED": True, "FLOATS": True, "CODES": True, "PAIRS": True, "STEPS": 1}
    fixed |= {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": kernels_triton.BLOCK_INPUTS}
    signature = {name: f"*{pointers[name]}" if name in pointers else "i32" for name in kernel.arg_names if name not in fixed}
    signature |= dict.fromkeys(fixed, "constexpr")
    source = triton.compiler.ASTSource(kernel, signature, fixed)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert "mma" in compiled.asm["ptx"], "the products do not use tensor cores"
    assert len(compiled.asm["cubin"]) > 0
