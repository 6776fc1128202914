"""Text that a model writes itself, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from equipoise.artifacts import Profile
from support import corpus, refused


@pytest.fixture
def run(run, monkeypatch, tmp_path):
    """The command, with a cache of its own."""
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    return run


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in corpus(3, 40)))
    return path


SIZE = ("--tokens", 128, "--seq-len", 32, "--precisions", "", "-q")


def test_text_is_written_measured_and_compared(run, tiny_model_dir, text, tmp_path):
    words = ("sample", tiny_model_dir, "--sentences", 4, "--length", 24, "--out", tmp_path / "own.jsonl", "-q")
    status, out, err = run(*words, "--text", text, "--set", "top=8", "--json")
    assert status == 0, err
    told = json.loads(out)
    assert told["options"]["top"] == 8
    assert told["text"]["balanced"]["tokens"] == told["text"]["text"]["tokens"]
    assert len((tmp_path / "own.jsonl").read_text().splitlines()) == 4
    status, out, err = run(*words, "--sampler", "plain")
    assert status == 0, err
    assert "plain" in out
    refused(run(*words, "--sampler", "beam"), "unknown sampler 'beam'")
    refused(run(*words, "--set", "top=0"), "top is 0")
    refused(run(*words, "--sentences", 0), "sentences is 0")


def test_load_is_never_taken_from_balanced_text(run, tiny_model_dir, text, tmp_path):
    path = tmp_path / "x.profile.safetensors"
    status, out, err = run("profile", tiny_model_dir, "--text", "self", *SIZE, "--out", path)
    assert status == 0, err
    assert "load: of text that the model drew from itself, not balanced (self-sampled)" in out
    found = Profile.load_file(path)
    assert found.source.scenarios == ("self-sampled",)
    (drawn,) = found.source.texts["self-sampled"]
    assert all(json.loads(line)["equipoise_sampler"] == "plain" for line in Path(drawn).read_text().splitlines())
    assert found.source.options["calibration"]["names"] == ["self-balanced"]

    status, out, err = run("profile", tiny_model_dir, "--text", "self", "--text", text, *SIZE, "--out", path)
    assert status == 0, err
    assert "load: of the files given (text)" in out
    beside = Profile.load_file(path)
    assert beside.source.texts == {"text": [str(text)]}
    assert beside.source.options["calibration"] == found.source.options["calibration"]
    status, _, err = run("profile", tiny_model_dir, "--text", text, *SIZE, "--out", path)
    assert status == 0, err
    assert (Profile.load_file(path).counts == beside.counts).all()
    assert (Profile.load_file(path).importance["wanda"] != beside.importance["wanda"]).any()

    status, _, err = run("profile", tiny_model_dir, "--text", "self", "--scenario", f"mine={text}", *SIZE, "--out", path)
    assert status == 0, err
    assert Profile.load_file(path).source.scenarios == ("mine",)


def test_a_file_of_balanced_text_is_calibration_text_and_no_scenario(run, tiny_model_dir, text, tmp_path):
    own, path = tmp_path / "own.jsonl", tmp_path / "x.profile.safetensors"
    status, _, err = run("sample", tiny_model_dir, "--sentences", 4, "--length", 24, "--out", own, "-q")
    assert status == 0, err
    words = ("profile", tiny_model_dir, *SIZE, "--out", path)
    refused(run(*words, "--text", own), "sampled to use all experts evenly")
    refused(run(*words, "--scenario", f"a={own}"), "scenario 'a' holds text that was sampled")
    status, _, err = run(*words, "--text", text, "--calibration", own)
    assert status == 0, err
    refused(run(*words, "--text", "self", "--calibration", own), "--calibration is of no use here")
    refused(
        run("profile", "records.json", "--from", "table", "--calibration", own, "--out", path), "--calibration is of no use"
    )
    refused(run("evaluate", tiny_model_dir, tiny_model_dir, "--text", "self"), "`--text self` is no measure")
