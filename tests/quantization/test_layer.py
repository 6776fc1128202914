from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from equipoise.errors import EquipoiseError, ModelError
from equipoise.models.layers import MoELayer, expert_hidden, expert_matrices, find_moe_layers, observe, run_expert
from equipoise.precisions import Precision, precision
from equipoise.quantization import hadamard
from equipoise.quantization import layer as module
from equipoise.quantization.formats import quantize
from equipoise.quantization.hessian import second_moment
from equipoise.quantization.layer import quantize_experts
from equipoise.quantization.layer_tokens import Call, LayerTokens
from models.architectures import tiny
from models.oracle import inputs_for, padded, sequences

FAMILIES = [
    "mixtral",
    "gpt_oss",
    "nemotron_h",
    "dbrx",
    "jetmoe",
    "switch_transformers",
    "llama4",
    "longcat_flash",
    "muse_spark",
]


@lru_cache(maxsize=1)
def watched(name: str, repeats: int = 6) -> tuple[MoELayer, list[Call]]:
    """The first MoE layer of a tiny model, and what reached it."""
    model = tiny(name)
    layer = find_moe_layers(model)[0]
    calls: list[Call] = []
    handle = observe(layer, lambda *call: calls.append(tuple(part.detach().clone() for part in call)))
    with torch.no_grad():
        for seed in range(repeats):
            model(**inputs_for(model, padded(sequences((9, 9), seed), "right")))  # of one length: no padding
    handle.remove()
    return layer, calls


