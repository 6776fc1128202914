from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import EquipoiseError, ProfileError
from equipoise.profiling import calibrate
from equipoise.profiling.calibrate import profile
from equipoise.profiling.pass_sums import PassSums
from equipoise.profiling.team import Team
from profiling.teams import run_team

OPTIONS = {
    "tokens": 300,
    "seq_len": 24,
    "batch_size": 2,
    "window_tokens": 50,
    "importance": ("wanda", "gate_norm", "frequency", "leave_one_out"),
    "importance_options": {"leave_one_out": {"tokens": 1}, "output_error": {"sensitivity_tokens": 30}},
    "precisions": ("int8", "int4"),
    "progress": False,
}


@pytest.fixture(scope="module")
def scenarios(make_documents):
    return {"code": make_documents(8, seed=1, words=15), "math": make_documents(8, seed=2, words=15)}


def assert_same(one, other):
    assert one.source == other.source
    assert one.model == other.model
    mine, theirs = one._arrays(), other._arrays()
    assert mine.keys() == theirs.keys()
    for name, array in mine.items():
        assert array.dtype == theirs[name].dtype
        assert np.array_equal(array, theirs[name], equal_nan=True), name


@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_a_sum_over_passes_does_not_depend_on_who_ran_which(values, cuts, data):
    whole = PassSums()
    for step, value in enumerate(values):
        whole.add("x", step, np.array([value, 0.0]))
        whole.add("x", step, np.array([0.0, -value]))
    assert len(whole.state_dict()) <= len(values).bit_length()
    assert whole.total("x")[0] == pytest.approx(np.sum(values), abs=1e-6)
    edges = sorted({0, len(values), *(min(cut, len(values)) for cut in cuts)})
    states = []
    for first, last in pairwise(edges):
        part = PassSums()
        for step in data.draw(st.permutations(range(first, last))):
            part.add("x", step, np.array([values[step], -values[step]]))
        states.append(part.state_dict())
    joined = PassSums()
    for state in data.draw(st.permutations(states)):
        joined.absorb(state)
    assert np.array_equal(joined.total("x"), whole.total("x"))
    assert joined.state_dict().keys() == whole.state_dict().keys()


@given(sizes=st.lists(st.integers(1, 500), max_size=30), processes=st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_every_pass_is_run_by_one_process_and_parts_are_even(sizes, processes):
    parts = [Team(rank, processes).stretch(sizes) for rank in range(processes)]
    assert [step for part in parts for step in part] == list(range(len(sizes)))
    for part in parts:
        assert sum(sizes[step] for step in part) <= sum(sizes) / processes + max(sizes, default=0)


@pytest.mark.parametrize(
    ("family", "size"), [("mixtral", 2), ("mixtral", 3), ("qwen2_moe", 4), ("deepseek_v3", 2), ("gpt_oss", 3), ("switch", 2)]
)
def test_a_divided_run_gives_the_same_profile_bit_for_bit(make_model, tokenizer, scenarios, family, size):
    one = profile(make_model(family), tokenizer, scenarios, **OPTIONS)
    models = [make_model(family) for _ in range(size)]
    several = run_team(size, lambda team: profile(models[team.rank], tokenizer, scenarios, **OPTIONS, team=team))
    for found in several:
        assert_same(found, one)


def test_more_processes_than_passes(make_model, tokenizer, scenarios):
    options = OPTIONS | {"tokens": 40, "batch_size": 4}
    one = profile(make_model("mixtral"), tokenizer, scenarios, **options)
    models = [make_model("mixtral") for _ in range(5)]
    several = run_team(5, lambda team: profile(models[team.rank], tokenizer, scenarios, **options, team=team))
    for found in several:
        assert_same(found, one)


def test_calibration_text_is_divided_too_and_windows_beyond_the_limit_are_merged_alike(
    make_model, tokenizer, scenarios, monkeypatch
):
    plain = calibrate.record
    monkeypatch.setattr(calibrate, "record", lambda *args, **kwargs: plain(*args, **kwargs, max_windows=4))
    options = OPTIONS | {"calibration": {"other": ["the lazy dog jumps over experts and tokens"] * 9}, "window_tokens": 1}
    one = profile(make_model("mixtral"), tokenizer, scenarios, **options)
    assert len(one.windows) < 10, "some have been merged"
    models = [make_model("mixtral") for _ in range(3)]
    several = run_team(3, lambda team: profile(models[team.rank], tokenizer, scenarios, **options, team=team))
    for found in several:
        assert_same(found, one)


def test_interrupted_members_go_on_from_their_own_states(make_model, tokenizer, scenarios, tmp_path, monkeypatch):
    options = OPTIONS | {"batch_size": 1}
    one = profile(make_model("mixtral"), tokenizer, scenarios, **options)
    run, calls = calibrate.run_batch, []

    def failing(model, batch, **options):
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(model, batch, **options)

    models = [make_model("mixtral") for _ in range(2)]

    def work(team):
        return profile(
            models[team.rank], tokenizer, scenarios, **options, team=team, resume_path=tmp_path / "part", save_every=0
        )

    monkeypatch.setattr(calibrate, "run_batch", failing)
    for _ in range(2):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            run_team(2, work)
    assert {path.name for path in tmp_path.iterdir()} == {"part.0of2", "part.1of2"}
    for found in run_team(2, work):
        assert_same(found, one)
    monkeypatch.setattr(calibrate, "run_batch", None)  # complete states stay: asking again runs nothing
    for found in run_team(2, work):
        assert_same(found, one)
    monkeypatch.setattr(calibrate, "run_batch", run)
    (tmp_path / "part.1of2").rename(tmp_path / "part.0of2")
    with pytest.raises(ProfileError, match="state of another run: part"):
        run_team(2, work)


def test_members_that_were_given_different_things_refuse_each_other(make_model, tokenizer, scenarios):
    models = [make_model("mixtral") for _ in range(2)]

    def work(team):
        return profile(models[team.rank], tokenizer, scenarios, **OPTIONS | {"seed": team.rank}, team=team)

    with pytest.raises(EquipoiseError, match=r"process \d and process \d of this run differ in text, options"):
        run_team(2, work)
