from __future__ import annotations

import io
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from equipoise.artifacts import Profile
from equipoise.errors import EquipoiseError, ModelError, ProfileError, TextError
from equipoise.models.layers import find_moe_layers
from equipoise.profiling import calibrate, progress
from equipoise.profiling.calibrate import profile
from equipoise.profiling.importance import leave_one_out

EVERYTHING = {
    "tokens": 240,
    "seq_len": 24,
    "batch_size": 3,
    "importance": ("wanda", "gate_norm", "frequency", "leave_one_out"),
    "importance_options": {"leave_one_out": {"tokens": 1}},
    "precisions": ("int8", "int4"),
}


@pytest.fixture(scope="module")
def scenarios(make_documents):
    return {"code": make_documents(8, seed=1, words=15), "math": make_documents(8, seed=2, words=15)}


@pytest.fixture
def mixtral(make_model):
    return make_model("mixtral")


def arrays(found: Profile) -> dict[str, np.ndarray]:
    return found._arrays()


def assert_same(one: Profile, other: Profile) -> None:
    assert one.source == other.source
    assert one.model == other.model
    assert arrays(one).keys() == arrays(other).keys()
    for name, array in arrays(one).items():
        assert np.array_equal(array, arrays(other)[name], equal_nan=True), name


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_counts_are_those_of_rows_run_one_by_one(make_model, tokenizer, scenarios, family):
    model = make_model(family)
    found = profile(model, tokenizer, scenarios, tokens=240, seq_len=24, batch_size=4)
    alone = profile(model, tokenizer, scenarios, tokens=240, seq_len=24, batch_size=1)
    assert np.array_equal(found.counts, alone.counts)
    assert found.gate_mass == pytest.approx(alone.gate_mass, rel=1e-4)
    assert found.tokens.tolist() == [240, 240]
    top_k = [layer.top_k for layer in found.model.layers]
    assert found.counts.sum((1, 3)).tolist() == [[240 * k for k in top_k]] * 2
    assert found.counts[:, 1].sum() == 0
    assert np.array_equal(found.windows[found.window_scenario == 0].sum(0), found.scenario_load[0])


def test_encoder_decoder_counts_are_the_tokens_of_each_stack(make_model, tokenizer, scenarios):
    found = profile(make_model("switch"), tokenizer, scenarios, tokens=240, seq_len=24, batch_size=4)
    assert found.load.sum() <= 480
    assert found.load.sum() > 400
    assert (found.tokens > 100).all()


def test_the_profile_says_what_it_was_made_from_and_survives_a_file(mixtral, tokenizer, scenarios, tmp_path):
    files = {"code": ["a.txt"], "math": [tmp_path / "b.jsonl"]}
    found = profile(mixtral, tokenizer, scenarios, **EVERYTHING, name="toy", files=files)
    assert found.model.name == "toy"
    assert found.source.scenarios == ("code", "math")
    assert found.source.texts == {"code": ["a.txt"], "math": [str(tmp_path / "b.jsonl")]}
    assert found.source.options["precisions"] == ["int8", "int4-g32"]
    assert set(found.importance) == {"wanda", "gate_norm", "frequency", "leave_one_out", "output_error"}
    found.save(tmp_path / "x.safetensors")
    assert_same(Profile.load_file(tmp_path / "x.safetensors"), found)


def test_the_same_run_gives_the_same_profile_and_another_seed_another(mixtral, tokenizer, scenarios):
    first = profile(mixtral, tokenizer, scenarios, **EVERYTHING)
    assert_same(profile(mixtral, tokenizer, scenarios, **EVERYTHING), first)
    other = profile(mixtral, tokenizer, scenarios, **EVERYTHING, seed=1)
    assert other.source.text_sha256 != first.source.text_sha256
    packed = profile(mixtral, tokenizer, scenarios, **EVERYTHING, layout="packed")
    assert packed.source.text_sha256 != first.source.text_sha256


