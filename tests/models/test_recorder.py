from __future__ import annotations

import numpy as np
import pytest
import torch

from equipoise.errors import RecordingError
from equipoise.models.layers import find_moe_layers
from equipoise.models.recorder import record
from models.architectures import tiny
from models.oracle import count, inputs_for, padded, sequences, watch_routers


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    return tiny("qwen2_moe")


def generate(model, batch, new_tokens=4):
    return model.generate(**batch, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)


def test_the_model_computes_the_same_while_recorded(model):
    batch = padded(sequences(), "left")
    before = model(**batch).logits
    with record(model, trace=True):
        assert torch.equal(model(**batch).logits, before)


def test_prefill_and_decode_are_told_apart(model):
    batch = padded(sequences(), "left")
    with record(model) as recorder:
        generate(model, batch)
    layers = [2 * (7 + 4), 2 * (2 * 3)]  # top-2; the last of the four new tokens is not run
    assert recorder.counts.sum((0, 3)).tolist() == [[layers[0]] * 2, [layers[1]] * 2]
    assert recorder.tokens_by_layer.tolist() == [[[11, 11], [6, 6]]]
    assert recorder.tokens.tolist() == [17]


def test_generation_counts_what_one_pass_over_the_result_counts(model):
    batch = padded(sequences((5,)), "left")
    with record(model) as generated:
        ids = generate(model, batch)
    with record(model) as whole:
        model(ids[:, :-1])
    assert (generated.counts.sum(1) == whole.counts.sum(1)).all()
    assert (generated.transitions == whole.transitions).all()
    assert (generated.coactivation == whole.coactivation).all()
    assert np.allclose(generated.gate_mass, whole.gate_mass, atol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "jamba", "llama4", "switch_transformers"])
def test_generation_with_padding_equals_each_sequence_alone(name):
    model, texts = tiny(name), sequences()
    with record(model) as together:
        generate(model, padded(texts, "left"))
    with record(model) as alone:
        for text in texts:
            generate(model, padded([text], "left"))
    assert (together.counts == alone.counts).all()


@pytest.mark.parametrize(
    "name", ["olmoe", "deepseek_v3", "gpt_oss", "llama4", "jetmoe", "dbrx", "switch_transformers", "qwen3_next"]
)
def test_models_in_bfloat16(name):
    model, batch = tiny(name, dtype=torch.bfloat16), padded(sequences(), "right")
    layers = find_moe_layers(model)
    assert {layer.dtype for layer in layers} == {"bf16"}
    with record(model) as recorder, watch_routers(model) as chosen:
        model(**inputs_for(model, batch))
    assert (recorder.counts.sum((0, 1)) == count(layers, chosen, batch)).all()


def test_trace_and_sums_tell_the_same(model):
    with record(model, scenarios=("a", "b"), trace=True) as recorder:
        model(**padded(sequences(), "left"))
        recorder.scenario = "b"
        generate(model, padded(sequences((3, 6), seed=5), "left"))
    trace = recorder.trace["decoder"]
    size_L, size_T, _ = trace.experts_LTK.shape
    counts = np.zeros_like(recorder.counts)
    mass = np.zeros_like(recorder.gate_mass)
    transitions, pairs = np.zeros_like(recorder.transitions), np.zeros_like(recorder.coactivation)
    for layer in range(size_L):
        for token in range(size_T):
            scenario, phase = trace.scenario_T[token], int(trace.decode_T[token])
            for k, expert in enumerate(trace.experts_LTK[layer, token]):
                counts[scenario, phase, layer, expert] += 1
                mass[scenario, layer, expert] += trace.weights_LTK[layer, token, k]
                for other in trace.experts_LTK[layer, token]:
                    pairs[layer, expert, other] += 1
                for after in trace.experts_LTK[layer + 1, token] if layer + 1 < size_L else ():
                    transitions[layer, expert, after] += 1
    assert (counts == recorder.counts).all()
    assert np.allclose(mass, recorder.gate_mass)
    assert (transitions == recorder.transitions).all()
    assert (pairs == recorder.coactivation).all()
    assert (pairs.diagonal(axis1=1, axis2=2) == counts.sum((0, 1))).all()
    assert trace.position_T[:11].tolist() == [*range(7), *range(4)]
    assert trace.sequence_T[:11].tolist() == [0] * 7 + [1] * 4
    assert trace.forward_T.max() == 4
    assert (recorder.tokens == [11, 9 + 6]).all()


def test_a_trace_is_kept_only_on_request(model):
    with record(model) as recorder:
        model(**padded(sequences(), "left"))
    with pytest.raises(RecordingError, match="trace=True"):
        _ = recorder.trace


