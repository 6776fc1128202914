"""Importance estimators against brute force: one token at a time, formulas written out, no padding and no sampling."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import EquipoiseError
from equipoise.models.layers import find_moe_layers
from equipoise.profiling.calibrate import profile
from equipoise.profiling.forward import negative_log_likelihood
from equipoise.profiling.importance import IMPORTANCE, Context, Observation, make_estimators
from equipoise.profiling.importance.sampling import SampledEstimator, draw
from equipoise.profiling.sequences import Framing, build_rows, make_batches
from equipoise.quantization.formats import round_trip

SIZES = {"tokens": 300, "seq_len": 24, "batch_size": 3}
ALL_TOKENS = {"max_tokens_per_expert": None}


@pytest.fixture(scope="module")
def documents(make_documents):
    return make_documents(9, words=11)


@pytest.fixture(scope="module", params=["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def decoder(request, make_model):
    return request.param, make_model(request.param)


def glu(family, experts, e, x, up=None, down=None):
    """One expert on one token, written out."""
    if family == "gpt_oss":
        up = experts.gate_up_proj[e].T if up is None else up
        down = experts.down_proj[e].T if down is None else down
        both = up @ x + experts.gate_up_proj_bias[e]
        gate, linear = both[0::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
        return down @ ((linear + 1) * gate * torch.sigmoid(1.702 * gate)) + experts.down_proj_bias[e]
    up = experts.gate_up_proj[e] if up is None else up
    down = experts.down_proj[e] if down is None else down
    gate, linear = (up @ x).chunk(2)
    return down @ (torch.nn.functional.silu(gate) * linear)


@torch.no_grad()
def selections(model, tokenizer, documents, **options):
    """For each MoE layer, (input, chosen experts, gate weights, routed output) of every token, rows run one by one."""
    options = SIZES | options
    rows = build_rows(
        documents, tokenizer, Framing.of(tokenizer), scenario="a", tokens=options["tokens"], seq_len=options["seq_len"]
    )
    seen = {layer.index: [] for layer in find_moe_layers(model)}

    def hook(index):
        def keep(module, args, output):
            seen[index].extend(zip(*(t.clone() for t in args), output.clone(), strict=True))

        return keep

    handles = [layer.experts.register_forward_hook(hook(layer.index)) for layer in find_moe_layers(model)]
    for ids in rows.content:
        model(input_ids=torch.from_numpy(ids)[None])
    for handle in handles:
        handle.remove()
    return seen


def measure(model, tokenizer, documents, name, precisions=(), **options):
    options = {name: options} if options else {}
    return profile(
        model, tokenizer, {"a": documents}, importance=[name], importance_options=options, precisions=precisions, **SIZES
    )


@pytest.mark.parametrize(("keep", "tokens", "fraction"), [("lowest", "layer", 0.5), ("highest", "routed", 0.3)])
@torch.no_grad()
def test_wanda_is_the_mean_of_the_kept_scores(decoder, tokenizer, documents, keep, tokens, fraction):
    family, model = decoder
    found = measure(model, tokenizer, documents, "wanda", keep=keep, tokens=tokens, fraction=fraction).importance["wanda"]
    seen = selections(model, tokenizer, documents)
    for layer in find_moe_layers(model):
        for e in range(layer.num_experts):
            squares = np.zeros(32)
            for x, chosen, _, _ in seen[layer.index]:
                if tokens == "layer" or e in chosen:
                    squares += x.double().numpy() ** 2
            weight = layer.experts.gate_up_proj[e].double()
            scores = abs((weight.T if family == "gpt_oss" else weight).numpy()) * np.sqrt(squares)
            count = int(32 * fraction)
            ordered = np.sort(scores, axis=1)
            kept = ordered[:, :count] if keep == "lowest" else ordered[:, -count:]
            assert found[layer.index, e] == pytest.approx(kept.mean(), rel=1e-5)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@torch.no_grad()
def test_gate_norm_is_the_gated_norm_of_the_output(decoder, tokenizer, documents, reduce):
    family, model = decoder
    found = measure(model, tokenizer, documents, "gate_norm", reduce=reduce, **ALL_TOKENS).importance["gate_norm"]
    seen = selections(model, tokenizer, documents)
    for layer in find_moe_layers(model):
        norms = [[] for _ in range(layer.num_experts)]
        for x, chosen, gates, _ in seen[layer.index]:
            for e, g in zip(chosen.tolist(), gates, strict=True):
                norms[e].append(float(g * glu(family, layer.experts, e, x).norm()))
        wanted = [getattr(np, reduce)(n) if n else 0.0 for n in norms]
        assert found[layer.index, : layer.num_experts] == pytest.approx(wanted, rel=1e-4)


@torch.no_grad()
def test_output_error_and_energy_are_those_of_the_outputs(decoder, tokenizer, documents):
    family, model = decoder
    options = ALL_TOKENS | {"energy_tokens": None, "int8_activations": False}
    found = measure(model, tokenizer, documents, "output_error", ("int8", "int4"), **options)
    assert set(found.output_error) == {"int8", "int4-g32"}
    seen = selections(model, tokenizer, documents)
    few = found.source.options["remarks"]["output_error"]["experts_with_few_tokens"]
    for layer in find_moe_layers(model):
        energy = sum(float(y.double().square().sum()) for *_, y in seen[layer.index])
        assert found.output_energy[layer.index] == pytest.approx(energy, rel=1e-4)
        for name in found.output_error:
            error = np.zeros(layer.num_experts)
            up, down = ([m.T for m in s] if family == "gpt_oss" else list(s) for s in stacks(layer.experts))
            rounded = [(round_trip(u, name), round_trip(d, name)) for u, d in zip(up, down, strict=True)]
            for x, chosen, gates, _ in seen[layer.index]:
                for e, g in zip(chosen.tolist(), gates, strict=True):
                    change = glu(family, layer.experts, e, x, *rounded[e]) - glu(family, layer.experts, e, x)
                    error[e] += float(g**2 * change.double().square().sum())
            known = np.setdiff1d(np.arange(layer.num_experts), few.get(str(layer.index), []))
            assert known.size > 1
            assert found.output_error[name][layer.index, known] == pytest.approx(error[known], rel=2e-3)
    score = found.importance["output_error"]
    assert score == pytest.approx(found.relative_error("int4-g32"))


def stacks(experts):
    return experts.gate_up_proj, experts.down_proj


def test_a_sample_estimates_the_same_error_as_all_tokens(make_model, tokenizer, make_documents):
    model, documents = make_model("mixtral"), make_documents(60, words=40)

    def of(**options):
        return profile(
            model, tokenizer, {"a": documents}, tokens=4000, seq_len=32, batch_size=4,
            importance=["output_error"], importance_options={"output_error": options}, precisions=["int4"],
        )  # fmt: skip

    everything, sample = of(**ALL_TOKENS, energy_tokens=None), of(max_tokens_per_expert=256, energy_tokens=1024)
    drawn = sample.source.options["remarks"]["output_error"]["tokens_drawn"]
    assert drawn <= 2 * 4 * 256 < everything.source.options["remarks"]["output_error"]["tokens_drawn"] / 3
    assert sample.output_error["int4-g32"] == pytest.approx(everything.output_error["int4-g32"], rel=0.2)
    assert sample.output_energy == pytest.approx(everything.output_energy, rel=0.2)
    assert not np.array_equal(sample.output_error["int4-g32"], everything.output_error["int4-g32"])


@torch.no_grad()
def test_a_massive_token_does_not_hide_the_error_of_the_other_experts(make_model):
    model = make_model("mixtral")
    layer = find_moe_layers(model)[0]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(400, 32, generator=generator)
    experts = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(400)])
    experts[0] = torch.tensor([3, 1])
    weights = torch.full((400, 2), 0.5)

    def relative(scale):
        hidden[0] *= scale
        context = Context(model, [layer], [None], ("int4",))
        estimator = make_estimators(["output_error"], context, {"output_error": ALL_TOKENS})["output_error"]
        estimator.observe(Observation(0, layer, hidden, experts, weights))
        found = estimator.finish(np.bincount(experts.flatten(), minlength=4)[None], lambda: None, lambda *_: None)
        return found.output_error["int4-g32"][0] / found.output_energy[0], found.remarks["energy_of_massive_tokens"]

    plain, none = relative(1.0)
    spiked, massive = relative(30.0)
    assert not none
    assert list(massive) == ["0"]
    assert spiked[[0, 2]] == pytest.approx(plain[[0, 2]], rel=0.3), "experts without the token look as before"
    assert (spiked[[1, 3]] > 100 * plain[[1, 3]]).all(), "those that made it stand out"


def test_experts_with_few_tokens_get_their_layers_error_per_token(make_model, tokenizer):
    model = make_model("deepseek_v3")
    found = profile(model, tokenizer, {"a": ["the lazy dog"]}, tokens=12, importance=["output_error"], precisions=["int8"])
    few = found.source.options["remarks"]["output_error"]["experts_with_few_tokens"]["0"]
    assert set(few) >= set(np.flatnonzero(found.load[0] == 0))
    error = found.output_error["int8"][0]
    assert (error > 0).all(), "rounding an expert that was not seen is not free"
    known = found.load[0] > 0
    idle = error[few] / np.maximum(found.load[0][few], 1)
    assert idle == pytest.approx(np.full(len(few), idle[0]))
    assert known.any()


@torch.no_grad()
def test_leave_one_out_is_the_loss_without_the_expert(decoder, tokenizer, documents):
    _, model = decoder
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = measure(model, tokenizer, documents, "leave_one_out", tokens=10_000)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    rows = build_rows(documents, tokenizer, Framing.of(tokenizer), scenario="a", tokens=300, seq_len=24)

    def loss():
        total, count = 0.0, 0
        for ids in map(torch.from_numpy, rows.content):
            if len(ids) > 1:
                total += float(model(input_ids=ids[None], labels=ids[None]).loss) * (len(ids) - 1)
                count += len(ids) - 1
        return total / count, count

    base, count = loss()
    remarks = found.source.options["remarks"]["leave_one_out"]
    assert remarks["scored_tokens"] == count
    assert remarks["loss"] == pytest.approx(base, rel=1e-5)
    for layer in find_moe_layers(model):
        for e in range(layer.num_experts):
            # Another way to remove it: its gate weight becomes zero on the way to the experts.
            handle = layer.experts.register_forward_pre_hook(
                lambda module, args, e=e: (args[0], args[1], args[2].masked_fill(args[1] == e, 0.0))
            )
            wanted = loss()[0] - base
            handle.remove()
            assert found.importance["leave_one_out"][layer.index, e] == pytest.approx(wanted, abs=2e-5)


def test_frequency_is_the_share_of_selections(decoder, tokenizer, documents):
    _, model = decoder
    found = measure(model, tokenizer, documents, "frequency")
    assert found.importance["frequency"].sum(1) == pytest.approx(np.ones(len(find_moe_layers(model))))
    assert found.importance["frequency"] * found.load.sum(1, keepdims=True) == pytest.approx(found.load)


@pytest.mark.parametrize("name", ["wanda", "gate_norm", "frequency", "output_error", "leave_one_out"])
def test_encoder_decoder_models_are_measured_in_both_stacks(make_model, tokenizer, documents, name):
    model = make_model("switch")
    found = measure(model, tokenizer, documents, name, precisions=["int8"] if name == "output_error" else ())
    assert [layer.stack for layer in found.model.layers] == ["encoder", "decoder"]
    scores = found.importance[name]
    assert scores.shape == (2, 4)
    assert (scores[found.load > 20] != 0).all()


@torch.no_grad()
def test_leave_one_out_of_an_encoder_decoder_matches_a_zeroed_expert(make_model, tokenizer, documents):
    model = make_model("switch")
    found = measure(model, tokenizer, documents, "leave_one_out", tokens=10_000)
    framing = Framing.of(tokenizer, model.config)
    batches = make_batches(build_rows(documents, tokenizer, framing, scenario="a", tokens=300, seq_len=24), 3)
    base = sum(negative_log_likelihood(model, batch)[0] for batch in batches)
    count = sum(negative_log_likelihood(model, batch)[1] for batch in batches)
    for layer in find_moe_layers(model):
        handle = layer.experts["expert_1"].register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        wanted = (sum(negative_log_likelihood(model, batch)[0] for batch in batches) - base) / count
        handle.remove()
        assert found.importance["leave_one_out"][layer.index, 1] == pytest.approx(wanted, abs=1e-6)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_draws_are_distinct_selections_of_their_expert(data):
    experts, k = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    size = data.draw(st.integers(0, 40))
    ids = np.array(data.draw(st.lists(st.integers(-1, experts), min_size=size * k, max_size=size * k)), np.int64).reshape(-1, k)
    quota = data.draw(st.none() | st.integers(1, 10))
    drawn = list(draw(ids, experts, quota, np.random.default_rng(data.draw(st.integers(0, 9)))))
    assert [d.expert for d in drawn] == [e for e in range(experts) if (ids == e).any()]
    for d in drawn:
        count = int((ids == d.expert).sum())
        assert len(set(zip(d.tokens, d.columns, strict=True))) == d.tokens.size == min(count, quota or count)
        assert (ids[d.tokens, d.columns] == d.expert).all()
        assert d.weight * d.tokens.size == pytest.approx(count)


def test_draws_are_unbiased():
    ids = np.random.default_rng(0).integers(0, 3, (50, 2))
    value = np.random.default_rng(1).random(ids.shape)
    totals = np.zeros(3)
    for seed in range(600):
        for d in draw(ids, 3, 5, np.random.default_rng(seed)):
            totals[d.expert] += d.weight * value[d.tokens, d.columns].sum() / 600
    assert totals == pytest.approx([value[ids == e].sum() for e in range(3)], rel=0.03)


@pytest.mark.parametrize(("total", "measured"), [(1, 1), (5, 5), (16, 16), (17, 16), (1000, 16)])
def test_long_runs_measure_a_bounded_number_of_passes_spread_over_the_run(total, measured):
    context = SimpleNamespace(seed=0, batches=[None] * total)
    estimator = SampledEstimator(context, 256)
    assert len(estimator.steps) == measured
    assert estimator.quota * measured >= 256
    halves = [sum(step < total / 2 for step in estimator.steps), sum(step >= total / 2 for step in estimator.steps)]
    assert abs(halves[0] - halves[1]) <= 2
    assert len(SampledEstimator(context, None).steps) == total


def test_every_estimator_is_described():
    assert IMPORTANCE.names() == ["easy_ep", "frequency", "gate_norm", "leave_one_out", "output_error", "wanda"]
    assert all(entry.summary and entry.source and entry.function.__doc__ for entry in IMPORTANCE)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["wander"], {}, "unknown importance estimator 'wander'.*Did you mean 'wanda'"),
        (["wanda"], {"wanda": {"fractoin": 1}}, "'wanda' has no option 'fractoin'; it has: fraction, keep, tokens"),
        (["frequency"], {"frequency": {"x": 1}}, "has no option 'x'; it has: none"),
        (["frequency"], {"wanda": {}}, "options for 'wanda', which is not among"),
        (["wanda"], {"wanda": {"fraction": 0.0}}, "fraction is 0.0"),
        (["wanda"], {"wanda": {"keep": "middle"}}, "keep is 'middle'; allowed: lowest, highest"),
        (["wanda"], {"wanda": {"tokens": "all"}}, "tokens is 'all'; allowed: layer, routed"),
        (["gate_norm"], {"gate_norm": {"reduce": "max"}}, "reduce is 'max'"),
        (["gate_norm"], {"gate_norm": {"max_tokens_per_expert": 0}}, "max_tokens_per_expert is 0"),
        (["output_error"], {}, "needs the precisions"),
        (["leave_one_out"], {"leave_one_out": {"tokens": 0}}, "tokens is 0"),
    ],
)
def test_unknown_names_and_options_are_refused(make_model, names, options, message):
    model = make_model("mixtral")
    with pytest.raises(EquipoiseError, match=message):
        make_estimators(names, Context(model, find_moe_layers(model), []), options)
