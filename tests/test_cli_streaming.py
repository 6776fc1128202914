"""`equipoise stream` and `equipoise watch`, on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from equipoise.artifacts import Plan
from equipoise.cli import app, main
from support import corpus

RUN = CliRunner()


def told(*arguments) -> str:
    result = RUN.invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def mistake(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["equipoise", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    return capsys.readouterr().err.strip()


@pytest.fixture(scope="module")
def place(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with texts of two kinds, a profile of the first and a plan for it."""
    directory = tmp_path_factory.mktemp("stream")
    for name, seed in (("first", 0), ("second", 7)):
        (directory / f"{name}.txt").write_text("\n".join(corpus(seed, documents=30)))
    told(
        "profile", tiny_model_dir, "--text", directory / "first.txt", "--out", directory / "p.profile.safetensors",
        "--tokens", 256, "--seq-len", 64, "--importance", "wanda", "--precisions", "", "-q",
    )  # fmt: skip
    told("plan", directory / "p.profile.safetensors", "--method", "rq-paper", "--out", directory / "x.plan.json")
    return directory


def test_a_stream_with_a_shift_is_watched_and_tells_what_became_of_it(tiny_model_dir, place, tmp_path):
    arguments = [
        "stream", tiny_model_dir, "--plan", place / "x.plan.json", "--profile", place / "p.profile.safetensors",
        "--scenario", f"first={place / 'first.txt'}", "--scenario", f"second={place / 'second.txt'}", "--tokens", 768,
        "--seq-len", 64, "--step-tokens", 128, "--store", tmp_path / "store", "-q",
    ]  # fmt: skip
    metrics = []
    try:
        import prometheus_client  # noqa: F401

        metrics = ["--metrics", tmp_path / "metrics.prom"]
    except ImportError:
        pass
    rows = json.loads(
        told(*arguments, "--policy", "last_step", "--out", tmp_path / "s.json", "--save-plan", tmp_path / "end.plan.json",
             *metrics, "--json")
    )  # fmt: skip
    assert rows["tokens"] == sum(report["tokens"] for report in rows["reports"])
    assert rows["steps"] == len(rows["reports"]) > 5
    assert rows["swapped"] == len(rows["changes"]) >= 1
    assert rows["failed"] == 0
    assert json.loads((tmp_path / "s.json").read_text()) == rows
    end, start = Plan.load_file(tmp_path / "end.plan.json"), Plan.load_file(place / "x.plan.json")
    assert end.bytes_by_unit().sum() == start.bytes_by_unit().sum()
    assert end.layers != start.layers
    if metrics:
        seen = json.loads(told("watch", tmp_path / "metrics.prom", "--json"))
        assert seen["replans_total"]["swapped"] == rows["swapped"]
        assert "LIS by layer" in told("watch", tmp_path / "metrics.prom", "--once")
    text = told(*arguments, "--policy", "adaptive", "--background")
    assert "stream under policy adaptive (measured)" in text


def test_mistakes_are_one_line(tiny_model_dir, place, monkeypatch, capsys, tmp_path):
    given = ["stream", tiny_model_dir, "--text", place / "first.txt"]
    assert "no plan given" in mistake(monkeypatch, capsys, *given)
    with_plan = [*given, "--plan", place / "x.plan.json", "--tokens", 64, "--seq-len", 64]
    assert "Did you mean 'adaptive'" in mistake(monkeypatch, capsys, *with_plan, "--policy", "adaptiv")
    assert "does not take" in mistake(monkeypatch, capsys, *with_plan, "--set", "speed=3")
    assert "cannot read metrics" in mistake(monkeypatch, capsys, "watch", tmp_path / "none")
    assert "allowed are http://" in mistake(monkeypatch, capsys, "watch", "ftp://x")
    assert "does not answer" in mistake(monkeypatch, capsys, "watch", "http://127.0.0.1:9", "--once")