def test_windows_are_the_counts_in_order_of_time(model):
    texts = sequences((5, 5, 5, 5), seed=3)
    with record(model, scenarios=("a", "b"), window_tokens=8) as recorder:
        for i, text in enumerate(texts):
            recorder.scenario = "ab"[i % 2]
            model(text[None])
            model(text[None])
    assert recorder.window_scenario.tolist() == [0, 1, 0, 1]
    for window, text in zip(recorder.windows, texts, strict=True):
        with record(model) as once:
            model(text[None])
        assert (window == 2 * once.counts[0, 0]).all()


def test_layers_of_different_widths_share_arrays(model):
    first, second = find_moe_layers(model)
    narrow = tiny("qwen2_moe")
    block = narrow.model.layers[1].mlp
    with torch.no_grad():  # four experts and top-1 in the second layer
        block.gate.weight = torch.nn.Parameter(block.gate.weight[:4].clone())
        block.gate.top_k = 1
        for name in ("gate_up_proj", "down_proj"):
            setattr(block.experts, name, torch.nn.Parameter(getattr(block.experts, name)[:4].clone()))
        block.experts.num_experts = 4
    batch = padded(sequences(), "left")
    with record(narrow) as recorder, watch_routers(narrow) as chosen:
        narrow(**batch)
    assert [(layer.num_experts, layer.top_k) for layer in recorder.layers] == [(6, 2), (4, 1)]
    assert (recorder.counts.sum((0, 1)) == count(recorder.layers, chosen, batch)).all()
    assert recorder.counts.sum((0, 1, 3)).tolist() == [22, 11]
    assert recorder.transitions.sum() == 22
    assert recorder.coactivation.sum((1, 2)).tolist() == [44, 11]
    assert recorder.unrouted.sum() == 0
    assert (first.num_experts, second.num_experts) == (6, 6)


def test_listeners_get_every_row_and_which_are_real(model):
    calls = []
    with record(model) as recorder:
        recorder.add_listener(lambda *call: calls.append(call))
        model(**padded(sequences(), "left"))
    assert [call[0].index for call in calls] == [0, 1]
    layer, hidden, experts, weights, batch = calls[0]
    assert hidden.shape == (14, 32)
    assert experts.shape == weights.shape == (14, 2)
    real = experts[batch.real_T].flatten().bincount(minlength=6)
    assert real.tolist() == recorder.counts[0, 0, layer.index].tolist()


def test_tokens_over_capacity_are_kept_apart():
    model = tiny("switch_transformers")
    for layer in find_moe_layers(model):
        layer.ancestors[-1].router.expert_capacity = 1
    with record(model) as recorder:
        model(**inputs_for(model, padded(sequences((9,)), "right")))
    for layer, served, dropped in zip(recorder.layers, recorder.counts.sum((0, 1)), recorder.unrouted[0], strict=True):
        assert served.max() == 1, "one token for each expert of one sequence"
        assert served.sum() + dropped == 9 * layer.top_k
        assert dropped > 0


def test_nllb_over_capacity():
    model = tiny("nllb_moe")
    for layer in find_moe_layers(model):
        layer.ancestors[-1].router.moe_eval_capacity_token_fraction = 0.2
    batch = inputs_for(model, padded(sequences((10,)), "right"))
    with record(model) as recorder, watch_routers(model) as chosen:
        model(**batch)
    assert (recorder.counts.sum((0, 1)) == count(recorder.layers, chosen, batch)).all()
    assert recorder.unrouted.sum() > 0


def test_a_skipped_token_is_not_a_token_of_expert_0():
    model = tiny("zaya")
    for layer in find_moe_layers(model):
        layer.ancestors[-1].gate.balancing_biases[-1] = 10.0  # the router prefers to skip
    with record(model) as recorder:
        model(**padded(sequences(), "right"))
    assert recorder.counts.sum() == 0
    assert recorder.unrouted.tolist() == [[11, 11]]


def test_scenarios_must_be_known(model):
    with record(model, scenarios=("a",)) as recorder:
        model(torch.zeros(1, 2, dtype=torch.long))
        with pytest.raises(RecordingError, match="unknown scenario 'b'; this recorder was made for: a"):
            recorder.scenario = "b"


def test_a_recorder_that_saw_nothing_says_so(model):
    with pytest.raises(RecordingError, match="saw no tokens"), record(model):
        pass


def test_a_batch_of_padding_alone_is_nothing(model):
    ids = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(RecordingError, match="saw no tokens"), record(model):
        model(ids, attention_mask=torch.zeros_like(ids))