def random_calls(
    layer: MoELayer, tokens: int, *, gates: Sequence[float] | None = None, without: Sequence[int] = (), seed: int = 0
) -> list[Call]:
    """Inputs that are correlated, the same way for every seed, and random experts; `without` are never chosen."""
    width = layer.matrices[0][1]
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(0)) / width**0.5
    generator = torch.Generator().manual_seed(seed + 1)
    open_to = torch.tensor([e for e in range(layer.num_experts) if e not in without])
    calls = []
    for size in (tokens // 2, tokens - tokens // 2):
        hidden = torch.randn(size, width, generator=generator) @ mix
        order = torch.rand(size, len(open_to), generator=generator).argsort(-1)
        experts = open_to[order[:, : layer.top_k]]
        weights = torch.rand(size, layer.top_k, generator=generator) if gates is None else torch.full(experts.shape, gates[0])
        calls.append((hidden, experts, weights))
    return calls


def everything(layer: MoELayer, name: str = "int3") -> list[tuple[int, Precision]]:
    return [(expert, precision(name)) for expert in range(layer.num_experts)]


@torch.no_grad()
def objective(layer: MoELayer, calls: Sequence[Call], expert: int, matrices: Sequence[Tensor], power: int) -> float:
    """Gate-weighted squared error of an expert's output on its tokens, computed token by token."""
    exact = [part.detach().float() for part in expert_matrices(layer, expert)]
    total = 0.0
    for hidden, experts, weights in calls:
        rows, columns = torch.nonzero(experts == expert, as_tuple=True)
        error = run_expert(layer, expert, hidden[rows], matrices) - run_expert(layer, expert, hidden[rows], exact)
        total += float((weights[rows, columns].double() ** power * error.double().square().sum(-1)).sum())
    return total


def floats(layer: MoELayer, expert: int, pair: module.Matrices) -> list[Tensor]:
    rows = [len(part) for part in expert_matrices(layer, expert)[:-1]]
    return [*pair[0].dequantize().split(rows), pair[1].dequantize()]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_family_keeps_its_outputs(name: str) -> None:
    layer, calls = watched(name)
    matrices, report = quantize_experts(layer, calls, everything(layer, "int8"), "gptq")
    assert [(r.expert, r.precision) for r in report.experts] == [(e, "int8") for e in range(layer.num_experts)]
    assert sum(r.tokens for r in report.experts) == sum(int((e < layer.num_experts).sum()) for _, e, _ in calls)
    for told in report.experts:
        *ups, down = expert_matrices(layer, told.expert)
        stored_up, stored_down = matrices[told.expert, "int8"]
        assert stored_up.dequantize().shape == (sum(len(up) for up in ups), ups[0].shape[1])
        assert stored_down.dequantize().shape == down.shape
        assert (told.output_error is None) == (told.tokens == 0)
        assert told.output_error is None or told.output_error < 2e-3
        x = calls[0][0][:5].float()
        exact = run_expert(layer, told.expert, x, [part.float() for part in expert_matrices(layer, told.expert)])
        torch.testing.assert_close(
            run_expert(layer, told.expert, x, floats(layer, told.expert, matrices[told.expert, "int8"])),
            exact,
            rtol=0.05,
            atol=float(exact.abs().max()) * 0.03,
        )
    json.dumps(report.to_dict())


def test_the_hidden_activations_are_what_the_last_matrix_gets() -> None:
    layer, calls = watched("mixtral")
    *ups, down = expert_matrices(layer, 1)
    x = calls[0][0]
    torch.testing.assert_close(expert_hidden(layer, 1, x, ups) @ down.T, run_expert(layer, 1, x))


@pytest.mark.parametrize("name", ["int3", "int4-g16-asym", "fp8"])
def test_gptq_errs_less_than_rounding_to_nearest_on_the_tokens(name: str) -> None:
    layer, _ = watched("mixtral")
    calls = random_calls(layer, 600)
    error = {}
    for method in ("rtn", "gptq"):
        matrices, _ = quantize_experts(layer, calls, everything(layer, name), method)
        error[method] = sum(
            objective(layer, calls, e, floats(layer, e, matrices[e, precision(name).name]), 2) for e in range(layer.num_experts)
        )
    assert error["gptq"] < 0.75 * error["rtn"]


def test_the_last_matrix_makes_up_for_the_others() -> None:
    layer, _ = watched("switch_transformers")
    calls, fresh = random_calls(layer, 3000), random_calls(layer, 500, seed=1)
    error = {}
    for refit in (False, True):
        matrices, _ = quantize_experts(layer, calls, everything(layer, "int2"), "gptq", refit=refit)
        error[refit] = sum(
            objective(layer, fresh, e, floats(layer, e, matrices[e, "int2-g32"]), 2) for e in range(layer.num_experts)
        )
    assert error[True] < 0.85 * error[False]  # on tokens that the fit has not seen


def test_rtn_is_what_quantize_stores() -> None:
    layer, calls = watched("mixtral")
    matrices, _ = quantize_experts(layer, calls, [(2, precision("int4"))], "rtn")
    up, down = expert_matrices(layer, 2)
    for stored, weight in zip(matrices[2, "int4-g32"], (up, down), strict=True):
        assert torch.equal(stored.packed, quantize(weight, "int4").packed)


def test_equal_gates_make_all_powers_the_same() -> None:
    layer, _ = watched("mixtral")
    calls = random_calls(layer, 300, gates=[0.37])
    plain, _ = quantize_experts(layer, calls, everything(layer), "gptq")
    for method in ("agq", "agq2"):
        weighted, _ = quantize_experts(layer, calls, everything(layer), method)
        for key, pair in plain.items():
            for one, other in zip(pair, weighted[key], strict=True):
                assert torch.equal(one.packed, other.packed)
                assert torch.equal(one.scales, other.scales)


def test_each_power_serves_its_own_objective_best() -> None:
    layer, _ = watched("mixtral")
    generator = torch.Generator().manual_seed(1)
    calls = []
    for hidden, experts, _ in random_calls(layer, 2000):
        # Gates that tell where an input lies, as a router's do; independent ones would weigh nothing.
        gates = torch.sigmoid(3 * hidden[:, :1]) * torch.rand(experts.shape, generator=generator).add(0.5)
        calls.append((hidden, experts, gates))
    results = {method: quantize_experts(layer, calls, everything(layer), method, shrink=0)[0] for method in ("gptq", "agq2")}
    for power, best, other in ((0, "gptq", "agq2"), (2, "agq2", "gptq")):
        total = {
            method: sum(objective(layer, calls, e, floats(layer, e, pair), power) for (e, _), pair in results[method].items())
            for method in results
        }
        assert total[best] < total[other]


def test_a_gate_on_the_input_is_in_the_input_already() -> None:
    layer, _ = watched("llama4")
    calls = random_calls(layer, 300)
    plain, _ = quantize_experts(layer, calls, everything(layer), "gptq")
    weighted, _ = quantize_experts(layer, calls, everything(layer), "agq2")
    assert all(torch.equal(a.packed, b.packed) for key in plain for a, b in zip(plain[key], weighted[key], strict=True))
    tokens = LayerTokens(layer, calls)
    gated = torch.cat(list(tokens.inputs(0)))
    explicit = torch.cat([h[(e == 0).any(-1)] * w[e == 0][:, None] for h, e, w in calls])
    torch.testing.assert_close(gated, explicit)


def test_experts_with_no_or_few_tokens_are_told_and_follow_the_layer() -> None:
    layer, _ = watched("mixtral")
    calls = random_calls(layer, 400, without=[3, 4])
    hidden, _, weights = calls[0]
    calls.append((hidden[:1], torch.tensor([[4, layer.num_experts]]), weights[:1]))  # one token for expert 4
    matrices, report = quantize_experts(layer, calls, everything(layer), "gptq", shrink=32)
    by_expert = {told.expert: told for told in report.experts}
    assert report.tokens == 401
    assert (by_expert[3].tokens, by_expert[4].tokens) == (0, 1)
    assert (by_expert[3].layer_part, by_expert[4].layer_part) == (1.0, 32 / 33)
    assert by_expert[3].output_error is None
    assert report.few == (3, 4)
    # An expert that served nothing is rounded for the layer's tokens: better on them than to nearest.
    everywhere = [(h, torch.full_like(e, 3)[:, :1], torch.ones(len(h), 1)) for h, e, _ in calls]
    plain, _ = quantize_experts(layer, calls, [(3, precision("int3"))], "rtn")
    assert objective(layer, everywhere, 3, floats(layer, 3, matrices[3, "int3-g32"]), 0) < 0.8 * objective(
        layer, everywhere, 3, floats(layer, 3, plain[3, "int3-g32"]), 0
    )
    # Without the layer's share there is nothing to go by, and the experts are rounded to nearest all the same.
    alone, _ = quantize_experts(layer, calls, [(3, precision("int3"))], "gptq", shrink=0)
    assert torch.isfinite(alone[3, "int3-g32"][0].dequantize()).all()


def test_hessians_are_the_weighted_sums_over_the_experts_own_tokens() -> None:
    layer, _ = watched("mixtral")
    calls = random_calls(layer, 300)
    task = module._Task(layer, LayerTokens(layer, calls), module.METHODS.get("agq"), 0.01, 16, False, False)
    original = module._Original(task, 2)
    mean = sum(h.T @ h for h, _, _ in calls) / 300
    total, gates = torch.zeros_like(mean), torch.cat([w[e == 2] for _, e, w in calls])
    for hidden, experts, weights in calls:
        for t, k in torch.nonzero(experts == 2).tolist():
            total += weights[t, k] / gates.mean() * torch.outer(hidden[t], hidden[t])
    assert original.hessian is not None
    torch.testing.assert_close(original.hessian, (total + 16 * mean) / (len(gates) + 16), rtol=1e-4, atol=1e-5)
    _, inner = task.inner(original, original.matrices[:-1])
    assert inner is not None
    total = torch.zeros_like(inner)
    for hidden, experts, weights in calls:
        for t, k in torch.nonzero(experts == 2).tolist():
            h = expert_hidden(layer, 2, hidden[t : t + 1], original.matrices[:-1])
            total += weights[t, k] / gates.mean() * (h.T @ h)
    everyone = expert_hidden(layer, 2, torch.cat([h for h, _, _ in calls]), original.matrices[:-1])
    torch.testing.assert_close(inner, (total + 16 * second_moment(everyone) / 300) / (len(gates) + 16), rtol=1e-4, atol=1e-6)


def test_workers_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = watched("mixtral")
    calls = random_calls(layer, 300)
    monkeypatch.setattr(module, "CHUNK_EXPERTS", 2)
    threads = torch.get_num_threads()
    results = [quantize_experts(layer, calls, everything(layer), "agq", workers=workers) for workers in (1, 3)]
    torch.set_num_threads(2)
    try:
        results.append(quantize_experts(layer, calls, everything(layer), "agq", workers=2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    for matrices, report in results[1:]:
        assert report == results[0][1]
        for key, pair in matrices.items():
            for one, other in zip(pair, results[0][0][key], strict=True):
                assert torch.equal(one.packed, other.packed)
                assert torch.equal(one.scales, other.scales)


def test_several_formats_of_one_expert() -> None:
    layer, _ = watched("mixtral")
    calls = random_calls(layer, 200)
    forms = [precision(name) for name in ("int8", "int4", "int2")]
    together, report = quantize_experts(layer, calls, [(1, form) for form in forms] + [(0, forms[0])], "gptq")
    assert [(told.expert, told.precision) for told in report.experts] == [(1, f.name) for f in forms] + [(0, "int8")]
    alone, _ = quantize_experts(layer, calls, [(1, forms[1])], "gptq")
    assert torch.equal(together[1, "int4-g32"][1].packed, alone[1, "int4-g32"][1].packed)
    errors = [told.output_error for told in report.experts[:3]]
    assert errors == sorted(errors)


@torch.no_grad()
def test_a_rotated_last_matrix_takes_rotated_activations() -> None:
    layer, _ = watched("mixtral")
    calls = random_calls(layer, 200)
    matrices, report = quantize_experts(layer, calls, everything(layer, "int8"), "gptq", rotate=True)
    assert all(told.output_error is not None and told.output_error < 1e-3 for told in report.experts)
    *ups, down = expert_matrices(layer, 0)
    hidden = expert_hidden(layer, 0, calls[0][0], ups)
    turned = hadamard.rotate(hidden) @ matrices[0, "int8"][1].dequantize().T
    torch.testing.assert_close(turned, hidden @ down.T, rtol=0.05, atol=float((hidden @ down.T).abs().max()) * 0.02)


def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, calls = watched("mixtral")
    int4 = precision("int4")
    with pytest.raises(EquipoiseError, match=r"has experts 0 to 5; expert 6"):
        quantize_experts(layer, calls, [(6, int4)], "gptq")
    with pytest.raises(EquipoiseError, match="'bf16', which is a float format"):
        quantize_experts(layer, calls, [(0, precision("bf16"))], "gptq")
    with pytest.raises(EquipoiseError, match=r"unknown quantization method 'gtpq'.*mean 'gptq'"):
        quantize_experts(layer, calls, [(0, int4)], "gtpq")
    with pytest.raises(EquipoiseError, match="no calibration text reached"):
        quantize_experts(layer, [], [(0, int4)], "gptq")
    with pytest.raises(EquipoiseError, match="shrink is -1"):
        quantize_experts(layer, calls, [(0, int4)], "gptq", shrink=-1)
    broken = [(hidden * float("nan"), experts, weights) for hidden, experts, weights in calls]
    with pytest.raises(EquipoiseError, match="NaN or infinite"):
        quantize_experts(layer, broken, [(0, int4)], "gptq")
    monkeypatch.setattr(hadamard, "block_size", lambda width: 1)
    with pytest.raises(EquipoiseError, match="is odd"):
        quantize_experts(layer, calls, [(0, int4)], "gptq", rotate=True)


def test_weights_that_are_not_numbers_are_refused() -> None:
    layer = find_moe_layers(tiny("mixtral", seed=5))[0]
    with torch.no_grad():
        layer.experts.down_proj[0, 0, 0] = float("inf")
    with pytest.raises(ModelError, match="NaN or infinite"):
        quantize_experts(layer, random_calls(layer, 50), [(0, precision("int4"))], "gptq")
