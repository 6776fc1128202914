"""Pruned models: the same as experts that cannot be chosen, saved as stock models, layer by layer as in memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from equipoise.artifacts import LayerPlan, ModelFacts, Plan
from equipoise.errors import CheckpointError, EquipoiseError, ModelError, PlanError
from equipoise.execution.apply import apply_plan
from equipoise.execution.prune import prune_model, prune_streamed
from equipoise.execution.prune_slices import plan_slices
from equipoise.lab import shelf
from equipoise.lab.recipe import read_mix
from equipoise.lab.text import domain_documents
from equipoise.models.layers import find_moe_layers, model_facts
from equipoise.models.streamed import open_streamed
from equipoise.models.tensor_files import TensorFiles
from equipoise.planning.methods import make_plan
from equipoise.profiling.calibrate import profile
from equipoise.profiling.forward import negative_log_likelihood
from equipoise.profiling.loading import load_model, load_tokenizer
from equipoise.profiling.sequences import Framing, text_batches
from execution.masking import masked
from models.architectures import ARCHITECTURES, tiny
from models.oracle import inputs_for, padded, sequences
from support import corpus

REFUSED = {
    "jetmoe": "num_local_experts: it sizes 'model.layers.0.self_attention.experts.input_linear.weight' too",
    "deepseek_v4": "tid2eid' holds whole numbers, which may name experts that are left out",
    "nllb_moe": "cannot be pruned: transformers' NllbMoeExperts.forward",
}
"""Architectures that cannot be pruned to a stock model, and why."""

FEW = ["mixtral", "deepseek_v3", "gpt_oss", "dbrx", "switch_transformers", "llama4", "longcat_flash", "zaya", "ernie4_5_vl_moe"]
"""One of each way to hold experts, routers and biases."""

SLICED = [
    pytest.param(name, marks=() if name in FEW else pytest.mark.slow)
    for name, spec in ARCHITECTURES.items()
    if not spec.skip and name not in REFUSED
]


def kept_experts(model: PreTrainedModel, seed: int = 1) -> tuple[tuple[int, ...], ...]:
    """Two thirds of the experts of each group of each layer, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    groups = getattr(model.config.get_text_config(), "n_group", None) or 1
    kept = []
    for layer in find_moe_layers(model):
        size = layer.num_experts // groups
        drawn = [torch.randperm(size, generator=generator)[: size * 2 // 3] + group * size for group in range(groups)]
        kept.append(tuple(sorted(torch.cat(drawn).tolist())))
    return tuple(kept)


def plan_of(facts: ModelFacts, experts: tuple[tuple[int, ...], ...], **changes: object) -> Plan:
    layers = tuple(
        LayerPlan(experts=k, precisions=(facts.dtype,) * len(k), units=tuple(range(len(k))), shares=(1.0,) * len(k))
        for k in experts
    )
    fields: dict[str, object] = {"exactness": "capacity", "kept": experts, **changes}
    return Plan(method="prune", model=facts, units=len(experts[0]), unit_bytes=1, layers=layers, **fields)


@torch.no_grad()
def outputs(model: PreTrainedModel) -> torch.Tensor:
    """What a model says of each real token of a padded batch."""
    batch = inputs_for(model, padded(sequences(), "right"))
    found = model(**batch)
    states = found.logits if hasattr(found, "logits") else found.last_hidden_state
    return states[batch["attention_mask"].bool()]


@pytest.mark.parametrize("name", SLICED)
def test_slicing_is_the_same_as_masking_before_top_k(name):
    model = tiny(name)
    kept = kept_experts(model)
    small = prune_model(model, kept)
    assert {layer.num_experts for layer in find_moe_layers(small)} == {len(kept[0])}
    whole = outputs(model)
    with masked(model, plan_slices(model, find_moe_layers(model), kept).slices, kept):
        wanted = outputs(model)
    assert torch.equal(outputs(model), whole), "the whole model was left as it was"
    scale = float(wanted.abs().max())
    assert float((whole - wanted).abs().max()) > 1e-3 * scale, "leaving out these experts changes something"
    assert float((outputs(small) - wanted).abs().max()) < 1e-5 * scale


@pytest.mark.parametrize("name", SLICED)
def test_streamed_files_are_those_of_the_pruned_model_in_memory(name, tmp_path):
    model = tiny(name)
    plan = plan_of(model_facts(model, name), kept_experts(model))
    small = prune_model(model, plan)
    model.save_pretrained(tmp_path / "whole")
    small.save_pretrained(tmp_path / "small")
    opened, _ = open_streamed(type(model), str(tmp_path / "whole"), dtype="auto")
    steps = []
    done = prune_streamed(opened, None, plan, tmp_path / "streamed", progress=lambda *step: steps.append(step))
    mine, reference = (TensorFiles(sorted((tmp_path / n).glob("*.safetensors"))) for n in ("streamed", "small"))
    assert set(mine) == set(reference)
    assert all(torch.equal(mine[key], reference[key]) and mine[key].dtype == reference[key].dtype for key in reference)
    assert done.bytes == sum(reference.nbytes(key) for key in reference)
    assert (done.experts_before, done.experts, done.left_out) == (6, 4, 0)
    assert done.expert_bytes * 3 == done.expert_bytes_before * 2
    assert steps[-1][0] == steps[-1][1] == len(steps)
    again, info = type(model).from_pretrained(tmp_path / "streamed", output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(outputs(again), outputs(small), rtol=1e-5, atol=1e-6)
    assert Plan.load_file(tmp_path / "streamed" / "equipoise.pruning.json") == plan


def test_a_fresh_process_without_equipoise_loads_the_pruned_model(tmp_path):
    wanted = {}
    for name in ("qwen3_moe", "deepseek_v3", "gpt_oss"):
        model = tiny(name)
        plan = plan_of(model_facts(model, name), kept_experts(model))
        model.save_pretrained(tmp_path / f"{name}-whole")
        opened, _ = open_streamed(type(model), str(tmp_path / f"{name}-whole"), dtype="auto")
        prune_streamed(opened, None, plan, tmp_path / name)
        ids = torch.arange(3, 12)[None]
        with torch.no_grad():
            wanted[name] = prune_model(model, plan)(input_ids=ids).logits
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
for name in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        torch.save(model.eval()(input_ids=torch.arange(3, 12)[None]).logits, f"{sys.argv[1]}/{name}.pt")
print("equipoise" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), *wanted], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.stdout.strip() == "False", done.stderr
    for name, logits in wanted.items():
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.pt"), logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_no_stock_model_could_hold_is_refused(name):
    model = tiny(name)
    with pytest.raises(ModelError, match=REFUSED[name].replace("(", "\\(")):
        prune_model(model, kept_experts(model))


def test_plans_that_do_not_suit_are_refused(tmp_path, monkeypatch):
    model = tiny("deepseek_v3")
    facts, layers = model_facts(model, "x"), len(find_moe_layers(model))
    for given in ([4, 1, 2], [1, 1, 2], [1, 2, 6], []):
        with pytest.raises(PlanError, match=r"is to keep \[.*\]; give ids of 0 to 5 in rising order"):
            prune_model(model, [given] * layers)
    with pytest.raises(PlanError, match=f"given for 1 layers, the model has {layers}"):
        prune_model(model, [[0, 1]])
    with pytest.raises(PlanError, match=r"1 experts are kept, and .* sends a token to 2"):
        prune_model(model, [[0]] * layers)
    with pytest.raises(PlanError, match="its 2 groups keep different numbers of experts"):
        prune_model(model, [[0, 1, 2, 3]] * layers)
    with pytest.raises(PlanError, match="1 experts are kept of each group, and a token is sent to 2 experts of 1 groups"):
        prune_model(model, [[0, 3]] * layers)
    with pytest.raises(PlanError, match=r"keep \[4, 6\]: a stock model has one number"):
        prune_model(model, [[0, 1, 3, 4], [0, 1, 2, 3, 4, 5]])
    everything = tuple(tuple(range(6)) for _ in range(layers))
    with pytest.raises(PlanError, match="the plan leaves out no experts"):
        prune_model(model, plan_of(facts, everything, exactness="exact"))
    plan = plan_of(facts, kept_experts(model))
    with pytest.raises(PlanError, match="the plan was made for 'x'"):
        prune_model(tiny("deepseek_v3", seed=1), plan)
    with pytest.raises(PlanError, match="under routing policy 'top_p', which a stock model does not have"):
        prune_model(model, plan.model_copy(update={"routing_policy": "top_p"}))
    with pytest.raises(PlanError, match="leaves out experts, so it is not carried out by slots"):
        apply_plan(model, plan)
    with pytest.raises(ModelError, match="in memory; use prune_model"):
        prune_streamed(model, None, plan, tmp_path / "out")
    model.save_pretrained(tmp_path / "whole")
    opened, _ = open_streamed(type(model), str(tmp_path / "whole"), dtype="auto")
    with pytest.raises(ModelError, match="read from its files; use prune_streamed"):
        prune_model(opened, plan)
    with pytest.raises(CheckpointError, match="not an empty directory"):
        prune_streamed(opened, None, plan, tmp_path / "whole")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("equipoise.execution.export_checkpoint.write_tensors", full)
    with pytest.raises(EquipoiseError, match="No space left"):
        prune_streamed(opened, None, plan, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["whole"]


def test_balanced_models_are_refused():
    model = tiny("mixtral")
    kept = kept_experts(model)
    facts = model_facts(model, "x")
    every = tuple(tuple(range(6)) for _ in facts.layers)
    apply_plan(model, plan_of(facts, every, kept=None, exactness="exact"))
    with pytest.raises(ModelError, match="quantized or balanced already"):
        prune_model(model, kept)


def test_sixteen_bit_weights_and_tied_embeddings_stay_as_they_are(tmp_path: Path):
    model = tiny("qwen3_moe", dtype=torch.bfloat16)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "whole")
    model = type(model).from_pretrained(tmp_path / "whole")
    kept = kept_experts(model)
    small = prune_model(model, kept)
    assert {tensor.dtype for tensor in small.state_dict().values()} == {torch.bfloat16}
    assert small.get_input_embeddings().weight is small.get_output_embeddings().weight
    assert small.get_input_embeddings().weight is not model.get_input_embeddings().weight
    for layer, ids in zip(find_moe_layers(small), kept, strict=True):
        before = find_moe_layers(model)[layer.index].experts.down_proj
        assert torch.equal(layer.experts.down_proj, before[list(ids)])
    assert np.isfinite(float(outputs(small).float().sum()))


def losses_by_score(model, tokenizer, demonstrations, heldout, scores, *, draws, tokens):
    """Mean loss of the model pruned to half by each score, and by each of some random draws."""
    made = profile(
        model, tokenizer, {"domain": demonstrations}, tokens=1 << 20, seq_len=256, batch_size=8, progress=False,
        importance=("easy_ep", "gate_norm"),
    )  # fmt: skip
    framing = Framing.of(tokenizer, model.config)
    batches = text_batches({"domain": heldout}, tokenizer, framing, tokens=tokens, seq_len=256, batch_size=8)

    def loss(**options):
        plan = make_plan(made, "prune", keep=0.5, **options)
        small = prune_model(model, plan)
        found = [negative_log_likelihood(small, batch) for batch in batches]
        return sum(nats for nats, _ in found) / sum(count for _, count in found)

    by_lot = [loss(score="random", seed=seed) for seed in range(draws)]
    return {score: loss(score=score) for score in scores}, np.array(by_lot)


def test_on_an_untrained_model_no_score_beats_drawing_by_lot(tiny_model_dir):
    model, tokenizer = load_model(str(tiny_model_dir), dtype="fp32"), load_tokenizer(str(tiny_model_dir))
    scores = ("easy-ep", "reap", "gate", "frequency")
    found, by_lot = losses_by_score(model, tokenizer, corpus(3, 25), corpus(4, 8), scores, draws=16, tokens=400)
    assert by_lot.std() > 0
    for score, loss in found.items():
        assert loss > by_lot.mean() - 3 * by_lot.std(), f"{score}: {loss} beats {by_lot.mean()} +- {by_lot.std()}"


def test_on_a_trained_model_the_score_beats_drawing_by_lot(shared_data):
    model, tokenizer = shelf.load("mixtral-8", dtype="fp32")
    mix = read_mix(Path(__file__).parents[2] / "configs" / "mix.toml")
    training, heldout = (domain_documents(mix, shared_data, split)["python"] for split in ("train", "heldout"))
    demonstrations = [text[:600] for text in training[:15]]
    found, by_lot = losses_by_score(model, tokenizer, demonstrations, heldout, ("easy-ep",), draws=6, tokens=800)
    assert found["easy-ep"] < by_lot.min()