def test_a_run_interrupted_anywhere_resumes_to_the_same_profile(mixtral, tokenizer, scenarios, tmp_path, monkeypatch):
    whole = profile(mixtral, tokenizer, scenarios, **EVERYTHING)
    state = tmp_path / "state"
    calls = {"forward": 0, "loss": 0}

    def failing(function, name, every):
        def wrapped(*args, **kwargs):
            calls[name] += 1
            if calls[name] % every == 0:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(calibrate, "run_batch", failing(calibrate.run_batch, "forward", 3))
    patched = failing(leave_one_out.negative_log_likelihood, "loss", 7)
    monkeypatch.setattr(leave_one_out, "negative_log_likelihood", patched)
    interruptions = 0
    while True:
        try:
            found = profile(mixtral, tokenizer, scenarios, **EVERYTHING, resume_path=state, save_every=0)
            break
        except KeyboardInterrupt:
            interruptions += 1
            assert interruptions < 20, "every attempt gets further than the one before"
    assert interruptions >= 4
    assert_same(found, whole)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in mixtral.modules())
    # The complete state stays: asking again runs nothing.
    monkeypatch.setattr(calibrate, "run_batch", None)
    assert_same(profile(mixtral, tokenizer, scenarios, **EVERYTHING, resume_path=state), whole)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import conftest
