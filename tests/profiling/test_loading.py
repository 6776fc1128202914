from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from transformers import MixtralForCausalLM

from equipoise.errors import ModelError
from equipoise.profiling.calibrate import profile
from equipoise.profiling.loading import load_model, load_tokenizer


@pytest.fixture
def saved(make_model, tokenizer, tmp_path):
    model = make_model("mixtral")
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path / "m")
    return model, tmp_path / "m"


def test_a_directory_is_loaded(saved, tokenizer):
    model, path = saved
    loaded = load_model(str(path))
    assert not loaded.training
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert load_tokenizer(str(path))("the lazy dog")["input_ids"] == tokenizer("the lazy dog")["input_ids"]
    assert load_model(str(path), dtype="bf16").dtype == torch.bfloat16


def test_encoder_decoder_models_are_loaded(make_model, tmp_path):
    make_model("switch").save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).config.is_encoder_decoder


def test_what_is_not_a_model_is_named(tmp_path, saved, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    _, path = saved
    (tmp_path / "empty").mkdir()
    for name, message in [
        (str(tmp_path / "nowhere"), "no directory"),
        (str(path / "config.json"), "is a file"),
        (str(tmp_path / "empty"), "no config.json"),
        ("nobody/no-such-model", "cannot load 'nobody/no-such-model'.* There is no directory 'nobody/no-such-model' here"),
    ]:
        with pytest.raises(ModelError, match=message) as error:
            load_model(name)
        assert "\n" not in str(error.value)
        with pytest.raises(ModelError):
            load_tokenizer(name)


def test_a_directory_without_a_tokenizer_is_named(make_model, tmp_path):
    make_model("mixtral").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"holds no tokenizer; copy the model's there"):
        load_tokenizer(str(tmp_path))


def test_damaged_checkpoints_are_refused(saved):
    _, path = saved
    shards = sorted(path.glob("model-*.safetensors"))
    whole = shards[-1].read_bytes()
    shards[-1].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot load"):
        load_model(str(path))
    shards[-1].unlink()
    with pytest.raises(ModelError, match=r"cannot load .* The checkpoint is not whole; copy it again"):
        load_model(str(path))


def test_missing_weights_are_refused_and_not_filled_with_random_numbers(saved):
    _, path = saved
    index = json.loads((path / "model.safetensors.index.json").read_text())
    name = next(key for key in index["weight_map"] if key.endswith("q_proj.weight"))
    shard = path / index["weight_map"].pop(name)
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    from safetensors.torch import load_file, save_file

    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of the model's weights, such as '.*q_proj.weight'"):
        load_model(str(path))


def test_code_in_a_checkpoint_is_never_run(saved):
    _, path = saved
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "own.py").write_text("raise SystemExit('executed')")
    with pytest.raises(ModelError, match="cannot load"):
        load_model(str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "int8"}, "unknown dtype 'int8'; known: auto"), ({"device": "tpu9"}, "device 'tpu9' cannot be used here")],
)
def test_unknown_dtypes_and_devices_are_refused(options, message):
    with pytest.raises(ModelError, match=message):
        load_model("nobody/no-such-model", **options)


def test_a_model_held_back_by_accelerate_is_profiled_as_one_in_memory(make_model, tokenizer, make_documents):
    options = {"tokens": 120, "seq_len": 24, "precisions": ("int4",), "progress": False}
    texts = {"a": make_documents(6)}
    for family in ("mixtral", "gpt_oss", "deepseek_v3"):
        one = profile(make_model(family), tokenizer, texts, **options)
        model = make_model(family)
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert all(parameter.is_meta for parameter in model.parameters())
        found = profile(model, tokenizer, texts, **options)
        assert found.model == one.model
        for name, array in one._arrays().items():
            assert np.array_equal(found._arrays()[name], array), (family, name)
        assert all(parameter.is_meta for parameter in model.parameters())


def test_a_device_map_loads_a_model_that_gives_the_same_profile(make_model, tokenizer, make_documents, tmp_path):
    make_model("mixtral").save_pretrained(tmp_path)
    texts = {"a": make_documents(6)}
    plain, spread = (
        profile(load_model(str(tmp_path), device_map=where), tokenizer, texts, tokens=120, seq_len=24, progress=False)
        for where in (None, "auto")
    )
    assert spread.model == plain.model
    assert all(np.array_equal(spread._arrays()[name], array) for name, array in plain._arrays().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": 10, "device_map": "auto"}, "memory and device_map are two ways"),
        ({"device_map": "auto", "experts_parallel": True}, "device_map and experts_parallel are two ways"),
        ({"experts_parallel": True}, "torchrun"),
        ({"device_map": "sideways"}, "cannot load"),
    ],
)
def test_ways_to_hold_a_large_model_that_do_not_go_are_refused(make_model, tmp_path, options, message):
    make_model("mixtral").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message):
        load_model(str(tmp_path), **options)


def test_a_model_that_would_lie_on_disk_is_referred_to_reading_by_layer(make_model, tmp_path, monkeypatch):
    make_model("mixtral").save_pretrained(tmp_path)
    monkeypatch.setattr(MixtralForCausalLM, "hf_device_map", {"model": 0, "lm_head": "disk"}, raising=False)
    with pytest.raises(ModelError, match="would stay on disk"):
        load_model(str(tmp_path), device_map="auto")
