"""Storage that a kernel lays out anew comes back bit for bit, and every path gives the product of what is stored."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from equipoise.artifacts import ModelFacts
from equipoise.execution import kernels, slot_group
from equipoise.execution.apply import apply_plan
from equipoise.execution.checkpoint import load, save_balanced
from equipoise.execution.kernels_int8 import has_int8_kernel
from equipoise.execution.kernels_nibbles import has_nibble_kernel
from equipoise.execution.slot_group import SlotGroup
from equipoise.execution.slots import slots_of
from equipoise.precisions import precision
from equipoise.quantization.formats import round_trip
from execution.helpers import make_plan

SLOTS, WIDTH, INNER = 3, 64, 96
COUNTS = torch.tensor([2, 0, 7])
QUANTIZED = ("int8", "int8-g32", "int4-g32", "int4-g32-asym", "int3", "int2", "fp8")


@pytest.fixture(autouse=True)
def every_size_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_group, "LARGE_ELEMENTS", 0)


def gate(up: Tensor) -> Tensor:
    first, second = up.chunk(2, dim=-1)
    return F.silu(first) * second


def make(name: str, *, biases: bool = False, dtype: torch.dtype = torch.float32) -> tuple[SlotGroup, list[list[Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(2 * INNER, WIDTH), (WIDTH, INNER)]
    group = SlotGroup(
        precision(name), SLOTS, shapes, native=False, biases=biases, dtype=dtype, device=torch.device("cpu")
    )  # fmt: skip
    matrices = [[torch.randn(shape, generator=generator) / shape[1] ** 0.5 for shape in shapes] for _ in range(SLOTS)]
    vectors = [[torch.randn(shape[0], generator=generator).bfloat16() for shape in shapes] if biases else [] for _ in matrices]
    for slot, (pair, pair_of_vectors) in enumerate(zip(matrices, vectors, strict=True)):
        group.write(slot, pair, pair_of_vectors)
    group.int8_activations = True
    return group, matrices


def packs(name: str) -> bool:
    return (name == "int8" and has_int8_kernel()) or (name[:4] in ("int4", "int3", "int2") and has_nibble_kernel())


def run(group: SlotGroup, x: Tensor) -> Tensor:
    row_N = torch.tensor([0, 1, 3, 0, 1, 2, 3, 4, 5])
    return group(x, row_N, COUNTS, gate)


def is_packed(group: SlotGroup) -> bool:
    return any(tensor.device.type == "meta" for tensor in group.buffers())


@pytest.mark.parametrize("name", [*QUANTIZED, "bf16", "fp16"])
@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_path_multiplies_what_is_stored(name: str, rounded: bool, dtype: torch.dtype) -> None:
    group, matrices = make(name, biases=True, dtype=dtype)
    group.int8_activations = rounded
    x = torch.randn(6, WIDTH).to(dtype)
    got = run(group, x)
    assert got.dtype is dtype
    wanted = []
    for slot, row in zip([0, 0, 2, 2, 2, 2, 2, 2, 2], [0, 1, 3, 0, 1, 2, 3, 4, 5], strict=True):
        up, down = (round_trip(matrix, name) for matrix in matrices[slot])
        hidden = gate(up @ x[row].float() + group.up_bias[slot].float())
        wanted.append(down @ hidden + group.down_bias[slot].float())
    error = float((got.float() - torch.stack(wanted)).norm() / torch.stack(wanted).norm())
    exact = dtype is torch.float32 and not rounded
    assert error < (1e-5 if exact else 0.02)
    assert is_packed(group) == (packs(name) and (rounded or (dtype is torch.bfloat16 and name != "int8")))


@pytest.mark.parametrize("name", QUANTIZED)
def test_storage_comes_back_bit_for_bit(name: str) -> None:
    group, _ = make(name)
    before, nbytes = {key: tensor.clone() for key, tensor in group.state_dict().items()}, group.nbytes
    x = torch.randn(6, WIDTH)
    first = run(group, x)
    assert is_packed(group) == packs(name)
    assert group.nbytes == nbytes
    twin = copy.deepcopy(group)
    for other in (group, twin):
        after = other.state_dict()
        assert not is_packed(other)
        assert list(after) == list(before)
        for key, tensor in after.items():
            assert tensor.dtype is before[key].dtype
            assert tensor.device.type == "cpu"
            assert torch.equal(tensor.view(torch.uint8), before[key].view(torch.uint8))
        assert torch.equal(run(other, x), first)


@pytest.mark.parametrize("name", ["int8", "int4-g32"])
def test_storage_is_put_back_before_it_changes(name: str) -> None:
    group, matrices = make(name)
    x = torch.randn(6, WIDTH)
    run(group, x)
    group.write(2, matrices[0], ())
    other, _ = make(name)
    for slot in range(SLOTS):
        other.write(slot, matrices[0 if slot == 2 else slot], ())
    assert torch.equal(run(group, x), run(other, x))
    state = make(name)[0].state_dict()
    group.load_state_dict(state)
    assert torch.equal(run(group, x), run(make(name)[0], x))
    group.half()
    assert group.state_dict()["up_scales"].dtype is torch.bfloat16
    group.int8_activations = False
    run(group, x)
    assert not is_packed(group)


@pytest.mark.parametrize("name", ["int8", "int4-g32"])
def test_without_kernels_weights_are_converted(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    group, _ = make(name)
    x = torch.randn(6, WIDTH)
    fast = run(group, x)
    monkeypatch.setattr(slot_group, "has_int8_kernel", lambda: False)
    monkeypatch.setattr(slot_group, "has_nibble_kernel", lambda: False)
    slow = run(group, x)
    assert not is_packed(group)
    assert float((fast - slow).norm() / slow.norm()) < 0.02


def test_without_a_unit_for_bf16_many_rows_are_computed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(2 * INNER, WIDTH), (WIDTH, INNER)]
    group = SlotGroup(
        precision("bf16"), 3, shapes, native=True, biases=False, dtype=torch.bfloat16, device=torch.device("cpu")
    )  # fmt: skip
    for slot in range(SLOTS):
        group.write(slot, [torch.randn(shape) / 8 for shape in shapes], ())
    x, used = torch.randn(6, WIDTH).bfloat16(), []
    with_unit = run(group, x)
    monkeypatch.setattr(kernels, "has_bfloat16_unit", lambda: False)
    monkeypatch.setattr(slot_group, "FEW_ROWS", 1)
    linear = kernels.ConvertedKernel.linear
    monkeypatch.setattr(kernels.ConvertedKernel, "linear", lambda self, *a: used.append(self.dtype) or linear(self, *a))
    without = run(group, x)
    assert used == [torch.float32, torch.float32]
    assert without.dtype is torch.bfloat16
    assert float((with_unit.float() - without.float()).norm() / without.float().norm()) < 0.01


def test_offloaded_storage_stays_where_it_is() -> None:
    group, _ = make("int8")
    group._hf_hook = object()  # as accelerate marks modules whose storage it moves
    run(group, torch.randn(6, WIDTH))
    assert not is_packed(group)


def test_small_matrices_are_computed_in_the_dtype_of_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_group, "LARGE_ELEMENTS", 1 << 40)
    x = torch.randn(6, WIDTH)
    for name in QUANTIZED:
        group, _ = make(name)
        got = run(group, x)
        group.int8_activations = False
        assert torch.equal(got, run(group, x))


def test_forwards_in_several_threads_pack_once() -> None:
    group, _ = make("int8")
    x = torch.randn(6, WIDTH)
    wanted = run(copy.deepcopy(group), x)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: run(group, x), range(8)):
            assert torch.equal(got, wanted)


@pytest.mark.skipif(not has_int8_kernel(), reason="this CPU has no int8 dot-product instructions")
def test_a_packed_model_saves_the_same_file(fresh: Callable[[], PreTrainedModel], facts: ModelFacts, tmp_path: Path) -> None:
    model = apply_plan(fresh(), make_plan(facts, precisions=("int8", "fp32")))
    save_balanced(model, None, tmp_path / "before")
    tokens = torch.arange(3, 12)[None]
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    assert any(is_packed(group) for slots in slots_of(model) for group in slots.groups)
    save_balanced(model, None, tmp_path / "after")
    before, after = ((tmp_path / name / "equipoise.safetensors").read_bytes() for name in ("before", "after"))
    assert before == after
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "after")(input_ids=tokens).logits, logits)
