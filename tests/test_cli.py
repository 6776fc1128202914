"""The command as a user meets it: each test runs it in a process of its own, or in this one where speed allows."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys

import pytest

from equipoise.artifacts import Plan, Profile
from support import corpus, refused


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in corpus(3, 40)))
    return path


@pytest.fixture
def profile_file(run, tiny_model_dir, text, tmp_path):
    path = tmp_path / "x.profile.safetensors"
    status, _, err = run("profile", tiny_model_dir, "--text", text, "--tokens", 800, "--seq-len", 64, "--out", path, "-q")
    assert status == 0, err
    return path


def test_help_and_version_are_quick_and_need_no_torch():
    code = "import sys, equipoise.cli as c; sys.argv = ['equipoise', '--help']\ntry: c.main()\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert "balance" in done.stdout
    assert done.stdout.strip().endswith("False")
    version = subprocess.run([sys.executable, "-m", "equipoise", "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.strip().count(".") == 2


def test_profile_plan_apply_evaluate_inspect(run, tiny_model_dir, text, profile_file, tmp_path):
    profile = Profile.load_file(profile_file)
    assert not list(tmp_path.glob(".*part")), "the state of a finished run is removed"
    plan_file, model, result = tmp_path / "x.plan.json", tmp_path / "balanced", tmp_path / "x.eval.json"
    status, out, _ = run("plan", profile_file, "--out", plan_file, "--json")
    assert status == 0
    assert json.loads(out)["method"] == "rq"
    plan = Plan.load_file(plan_file)
    assert plan.model == profile.model
    assert run("apply", tiny_model_dir, plan_file, "--out", model)[0] == 0
    options = ("--tokens", 400, "--seq-len", 64, "--out", result, "--json", "-q")
    status, out, err = run("evaluate", tiny_model_dir, model, "--text", text, *options)
    assert status == 0, err
    assert json.loads(out)["contenders"][0]["texts"][0]["tokens"] > 0
    for file in (profile_file, plan_file, result):
        status, out, err = run("inspect", file, "--json")
        assert status == 0, err
        json.loads(out)
        status, out, err = run("inspect", file)
        assert status == 0, err
        assert "predicted" in out or "measured" in out


def test_a_plan_is_the_same_for_a_seed(run, profile_file, tmp_path):
    for name in ("a", "b"):
        assert run("plan", profile_file, "--out", tmp_path / name)[0] == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_frontier_and_methods(run, profile_file):
    status, out, err = run("frontier", profile_file, "--bytes", "0.75,1.0", "--error-bounds", "0,0.05", "--json")
    assert status == 0, err
    assert len(json.loads(out)["points"]) == 4
    status, out, err = run("methods", "--json")
    assert status == 0, err
    assert {"rq", "rq-paper"} <= {m["name"] for m in json.loads(out)["planning method"]}


def test_options_of_estimators_reach_the_profile(run, tiny_model_dir, text, tmp_path):
    words = ("profile", tiny_model_dir, "--text", text, "--tokens", 300, "--seq-len", 64, "-q", "--precisions", "")
    for fraction in (0.2, 0.9):
        status, _, err = run(*words, "--set", f"wanda.fraction={fraction}", "--out", tmp_path / str(fraction))
        assert status == 0, err
    few, most = (Profile.load_file(tmp_path / name) for name in ("0.2", "0.9"))
    assert few.source.options["importance_options"] == {"wanda": {"fraction": 0.2}}
    assert (few.importance["wanda"] < most.importance["wanda"]).all()
    refused(run(*words, "--set", "fraction=0.2", "--out", tmp_path / "x"), "ESTIMATOR.NAME=VALUE")
    refused(run(*words, "--set", "wanda.part=0.2", "--out", tmp_path / "x"), "no option 'part'")


def test_dense_model(run, tiny_model_dir, text, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "dense")
    for file in tiny_model_dir.glob("tokenizer*"):
        (tmp_path / "dense" / file.name).write_bytes(file.read_bytes())
    refused(run("profile", tmp_path / "dense", "--text", text, "--out", tmp_path / "p", "-q"), "no MoE layer")
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("content", ["", " \n"])
def test_empty_text(run, tiny_model_dir, tmp_path, content):
    (tmp_path / "t.txt").write_text(content)
    words = ("profile", tiny_model_dir, "--text", tmp_path / "t.txt", "--out", tmp_path / "p", "-q")
    refused(run(*words), "every document is empty")
    assert not (tmp_path / "p").exists()


def test_missing_text_missing_model_and_bad_scenario(run, tiny_model_dir, text, tmp_path):
    refused(run("profile", tiny_model_dir, "--out", tmp_path / "p"), "no text given")
    refused(run("profile", tiny_model_dir, "--text", tmp_path / "absent.txt", "--out", tmp_path / "p"), "does not exist")
    refused(run("profile", tmp_path / "absent", "--text", text, "--out", tmp_path / "p"), "no directory")
    refused(run("profile", tiny_model_dir, "--scenario", "code", "--out", tmp_path / "p"), "NAME=FILE")


def test_nan_weights(run, tiny_model_dir, text, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model_dir, broken)
    weights = load_file(broken / "model.safetensors")
    name = next(n for n in weights if "experts.3" in n)
    weights[name][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    refused(run("profile", broken, "--text", text, "--out", tmp_path / "p", "-q"), "experts")
    assert not (tmp_path / "p").exists()


def test_truncated_profile_and_unknown_method(run, profile_file, tmp_path):
    refused(run("plan", profile_file, "--method", "rq-papr"), "Did you mean 'rq-paper'")
    refused(run("plan", profile_file, "--set", "tolerence=1"), "tolerence")
    refused(run("plan", profile_file, "--set", "tolerance"), "NAME=VALUE")
    refused(run("plan", profile_file, "--dispatch", "random"), "least_loaded")
    profile_file.write_bytes(profile_file.read_bytes()[:2000])
    refused(run("plan", profile_file, "--out", tmp_path / "plan"), "not a whole equipoise profile")
    assert not (tmp_path / "plan").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: layer["experts"].__setitem__(0, 99), "out of range"),
        (lambda layer: layer["experts"].__setitem__(0, layer["experts"][-1]), "expert"),
        (lambda layer: [layer[c].pop(0) for c in ("experts", "precisions", "units", "shares")], "has no slot"),
    ],
)
def test_broken_plans(run, tiny_model_dir, profile_file, tmp_path, change, message):
    path = tmp_path / "x.plan.json"
    assert run("plan", profile_file, "--set", "error_bound=0", "--out", path)[0] == 0
    data = json.loads(path.read_text())
    change(data["layers"][0])
    path.write_text(json.dumps(data))
    refused(run("apply", tiny_model_dir, path, "--out", tmp_path / "m"), message)
    assert not (tmp_path / "m").exists()


def test_plan_of_another_model_and_read_only_output(run, tiny_model_dir, profile_file, tmp_path):
    path = tmp_path / "x.plan.json"
    assert run("plan", profile_file, "--out", path)[0] == 0
    (tmp_path / "file").write_text("")
    refused(run("apply", tiny_model_dir, path, "--out", tmp_path / "file" / "m"), "cannot")
    refused(run("plan", profile_file, "--out", tmp_path / "file" / "p"), "cannot write")
    data = json.loads(path.read_text())
    data["model"] |= {"fingerprint": "0" * 64, "name": "another"}
    path.write_text(json.dumps(data))
    met = run("apply", tiny_model_dir, path, "--out", tmp_path / "m")
    refused(met, "made for 'another'")
    refused(met, f"not for '{tiny_model_dir}'")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "x.plan.json", "x.profile.safetensors"]


def test_balance_reads_chats_keeps_to_bytes_and_names_a_command_that_runs(run, tiny_model_dir, text, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    chats = tmp_path / "log.jsonl"
    said = [[{"role": "user", "content": document}] for document in corpus(5, 20)]
    chats.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in said))
    words = (
        "--scenario",
        f"chat={chats}",
        "--scenario",
        f"text={text}",
        "--tokens",
        400,
        "--heldout-tokens",
        200,
        "--seq-len",
        64,
    )
    command = ("balance", model, *words, "--bytes", 0.8, "--error-bound", 1, "--compare", "", "--out", tmp_path / "a run", "-q")
    refused(run(*command), f"'{chats}' line 1: the model's tokenizer has no chat template")
    (model / "chat_template.jinja").write_text("{% for m in messages %}the old {{ m.content }} stone{% endfor %}")
    status, out, err = run(*command)
    assert status == 0, err
    assert Plan.load_file(tmp_path / "a run" / "rq.plan.json").options["bytes_fraction"] == 0.8
    following = out.splitlines()[-1]
    assert following.startswith("next: equipoise report ")
    assert run(*shlex.split(following)[2:])[0] == 0
    assert (tmp_path / "a run" / "report.html").is_file()


def test_ctrl_c_says_that_the_same_command_goes_on(run, monkeypatch, tmp_path):
    def stop(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(Profile, "load_file", stop)
    status, _, err = run("plan", tmp_path / "x.profile.safetensors")
    assert status == 130
    assert "interrupted; the same command goes on" in err
