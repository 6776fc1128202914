"""Routing policies from the command line: fitted, profiled, planned, applied, judged; and what does not go together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from equipoise.artifacts import Evaluation, Plan, Profile
from equipoise.artifacts.routing import RoutingPolicy
from equipoise.models.policy_marks import policy_id
from equipoise.pipeline import load_balanced
from support import corpus

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(corpus(0)))
    return path


def test_from_fit_to_proof(run: Run, tiny_model_dir: Path, text: Path, tmp_path: Path) -> None:
    policy, measured, decided = tmp_path / "p.policy.json", tmp_path / "x.profile", tmp_path / "x.plan.json"
    short = ("--text", text, "--tokens", 300, "--seq-len", 64, "-q")
    status, out, err = run(
        "policy", "fit", tiny_model_dir, "--policy", "top_p", "--mean-k", 1.5, *short, "--out", policy, "--json"
    )
    assert status == 0, err
    fitted = RoutingPolicy.load_file(policy)
    assert json.loads(out)["id"] == fitted.id
    assert fitted.mean_k == pytest.approx(1.5, abs=0.05)
    for command in (("policy", "show"), ("inspect",)):
        status, out, err = run(*command, policy)
        assert status == 0, err
        assert fitted.id in out.replace("\n", "")
    native = tmp_path / "native.profile"
    assert run("profile", tiny_model_dir, *short, "--precisions", "", "--out", native)[0] == 0
    status, _, err = run("profile", tiny_model_dir, *short, "--precisions", "", "--policy", policy, "--out", measured)
    assert status == 0, err
    profile = Profile.load_file(measured)
    assert profile.source.routing_policy == fitted.id
    assert profile.load.sum() < Profile.load_file(native).load.sum()
    status, _, err = run("plan", measured, "--out", decided)
    assert status == 0, err
    plan = Plan.load_file(decided)
    assert (plan.routing_policy, plan.exactness) == (fitted.id, "routing")

    status, _, err = run("apply", tiny_model_dir, decided, "--out", tmp_path / "no")
    assert status == 1
    assert "give that policy's file (--policy)" in err
    assert not (tmp_path / "no").exists()
    status, _, err = run("apply", tiny_model_dir, decided, "--policy", policy, "--out", tmp_path / "model")
    assert status == 0, err
    assert policy_id(load_balanced(tmp_path / "model")) == fitted.id

    result = tmp_path / "x.eval.json"
    words = ("evaluate", tiny_model_dir, tmp_path / "model", "--policy", policy, *short, "--out", result)
    status, _, err = run(*words)
    assert status == 0, err
    balanced, alone = Evaluation.load_file(result).contenders
    assert balanced.exactness == alone.exactness == "routing"
    assert alone.name == "policy p.policy.json"
    assert alone.batch_order_kl is not None
    assert alone.batch_order_kl < 1e-3  # bf16
    assert alone.texts[0].kl.value > 0  # its random experts hardly matter


def test_what_does_not_go_together_is_refused(run: Run, tiny_model_dir: Path, text: Path, tmp_path: Path) -> None:
    policy = tmp_path / "p.policy.json"
    short = ("--text", text, "--tokens", 200, "--seq-len", 64, "-q")
    fit = ("policy", "fit", tiny_model_dir, *short, "--out", policy)
    for words, message in (
        (("--policy", "top_q"), "Did you mean 'top_p'"),
        (("--policy", "top_p", "--mean-k", 9), "mean_k: 9.0 given"),
        (("--policy", "bias", "--set", "force=1"), "no option 'force'"),
        (("--policy", "top_p", "--mean-k", 1.5, "--set", "mean_k=1.5"), "give one"),
    ):
        status, _, err = run(*fit, *words)
        assert status == 1, words
        assert message in err
        assert not policy.exists()
    status, _, err = run("report", "--help")
    assert status == 0, err


def test_policies_are_listed(run: Run) -> None:
    status, out, err = run("methods", "--json")
    assert status == 0, err
    listed = {entry["name"]: entry for entry in json.loads(out)["routing policy"]}
    assert {"top_p", "random_k", "static_k", "bias", "laser_style", "load_only", "random_pool"} <= set(listed)
    assert "Loss-Free" in listed["bias"]["source"]
