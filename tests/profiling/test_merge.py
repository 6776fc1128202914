from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from equipoise.artifacts import Profile
from equipoise.cli import app
from equipoise.errors import ProfileError
from equipoise.profiling.calibrate import profile
from equipoise.profiling.loading import load_model
from equipoise.profiling.merge import HOW, PARTS, merge

EXACT = ("counts", "gate_mass", "tokens", "transitions", "coactivation")
OPTIONS = {
    "tokens": 300,
    "seq_len": 24,
    "batch_size": 2,
    "importance": ("wanda", "gate_norm", "frequency", "leave_one_out", "easy_ep"),
    "importance_options": {"gate_norm": {"max_tokens_per_expert": None}, "output_error": {"max_tokens_per_expert": None}},
    "precisions": ("int8", "int4"),
    "progress": False,
}


@pytest.fixture(scope="module")
def texts(make_documents):
    return {"code": make_documents(8, seed=1, words=15), "math": make_documents(8, seed=2, words=15)}


@pytest.fixture(scope="module")
def model(make_model):
    return make_model("mixtral")


@pytest.fixture(scope="module")
def parts(model, tokenizer, texts):
    return [profile(model, tokenizer, {name: documents}, **OPTIONS) for name, documents in texts.items()]


@pytest.fixture(scope="module")
def whole(model, tokenizer, texts):
    return profile(model, tokenizer, texts, **OPTIONS)


def test_two_runs_over_two_traffics_count_what_one_run_over_both_counts(parts, whole):
    found = merge(parts)
    assert found.source.scenarios == whole.source.scenarios
    for name in EXACT:
        assert np.array_equal(getattr(found, name), getattr(whole, name)), name
    for scenario in range(2):
        mine, theirs = (p.windows[p.window_scenario == scenario] for p in (found, whole))
        assert np.array_equal(mine, theirs)
    assert np.array_equal(found.importance["frequency"], whole.importance["frequency"])
    for name in ("gate_norm", "leave_one_out", "easy_ep"):
        assert found.importance[name] == pytest.approx(whole.importance[name], rel=1e-9), name
    assert np.array_equal(found.scenario_importance["easy_ep"], whole.scenario_importance["easy_ep"])
    for name, error in whole.output_error.items():
        assert found.output_error[name] == pytest.approx(error, rel=1e-9)
    # The energy is estimated from a sample of each run's tokens; scores relative to it share its spread.
    assert found.output_energy == pytest.approx(whole.output_energy, rel=0.05)
    assert found.importance["output_error"] == pytest.approx(whole.importance["output_error"], rel=0.05)
    assert found.importance["wanda"] == pytest.approx(whole.importance["wanda"], rel=0.01)


def test_one_scenario_in_parts_adds_up(model, tokenizer, texts, parts):
    again = profile(model, tokenizer, {"code": texts["math"]}, **OPTIONS)
    found = merge([parts[0], again])
    assert found.source.scenarios == ("code",)
    assert np.array_equal(found.counts, parts[0].counts + again.counts)
    assert len(found.windows) == len(parts[0].windows) + len(again.windows)
    assert found.windows.sum((0,)).tolist() == found.load.tolist()


def test_merging_in_steps_or_at_once_counts_alike_and_lists_all_runs(model, tokenizer, parts, make_documents, tmp_path):
    third = profile(model, tokenizer, {"prose": make_documents(5, seed=3)}, **OPTIONS | {"seed": 4, "tokens": 100})
    merge(parts).save(tmp_path / "two")
    steps, once = merge([Profile.load_file(tmp_path / "two"), third]), merge([*parts, third])
    for name in EXACT:
        assert np.array_equal(getattr(steps, name), getattr(once, name)), name
    for name, score in once.importance.items():
        assert steps.importance[name] == pytest.approx(score, rel=1e-9), name
    assert steps.source == once.source
    runs = steps.source.options[PARTS]
    assert [run["scenarios"] for run in runs] == [["code"], ["math"], ["prose"]]
    assert [run["tokens"] for run in runs] == [300, 300, 100]
    assert set(steps.source.options[HOW]) == set(steps.importance)


