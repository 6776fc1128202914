"""EASY-EP's score against its formula, token by token, and the residual stream that it needs."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from equipoise.artifacts import Profile
from equipoise.models.layers import find_moe_layers
from equipoise.models.recorder import record
from equipoise.models.residual import ResidualStream
from equipoise.profiling.calibrate import profile
from equipoise.profiling.importance import Context, Observation, easy_ep, make_estimators
from equipoise.profiling.loading import load_model, load_tokenizer
from models.architectures import tiny
from models.oracle import inputs_for, padded, sequences
from support import corpus

EASY = ["easy_ep"]


def test_three_tokens_by_hand(monkeypatch):
    """Two experts, width 2; every number below is worked out on paper."""
    output = {0: [[0.0, 5.0], [0.0, 0.0], [-4.0, 0.0]], 1: [[0.0, 2.5], [2.0, 0.0], [0.0, 0.0]]}
    names = {(0.0,): 0, (1.0,): 1, (2.0,): 2}

    def gated(layer, expert, hidden, gates):
        tokens = [names[tuple(row)] for row in hidden[:, :1].tolist()]
        return torch.tensor([output[expert][t] for t in tokens]) * gates[:, None]

    monkeypatch.setattr(easy_ep, "gated_expert", gated)
    layer = SimpleNamespace(index=0, num_experts=2)
    context = Context(None, [layer], [SimpleNamespace(scenario="math")])
    estimator = make_estimators(EASY, context)["easy_ep"]
    hidden = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    residual = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    # Token 0 chose experts 0 and 1, token 1 expert 1 alone, token 2 expert 0 alone; id 2 is no expert.
    experts = torch.tensor([[0, 1], [1, 2], [2, 0]])
    weights = torch.tensor([[0.6, 0.4], [1.0, 0.0], [0.0, 0.5]])
    estimator.observe(Observation(0, layer, hidden, experts, weights, residual))
    found = estimator.finish(np.array([[2, 2]]), lambda: None, lambda *_: None)
    # Token 0: gated outputs (0, 3) and (0, 1) turn (1, 0) into (1, 4). Token 1: (2, 0) turns nothing. Token 2: (-2, 0) turns
    # (1, 0) round, cosine -1.
    turned = 1 - 1 / math.sqrt(17)
    assert found.importance == pytest.approx(np.array([[3 * turned + 2 * 2, 1 * turned]]))
    assert found.by_scenario["math"] == pytest.approx(found.importance)


@pytest.fixture(params=["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def family(request, make_model):
    return make_model(request.param)


@torch.no_grad()
def by_formula(model, ids, token_term=True, norm_term=True):
    """[L, E] sums over one sequence's tokens, from the inputs and outputs of the model's own modules."""
    layers = find_moe_layers(model)
    seen = {layer.index: {} for layer in layers}
    handles = []
    for layer in layers:
        norm = layer.ancestors[-2].post_attention_layernorm
        keep = seen[layer.index]
        handles.append(norm.register_forward_pre_hook(lambda m, a, keep=keep: keep.update(h=a[0][0].clone())))
        handles.append(
            layer.experts.register_forward_hook(lambda m, a, out, keep=keep: keep.update(call=[x.clone() for x in a], out=out))
        )
    model(input_ids=ids[None])
    for handle in handles:
        handle.remove()
    scores = np.zeros((len(layers), max(layer.num_experts for layer in layers)))
    for layer in layers:
        h, (x, chosen, gates), routed = (seen[layer.index][key] for key in ("h", "call", "out"))
        for t in range(len(ids)):
            total = routed.reshape(len(ids), -1)[t]
            s = max(0.0, 1 - float(torch.cosine_similarity(h[t].double(), (h[t] + total).double(), dim=0)))
            for e, g in zip(chosen[t].tolist(), gates[t].tolist(), strict=True):
                alone = layer.experts(x[t : t + 1], torch.full((1, chosen.shape[1]), e), torch.eye(1, chosen.shape[1]))
                c = abs(g) * (float(alone.norm()) if norm_term else 1.0)
                scores[layer.index, e] += c * (s if token_term else 1.0)
    return scores


def measured(model, tokenizer, scenarios, **options) -> Profile:
    return profile(
        model, tokenizer, scenarios, tokens=120, seq_len=64, batch_size=1, importance=EASY,
        importance_options={"easy_ep": options} if options else None,
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"token_term": False}, {"norm_term": False}])
def test_the_score_is_the_formula_on_every_family(family, tokenizer, options):
    text = "the quick brown fox jumps over the lazy dog"
    found = measured(family, tokenizer, {"a": [text]}, **options)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    assert found.importance["easy_ep"] == pytest.approx(by_formula(family, ids, **options), rel=1e-3, abs=1e-6)
    assert (found.importance["easy_ep"] > 0).any()


def test_domains_are_kept_apart_and_mixed_and_survive_a_file(make_model, tokenizer, make_documents, tmp_path):
    model, documents = make_model("mixtral"), make_documents(4, words=9)
    both = measured(model, tokenizer, {"math": documents[:2], "code": documents[2:]})
    apart = [measured(model, tokenizer, {name: part}) for name, part in (("math", documents[:2]), ("code", documents[2:]))]
    score = both.scenario_importance["easy_ep"]
    for row, alone in zip(score, apart, strict=True):
        assert row == pytest.approx(alone.importance["easy_ep"], rel=1e-5)
    wanted = sum(row / row.sum(1, keepdims=True) for row in score)
    assert both.importance["easy_ep"] == pytest.approx(wanted)
    both.save(tmp_path / "x.profile.safetensors")
    again = Profile.load_file(tmp_path / "x.profile.safetensors")
    assert np.array_equal(again.scenario_importance["easy_ep"], score)


def test_an_interrupted_run_resumes_to_the_same_score(make_model, tokenizer, make_documents, tmp_path):
    model, documents = make_model("mixtral"), make_documents(6, words=9)
    whole = measured(model, tokenizer, {"a": documents})
    calls = iter(range(100))

    def stop(module, args, kwargs):
        if next(calls) == 2:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(stop, with_kwargs=True)
    run = {
        "tokens": 120,
        "seq_len": 64,
        "batch_size": 1,
        "importance": EASY,
        "resume_path": tmp_path / "part",
        "save_every": 0.0,
    }
    with pytest.raises(KeyboardInterrupt):
        profile(model, tokenizer, {"a": documents}, **run)
    handle.remove()
    again = profile(model, tokenizer, {"a": documents}, **run)
    assert np.array_equal(again.importance["easy_ep"], whole.importance["easy_ep"])


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("mixtral", "post_attention_layernorm"),
        ("deepseek_v3", "post_attention_layernorm"),
        ("gemma4", "pre_feedforward_layernorm_2"),
        ("cohere2_moe", "input_layernorm"),
        ("flex_olmo", None),
    ],
)
@torch.no_grad()
def test_the_residual_is_what_the_norm_before_the_layer_was_given(name, norm):
    model = tiny(name)
    layers = find_moe_layers(model)
    given, found = {}, {}
    for layer in layers:
        block = next(module for module in reversed(layer.ancestors) if norm is None or hasattr(module, norm))
        if norm is not None:
            getattr(block, norm).register_forward_pre_hook(lambda m, a, i=layer.index: given.update({i: a[0].flatten(0, -2)}))
    stream = ResidualStream(model, layers)
    with record(model) as recorder, stream:
        recorder.add_listener(lambda layer, x, *_: found.update({layer.index: (stream.before(layer, x), x)}))
        model(**inputs_for(model, padded(sequences(), "right")))
    for index, (residual, hidden) in found.items():
        assert torch.equal(residual, hidden if norm is None else given[index])
    assert (len(stream.unseen) == len(layers)) == (norm is None)


def test_a_model_that_is_read_from_its_files_has_the_same_score(tiny_model_dir):
    documents = {"a": corpus(3, 4)}
    whole, streamed = (
        measured(load_model(str(tiny_model_dir), memory=memory), load_tokenizer(str(tiny_model_dir)), documents)
        for memory in (None, 0)
    )
    assert np.array_equal(streamed.importance["easy_ep"], whole.importance["easy_ep"])
