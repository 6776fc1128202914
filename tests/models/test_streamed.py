from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from equipoise.errors import ModelError
from equipoise.models.blocks import all_blocks, moe_blocks
from equipoise.models.layers import check_weights, expert_matrices, find_moe_layers, model_facts
from equipoise.models.streamed import open_streamed, streamed_of
from models.architectures import ARCHITECTURES, tiny

IDS = {"input_ids": torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])}


def save(model: PreTrainedModel, directory: Path, **options: object) -> Path:
    model.save_pretrained(directory, max_shard_size="60KB", **options)
    return directory


def held(model: PreTrainedModel) -> set[str]:
    """Transformer layers with data."""
    paths = all_blocks(model, find_moe_layers(model))
    return {path for path in paths if not any(p.is_meta for p in model.get_submodule(path).parameters())}


OFTEN = ("mixtral", "gpt_oss", "switch_transformers", "jetmoe")
BUILDABLE = [name for name, spec in ARCHITECTURES.items() if not spec.skip]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in BUILDABLE])
def test_a_streamed_model_is_the_model(name: str, fused: bool, tmp_path: Path) -> None:
    """From files with single experts and with fused ones, in several shards."""
    original = tiny(name)
    save(original, tmp_path, save_original_format=not fused)
    whole = type(original).from_pretrained(tmp_path).eval()
    model, info = open_streamed(type(original), str(tmp_path))
    assert not any(info.values())
    assert not held(model)
    assert type(model) is type(original)
    assert model_facts(model, name) == model_facts(whole, name)
    inputs = IDS | ({"decoder_input_ids": IDS["input_ids"]} if original.config.is_encoder_decoder else {})
    with torch.no_grad():
        got, wanted = model(**inputs), whole(**inputs)
    output = "logits" if "logits" in wanted else "last_hidden_state"
    assert torch.equal(got[output], wanted[output])
    assert len(held(model)) == 1


def test_a_hybrid_model_generates(tmp_path: Path) -> None:
    original = tiny("qwen3_next")
    model, _ = open_streamed(type(original), str(save(original, tmp_path)))
    wanted = original.generate(**IDS, max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(**IDS, max_new_tokens=3, do_sample=False), wanted)


def test_another_dtype_is_that_of_the_loaded_model(tmp_path: Path) -> None:
    original = tiny("mixtral")
    save(original, tmp_path)
    whole = type(original).from_pretrained(tmp_path, dtype=torch.bfloat16)
    model, _ = open_streamed(type(original), str(tmp_path), dtype=torch.bfloat16)
    assert model_facts(model, "x") == model_facts(whole, "x")


def test_weights_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    original = tiny("qwen2_moe")
    model, _ = open_streamed(type(original), str(save(original, tmp_path)))
    ours, theirs = find_moe_layers(model), find_moe_layers(original)
    for mine, layer in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expert_matrices(mine, 3), expert_matrices(layer, 3), strict=True))
        assert held(model) == {*moe_blocks([mine])}
    streamed = streamed_of(model)
    assert streamed is not None
    assert streamed_of(original) is None
    streamed.drop()
    with streamed.by_hand(), pytest.raises(Exception, match="meta"):
        model(**IDS)


def test_damaged_weights_are_found_before_they_are_used(tmp_path: Path) -> None:
    original = tiny("mixtral")
    save(original, tmp_path)

    def of_layer(name: str) -> bool:
        return "layers.1." in name and "experts" in name

    broken = next(path for path in sorted(tmp_path.glob("*.safetensors")) if any(map(of_layer, load_file(path))))
    tensors = load_file(broken)
    name = next(filter(of_layer, tensors))
    save_file(tensors | {name: torch.full_like(tensors[name], float("nan"))}, broken)
    model, _ = open_streamed(type(original), str(tmp_path))
    with pytest.raises(ModelError, match=r"layers\.1\..* holds NaN"):
        check_weights(model)
    save_file({key: tensor for key, tensor in tensors.items() if "layers.1." not in key}, broken)
    model, _ = open_streamed(type(original), str(tmp_path))
    with pytest.raises(ModelError, match=r"lacks weights of model\.layers\.1"):
        check_weights(model)


def test_what_cannot_be_streamed_is_refused(tmp_path: Path) -> None:
    model = tiny("qwen2_moe")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no weights in safetensors files"):
        open_streamed(type(model), str(tmp_path))