from equipoise.profiling import calibrate
run, calls = calibrate.run_batch, []
def dying(*args, **kwargs):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return run(*args, **kwargs)
calibrate.run_batch = dying
documents = conftest._make_documents
calibrate.profile(
    conftest._make_model("mixtral"), conftest._make_tokenizer(),
    {"code": documents(8, seed=1, words=15), "math": documents(8, seed=2, words=15)},
    tokens=240, seq_len=24, batch_size=3, precisions=("int8",), resume_path=sys.argv[2], save_every=0,
)
"""


def test_a_killed_process_leaves_a_whole_state(mixtral, tokenizer, scenarios, tmp_path):
    state = tmp_path / "state"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    here = os.path.dirname(__file__)
    done = subprocess.run([sys.executable, "-c", KILLED, here, state], capture_output=True, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    options = {"tokens": 240, "seq_len": 24, "batch_size": 3, "precisions": ("int8",)}
    resumed = profile(mixtral, tokenizer, scenarios, **options, resume_path=state)
    whole = profile(mixtral, tokenizer, scenarios, **options)
    assert resumed.source == whole.source
    assert np.array_equal(resumed.counts, whole.counts)
    # Another process may add up floats in another order of threads; the resumed part itself is exact (tested above).
    assert resumed.output_error["int8"] == pytest.approx(whole.output_error["int8"], rel=1e-6)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "options"),
        ({"importance": ("wanda",)}, "options"),
        ({"scenarios": {"code": ["other text"], "math": ["and more"]}}, "text"),
        ({"model": 1}, "model"),
    ],
)
def test_the_state_of_another_run_is_refused(make_model, tokenizer, scenarios, tmp_path, change, named):
    options = {"tokens": 60, "seq_len": 24, "importance": ("frequency",), "resume_path": tmp_path / "state"}
    profile(make_model("mixtral"), tokenizer, scenarios, **options)
    model = make_model("mixtral", change.pop("model", 0))
    texts = change.pop("scenarios", scenarios)
    with pytest.raises(ProfileError, match=rf"state of another run: .*{named}"):
        profile(model, tokenizer, texts, **options | change)


@pytest.mark.parametrize("content", [b"", b"not a safetensors file", b"\x02\0\0\0\0\0\0\0{}"])
def test_a_damaged_state_is_refused(mixtral, tokenizer, scenarios, tmp_path, content):
    (tmp_path / "state").write_bytes(content)
    with pytest.raises(ProfileError, match=r"not the state of a profiling run.*delete it"):
        profile(mixtral, tokenizer, scenarios, tokens=60, resume_path=tmp_path / "state")


def test_a_place_that_cannot_be_written_is_refused_before_anything_runs(mixtral, tokenizer, scenarios, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "run_batch", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(EquipoiseError, match="cannot write"):
        profile(mixtral, tokenizer, scenarios, tokens=60, resume_path=tmp_path / "file" / "state")


def test_nan_weights_are_refused(mixtral, tokenizer, scenarios):
    with torch.no_grad():
        mixtral.model.layers[1].mlp.experts.down_proj[2, 0, 0] = float("nan")
    with pytest.raises(ModelError, match="NaN"):
        profile(mixtral, tokenizer, scenarios, tokens=60)


@pytest.mark.parametrize("where", ["before the experts", "after the last experts"])
def test_values_that_overflow_are_refused_and_not_saved(mixtral, tokenizer, scenarios, tmp_path, where):
    layer = mixtral.model.layers[0] if where == "before the experts" else mixtral.model.layers[-1]
    with torch.no_grad():
        layer.mlp.experts.down_proj.fill_(3e38)
    with pytest.raises(ModelError, match="not finite numbers"):
        profile(mixtral, tokenizer, scenarios, tokens=60, resume_path=tmp_path / "state", save_every=0)
    assert not list(tmp_path.iterdir())


def test_the_model_is_left_as_it_was(mixtral, tokenizer, scenarios):
    mixtral.train()
    before = {name: value.clone() for name, value in mixtral.state_dict().items()}
    profile(mixtral, tokenizer, scenarios, **EVERYTHING)
    assert mixtral.training
    assert all(torch.equal(value, before[name]) for name, value in mixtral.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in mixtral.modules())


def test_bfloat16_models_are_measured(make_model, tokenizer, scenarios):
    for family in ("mixtral", "gpt_oss"):
        exact = profile(make_model(family), tokenizer, scenarios, **EVERYTHING)
        found = profile(make_model(family).bfloat16(), tokenizer, scenarios, **EVERYTHING)
        assert found.model.dtype == "bf16"
        for name in ("int8", "int4-g32"):
            # The float32 arithmetic keeps the model's own rounding out of the error, except where biases pin bfloat16.
            ratio = found.relative_error(name).sum() / exact.relative_error(name).sum()
            assert 0.6 < ratio < (1.5 if family == "mixtral" or name == "int4-g32" else 4)


def test_precisions_alone_add_the_output_error(mixtral, tokenizer, scenarios):
    found = profile(mixtral, tokenizer, scenarios, tokens=60, importance=(), precisions=("int8", "int8"))
    assert list(found.output_error) == ["int8"]
    assert list(found.importance) == ["output_error"]


def test_nothing_but_the_load_when_no_estimator_is_asked_for(mixtral, tokenizer, scenarios):
    found = profile(mixtral, tokenizer, scenarios, tokens=60, importance=())
    assert found.load.sum() == 2 * 2 * 60 * 2
    assert not found.importance
    assert found.output_energy.size == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scenarios": {}}, TextError, "no scenarios"),
        ({"scenarios": {"code": []}}, TextError, "scenario 'code' has no text"),
        ({"scenarios": {"code": ["x"], "math": [" "]}}, TextError, "scenario 'math' has no text"),
        ({"scenarios": {"code": "text"}}, TextError, "scenario 'code' is one string"),
        ({"window_tokens": 0}, TextError, "window_tokens is 0"),
        ({"batch_size": 0}, TextError, "batch_size is 0"),
        ({"precisions": ("int5",)}, EquipoiseError, "unknown precision 'int5'"),
        ({"importance": ("magic",)}, EquipoiseError, "unknown importance estimator 'magic'"),
    ],
)
def test_mistakes_are_named_before_anything_runs(mixtral, tokenizer, scenarios, monkeypatch, options, error, message):
    monkeypatch.setattr(calibrate, "run_batch", None)
    with pytest.raises(error, match=message):
        profile(mixtral, tokenizer, **{"scenarios": scenarios} | options)


def test_a_dense_model_is_refused(tokenizer, scenarios):
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    with pytest.raises(ModelError, match="dense"):
        profile(LlamaForCausalLM(config), tokenizer, scenarios)


def test_progress_is_silent_unless_on_a_terminal(mixtral, tokenizer, scenarios, capsys, monkeypatch):
    profile(mixtral, tokenizer, scenarios, tokens=60, importance=("leave_one_out",))
    assert capsys.readouterr() == ("", "")
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(progress, "Console", lambda **_: terminal)
    profile(mixtral, tokenizer, scenarios, tokens=60, importance=("leave_one_out",), progress=False)
    assert screen.getvalue() == ""
    profile(mixtral, tokenizer, scenarios, tokens=60, importance=("leave_one_out",))
    assert "recording" in screen.getvalue()
    assert "tokens/s" in screen.getvalue()


def test_the_last_position_is_all_that_the_head_computes_while_recording(mixtral, tokenizer, scenarios, monkeypatch):
    shapes = []
    check = calibrate._check_logits
    monkeypatch.setattr(calibrate, "_check_logits", lambda out, batch: (shapes.append(out.logits.shape[1]), check(out, batch)))
    profile(mixtral, tokenizer, scenarios, tokens=60)
    assert set(shapes) == {1}
    assert len(find_moe_layers(mixtral)) == 2


def test_calibration_text_is_watched_and_never_counted(mixtral, tokenizer, scenarios, make_documents):
    own = {"own": make_documents(8, seed=5, words=15)}
    options = EVERYTHING | {"batch_size": 4}
    plain = profile(mixtral, tokenizer, scenarios, **options)
    found = profile(mixtral, tokenizer, scenarios, **options, calibration=own)
    alone = profile(mixtral, tokenizer, own, **options)
    for name in ("counts", "gate_mass", "tokens", "windows", "window_scenario", "transitions", "coactivation"):
        assert np.array_equal(getattr(found, name), getattr(plain, name)), name
    assert found.source.text_sha256 == plain.source.text_sha256
    assert found.source.options["calibration"] == {"names": ["own"], "text_sha256": alone.source.text_sha256}
    assert "calibration" not in plain.source.options
    # What experts do is of the calibration text, how often they do it is of the traffic.
    for name in ("wanda", "leave_one_out"):
        assert np.array_equal(found.importance[name], alone.importance[name]), name
        assert not np.array_equal(found.importance[name], plain.importance[name]), name
    assert found.importance["frequency"] == pytest.approx(plain.load / plain.load.sum(1, keepdims=True))
    served_LE = (plain.load > 0) & (alone.load > 8)
    assert served_LE.sum() > 4
    traffic_LE, own_LE = (load / load.sum(1, keepdims=True) for load in (plain.load, alone.load))
    for name in ("int8", "int4-g32"):
        ratio_LE = found.relative_error(name) / alone.relative_error(name)
        assert ratio_LE[served_LE] == pytest.approx((traffic_LE / own_LE)[served_LE])


def test_calibration_on_the_traffic_itself_changes_nothing(mixtral, tokenizer, scenarios):
    plain = profile(mixtral, tokenizer, scenarios, **EVERYTHING)
    found = profile(mixtral, tokenizer, scenarios, **EVERYTHING, calibration=scenarios)
    for name, array in arrays(plain).items():
        assert np.array_equal(arrays(found)[name], array), name


def test_a_run_with_calibration_text_resumes_to_the_same_profile(mixtral, tokenizer, scenarios, tmp_path, monkeypatch):
    options = {"tokens": 120, "seq_len": 24, "batch_size": 3, "precisions": ("int8",), "calibration": scenarios}
    traffic = {"code": scenarios["code"]}
    whole = profile(mixtral, tokenizer, traffic, **options)
    run, calls = calibrate.run_batch, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) % 3 == 0:
            raise KeyboardInterrupt
        return run(*args, **kwargs)

    monkeypatch.setattr(calibrate, "run_batch", failing)
    for attempt in range(9):
        try:
            found = profile(mixtral, tokenizer, traffic, **options, resume_path=tmp_path / "state", save_every=0)
            break
        except KeyboardInterrupt:
            assert attempt < 8, "every attempt gets further than the one before"
    assert attempt >= 2
    assert_same(found, whole)
