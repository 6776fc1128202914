from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.errors import EquipoiseError, TextError
from equipoise.pipeline import STRETCH, balance, hold_out, read_artifact
from support import corpus


@given(st.lists(st.text(min_size=1, max_size=20), min_size=10, max_size=40, unique=True), st.floats(0.05, 0.9))
def test_held_out_documents_are_not_planned_from(documents, fraction):
    planned, judged = hold_out({"a": documents}, fraction)
    assert sorted(planned["a"] + judged["a"]) == sorted(documents)
    assert not set(planned["a"]) & set(judged["a"])
    assert len(judged["a"]) == max(1, round(fraction * len(documents)))


def test_the_division_does_not_depend_on_the_order():
    documents = corpus(0, documents=20)
    forward, backward = hold_out({"a": documents}), hold_out({"a": documents[::-1]})
    assert set(forward[1]["a"]) == set(backward[1]["a"])


def test_one_long_file_is_cut_at_line_ends():
    text = "\n".join(f"line {i} of a long file" for i in range(2000))
    planned, judged = hold_out({"a": [text]})
    assert len(judged["a"]) >= 2
    assert len("".join(planned["a"] + judged["a"])) == len(text)
    assert all(part.endswith("\n") for part in planned["a"] if part[-9:] != text[-9:])


def test_too_little_text_is_refused():
    with pytest.raises(TextError, match="too little text"):
        hold_out({"a": ["x" * STRETCH]})


@pytest.fixture(scope="module")
def run(tiny_model_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    said: list[str] = []
    texts = {"one": corpus(1, 30), "two": corpus(2, 30)}
    options = {"tokens": 1500, "heldout_tokens": 600, "seq_len": 64, "progress": False}
    options["compare"] = ("rq-paper", "rq:even")
    return balance(str(tiny_model_dir), texts, out, say=said.append, **options), said


def test_the_run_leaves_whole_files_and_a_model(run):
    result, said = run
    names = {path.name for path in result.directory.iterdir()}
    assert names == {
        "model", "rq.plan.json", "rq-paper.plan.json", "rq-even.plan.json", "run.profile.safetensors", "run.eval.json"
    }  # fmt: skip
    assert read_artifact(result.directory / "rq.plan.json") == result.plans["rq"]
    assert read_artifact(result.directory / "run.eval.json") == result.evaluation
    assert read_artifact(result.directory / "run.profile.safetensors").model == result.profile.model
    assert [line.split()[0] for line in said] == ["load", "record", "plan", "plan", "plan", "apply", "apply", "apply", "prove"]


def test_raw_published_and_optimal_stand_side_by_side(run):
    result, _ = run
    contenders = {c.name: c for c in result.evaluation.contenders}
    assert set(contenders) == {"rq", "rq-paper", "rq:even"}
    assert result.plans["rq"].dispatch == "least_loaded"
    assert result.plans["rq:even"].dispatch == "even"
    for contender in contenders.values():
        assert contender.expert_bytes == sum(result.plans[contender.name].bytes_by_unit())
    assert contenders["rq"].expert_bytes <= result.evaluation.base_expert_bytes
    for text in contenders["rq"].texts:
        assert text.lis < text.lis_base
        assert text.kl.value >= 0


def test_unreadable_artifacts_are_named(tmp_path):
    with pytest.raises(EquipoiseError, match="cannot read"):
        read_artifact(tmp_path / "absent")
    with pytest.raises(EquipoiseError, match=r"is a directory; give a file: .*equipoise.plan.json"):
        read_artifact(tmp_path)
    (tmp_path / "x").write_text("{}")
    with pytest.raises(EquipoiseError, match="not a valid plan"):
        read_artifact(tmp_path / "x")


def test_a_model_without_text_writes_its_own(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    options = {"tokens": 600, "heldout_tokens": 200, "seq_len": 64, "progress": False, "compare": ()}
    result = balance(str(tiny_model_dir), {}, tmp_path / "run", own_text=True, **options)
    assert result.profile.source.scenarios == ("self-sampled",)  # the load is of text that nothing balanced
    assert result.profile.source.options["calibration"]["names"] == ["self-balanced"]
    assert [text.name for text in result.evaluation.contenders[0].texts] == ["self-sampled"]
    assert (result.model_directory / "equipoise.plan.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best"}, "unknown planning method 'best'"),
        ({"compare": ("rq:even", "rq-papers")}, "unknown planning method 'rq-papers'"),
        ({"rounding": "magic"}, "unknown quantization method 'magic'"),
        ({"tasks": ("piqa",), "task_dir": "nowhere"}, "nowhere"),
        ({"out": "file/run"}, "cannot write to 'file/run'.* Choose a writable place"),
    ],
)
def test_mistakes_show_before_a_model_is_loaded(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(EquipoiseError, match=message):
        balance("there/is/no/model", {"text": corpus(1)}, options.pop("out", "run"), **options)
    assert not (tmp_path / "run").exists()
