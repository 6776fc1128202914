"""A layer run from slots of several precisions against a slow loop over selections."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

from equipoise.artifacts import LayerFacts, LayerPlan, ModelFacts
from equipoise.errors import EquipoiseError, ModelError
from equipoise.execution.slots import ExpertSlots, SlotGroup, canonical
from equipoise.precisions import precision
from equipoise.quantization.formats import quantize, round_trip
from execution.helpers import make_plan

EXPERTS, WIDTH, INNER = 4, 40, 24
MIXED = ("fp32", "bf16", "int8", "int4", "int4-g16", "int4-g16-asym", "int3", "int2-g7-asym", "int8-g32-asym", "fp8")


class Tokens:
    """All rows real, positions in order."""

    def __init__(self, rows: int) -> None:
        self.real_T, self.position_T = torch.ones(rows, dtype=torch.bool), torch.arange(rows)


def gate(up: torch.Tensor) -> torch.Tensor:
    a, b = up.chunk(2, dim=-1)
    return F.silu(a) * b


def layer_plan(precisions: tuple[str, ...], extra: int, seed: int) -> LayerPlan:
    layer = LayerFacts(path="x", model_layer=0, num_experts=EXPERTS, top_k=2, matrices=((2 * INNER, WIDTH), (WIDTH, INNER)))
    model = ModelFacts(name="x", model_type="x", dtype="fp32", fingerprint="x", layers=(layer,))
    return make_plan(model, precisions=precisions, extra=extra, seed=seed).layers[0]


def weights(seed: int, biases: bool) -> tuple[list[list[torch.Tensor]], list[list[torch.Tensor]]]:
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=random) / shape[-1] ** 0.5  # noqa: E731
    matrices = [[draw(2 * INNER, WIDTH), draw(WIDTH, INNER)] for _ in range(EXPERTS)]
    vectors = [[draw(2 * INNER), draw(WIDTH)] if biases else [] for _ in range(EXPERTS)]
    return matrices, vectors


def build(plan: LayerPlan, matrices: list, vectors: list) -> ExpertSlots:
    shapes = [(2 * INNER, WIDTH), (WIDTH, INNER)]
    groups = {
        name: SlotGroup(
            precision(name),
            sum(canonical(p) == name for p in plan.precisions),
            shapes,
            native=name == "fp32",
            biases=bool(vectors[0]),
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        for name in dict.fromkeys(canonical(p) for p in plan.precisions)
    }
    slots = ExpertSlots(plan, 0, "decoder", EXPERTS, groups)
    places = iter(slots.order)
    for group in slots.groups:
        for index in range(len(group)):
            expert = plan.experts[next(places)]
            group.write(index, matrices[expert], vectors[expert], "rtn")
    slots.batches = lambda stack, rows: Tokens(rows)
    return slots


def oracle(
    slots: ExpertSlots, matrices: list, vectors: list, x: torch.Tensor, ids: torch.Tensor, w: torch.Tensor
) -> torch.Tensor:
    """One selection at a time, with the slot that dispatch chose, at the precision of that slot."""
    chosen: list[torch.Tensor] = []
    slots.listeners.append(lambda slot_S, real_S: chosen.append(slot_S))
    slots(x, ids, w, gate)
    slots.listeners.clear()
    slot_TK = chosen[0].view(ids.shape)
    out = torch.zeros_like(x)
    for t, k in [(t, k) for t in range(len(x)) for k in range(ids.shape[1])]:
        slot, expert = int(slot_TK[t, k]), int(ids[t, k])
        assert slots.plan.experts[slot] == expert
        up, down = (round_trip(m, slots.plan.precisions[slot]) for m in matrices[expert])
        stored = [v if slots.plan.precisions[slot] == "fp32" else v.bfloat16().float() for v in vectors[expert]]
        up_bias, down_bias = stored or (None, None)
        out[t] += w[t, k] * F.linear(gate(F.linear(x[t], up, up_bias)), down, down_bias)
    return out


@given(st.integers(0, 1000), st.integers(1, 12), st.integers(0, 4), st.booleans(), st.sampled_from(["even", "least_loaded"]))
@settings(max_examples=25, deadline=None)
def test_mixed_precisions_equal_a_loop(seed: int, tokens: int, extra: int, biases: bool, dispatch: str) -> None:
    plan = layer_plan(MIXED, extra, seed)
    matrices, vectors = weights(seed, biases)
    slots = build(plan, matrices, vectors)
    slots.dispatch = dispatch
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, WIDTH, generator=random)
    ids = torch.rand(tokens, EXPERTS, generator=random).topk(2).indices
    w = torch.rand(tokens, 2, generator=random)
    torch.testing.assert_close(slots(x, ids, w, gate), oracle(slots, matrices, vectors, x, ids, w), rtol=1e-4, atol=1e-5)


def test_absent_selections_are_served_by_nobody() -> None:
    matrices, vectors = weights(3, False)
    slots = build(layer_plan(("fp32", "int8"), 2, 3), matrices, vectors)
    x, w = torch.randn(5, WIDTH), torch.rand(5, 2)
    ids = torch.tensor([[0, 1], [2, EXPERTS], [EXPERTS, EXPERTS], [3, 0], [1, 2]])
    out = slots(x, ids, w, gate, partial=True)
    present = ids.clamp_max(EXPERTS - 1)
    w_zero = w.masked_fill(ids == EXPERTS, 0)
    torch.testing.assert_close(out, slots(x, present, w_zero, gate))
    assert not out[2].any()
    nobody = torch.full_like(ids, EXPERTS)
    assert not slots(x, nobody, w, gate, partial=True).any()


def test_bytes_are_those_of_the_plan() -> None:
    plan = layer_plan(MIXED, 4, 11)
    for biases in (False, True):
        layer = LayerFacts(
            path="x",
            model_layer=0,
            num_experts=EXPERTS,
            top_k=2,
            matrices=((2 * INNER, WIDTH), (WIDTH, INNER)),
            vector_elements=biases * (2 * INNER + WIDTH),
        )
        slots = build(plan, *weights(0, biases))
        assert sum(group.nbytes for group in slots.groups) == plan.slot_bytes(layer).sum()


def test_ready_matrices_are_stored_as_they_are() -> None:
    for name in MIXED[2:]:
        matrices, vectors = weights(5, True)
        given = build(layer_plan((name,), 2, 5), matrices, vectors)
        ready = [[quantize(m, name) for m in expert] for expert in matrices]
        stored = build(layer_plan((name,), 2, 5), ready, vectors)
        for key, tensor in given.state_dict().items():
            assert torch.equal(stored.state_dict()[key].view(torch.uint8), tensor.view(torch.uint8)), key
        with pytest.raises(AssertionError, match="matrix for slots of"):
            stored.groups[0].write(0, [quantize(m, "int4-g5") for m in matrices[0]], vectors[0])


def test_storage_keeps_its_format_when_the_model_is_cast() -> None:
    slots = build(layer_plan(MIXED, 4, 11), *weights(0, True))
    before = {name: t.clone() for name, t in slots.state_dict().items()}
    nn.Module.to(slots, torch.float16)
    for name, tensor in slots.state_dict().items():
        if name.startswith("fp32"):
            assert tensor.dtype is torch.float16
        else:
            assert tensor.dtype is before[name].dtype
            assert torch.equal(tensor, before[name])


def test_refusals() -> None:
    slots = build(layer_plan(("fp32",), 2, 3), *weights(3, False))
    slots.dispatch = "evenly"
    with pytest.raises(EquipoiseError, match="Did you mean 'even'"):
        slots(torch.randn(2, WIDTH), torch.tensor([[0, 1], [2, 3]]), torch.rand(2, 2), gate)
    matrices, vectors = weights(3, False)
    matrices[1][0][0, 0] = float("nan")
    for name in MIXED[1:]:
        with pytest.raises(ModelError, match="NaN"):
            build(layer_plan((name,), 0, 3), matrices, vectors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_in_the_models_precision_compute_what_transformers_does(dtype: torch.dtype) -> None:
    config = Qwen2MoeConfig(hidden_size=32, moe_intermediate_size=48, num_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    stock = Qwen2MoeExperts(config).to(dtype)
    for weight in stock.parameters():
        weight.requires_grad_(False).normal_(std=0.2)
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    held = (0, 1, 2, 3, 0, 2)  # with copies
    plan = LayerPlan(experts=held, precisions=(name,) * 6, units=(0, 1, 2, 3, 1, 3), shares=(0.5, 1, 0.5, 1, 0.5, 0.5))
    shapes = [(96, 32), (32, 48)]
    group = SlotGroup(precision(name), 6, shapes, native=True, biases=False, dtype=dtype, device=torch.device("cpu"))
    for slot, expert in enumerate(held):
        group.write(slot, (stock.gate_up_proj[expert], stock.down_proj[expert]), ())
    slots = ExpertSlots(plan, 0, "decoder", 4, {name: group})
    slots.batches = lambda stack, rows: Tokens(rows)
    for tokens in (1, 7, 40):
        x, ids = torch.randn(tokens, 32).to(dtype), torch.rand(tokens, 4).topk(2).indices
        w = torch.rand(tokens, 2).to(dtype)
        got, wanted = slots(x, ids, w, gate), stock(x, ids, w)
        if dtype is torch.bfloat16:
            assert torch.equal(got, wanted)
        else:
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
