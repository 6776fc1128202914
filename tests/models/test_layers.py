from __future__ import annotations

import copy

import pytest
import torch
from transformers import DogeConfig, DogeForCausalLM, LlamaConfig, LlamaForCausalLM

from equipoise.errors import ModelError
from equipoise.models.layers import (
    check_weights,
    expert_matrices,
    expert_vectors,
    find_moe_layers,
    fingerprint,
    model_facts,
    run_expert,
)
from equipoise.precisions import precision
from models.architectures import tiny
from models.oracle import padded, sequences

DENSE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_a_dense_model_is_refused():
    model = LlamaForCausalLM(LlamaConfig(**DENSE))
    with pytest.raises(ModelError, match="LlamaForCausalLM is a dense model"):
        find_moe_layers(model)


def test_experts_without_matrices_are_refused_with_the_reason():
    model = DogeForCausalLM(DogeConfig(**DENSE, is_moe=True, num_experts=16, num_experts_per_tok=2))
    with pytest.raises(ModelError, match=r"DogeCDMoE.*rows of an embedding"):
        find_moe_layers(model)


def test_a_view_of_a_common_model():
    layers = find_moe_layers(tiny("qwen2_moe"))
    assert [layer.index for layer in layers] == [0, 1]
    second = layers[1]
    assert (second.path, second.router_path) == ("model.layers.1.mlp.experts", "model.layers.1.mlp.gate")
    assert (second.num_experts, second.top_k, second.num_shared) == (6, 2, 1)
    assert (second.model_layer, second.stack, second.stack_path) == (1, "decoder", "model")
    assert (second.matrices, second.vector_elements, second.dtype) == (((32, 32), (32, 16)), 0, "fp32")
    assert second.facts.expert_bytes(precision("bf16")) == 2 * (32 * 32 + 32 * 16)


@pytest.mark.parametrize(
    ("name", "matrices", "vectors"),
    [
        ("gpt_oss", ((96, 32), (32, 48)), 96 + 32),  # transposed, biases
        ("nemotron_h", ((16, 32), (32, 16)), 0),  # no gate
        ("dbrx", ((16, 32), (16, 32), (32, 16)), 0),
        ("switch_transformers", ((48, 32), (32, 48)), 0),
        ("nllb_moe", ((48, 32), (32, 48)), 48 + 32),
        ("llama4", ((96, 32), (32, 48)), 0),
        ("muse_spark", ((32, 16), (16, 16)), 0),  # experts of another width than the model
    ],
)
def test_matrices_of_one_expert(name, matrices, vectors):
    for layer in find_moe_layers(tiny(name)):
        assert layer.matrices == matrices
        assert layer.vector_elements == vectors == sum(v.numel() for v in expert_vectors(layer, 0))
        for expert in range(layer.num_experts):
            assert tuple(tuple(m.shape) for m in expert_matrices(layer, expert)) == matrices


def test_expert_matrices_are_views_of_the_model():
    layer = find_moe_layers(tiny("mixtral"))[0]
    with torch.no_grad():
        expert_matrices(layer, 3)[1].zero_()
    assert layer.experts.down_proj[3].abs().sum() == 0
    assert layer.experts.down_proj[2].abs().sum() > 0


def test_given_matrices_replace_the_experts_own():
    layer = find_moe_layers(tiny("gpt_oss"))[0]
    x = torch.randn(5, 32)
    other = run_expert(layer, 4, x, matrices=expert_matrices(layer, 1))
    assert not torch.allclose(other, run_expert(layer, 4, x))
    with torch.no_grad():  # the biases stay the expert's own
        for name in ("gate_up_proj", "down_proj"):
            getattr(layer.experts, name)[4] = getattr(layer.experts, name)[1]
    assert torch.equal(other, run_expert(layer, 4, x))


def test_encoder_layers_come_before_decoder_layers():
    layers = find_moe_layers(tiny("switch_transformers"))
    assert [layer.stack for layer in layers] == ["encoder", "encoder", "decoder", "decoder"]
    assert [layer.model_layer for layer in layers] == [0, 1, 0, 1]
    assert {layer.top_k for layer in layers} == {1}


