from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from equipoise.errors import CheckpointError, ModelError
from equipoise.execution.stock_names import skeleton, stacked_parameters, stock_path, stock_tensors
from equipoise.models.layers import expert_matrices, find_moe_layers
from models.architectures import tiny


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "nemotron_h", "phimoe", "lfm2_moe"])
def test_each_tensor_holds_the_rows_it_is_said_to(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    bare = skeleton(tmp_path)
    assert all(parameter.is_meta for parameter in bare.parameters())
    for layer, without in zip(find_moe_layers(model), find_moe_layers(bare), strict=True):
        found = stock_tensors(bare, without)
        assert len({tensor.name for tensor in found}) == len(found)
        assert {tensor.expert for tensor in found} == set(range(layer.num_experts))
        for tensor in found:
            *ups, down = expert_matrices(layer, tensor.expert)
            matrix = down if tensor.which else torch.cat(ups)
            assert torch.equal(written[tensor.name], matrix[tensor.start : tensor.stop])
            assert tensor.name.startswith(f"{stock_path(bare, layer.path)}.")
        assert [rows for _, rows in stacked_parameters(without)] == [len(m) for m in expert_matrices(layer, 0)]


@pytest.mark.parametrize("name", ["gpt_oss", "dbrx", "switch_transformers", "jetmoe", "llama4", "qwen3_vl_moe"])
def test_families_without_a_tensor_for_each_expert_are_refused(name: str) -> None:
    model = tiny(name)
    with pytest.raises(ModelError, match=r"one tensor per expert.*is not one.*--to checkpoint"):
        stock_tensors(model, find_moe_layers(model)[0])


def test_unusable_configurations_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"]}')
    with pytest.raises(CheckpointError, match="is a NoSuchModel, which this transformers"):
        skeleton(tmp_path)
    for text, problem in [("{", "is not JSON"), ("[]", "is not a configuration")]:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=problem):
            skeleton(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        skeleton(tmp_path)
