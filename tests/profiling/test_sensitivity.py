from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from equipoise.errors import EquipoiseError
from equipoise.models.layers import expert_matrices, find_moe_layers, gated_expert
from equipoise.models.recorder import record
from equipoise.precisions import precision
from equipoise.profiling.calibrate import profile
from equipoise.profiling.forward import run_batch
from equipoise.profiling.importance.output_error import RoundedInputs
from equipoise.profiling.importance.sensitivity import first_rows, sensitivity
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


def squared_errors(model, changed, index, batches):
    """[E] squared error of each expert's gated output in one layer, summed over the tokens of some batches."""
    layer, other = (find_moe_layers(m)[index] for m in (model, changed))
    total = np.zeros(layer.num_experts)
    with record(model) as recorder:

        def listen(seen, hidden, experts, weights, tokens):
            if seen.index != index:
                return
            for expert in range(layer.num_experts):
                rows, columns = ((experts == expert) & tokens.real_T[:, None]).nonzero(as_tuple=True)
                exact, rounded = (
                    gated_expert(one, expert, hidden[rows], weights[rows, columns].double(), expert_matrices(one, expert))
                    for one in (layer, other)
                )
                total[expert] += float((rounded - exact).double().square().sum())

        recorder.add_listener(listen)
        for batch in batches:
            run_batch(model, batch, all_logits=True)
    return total


def divergence(model, changed, batches):
    """KL divergence in nats, summed over predictions."""
    total = 0.0
    for batch in batches:
        scored = torch.from_numpy(batch.labels != IGNORED)
        p, q = (run_batch(m, batch, all_logits=True).logits[scored].double().log_softmax(-1) for m in (model, changed))
        total += float((p.exp() * (p - q)).sum())
    return total


@torch.no_grad()
def rounded_copy(model, index, form, experts):
    other = copy.deepcopy(model)
    layer = find_moe_layers(other)[index]
    for expert in experts:
        for matrix in expert_matrices(layer, expert):
            matrix.copy_(round_trip(matrix.clone(), form))
    return other


@pytest.fixture
def batches(tokenizer, documents):
    def make(model):
        rows = build_rows(documents, tokenizer, Framing.of(tokenizer, model.config), scenario="a", tokens=200, seq_len=24)
        return first_rows(make_batches(rows, 3), 200)

    return make


# The last layer: behind it no router can change its mind, which gradients do not see.
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "switch"])
def test_sensitivity_times_error_is_the_divergence(make_model, batches, name):
    model, form = make_model(name).eval(), precision("int4")
    layers, text = find_moe_layers(model), batches(model)
    index = layers[-1].index
    found = np.mean([sensitivity(model, layers, form, text, seed, advance).nats_LE[index] for seed in range(8)], axis=0)
    whole = rounded_copy(model, index, form, range(layers[index].num_experts))
    error_E = squared_errors(model, whole, index, text)
    assert found[: len(error_E)] @ error_E == pytest.approx(divergence(model, whole, text), rel=0.25)
    most = int(error_E.argmax())
    single = rounded_copy(model, index, form, [most])
    assert found[most] * error_E[most] == pytest.approx(divergence(model, single, text), rel=0.4)


def advance(done, total):
    assert 0 < done <= total


def test_a_profile_holds_it_for_each_unit_of_relative_error(make_model, tokenizer, documents):
    model = make_model("mixtral").eval()
    found = measure(model, tokenizer, documents, ("int8", "int3"), sensitivity_tokens=60)
    rows = build_rows(documents, tokenizer, Framing.of(tokenizer, model.config), scenario="a", tokens=200, seq_len=24)
    text = first_rows(make_batches(rows, 3), 60)
    raw = sensitivity(model, find_moe_layers(model), precision("int3"), text, 0, advance)
    tokens = found.load.sum(1) / 2
    assert found.sensitivity == pytest.approx(raw.nats_LE * (found.output_energy / tokens / raw.predicted_L)[:, None])


def test_the_model_is_left_as_it_was(make_model, batches):
    model = make_model("qwen2_moe").eval()
    for weight in list(model.parameters())[::2]:
        weight.requires_grad_(False)
    wanted = [weight.requires_grad for weight in model.parameters()]
    before = copy.deepcopy(model.state_dict())
    sensitivity(model, find_moe_layers(model), precision("int4"), batches(model), 0, advance)
    assert [weight.requires_grad for weight in model.parameters()] == wanted
    assert all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_expert_without_tokens_gets_its_layers_mean(make_model, batches):
    model = make_model("deepseek_v3").eval()
    layers, text = find_moe_layers(model), batches(model)
    layers[0].ancestors[-1].gate.e_score_correction_bias[3] = -10.0
    with record(model) as recorder:
        for batch in text:
            run_batch(model, batch, all_logits=True)
    load = recorder.counts.sum((0, 1))[0]
    assert load[3] == 0
    found = sensitivity(model, layers, precision("int4"), text, 0, advance).nats_LE[0]
    assert found[load > 0].min() < found[3] < found[load > 0].max()


def test_models_that_cannot_be_differentiated_are_refused(make_model, batches):
    model = make_model("mixtral").eval()
    text = batches(model)
    model.lm_head.register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(EquipoiseError, match="cannot be differentiated"):
        sensitivity(model, find_moe_layers(model), precision("int4"), text, 0, advance)


def test_no_sensitivity_unless_asked_for(make_model, tokenizer, documents):
    assert measure(make_model("mixtral"), tokenizer, documents, ("int4",)).sensitivity.size == 0
    with pytest.raises(EquipoiseError, match="sensitivity_tokens is -1; it must be at least 0"):
        measure(make_model("mixtral"), tokenizer, documents, ("int4",), sensitivity_tokens=-1)