def test_text_experts_come_before_vision_experts():
    paths = [layer.path for layer in find_moe_layers(tiny("ernie4_5_vl_moe"))]
    assert [".vision_moe." in path for path in paths] == [False, False, True, True]


def test_the_text_model_of_a_multimodal_model_is_found_without_its_image_tower():
    layers = find_moe_layers(tiny("qwen3_vl_moe"))
    assert {layer.stack_path for layer in layers} == {"model.language_model"}
    assert {layer.stack for layer in layers} == {"decoder"}


def test_weights_in_eight_bits_are_refused():
    model = tiny("olmoe")
    for layer in model.model.layers:
        layer.mlp.experts.gate_up_proj = torch.nn.Parameter(layer.mlp.experts.gate_up_proj.to(torch.float8_e4m3fn))
    with pytest.raises(ModelError, match="float8_e4m3fn; load the model in"):
        find_moe_layers(model)


def test_a_layer_is_still_known_when_its_weights_are_gone():
    model = tiny("olmoe")
    before = find_moe_layers(model)
    assert not before[0].balanced
    for layer in before:
        del layer.experts.gate_up_proj, layer.experts.down_proj
    for layers in (find_moe_layers(model), find_moe_layers(copy.deepcopy(model))):
        assert [layer.facts for layer in layers] == [layer.facts for layer in before]
        assert all(layer.balanced for layer in layers)
    with pytest.raises(ModelError, match="is balanced already"):
        expert_matrices(find_moe_layers(model)[0], 0)


@pytest.mark.parametrize(
    ("value", "name"), [(float("nan"), "model.layers.1.mlp.gate.weight"), (float("inf"), "lm_head.weight")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unusable_weights_are_named(value, name, dtype):
    model = tiny("qwen3_moe", dtype=dtype)
    check_weights(model)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-7] = value
    with pytest.raises(ModelError, match=f"'{name}' holds NaN or infinite"):
        check_weights(model)


def test_weights_without_data_are_refused():
    model = tiny("qwen3_moe").to("meta")
    with pytest.raises(ModelError, match="meta device"):
        check_weights(model)
    with pytest.raises(ModelError, match="meta device"):
        fingerprint(model)


def test_fingerprint_tells_models_apart_but_not_dtypes(tmp_path):
    model = tiny("qwen3_moe", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    mine = fingerprint(model)
    for dtype in (torch.bfloat16, torch.float32):
        assert fingerprint(type(model).from_pretrained(tmp_path, dtype=dtype)) == mine
    assert fingerprint(tiny("qwen3_moe", seed=1, dtype=torch.bfloat16)) != mine
    model.config.num_experts_per_tok = 3
    assert fingerprint(model) != mine
    model.config.num_experts_per_tok = 2
    assert fingerprint(model) == mine
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[5] += 1
    assert fingerprint(model) != mine


def test_model_facts():
    facts = model_facts(tiny("gpt_oss", dtype=torch.bfloat16), "somewhere/model")
    assert (facts.name, facts.model_type, facts.dtype) == ("somewhere/model", "gpt_oss", "bf16")
    assert [layer.path for layer in facts.layers] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert facts.max_experts == 6


def test_the_models_output_is_unchanged_by_listing_it():
    model, batch = tiny("mixtral"), padded(sequences(), "left")
    with torch.no_grad():
        before = model(**batch).logits
        find_moe_layers(model)
        assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("name", ["gpt_oss", "switch_transformers", "dbrx", "jetmoe", "mixtral"])
def test_an_expert_of_a_bf16_model_can_be_run_in_float32(name: str) -> None:
    layer = find_moe_layers(copy.deepcopy(tiny(name)).to(torch.bfloat16))[0]
    x_TD = torch.randn(5, layer.matrices[0][1], generator=torch.Generator().manual_seed(0))
    wide = run_expert(layer, 1, x_TD, [matrix.float() for matrix in expert_matrices(layer, 1)])
    assert wide.dtype == torch.float32
    narrow = run_expert(layer, 1, x_TD.bfloat16()).float()
    assert 0 < (wide - narrow).norm() < 0.03 * wide.norm()
