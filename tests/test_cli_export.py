"""`equipoise export` for models: balanced models and plans as checkpoints that any tool loads."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from equipoise.artifacts import Plan
from equipoise.cli import app, main
from equipoise.models.layers import model_facts
from execution.export_helpers import layered_plan, logits, saved
from execution.helpers import make_plan
from models.architectures import tiny

RUN = CliRunner()


def told(*arguments: object) -> dict:
    result = RUN.invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def mistake(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["equipoise", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: ")
    assert "\n" not in line
    return line


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """An original model, a plan that mixes precisions in its layers, and the model balanced with another."""
    model = tiny("qwen3_moe")
    model.save_pretrained(tmp_path / "original")
    facts = model_facts(model, "tiny")
    make_plan(facts, precisions=("int4-g16", "int8"), extra=2).save(tmp_path / "mixed.plan.json")
    torch.save(saved(model, layered_plan(facts, ["int4-g16", "int8"], extra=1), tmp_path / "balanced"), tmp_path / "logits.pt")
    return tmp_path


def test_a_balanced_model_as_a_plain_checkpoint(here: Path) -> None:
    rows = told("export", here / "balanced", "--to", "checkpoint", "--out", here / "plain", "--json")
    assert rows["directory"] == str(here / "plain")
    assert any("copies of experts are left out" in note for note in rows["notes"])
    model = type(tiny("qwen3_moe")).from_pretrained(here / "plain")
    torch.testing.assert_close(logits(model), torch.load(here / "logits.pt"), rtol=1e-4, atol=1e-5)
    plain = RUN.invoke(app, ["export", str(here / "balanced"), "--to", "checkpoint", "--out", str(here / "again")])
    assert "copies of experts are left out" in plain.stdout
    assert f"experts: {rows['expert_bytes']:,} bytes" in plain.stdout


def test_a_balanced_model_as_compressed_tensors(here: Path) -> None:
    plan = here / "balanced" / "equipoise.plan.json"
    wide = told("export", plan, "--model", here / "balanced", "--to", "compressed-tensors", "--out", here / "wide", "--json")
    assert wide["rounded"] is None
    assert any("stored in 8 bits" in note for note in wide["notes"])
    narrow = told(
        "export", plan, "--model", here / "balanced", "--to", "compressed-tensors", "--out", here / "narrow",
        "--set", "by_layer=true", "--json",
    )  # fmt: skip
    assert narrow["expert_bytes"] < wide["expert_bytes"]
    config = json.loads((here / "narrow" / "config.json").read_text())["quantization_config"]
    assert [group["weights"]["num_bits"] for group in config["config_groups"].values()][1:] == [4, 8]


def test_a_mixed_plan_is_rounded_on_request_and_the_cost_shown(here: Path) -> None:
    rows = told(
        "export", here / "mixed.plan.json", "--model", here / "original", "--to", "compressed-tensors", "--round-per-layer",
        "--out", here / "out", "--json",
    )  # fmt: skip
    assert rows["rounded"]["layers"] == len(Plan.load_file(here / "mixed.plan.json").layers)
    assert rows["rounded"]["bytes_after"] <= rows["rounded"]["bytes_before"]
    assert rows["rounded"]["measured"] is False
    assert rows["notes"][0].startswith("2 of 2 layers rounded to one precision: experts ")


def test_mistakes_are_one_line(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: object) -> str:
        return mistake(monkeypatch, capsys, "export", *arguments, "--out", here / "out")

    plan, packed = here / "mixed.plan.json", ("--to", "compressed-tensors")
    assert "does not exist" in said(here / "absent", *packed)
    assert "give --model DIR" in said(plan, *packed)
    assert "--round-per-layer" in said(plan, "--model", here / "original", *packed)
    assert "was balanced with another plan" in said(plan, "--model", here / "balanced", *packed)
    assert "carries one already" in said(here / "balanced", *packed, "--round-per-layer")
    assert "has no option 'bits'; it takes by_layer" in said(here / "balanced", *packed, "--set", "bits=4")
    assert "has no option 'by_layer'; it takes no options" in said(
        here / "balanced", "--to", "checkpoint", "--set", "by_layer=true"
    )
    assert "must be true or false" in said(here / "balanced", *packed, "--set", "by_layer=4")
    assert "--config is of no use here" in said(here / "balanced", *packed, "--config", here / "original" / "config.json")
    assert "--profile is of no use here" in said(here / "balanced", *packed, "--profile", plan)
    assert "--round-per-layer is of no use here" in said(plan, "--to", "checkpoint", "--round-per-layer")
    assert "unknown target 'vlm'; known: checkpoint, compressed-tensors, " in said(plan, "--to", "vlm")
    assert "--round-per-layer is of no use here" in said(plan, "--to", "vllm", "--round-per-layer")
    assert not (here / "out").exists()
