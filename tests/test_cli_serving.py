"""The command from an engine's records to an engine's plan file, without a model and without torch."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from equipoise.artifacts import Plan, Profile
from equipoise.cli import app, main

RUN = CliRunner()


@pytest.fixture
def records(tmp_path):
    """Two kinds of traffic with skew of their own, as the plain table that scripts write."""
    rng = np.random.default_rng(0)
    counts = rng.gamma(0.5, 400, (4, 3, 16)).astype(np.int64) + 1
    file = tmp_path / "loads.npz"
    np.savez(file, counts=counts, scenarios=np.array(["code", "math", "chat", "law"]))
    return file


def told(*arguments):
    result = RUN.invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def mistake(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["equipoise", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: ")
    assert "\n" not in line
    return line


def test_from_a_table_to_a_plan_to_an_engine_s_file(records, tmp_path):
    profile, plan, map_file = tmp_path / "p.profile.safetensors", tmp_path / "x.plan.json", tmp_path / "map.json"
    rows = json.loads(told("profile", "--from", "table", records, "--out", profile, "--top-k", 2, "--json"))
    assert [row["scenario"] for row in rows["scenarios"]] == ["code", "math", "chat", "law"]
    assert Profile.load_file(profile).source.origin == "table"
    planned = json.loads(told("plan", profile, "--ranks", 4, "--slots", 20, "--out", plan, "--json"))
    assert planned["method"] == "robust"
    made = Plan.load_file(plan)
    assert made.units == 4
    assert all(layer.num_slots == 20 and layer.duplicates == 0 for layer in made.layers)
    written = json.loads(told("export", plan, "--to", "sglang", "--out", map_file, "--json"))
    assert written["files"] == [str(map_file)]
    assert "--init-expert-location" in written["flags"]
    assert json.loads(map_file.read_text()) == {"physical_to_logical_map": [list(layer.experts) for layer in made.layers]}


@pytest.mark.parametrize("method", ["contiguous", "round_robin", "eplb", "robust"])
def test_every_rank_method_is_planned_and_simulated(method, records, tmp_path):
    profile = tmp_path / "p.profile.safetensors"
    told("profile", "--from", "table", records, "--out", profile, "--top-k", 2)
    told("plan", profile, "--method", method, "--ranks", 4, "--nodes", 2, "--out", tmp_path / "a.plan.json")
    report = json.loads(
        told("simulate", "--profile", profile, "--plan", f"mine={tmp_path / 'a.plan.json'}", "--batch", 64, "--batches", 4,
             "--out", tmp_path / "report.json", "--json")
    )  # fmt: skip
    part = report["parts"][0]
    assert "mine" in [result["name"] for result in part["results"]]
    assert all(result["imbalance"]["mean"] >= 1 for result in part["results"])
    assert part["origin"] == "estimated", "counts alone are no replay"
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_the_planner_chooses_slots_within_a_budget(records, tmp_path):
    profile = tmp_path / "p.profile.safetensors"
    told("profile", "--from", "table", records, "--out", profile, "--top-k", 2)
    told("plan", profile, "--ranks", 4, "--redundancy", 2, "--out", tmp_path / "a.plan.json")
    slots = [layer.num_slots for layer in Plan.load_file(tmp_path / "a.plan.json").layers]
    assert sum(slots) <= 3 * 16 + 2 * 4
    assert all(number % 4 == 0 for number in slots)


def test_what_moves_from_the_plan_in_force_is_counted(records, tmp_path):
    profile, first, second = tmp_path / "p.profile.safetensors", tmp_path / "1.plan.json", tmp_path / "2.plan.json"
    told("profile", "--from", "table", records, "--out", profile, "--top-k", 2)
    told("plan", profile, "--method", "contiguous", "--ranks", 4, "--out", first)
    told("plan", profile, "--ranks", 4, "--current", first, "--out", second)
    moved = [layer.moved for layer in Plan.load_file(second).predicted.layers]
    assert all(0 <= number <= 16 for number in moved)
    assert any(moved) or "default" in Plan.load_file(second).predicted.note


def test_engines_that_plan_by_themselves_are_handed_the_loads(records, tmp_path, monkeypatch, capsys):
    profile, plan, out = tmp_path / "p.profile.safetensors", tmp_path / "x.plan.json", tmp_path / "loads.json"
    told("profile", "--from", "table", records, "--out", profile, "--top-k", 2)
    told("plan", profile, "--ranks", 4, "--slots", 20, "--out", plan)
    assert "--profile" in mistake(monkeypatch, capsys, "export", plan, "--to", "lmdeploy", "--out", out)
    told("export", plan, "--to", "lmdeploy", "--out", out, "--profile", profile)
    assert json.loads(out.read_text()) == Profile.load_file(profile).load.tolist()


def test_flags_are_printed_as_they_are_to_be_pasted(records, tmp_path):
    profile, plan, out = tmp_path / "p.profile.safetensors", tmp_path / "x.plan.json", tmp_path / "maps.npz"
    told("profile", "--from", "table", records, "--out", profile, "--top-k", 2)
    told("plan", profile, "--ranks", 4, "--out", plan)
    shown = told("export", plan, "--to", "deepseek", "--out", out)
    assert json.loads(told("export", plan, "--to", "deepseek", "--out", out, "--json"))["flags"] in shown
    assert "[k] for k in" in shown


def test_a_change_of_plan_is_priced(records, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps({
            "model_type": "qwen3_moe", "num_hidden_layers": 3, "hidden_size": 64, "moe_intermediate_size": 32,
            "num_experts": 16, "num_experts_per_tok": 2, "torch_dtype": "bfloat16", "num_attention_heads": 4,
        })
    )  # fmt: skip
    profile, first, second = tmp_path / "p.profile.safetensors", tmp_path / "1.plan.json", tmp_path / "2.plan.json"
    told("profile", "--from", "table", records, "--out", profile, "--config", config)
    told("plan", profile, "--method", "contiguous", "--ranks", 4, "--out", first)
    told("plan", profile, "--method", "eplb", "--ranks", 4, "--current", first, "--out", second)
    asked = ("payback", first, second, "--profile", profile, "--balanced-ms", 10, "--link", 50, "--json")
    soon, late = (json.loads(told(*asked, "--steps", steps)) for steps in (0, 10**9))
    assert soon["bytes_moved"] == late["bytes_moved"] > 0
    assert not soon["pays"]
    assert late["pays"] == (late["seconds_saved"] > 0)


def test_mistakes_are_one_line(records, tmp_path, monkeypatch, capsys):
    profile, out = tmp_path / "p.profile.safetensors", tmp_path / "x.plan.json"
    told("profile", "--from", "table", records, "--out", profile, "--top-k", 2)
    assert "sglangg" in mistake(monkeypatch, capsys, "profile", "--from", "sglangg", records, "--out", out)
    assert "--from ENGINE" in mistake(monkeypatch, capsys, "profile", "a", "b", "--text", "t.txt", "--out", out)
    assert "--config is of no use" in mistake(
        monkeypatch, capsys, "profile", "model", "--text", "t.txt", "--config", records, "--out", out
    )
    assert "--text is of no use" in mistake(
        monkeypatch, capsys, "profile", "--from", "table", records, "--text", "t.txt", "--out", out
    )
    assert "name the same thing" in mistake(monkeypatch, capsys, "plan", profile, "--ranks", 4, "--units", 8)
    assert "--slots is 'x'" in mistake(monkeypatch, capsys, "plan", profile, "--ranks", 4, "--slots", "x")
    assert "ranks" in mistake(monkeypatch, capsys, "plan", profile, "--ranks", 5)
    assert "give one" in mistake(monkeypatch, capsys, "plan", profile, "--ranks", 4, "--slots", 20, "--redundancy", 1)
    assert "--ranks" in mistake(monkeypatch, capsys, "plan", profile, "--redundancy", 1)
    assert "slots" in mistake(monkeypatch, capsys, "plan", profile, "--method", "rq", "--slots", 20)
    told("plan", profile, "--ranks", 4, "--out", out)
    assert "sglang" in mistake(monkeypatch, capsys, "export", out, "--to", "nowhere", "--out", tmp_path / "y")
    assert not (tmp_path / "y").exists()
    assert "same traffic" in mistake(monkeypatch, capsys, "simulate", "--plan", out, "--profile", profile, "--trace", records)


def test_nothing_of_it_imports_torch(records, tmp_path):
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom equipoise.cli import app\n"
        f"p, x, m = [{str(tmp_path)!r} + '/' + name for name in ('p.profile.safetensors', 'x.plan.json', 'm.json')]\n"
        f"for line in (['profile', '--from', 'table', {str(records)!r}, '--out', p, '--top-k', '2'],\n"
        "             ['plan', p, '--ranks', '4', '--out', x], ['export', x, '--to', 'sglang', '--out', m],\n"
        "             ['simulate', '--profile', p, '--plan', x, '--batch', '64', '--batches', '2']):\n"
        "    done = CliRunner().invoke(app, line, catch_exceptions=False)\n    assert done.exit_code == 0, done.output\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
