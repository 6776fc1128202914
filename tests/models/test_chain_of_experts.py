"""Chain-of-Experts: one step is a plain MoE; several are recorded as they were, and are planned, saved and loaded."""

from __future__ import annotations

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from equipoise.artifacts import Profile
from equipoise.errors import EquipoiseError, RecordingError
from equipoise.execution.apply import apply_plan
from equipoise.execution.layerwise import Calibration, quantize_model
from equipoise.execution.meter import SlotMeter
from equipoise.models.layers import find_moe_layers, model_facts
from equipoise.models.recorder import record
from equipoise.planning.methods import make_plan
from equipoise.planning.uniform import uniform_plan
from equipoise.profiling.calibrate import profile
from equipoise.profiling.loading import load_model
from equipoise.profiling.sequences import Batch
from recipes_support import tiny_recipe_model
from support import corpus

IDS = torch.randint(2, 48, (2, 9), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(IDS).index_put((torch.tensor([1, 1]), torch.tensor([7, 8])), torch.tensor(0))


@pytest.fixture(scope="module")
def chain():
    return tiny_recipe_model("chain_of_experts").eval()


def test_one_step_equals_the_plain_model_bit_for_bit():
    plain = tiny_recipe_model("qwen3_moe", norm_topk_prob=False).eval()
    chain = tiny_recipe_model("chain_of_experts", steps=1).eval()
    state = {name.replace("mlp.gate.weight", "mlp.gate.0.weight"): value for name, value in plain.state_dict().items()}
    assert chain.load_state_dict(state) == ([], [])
    with torch.no_grad():
        assert torch.equal(chain(IDS).logits, plain(IDS).logits)


def test_a_step_more_is_a_router_more():
    sizes = [sum(p.numel() for p in tiny_recipe_model("chain_of_experts", steps=steps).parameters()) for steps in (1, 2, 3)]
    assert sizes[1] - sizes[0] == sizes[2] - sizes[1] == 2 * 8 * 32


def test_a_layer_follows_the_formula(chain):
    """arXiv:2506.18945 section 3: x_t = x_{t-1} + sum_i g_{t,i} E_i(x_{t-1}), here of the normed x_{t-1}."""
    layer = chain.model.layers[0]
    x_TD = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    found = x_TD[None].clone()
    with torch.no_grad():
        for step in range(2):
            found = found + layer.mlp(layer.post_attention_layernorm(found), step)
        for step in range(2):
            normed_TD = layer.post_attention_layernorm(x_TD)
            added_TD = torch.zeros_like(x_TD)
            for token, probs_E in enumerate((normed_TD @ layer.mlp.gate[step].weight.T).softmax(-1)):
                for expert in probs_E.topk(2).indices.tolist():
                    gate, up = (layer.mlp.experts.gate_up_proj[expert] @ normed_TD[token]).chunk(2)
                    made = layer.mlp.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                    added_TD[token] += probs_E[expert] * made
            x_TD = x_TD + added_TD
    torch.testing.assert_close(found[0], x_TD, atol=1e-5, rtol=1e-4)


def test_the_cache_changes_nothing(chain):
    with torch.no_grad():
        whole = chain(IDS, use_cache=False).logits
        first = chain(IDS[:, :5], use_cache=True)
        rest = chain(IDS[:, 5:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), whole, atol=1e-5, rtol=1e-4)


def test_several_events_are_recorded_as_a_brute_force_count_has_them(chain):
    heard = []
    handles = [
        gate.register_forward_hook(lambda module, args, out: heard.append((out[2].numpy(), out[1].detach().numpy())))
        for layer in chain.model.layers
        for gate in layer.mlp.gate
    ]
    with torch.no_grad(), record(chain, trace=True) as recorder:
        chain(IDS, attention_mask=MASK)
    for handle in handles:
        handle.remove()
    real = MASK.flatten().bool().numpy()
    events = [(ids[real], weights[real]) for ids, weights in heard]  # layer 0 step 0, layer 0 step 1, layer 1 step 0, ...
    (trace,) = recorder.trace.values()
    assert trace.events.tolist() == [2, 2]
    for layer in range(2):
        ids = np.hstack([events[2 * layer + step][0] for step in range(2)])
        assert (trace.experts_LTK[layer] == ids).all()
        assert np.allclose(trace.weights_LTK[layer], np.hstack([events[2 * layer + step][1] for step in range(2)]))
        assert recorder.counts[0, 0, layer].tolist() == np.bincount(ids.flatten(), minlength=8).tolist()
    moved, both = np.zeros((8, 8), int), np.zeros((2, 8, 8), int)
    for token in range(real.sum()):
        for i in events[1][0][token]:  # the last event of a layer, and the first of the next
            for j in events[2][0][token]:
                moved[i, j] += 1
        for layer in range(2):
            for step in range(2):
                chosen = events[2 * layer + step][0][token]
                for i in chosen:
                    both[layer, i, chosen] += 1
    assert (recorder.transitions[0] == moved).all()
    assert (recorder.coactivation == both).all()
    assert (np.diagonal(recorder.coactivation, axis1=1, axis2=2) == recorder.counts.sum((0, 1))).all()
    assert recorder.tokens.tolist() == [real.sum()]


@pytest.mark.parametrize(("told", "message"), [(1, "called twice"), (3, "was not called")])
def test_a_block_that_calls_its_experts_otherwise_than_it_says_is_noticed(chain, told, message):
    wrong = copy.deepcopy(chain)
    wrong.model.layers[1].mlp.routing_events = told
    with pytest.raises(RecordingError, match=message), torch.no_grad(), record(wrong):
        wrong(IDS)


def test_what_is_planned_knows_all_events_together(chain):
    layer = find_moe_layers(chain)[0]
    assert (layer.top_k, layer.events, layer.num_experts) == (4, 2, 8)
    assert layer.facts.top_k == 4


def test_it_runs_from_slots_and_the_meter_counts_every_event(chain):
    plan = uniform_plan(model_facts(chain, "tiny"), "fp32")
    balanced = apply_plan(copy.deepcopy(chain), plan)
    with torch.no_grad(), SlotMeter(balanced) as meter, record(chain) as recorder:
        torch.testing.assert_close(balanced(IDS).logits, chain(IDS).logits, atol=1e-5, rtol=1e-4)
    assert [load.tolist() for load in meter.slot_load] == recorder.counts[0, 0].tolist()


def test_rounding_on_text_sees_what_every_event_is_sent(chain):
    plan = uniform_plan(model_facts(chain, "tiny"), "int4-g16")
    ids = IDS.numpy()
    reports = quantize_model(copy.deepcopy(chain), plan, Calibration([Batch("x", ids, MASK.numpy(), ids)], method="gptq"))
    with torch.no_grad(), record(chain) as recorder:
        chain(IDS, attention_mask=MASK)
    assert [report["tokens"] for report in reports] == [2 * 16] * 2
    assert [part["tokens"] for part in reports[0]["experts"]] == recorder.counts[0, 0, 0].tolist()


def test_profile_plan_save_and_load_in_a_fresh_process(tiny_model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = tiny_recipe_model("chain_of_experts", vocab_size=len(tokenizer), max_position_embeddings=256).eval()
    measured = profile(
        model, tokenizer, {"some": corpus(0), "other": corpus(1)}, tokens=256, seq_len=32, precisions=("int8",), progress=False,
        importance=("gate_norm", "easy_ep", "leave_one_out", "wanda"),
    )  # fmt: skip
    assert measured.counts.sum() == 2 * 4 * measured.tokens.sum()
    measured.save(tmp_path / "chain.profile.safetensors")
    plan = make_plan(Profile.load_file(tmp_path / "chain.profile.safetensors"), "rq")
    assert plan.predicted.lis < plan.predicted.lis_raw
    model.save_pretrained(tmp_path / "raw")
    balanced = apply_plan(load_model(str(tmp_path / "raw")), plan, int8_activations=False)
    balanced.save_pretrained(tmp_path / "balanced")
    ids = torch.arange(12)[None] % len(tokenizer)
    with torch.no_grad():
        expected = balanced(ids).logits
        torch.testing.assert_close(expected, model(ids).logits, atol=0.2, rtol=0.2)
    torch.save(expected, tmp_path / "expected.pt")
    code = (
        "import sys, torch\nfrom equipoise.profiling.loading import load_model\n"
        "model = load_model(sys.argv[1])\nexpected = torch.load(sys.argv[2])\n"
        "with torch.no_grad():\n    found = model(torch.arange(12)[None] % model.config.vocab_size).logits\n"
        "assert torch.equal(found, expected), (found - expected).abs().max()\nprint(type(model).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "balanced"), str(tmp_path / "expected.pt")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "ChainOfExpertsForCausalLM"


def test_a_chain_of_no_steps_is_refused():
    with pytest.raises(EquipoiseError, match="at least once"):
        tiny_recipe_model("chain_of_experts", steps=0)
