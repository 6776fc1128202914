from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from equipoise.artifacts import Plan, Profile
from equipoise.cli import app
from equipoise.errors import EquipoiseError
from equipoise.execution.checkpoint import load
from equipoise.planning.methods import make_plan
from equipoise.profiling.loading import load_model
from support import corpus


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(corpus(0)))
    return path


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [*map(str, arguments), "--quiet"])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_model_is_quantized_on_text(tiny_model_dir: Path, text: Path, tmp_path: Path) -> None:
    options = ("--precision", "int4-g16", "--method", "agq", "--text", text, "--tokens", 200, "--seq-len", 64)
    rows = json.loads(run("quantize", tiny_model_dir, "--out", tmp_path / "q", *options, "--json"))
    assert rows["text"]["tokens"] == 200
    run("profile", tiny_model_dir, "--out", tmp_path / "p", *options[4:])  # the same text, so the same tokens for each expert
    profile = Profile.load_file(tmp_path / "p")
    load_E, inputs = profile.load[0], profile.model.layers[0].matrices[0][1]
    assert rows["layers"][0]["fewest_tokens"] == load_E.min()
    assert rows["layers"][0]["experts_with_few_tokens"] == np.flatnonzero(load_E < inputs).tolist()
    model = load(tmp_path / "q")
    assert model.config.quantization_config.rounding == rows["text"]
    plan = Plan.load_file(tmp_path / "q" / "equipoise.plan.json")
    assert {name for layer in plan.layers for name in layer.precisions} == {"int4-g16"}
    assert rows["expert_bytes"] == plan.bytes_by_unit().sum()
    assert "rounded by agq" in run("quantize", tiny_model_dir, "--out", tmp_path / "again", *options)
    for path in (tmp_path / "q").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_a_plan_is_carried_out_with_text_and_without(tiny_model_dir: Path, text: Path, tmp_path: Path) -> None:
    run("profile", tiny_model_dir, "--text", text, "--tokens", 200, "--seq-len", 64, "--out", tmp_path / "p.safetensors")
    make_plan(Profile.load_file(tmp_path / "p.safetensors"), "rq").save(tmp_path / "plan.json")
    on_text = ("--method", "gptq", "--text", text, "--tokens", 200, "--seq-len", 64)
    for name, options in {"plain": (), "on text": on_text}.items():
        run("apply", tiny_model_dir, tmp_path / "plan.json", *options, "--out", tmp_path / name)
        config = load(tmp_path / name).config.quantization_config
        assert config.read_plan() == Plan.load_file(tmp_path / "plan.json")
        assert config.rounding["method"] == ("gptq" if options else "rtn")


def test_options_without_effect_are_refused(tiny_model_dir: Path, text: Path, tmp_path: Path) -> None:
    model = ("quantize", tiny_model_dir, "--out", tmp_path / "q")
    with pytest.raises(EquipoiseError, match="--text is of no use"):
        run(*model, "--method", "rtn", "--text", text)
    with pytest.raises(EquipoiseError, match="--set is of no use"):
        run(*model, "--method", "rtn", "--set", "damp=0.1")
    with pytest.raises(EquipoiseError, match="no text given"):
        run(*model)


def test_a_memory_limit_makes_a_model_streamed(tiny_model_dir: Path) -> None:
    assert not any(p.is_meta for p in load_model(str(tiny_model_dir), memory=1 << 30).parameters())
    streamed = load_model(str(tiny_model_dir), memory=10_000)
    assert any(p.is_meta for p in streamed.parameters())
    assert not streamed.training


def test_a_profile_under_a_memory_limit_is_the_same(tiny_model_dir: Path, text: Path, tmp_path: Path) -> None:
    options = ("--text", text, "--tokens", 200, "--seq-len", 64, "--precisions", "int4")
    for name, limit in {"whole": (), "streamed": ("--memory", 0.00001)}.items():
        run("profile", tiny_model_dir, *options, *limit, "--out", tmp_path / name)
    whole, streamed = (Profile.load_file(tmp_path / name) for name in ("whole", "streamed"))
    assert (streamed.counts == whole.counts).all()
    assert streamed.model == whole.model
    assert np.allclose(streamed.output_error["int4-g32"], whole.output_error["int4-g32"], rtol=1e-4)