def test_a_layer_that_is_not_called_is_noticed():
    skipping = tiny("qwen2_moe")
    skipping.model.layers[1].mlp.forward = lambda hidden: hidden
    with pytest.raises(RecordingError, match=r"layers.1.mlp.experts was not called"), record(skipping):
        skipping(torch.zeros(1, 2, dtype=torch.long))


def test_other_selections_than_top_k_are_noticed():
    model = tiny("qwen2_moe")
    recorder = record(model)
    model.model.layers[0].mlp.gate.top_k = 3
    with pytest.raises(RecordingError, match=r"layers.0.mlp.experts was sent 3 experts a token, expected top-2"), recorder:
        model(torch.zeros(1, 2, dtype=torch.long))


def test_ids_of_no_expert_are_noticed():
    model = tiny("qwen2_moe")

    def send_elsewhere(module, args, output):
        logits, weights, ids = output
        return logits, weights, torch.full_like(ids, 6)

    model.model.layers[1].mlp.gate.register_forward_hook(send_elsewhere)
    model.set_experts_implementation("eager")  # its loop leaves the id past the last alone
    with pytest.raises(RecordingError, match=r"22 expert ids outside 0..5"), record(model) as recorder:
        model(**padded(sequences(), "left"))
    assert recorder.counts[0, 0, 1].sum() == 0


def test_the_absent_index_of_expert_parallelism_is_not_counted():
    model = tiny("qwen2_moe")

    def send_elsewhere(module, args, output):
        logits, weights, ids = output
        ids, weights = ids.clone(), weights.clone()
        ids[:, 1], weights[:, 1] = 6, 0
        return logits, weights, ids

    for layer in find_moe_layers(model):
        layer.experts._is_expert_parallel = True
        layer.ancestors[-1].gate.register_forward_hook(send_elsewhere)
    with record(model) as recorder:
        model(**padded(sequences(), "left"))
    assert recorder.counts.sum((0, 1, 3)).tolist() == [11, 11]
    assert recorder.unrouted.tolist() == [[11, 11]]


def test_a_failed_forward_leaves_no_trace(model):
    batch = padded(sequences(), "left")
    failing = True

    def fail(module, args):
        if failing:
            raise ValueError("out of memory")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    try:
        with record(model) as recorder:
            with pytest.raises(ValueError, match="out of memory"):
                model(**batch)
            failing = False
            model(**batch)
    finally:
        handle.remove()
    assert recorder.tokens.tolist() == [11]
    assert recorder.counts.sum((0, 1, 3)).tolist() == [22, 22]


def test_the_error_of_the_model_is_not_hidden_by_the_check(model):
    with pytest.raises(KeyError), record(model):
        raise KeyError


def test_resuming_gives_what_one_run_gives(model):
    texts = sequences((5, 6, 7), seed=9)
    options = {"scenarios": ("a", "b"), "window_tokens": 4}

    def run(recorder, part):
        for i, text in part:
            recorder.scenario = "ab"[i % 2]
            model(text[None])

    with record(model, **options) as once:
        run(once, enumerate(texts))
    with record(model, **options) as first:
        run(first, [(0, texts[0])])
    with record(model, **options) as second:
        second.load_state_dict(first.state_dict())
        run(second, [(1, texts[1]), (2, texts[2])])
    assert {a.dtype.kind for a in second.state_dict().values()} <= {"i", "f"}
    for mine, other in zip(once.state_dict().values(), second.state_dict().values(), strict=True):
        assert np.allclose(mine, other)
    assert (once.windows == second.windows).all()


def test_resuming_from_other_options_is_refused(model):
    with record(model, scenarios=("a", "b")) as first:
        model(torch.zeros(1, 2, dtype=torch.long))
    with record(model) as second:
        model(torch.zeros(1, 2, dtype=torch.long))
        with pytest.raises(RecordingError, match="cannot resume: 'counts'"):
            second.load_state_dict(first.state_dict())


def test_memory_does_not_grow_with_tokens(model):
    with record(model, window_tokens=2, max_windows=4) as recorder:
        for _ in range(5):
            model(torch.zeros(1, 4, dtype=torch.long))
        early = sum(a.nbytes for a in recorder.state_dict().values())
        window = recorder.windows[0].nbytes
        for _ in range(60):
            model(torch.zeros(1, 4, dtype=torch.long))
    assert sum(a.nbytes for a in recorder.state_dict().values()) <= early + 2 * window
    assert len(recorder.windows) <= 5
    assert recorder.windows.sum() == recorder.counts.sum()


def test_no_hooks_remain(model):
    hooks = lambda: sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())  # noqa: E731
    before = hooks()
    with record(model):
        assert hooks() > before
        model(torch.zeros(1, 2, dtype=torch.long))
    assert hooks() == before
