"""From prompts to a smaller stock model, from the command line."""

from __future__ import annotations

import json

import pytest

from equipoise.artifacts import Evaluation, Plan
from support import corpus, refused


@pytest.fixture
def files(tmp_path):
    """Prompts of a domain, and held-out text of it and of another."""
    prompts = [{"prompt": text[:80], "answer": text[80:160]} for text in corpus(3, 30)]
    for name, lines in {
        "prompts": prompts, "inside": [{"text": t} for t in corpus(3, 12)], "outside": [{"text": t} for t in corpus(9, 12)]
    }.items():  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_prompts_become_demonstrations_a_plan_and_a_smaller_model(run, tiny_model_dir, files):
    words = ("demonstrations", tiny_model_dir, "--text", files / "prompts.jsonl", "--out", files / "math.jsonl", "-q")
    status, out, err = run(*words, "--answers", "self", "--answer-tokens", 5, "--count", 4, "--json")
    assert status == 0, err
    told = json.loads(out)
    assert (told["demonstrations"], told["answers"]) == (4, "self")
    assert 0 < told["answer_tokens"] < told["tokens"]
    status, out, err = run(*words, "--answers", "given")
    assert status == 0, err
    assert "25 demonstrations of" in out

    measured, plan = files / "x.profile.safetensors", files / "x.plan.json"
    status, _, err = run(
        "profile", tiny_model_dir, "--scenario", f"math={files / 'math.jsonl'}", "--out", measured, "--seq-len", 64,
        "--importance", "easy_ep", "--precisions", "", "-q",
    )  # fmt: skip
    assert status == 0, err
    status, out, err = run("plan", measured, "--prune", "easy-ep", "--keep", 0.5, "--out", plan)
    assert status == 0, err
    assert "warning: the experts were chosen for math alone" in " ".join(out.split())
    assert Plan.load_file(plan).exactness == "capacity"
    status, out, err = run("plan", measured, "--prune", "easy_ep", "--keep", 0.5, "--json")
    assert json.loads(out)["layers"][0]["slots"] == 4
    refused(
        run("apply", tiny_model_dir, plan, "--out", files / "no", "-q"), "leaves out experts, so it is not carried out by slots"
    )
    refused(run("report", measured, plan, "--out", files / "x.html"), "so it is not reported beside the whole model's traffic")
    refused(
        run("export", plan, "--to", "sglang", "--out", files / "x.json"), "leaves out experts, so it is not a placement for"
    )
    refused(run("plan", measured, "--prune", "reap"), "needs the importance estimate 'gate_norm'")
    refused(run("plan", measured, "--prune", "easy-ep", "--method", "rq"), "leave out --method and --ranks")
    refused(run("plan", measured, "--keep", 0.5), "has no option 'keep'")

    status, out, err = run(
        "prune", tiny_model_dir, plan, "--out", files / "small", "--scenario", f"math={files / 'inside.jsonl'}", "--scenario",
        f"other={files / 'outside.jsonl'}", "--tokens", 300, "--seq-len", 64, "-q", "--json",
    )  # fmt: skip
    assert status == 0, err
    told = json.loads(out)
    assert {text["name"]: text["where"] for text in told["texts"]} == {"math": "in domain", "other": "out of domain"}
    assert (told["experts_before"], told["experts"]) == (8, 4)
    assert "chosen for math alone" in told["warning"]
    assert told["balance"].startswith(f"equipoise balance {files / 'small'} --units 8 --bytes 2 ")
    kept = Evaluation.load_file(files / "small" / "equipoise.eval.json").contenders[0]
    assert (kept.plan_method, kept.exactness) == ("prune", "capacity")

    again = ("prune", tiny_model_dir, plan, "--out", files / "again", "-q")
    status, out, err = run(*again, "--scenario", f"math={files / 'inside.jsonl'}", "--tokens", 300, "--seq-len", 64)
    assert status == 0, err
    assert "not measured out of domain" in out
    assert "not measured in domain" not in out
    assert "warning: the experts were chosen for math alone" in " ".join(out.split())
    refused(run(*again), "is not an empty directory")


def test_methods_lists_the_scores(run):
    status, out, err = run("methods", "--json")
    assert status == 0, err
    told = json.loads(out)
    names = {entry["name"] for entry in told["pruning score"]}
    assert names == {"easy-ep", "reap", "gate", "frequency", "leave-one-out", "random"}
    assert "prune" in {entry["name"] for entry in told["planning method"]}
    assert "easy_ep" in {entry["name"] for entry in told["importance estimator"]}


def test_answers_are_given_or_the_models_own(run, tiny_model_dir, files):
    words = ("demonstrations", tiny_model_dir, "--text", files / "prompts.jsonl", "--out", files / "x.jsonl")
    refused(run(*words, "--answers", "none"), "--answers is 'none'; allowed: given, self")
