"""Balanced models as plain checkpoints: what stock transformers loads computes what our slots do."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from equipoise.errors import CheckpointError, PlanError
from equipoise.execution import export_checkpoint as module
from equipoise.execution.apply import apply_plan
from equipoise.execution.checkpoint import save_balanced
from equipoise.execution.export_checkpoint import export_checkpoint
from equipoise.execution.stock_source import Source
from equipoise.models.layers import find_moe_layers, model_facts
from equipoise.quantization.formats import round_trip
from execution.export_helpers import layered_plan, logits, save_original, saved
from execution.helpers import make_plan
from models.architectures import tiny

FAMILIES = [
    "mixtral", "deepseek_v3", "gpt_oss", "nemotron_h", "qwen3_vl_moe", "dbrx", "jetmoe", "switch_transformers", "llama4",
    "granitemoe", "longcat_flash", "zaya",
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_stock_transformers_computes_what_our_slots_do(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    plan = layered_plan(save_original(model, tmp_path / "original"), ["int4-g16-asym", "fp8", "bf16"], extra=2)
    wanted = saved(model, plan, tmp_path / "balanced")
    done = export_checkpoint(Source(tmp_path / "balanced"), tmp_path / "plain")
    assert any("copies of experts are left out" in note for note in done.notes)
    again, info = type(model).from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(logits(again), wanted, rtol=1e-4, atol=1e-5)
    original, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("original", "plain"))
    assert {key: t.shape for key, t in plain.items()} == {key: t.shape for key, t in original.items()}
    assert done.bytes == sum(t.nbytes for t in original.values())


def test_the_copy_of_the_most_bits_speaks_for_an_expert(tmp_path: Path) -> None:
    model = tiny("qwen3_moe")
    weights = {e: m.clone() for e, m in enumerate(find_moe_layers(model)[0].experts.down_proj)}
    plan = make_plan(model_facts(model, "x"), precisions=("int2", "int8", "fp32"), extra=4)
    saved(model, plan, tmp_path / "balanced")
    done = export_checkpoint(Source(tmp_path / "balanced"), tmp_path / "plain")
    assert any("the copy of the most bits is taken" in note for note in done.notes)
    written = load_file(tmp_path / "plain" / "model.safetensors")
    columns = plan.layers[0]
    for expert, weight in weights.items():
        names = {p for p, e in zip(columns.precisions, columns.experts, strict=True) if e == expert}
        best = next(name for name in ("fp32", "int8", "int2") if name in names)
        assert torch.equal(written[f"model.layers.0.mlp.experts.{expert}.down_proj.weight"], round_trip(weight, best))


ALL_FORMATS = (
    "fp32", "bf16", "fp8", "int8", "int8-g16", "int8-asym", "int4-g7", "int4-asym", "int3", "int3-g8-asym",
    "int2", "int2-g12-asym",
)  # fmt: skip


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "dbrx"])
def test_bytes_on_disk_are_those_of_the_plan_exactly(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    plan = make_plan(model_facts(model, "x"), precisions=ALL_FORMATS, extra=8)
    saved(model, plan, tmp_path / "balanced")
    written = load_file(tmp_path / "balanced" / "equipoise.safetensors")
    held = sum(tensor.nbytes for key, tensor in written.items() if ".slots." in key)
    assert held == plan.bytes_by_unit().sum()
    assert held > 0


def test_a_plan_put_on_an_original_checkpoint_is_the_same_as_saving_first(tmp_path: Path) -> None:
    model = tiny("mixtral")
    plan = layered_plan(save_original(model, tmp_path / "original"), ["int3", "int8"], extra=1)
    saved(model, plan, tmp_path / "balanced")
    export_checkpoint(Source(tmp_path / "balanced", plan), tmp_path / "one")
    export_checkpoint(Source(tmp_path / "original", plan), tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_original_checkpoints_of_fused_experts_are_read_too(tmp_path: Path) -> None:
    model = tiny("qwen3_moe")
    plan = layered_plan(model_facts(model, "x"), ["int4"])
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    model.save_pretrained(tmp_path / "split")
    for name in ("fused", "split"):
        export_checkpoint(Source(tmp_path / name, plan), tmp_path / f"out-{name}")
    one, two = (load_file(tmp_path / f"out-{name}" / "model.safetensors") for name in ("fused", "split"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_shards_files_and_what_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("mixtral")
    wanted = saved(model, layered_plan(model_facts(model, "x"), ["int8"]), tmp_path / "balanced")
    (tmp_path / "balanced" / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(module, "SHARD_BYTES", 20_000)
    done = export_checkpoint(Source(tmp_path / "balanced"), tmp_path / "plain")
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert "tokenizer.json" in names
    assert not [name for name in names if name.startswith(("equipoise", "part"))]
    index = json.loads((tmp_path / "plain" / module.INDEX).read_text())
    shards = sorted({*index["weight_map"].values()})
    assert len(shards) > 3
    assert [name for name in names if name.endswith(".safetensors")] == shards
    assert index["metadata"]["total_size"] == done.bytes
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path / "plain")), wanted, rtol=1e-4, atol=1e-5)


def test_refusals_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("qwen3_moe")
    plan = layered_plan(save_original(model, tmp_path / "original"), ["int8"])
    with pytest.raises(PlanError, match="holds no balanced model; give the plan"):
        Source(tmp_path / "original")
    with pytest.raises(CheckpointError, match="cannot read"):
        Source(tmp_path / "nowhere", plan)
    tiny("deepseek_v2").save_pretrained(tmp_path / "other")
    with pytest.raises(PlanError, match="give the plan's model"):
        Source(tmp_path / "other", plan)
    saved(model, plan, tmp_path / "balanced")
    with pytest.raises(PlanError, match="was balanced with another plan"):
        Source(tmp_path / "balanced", layered_plan(plan.model, ["int4"]))
    source = Source(tmp_path / "balanced")
    with pytest.raises(CheckpointError, match="not an empty directory"):
        export_checkpoint(source, tmp_path / "original")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.iterdir())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_tensors", full)
    with pytest.raises(CheckpointError, match="No space left"):
        export_checkpoint(source, tmp_path / "empty")
    assert sorted(tmp_path.iterdir()) == before
    assert not os.listdir(tmp_path / "empty")


def test_a_damaged_slot_is_refused(tmp_path: Path) -> None:
    model = tiny("qwen3_moe")
    apply_plan(model, layered_plan(model_facts(model, "x"), ["fp32", "int8"]))
    with torch.no_grad():
        find_moe_layers(model)[0].experts.slots.groups[0].up[1, 2, 3] = torch.nan
    save_balanced(model, None, tmp_path / "balanced")
    with pytest.raises(CheckpointError, match="holds NaN weights, or a part of"):
        export_checkpoint(Source(tmp_path / "balanced"), tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_quantized_models_of_others_are_refused(tmp_path: Path) -> None:
    config = transformers.Qwen3MoeConfig().to_dict() | {"architectures": ["Qwen3MoeForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(CheckpointError, match="is quantized \\(gptq\\); give the original"):
        Source(tmp_path)