def test_what_does_not_belong_together_is_refused(make_model, model, tokenizer, texts, parts):
    def other(**change):
        given = {"documents": texts["math"], "model": model} | change
        of, documents = given.pop("model"), given.pop("documents")
        return profile(of, tokenizer, {"math": documents}, **OPTIONS | given)

    with pytest.raises(ProfileError, match=r"profile 1 and profile 2 cannot be merged: they differ in model fingerprint\."):
        merge([parts[0], other(model=make_model("mixtral", 1))])
    with pytest.raises(ProfileError, match="differ in option seq_len"):
        merge([parts[0], other(seq_len=20)])
    with pytest.raises(ProfileError, match=r"differ in option importance, .*names of importance"):
        merge([parts[0], other(importance=("wanda",), importance_options={}, precisions=())])
    with pytest.raises(ProfileError, match="differ in option calibration"):
        merge([parts[0], other(calibration={"c": texts["code"]})])
    policy = replace(parts[1], source=parts[1].source.model_copy(update={"routing_policy": "top-p"}))
    with pytest.raises(ProfileError, match="differ in routing_policy"):
        merge([parts[0], policy])
    with pytest.raises(ProfileError, match="profile 1 and profile 2 are of the same text"):
        merge([parts[0], parts[0]])
    with pytest.raises(ProfileError, match="profile 1 and profile 2 are of the same text"):
        merge([merge(parts), parts[1]])
    with pytest.raises(ProfileError, match="at least two"):
        merge(parts[:1])
    odd = [replace(part, importance={"odd": part.importance["wanda"]}) for part in parts]
    with pytest.raises(ProfileError, match="no rule to merge importance 'odd'"):
        merge(odd)


def test_the_command(parts, tmp_path):
    from typer.testing import CliRunner

    for name, part in zip("ab", parts, strict=True):
        part.save(tmp_path / name)
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "c"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)
    assert Profile.load_file(tmp_path / "c").source == merge(parts).source


def test_profiles_of_a_model_that_is_read_layer_by_layer_merge_to_that_of_one_in_memory(model, tokenizer, texts, tmp_path):
    model.save_pretrained(tmp_path)
    options = OPTIONS | {
        "importance": ("wanda", "gate_norm", "frequency"),
        "importance_options": {},
        "tokens": 120,
        "name": "m",
    }
    whole = profile(model, tokenizer, texts, **options)
    streamed = load_model(str(tmp_path), memory=0)
    found = merge([profile(streamed, tokenizer, {name: documents}, **options) for name, documents in texts.items()])
    assert found.model == whole.model
    for name in EXACT:
        assert np.array_equal(getattr(found, name), getattr(whole, name)), name
    assert np.array_equal(found.importance["frequency"], whole.importance["frequency"])


def test_an_expert_that_one_run_hardly_saw_keeps_the_error_that_another_measured(parts):
    def with_few(part, load, error, few):
        counts, errors = part.counts.copy(), part.output_error["int8"].copy()
        counts[0, :, 0, 1] = [load, 0]
        errors[0, 1] = error
        remarks = {"output_error": {"experts_with_few_tokens": few}, "leave_one_out": {"scored_tokens": 1}}
        options = part.source.options | {"remarks": remarks}
        source = part.source.model_copy(update={"options": options})
        return replace(part, counts=counts, output_error=dict(part.output_error) | {"int8": errors}, source=source)

    guessed, measured = with_few(parts[0], 2, 50.0, {"0": [1]}), with_few(parts[1], 100, 10.0, {})
    assert merge([guessed, measured]).output_error["int8"][0, 1] == pytest.approx(10.0 * 102 / 100)
    alike = with_few(parts[1], 100, 10.0, {"0": [1]})
    assert merge([guessed, alike]).output_error["int8"][0, 1] == pytest.approx(60.0), "nobody knows better"
