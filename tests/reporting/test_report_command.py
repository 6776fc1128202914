"""`equipoise report` as a user meets it."""

from __future__ import annotations

import json
import sys
from functools import partial

import pytest

from reporting import report_cases as cases


@pytest.fixture
def run(run):
    """`equipoise report` with some arguments."""
    return partial(run, "report")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    place = tmp_path_factory.mktemp("values")
    profile = cases.profile()
    profile.save(place / "run.profile.safetensors")
    cases.rq_plan(profile).save(place / "rq.plan.json")
    cases.rank_plan(profile).save(place / "ranks.plan.json")
    cases.evaluation().save(place / "run.eval.json")
    rows = [
        {"bytes_fraction": 1.0, "error_bound": 0.1, "lis": 1.2, "lower_bound": 1.0, "output_error": 0.05, "bytes": 1000,
         "slots": 9, "efficient": True, "problem": ""}
    ]  # fmt: skip
    (place / "frontier.json").write_text(json.dumps({"points": rows}))
    return place


def test_values_are_told_apart_by_content_in_any_order(run, files, tmp_path):
    pytest.importorskip("plotly", reason="plotly is not installed")
    given = ["run.eval.json", "frontier.json", "run.profile.safetensors", "ranks.plan.json", "rq.plan.json"]
    out = tmp_path / "r.html"
    status, printed, _ = run(*(files / name for name in given), "--out", out)
    assert status == 0
    assert out.read_text().startswith("<!doctype html>")
    assert "next: equipoise " in printed
    assert "1. 'rq' changes perplexity" in printed


def test_json_has_the_findings_and_every_table(run, files, tmp_path):
    status, printed, _ = run(
        files / "run.profile.safetensors", f"mine={files / 'rq.plan.json'}", "--out", tmp_path / "r.md", "--json"
    )
    assert status == 0
    rows = json.loads(printed)
    assert rows["findings"][0]["topic"] == "imbalance"
    assert {figure["key"] for figure in rows["figures"]} >= {"load", "lis", "slots", "units", "memory", "drift"}
    assert rows["files"] == [str(tmp_path / "r.md")]
    lis = next(figure for figure in rows["figures"] if figure["key"] == "lis")
    assert [row[0] for row in lis["table"]["rows"]] == ["as it is", "mine"]


def test_pictures_go_to_a_directory(run, files, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    out = tmp_path / "pictures"
    status, *_ = run(files / "run.eval.json", "--out", out, "--format", "png")
    assert status == 0
    assert sorted(path.name for path in out.iterdir()) == [
        f"01-quality-{view}.png" for view in ("balance", "kl", "perplexity", "tasks", "top-1")
    ]


def test_the_next_command_names_the_files_that_were_given(run, files, tmp_path):
    _, printed, _ = run(files / "run.profile.safetensors", "--out", tmp_path / "r.md")
    assert f"next: equipoise plan {files / 'run.profile.safetensors'} --out rq.plan.json" in printed


def test_the_next_command_finds_the_model_that_balance_saved(run, files, tmp_path):
    cases.evaluation(difference=(-0.01, -0.03, 0.01)).save(tmp_path / "run.eval.json")
    given = (files / "run.profile.safetensors", files / "rq.plan.json", files / "frontier.json", tmp_path / "run.eval.json")
    _, before, _ = run(*given, "--out", tmp_path / "r.md")
    assert "next: equipoise apply " in before
    (tmp_path / "model").mkdir()
    cases.rq_plan(cases.profile()).save(tmp_path / "model" / "equipoise.plan.json")
    _, after, _ = run(*given, "--out", tmp_path / "r.md")
    assert f"next: equipoise inspect {tmp_path / 'model' / 'equipoise.plan.json'}" in after


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["run.eval.json", "run.eval.json"], "second evaluation"),
        (["rq.plan.json", "rq.plan.json"], "two plans are named 'rq'"),
        (["absent.json"], "cannot read"),
        (["broken.json"], "not a valid plan"),
        (["empty-frontier.json"], "not a valid plan"),
    ],
)
def test_mistakes_are_one_line(run, files, tmp_path, given, message):
    (files / "broken.json").write_text('{"schema": ')
    (files / "empty-frontier.json").write_text('{"points": []}')
    out = tmp_path / "r.html"
    status, printed, err = run(*(files / name for name in given), "--out", out)
    assert status == 1
    assert printed == ""
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not out.exists()


def test_formats_and_places_that_cannot_be(run, files, tmp_path):
    status, _, err = run(files / "run.eval.json", "--out", tmp_path / "r.pdf", "--format", "pdf")
    assert status == 1
    assert "allowed are html, md, png" in err
    status, _, err = run(files / "run.eval.json", "--out", tmp_path / "r.pdf")
    assert status == 1
    assert "ends in '.pdf', which tells no format" in err
    assert not (tmp_path / "r.pdf").exists()
    taken = tmp_path / "taken.png"
    taken.write_text("mine")
    status, _, err = run(files / "run.eval.json", "--out", taken, "--format", "png")
    assert status == 1
    assert "directory" in err
    assert taken.read_text() == "mine"


def test_without_plotly_the_page_says_what_to_install(run, files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    status, _, err = run(files / "run.eval.json", "--out", tmp_path / "r.html")
    assert status == 1
    assert "pip install plotly" in err
