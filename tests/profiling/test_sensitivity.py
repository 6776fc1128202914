from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from equipoise.errors import EquipoiseError
from equipoise.models.layers import expert_matrices, find_moe_layers, gated_expert
from equipoise.precisions import precision
from equipoise.profiling.calibrate import profile
from equipoise.profiling.forward import run_batch
from equipoise.profiling.importance.output_error import RoundedInputs
from equipoise.profiling.importance.sensitivity import choose_probes, first_rows, rounded
from equipoise.profiling.sequences import IGNORED, Framing, build_rows, make_batches
from equipoise.quantization.formats import round_trip

SIZES = {"tokens": 200, "seq_len": 24, "batch_size": 3}


@pytest.fixture(scope="module")
def documents(make_documents):
    return make_documents(9, words=11)


def measure(model, tokenizer, documents, precisions, **options):
    return profile(
        model, tokenizer, {"a": documents}, importance=["output_error"], precisions=precisions,
        importance_options={"output_error": options}, progress=False, **SIZES,
    )  # fmt: skip


def rounded_rows(x):
    step = x.abs().amax(-1, keepdim=True) / 127
    return (x / step).round() * step


@torch.no_grad()
def test_int8_errors_count_the_rounding_of_activations(make_model, tokenizer, documents):
    model = make_model("mixtral")
    both = [measure(model, tokenizer, documents, ("int8", "int4"), int8_activations=on).output_error for on in (True, False)]
    assert both[0]["int8"].sum() > 1.3 * both[1]["int8"].sum()
    assert np.array_equal(both[0]["int4-g32"], both[1]["int4-g32"])


@torch.no_grad()
def test_rounded_inputs_are_those_of_an_int8_product(make_model):
    layer = find_moe_layers(make_model("mixtral"))[0]
    up, down = expert_matrices(layer, 0)
    x = torch.randn(5, up.shape[1])
    with RoundedInputs():
        found = gated_expert(layer, 0, x, torch.ones(5).double(), [up, down])
    gate, linear = (rounded_rows(x) @ up.T).chunk(2, dim=-1)
    wanted = rounded_rows(torch.nn.functional.silu(gate) * linear) @ down.T
    torch.testing.assert_close(found.float(), wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.nn.functional.linear(x, up), x @ up.T)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "switch"])
def test_sensitivity_is_the_divergence_for_each_unit_of_error(make_model, tokenizer, documents, name):
    model = make_model(name)
    before = copy.deepcopy(model.state_dict())
    found = measure(model, tokenizer, documents, ("int8", "int3"), sensitivity_tokens=60)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    layers = find_moe_layers(model)
    relative = {form: found.relative_error(form) for form in found.output_error}
    probes = choose_probes(relative, {form: precision(form) for form in relative})
    rows = build_rows(documents, tokenizer, Framing.of(tokenizer, model.config), scenario="a", tokens=200, seq_len=24)
    batches = first_rows(make_batches(rows, 3), 60)
    for layer, probe in zip(layers, probes, strict=True):
        other = copy.deepcopy(model)
        changed = find_moe_layers(other)[layer.index]
        for expert in range(layer.num_experts):
            for matrix in expert_matrices(changed, expert):
                matrix.copy_(round_trip(matrix, probe))
        total = count = 0.0
        for batch in batches:
            scored = torch.from_numpy(batch.labels != IGNORED)
            p, q = (run_batch(m, batch, all_logits=True).logits[scored].double().log_softmax(-1) for m in (model, other))
            total += float((p.exp() * (p - q)).sum())
            count += int(scored.sum())
        wanted = total / count / relative[probe.name][layer.index].sum()
        assert found.sensitivity[layer.index] == pytest.approx(wanted, rel=0.02, abs=1e-6)


def test_no_sensitivity_unless_asked_for(make_model, tokenizer, documents):
    assert measure(make_model("mixtral"), tokenizer, documents, ("int4",)).sensitivity.size == 0
    with pytest.raises(EquipoiseError, match="sensitivity_tokens is -1; it must be at least 0"):
        measure(make_model("mixtral"), tokenizer, documents, ("int4",), sensitivity_tokens=-1)


def test_weights_come_back_after_an_error(make_model):
    layer = find_moe_layers(make_model("mixtral"))[0]
    before = expert_matrices(layer, 0)[0].clone()

    def fail():
        with rounded(layer, precision("int4")):
            assert not torch.equal(expert_matrices(layer, 0)[0], before)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert torch.equal(expert_matrices(layer, 0)[0], before)


def test_probes_are_neither_too_fine_nor_too_coarse():
    forms = {name: precision(name) for name in ("int8", "int4-g32", "int2-g32", "bf16")}
    errors = {"int8": [[1e-4], [0.09], [0.0]], "int4-g32": [[0.02], [0.8], [0.0]], "int2-g32": [[0.9], [9.0], [0.0]]}
    relative = {name: np.array(value) for name, value in errors.items()}
    assert [None if p is None else p.name for p in choose_probes(relative, forms)] == ["int4-g32", "int8", None]
