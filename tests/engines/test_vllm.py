"""What vLLM records is read whole or refused; its mapping file is written by its rules."""

from __future__ import annotations

import base64
import contextlib
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from equipoise.artifacts import LayerFacts, ModelFacts, Profile, Source
from equipoise.engines import read_plan, read_records, write_plan
from equipoise.engines.vllm import save_outputs
from equipoise.errors import EquipoiseError, PlanError, ProfileError
from equipoise.planning.methods import make_plan
from equipoise.planning.ranks import slots_of

EXPERTS, LAYERS, TOP_K = 16, 5, 3
DENSE = 2
"""First layers without routed experts, which vLLM leaves at zero."""


def routed(tokens: int, seed: int, dense: int = DENSE) -> np.ndarray:
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((tokens, LAYERS, EXPERTS)), axis=-1)[..., :TOP_K].astype(np.uint8)
    ids[:, :dense] = 0
    return ids


def encoded(array: np.ndarray) -> str:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode()


def counted(*arrays: np.ndarray) -> np.ndarray:
    """[L, E] by the plainest loop, dense layers left out."""
    counts = np.zeros((LAYERS - DENSE, EXPERTS), int)
    for array in arrays:
        for token in array:
            for layer in range(DENSE, LAYERS):
                for expert in token[layer]:
                    counts[layer - DENSE, expert] += 1
    return counts


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(
            {
                "model_type": "deepseek_v3", "num_hidden_layers": LAYERS, "n_routed_experts": EXPERTS,
                "first_k_dense_replace": DENSE, "num_experts_per_tok": TOP_K, "hidden_size": 8, "moe_intermediate_size": 4,
            }
        )
    )  # fmt: skip
    return path


def test_npy_counts_transitions_and_dense_layers(tmp_path, config):
    ids = routed(40, 0)
    np.save(tmp_path / "a.npy", ids)
    profile = read_records("vllm", [tmp_path / "a.npy"], config=config)
    assert np.array_equal(profile.counts[0, 0], counted(ids))
    assert not profile.counts[:, 1].any()
    assert [layer.model_layer for layer in profile.model.layers] == [2, 3, 4]
    assert (profile.model.hidden_layers, profile.model.layers[0].top_k, profile.tokens.tolist()) == (LAYERS, TOP_K, [40])
    pairs = np.zeros((LAYERS - DENSE - 1, EXPERTS, EXPERTS), int)
    both = np.zeros((LAYERS - DENSE, EXPERTS, EXPERTS), int)
    for token in ids.astype(int):
        for layer in range(DENSE, LAYERS):
            for a in token[layer]:
                for b in token[layer]:
                    both[layer - DENSE, a, b] += 1
                if layer + 1 < LAYERS:
                    for b in token[layer + 1]:
                        pairs[layer - DENSE, a, b] += 1
    assert np.array_equal(profile.transitions, pairs)
    assert np.array_equal(profile.coactivation, both)


def test_responses_tell_prompt_from_answer(tmp_path, config):
    first, second = routed(20, 1), routed(9, 2)
    lines = [
        {"choices": [{"routed_experts": encoded(first)}], "usage": {"prompt_tokens": 15}},
        {"choices": [{"routed_experts": encoded(second), "prompt_token_ids": [1, 2, 3]}], "usage": {"prompt_tokens": 3}},
        {"choices": [{"routed_experts": None}], "usage": {"prompt_tokens": 3}},
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    profile = read_records("vllm", [tmp_path / "chat.jsonl"], config=config)
    assert np.array_equal(profile.counts[0, 0], counted(first[:15], second[:3]))
    assert np.array_equal(profile.counts[0, 1], counted(first[15:], second[3:]))
    assert np.array_equal(profile.windows, np.stack([counted(first), counted(second)]))
    (tmp_path / "one.json").write_text(json.dumps(lines[0]))
    assert np.array_equal(read_records("vllm", [tmp_path / "one.json"], experts=EXPERTS).load, counted(first))


def test_cached_tokens_were_not_run(tmp_path):
    ids = routed(20, 3)
    usage = {"prompt_tokens": 15, "prompt_tokens_details": {"cached_tokens": 8}}
    (tmp_path / "a.json").write_text(json.dumps([{"choices": [{"routed_experts": encoded(ids)}], "usage": usage}]))
    profile = read_records("vllm", [tmp_path / "a.json"], experts=EXPERTS)
    assert np.array_equal(profile.counts[0, 0], counted(ids[8:15]))
    assert profile.tokens.tolist() == [12]


def test_saved_outputs_round_trip(tmp_path):
    a, b, c = routed(12, 4), routed(14, 5), routed(7, 6)

    def choice(array):
        return SimpleNamespace(routed_experts=array)

    outputs = [
        SimpleNamespace(prompt_token_ids=[0] * 10, num_cached_tokens=4, outputs=[choice(a), choice(b)]),
        SimpleNamespace(prompt_token_ids=[0] * 7, num_cached_tokens=None, outputs=[choice(c), choice(None)]),
    ]
    save_outputs(outputs, tmp_path / "t.npz")
    profile = read_records("vllm", [tmp_path / "t.npz"], experts=EXPERTS, scenarios=["chat"])
    assert np.array_equal(profile.counts[0, 0], counted(a[4:10], c[:7]))
    assert np.array_equal(profile.counts[0, 1], counted(a[10:], b[10:]))
    assert profile.source.scenarios == ("chat",)
    with pytest.raises(ProfileError, match="enable_return_routed_experts"):
        save_outputs([SimpleNamespace(prompt_token_ids=[], num_cached_tokens=0, outputs=[choice(None)])], tmp_path / "n.npz")


def test_plain_npz_holds_one_array_per_request(tmp_path):
    a, b = routed(12, 4), routed(5, 5)
    np.savez(tmp_path / "t.npz", first=a, second=b)
    assert np.array_equal(read_records("vllm", [tmp_path / "t.npz"], experts=EXPERTS).load, counted(a, b))


def test_many_requests_make_boundedly_many_windows(tmp_path):
    requests = [routed(2, seed) for seed in range(1100)]
    np.savez(tmp_path / "t.npz", **{f"r{i:04}": r for i, r in enumerate(requests)})
    profile = read_records("vllm", [tmp_path / "t.npz"], experts=EXPERTS)
    assert len(profile.windows) <= 128
    assert np.array_equal(profile.windows.sum(0), counted(*requests))


def test_tokens_whose_routing_was_lost_are_left_out(tmp_path):
    ids = routed(20, 7)
    ids[3:6] = 0
    np.save(tmp_path / "a.npy", ids)
    profile = read_records("vllm", [tmp_path / "a.npy"], experts=EXPERTS)
    assert profile.tokens.tolist() == [17]
    assert np.array_equal(profile.load, counted(np.delete(ids, [3, 4, 5], axis=0)))


def test_top_1_routing_needs_the_configuration_for_dense_layers(tmp_path):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 4, (50, 3, 1)).astype(np.uint8)
    ids[:, 0] = 0
    np.save(tmp_path / "a.npy", ids)
    keys = {"num_hidden_layers": 3, "num_experts": 4, "num_experts_per_tok": 1, "first_k_dense_replace": 1}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    profile = read_records("vllm", [tmp_path / "a.npy"], config=tmp_path)
    assert [layer.model_layer for layer in profile.model.layers] == [1, 2]
    assert np.array_equal(profile.load, [np.bincount(ids[:, i, 0], minlength=4) for i in (1, 2)])


def bad_arrays():
    ids = routed(10, 0)
    high, twice, silent = ids.copy(), ids.copy(), ids.copy()
    high[0, 3, 0] = EXPERTS + 2
    twice[5, 4] = [7, 7, 2]
    silent[:, 3] = 0
    return {
        "physical slots": (high, "names expert|logical experts"),
        "twice the same": (twice, "twice to the same"),
        "silent layer": (silent, "recorded nothing"),
        "all zero": (ids * 0, "empty"),
        "floats": (ids.astype(float), "whole numbers"),
        "flat": (ids.reshape(10, -1), "whole numbers"),
        "other top-k": (ids[..., :2], "top-2"),
        "other layers": (ids[:, :4], "4 layers"),
        "no tokens": (ids[:0], "empty"),
    }


@pytest.mark.parametrize("case", bad_arrays())
def test_arrays_that_cannot_be_are_refused(case, tmp_path, config):
    array, message = bad_arrays()[case]
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ProfileError, match=message):
        read_records("vllm", [tmp_path / "a.npy"], config=config)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "JSON"),
        ("[]", "no routed experts"),
        ('{"error": "x"}', "choices"),
        ('{"choices": [3]}', "choices"),
        ('{"choices": [{"routed_experts": 3}]}', "base64"),
        ('{"choices": [{"routed_experts": "!!!"}]}', "base64"),
        ('{"choices": [{"text": "hi"}]}', "--enable-return-routed-experts"),
        (json.dumps({"choices": [{"routed_experts": encoded(routed(9, 0))[:-40]}]}), "base64"),
        (json.dumps({"choices": [{"routed_experts": encoded(np.array([{}], object).astype("U3"))}]}), "whole numbers"),
    ],
)
def test_responses_that_cannot_be_are_refused(content, message, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ProfileError, match=message):
        read_records("vllm", [tmp_path / "a.json"], experts=EXPERTS)


def test_a_header_that_declares_too_much_is_refused_without_allocating(tmp_path):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, LAYERS, TOP_K)})
    response = {"choices": [{"routed_experts": base64.b64encode(buffer.getvalue() + b"123").decode()}]}
    (tmp_path / "a.json").write_text(json.dumps(response))
    with pytest.raises(ProfileError, match="base64"):
        read_records("vllm", [tmp_path / "a.json"], experts=EXPERTS)


def test_the_number_of_experts_must_be_told(tmp_path):
    np.save(tmp_path / "a.npy", routed(4, 0))
    with pytest.raises(ProfileError, match=r"config.json \(--config\) or the number \(--experts\)"):
        read_records("vllm", [tmp_path / "a.npy"])


@settings(max_examples=80, deadline=None)
@given(data=st.binary(max_size=300), suffix=st.sampled_from([".npy", ".npz", ".json", ".jsonl", ".txt"]), head=st.booleans())
def test_garbage_is_refused_and_nothing_else_happens(data, suffix, head, tmp_path_factory):
    path = tmp_path_factory.mktemp("g") / f"x{suffix}"
    path.write_bytes((b"\x93NUMPY\x01\x00" if head else b"") + data)
    with pytest.raises(EquipoiseError):
        read_records("vllm", [path], experts=EXPERTS)


scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4), max_leaves=12
)


@settings(max_examples=150, deadline=None)
@given(value=json_values, data=st.data())
def test_hostile_json_is_refused(value, data, tmp_path_factory):
    """One field of a good file is replaced by anything."""
    directory = tmp_path_factory.mktemp("h")
    if data.draw(st.booleans()):
        record = {
            "choices": [{"routed_experts": encoded(routed(3, 0)), "prompt_token_ids": [1]}],
            "usage": {"prompt_tokens": 2},
        }
        place = data.draw(st.sampled_from([(record, "choices"), (record["choices"][0], "routed_experts"), (record, "usage")]))
    else:
        record = stats(1, [[1, 2, 3]], [[0, 1, 2]])
        place = record, data.draw(st.sampled_from(["expert_load", "p2l_map", "version", "record_type"]))
    place[0][place[1]] = value
    path = directory / data.draw(st.sampled_from(["a.json", "a.jsonl"]))
    path.write_text(json.dumps(record))
    with contextlib.suppress(EquipoiseError):
        read_records("vllm", [path], experts=EXPERTS)


@settings(max_examples=80, deadline=None)
@given(value=json_values, data=st.data())
def test_hostile_mappings_are_refused(value, data, tmp_path_factory):
    directory, plan = tmp_path_factory.mktemp("h"), a_plan(20)
    write_plan(plan, "vllm", directory / "m.jsonl")
    record = json.loads((directory / "m.jsonl").read_text())
    place = data.draw(st.sampled_from([(record, key) for key in record] + [(record["initial_global_assignments"], "1")]))
    assume((type(value), value) != (type(place[0][place[1]]), place[0][place[1]]))
    place[0][place[1]] = value
    (directory / "m.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(EquipoiseError):
        read_plan("vllm", directory / "m.jsonl", plan, 4)


def stats(step: int, load, map_LP) -> dict:
    return {
        "record_type": "eplb_load_stats", "version": 1, "step": step, "num_ranks": 2,
        "expert_load": np.asarray(load).tolist(), "p2l_map": np.asarray(map_LP).tolist(),
    }  # fmt: skip


def write_lines(path, records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_load_statistics_are_mapped_back_to_logical_experts(tmp_path):
    rng = np.random.default_rng(0)
    maps = [np.array([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 0, 3]]), np.array([[3, 1, 2, 0, 2, 1], [0, 1, 2, 3, 3, 3]])]
    loads = rng.integers(0, 50, (2, 2, 6))
    meta = {"record_type": "eplb_load_meta", "version": 1, "num_layers": 2}
    write_lines(tmp_path / "s.jsonl", [meta, stats(1, loads[0], maps[0]), stats(2, loads[1], maps[1])])
    profile = read_records("vllm", [tmp_path / "s.jsonl"])
    expected = np.zeros((2, 2, 4), int)
    for step in range(2):
        for layer in range(2):
            for slot in range(6):
                expected[step, layer, maps[step][layer, slot]] += loads[step, layer, slot]
    assert np.array_equal(profile.windows, expected)
    assert np.array_equal(profile.load, expected.sum(0))


def test_long_load_statistics_are_summed_in_bounded_windows(tmp_path):
    load = np.zeros((700, 1, 4), int)
    load[350:, 0, 1] = np.arange(350)
    write_lines(tmp_path / "s.jsonl", [stats(i, x, [[0, 1, 2, 3]]) for i, x in enumerate(load)])
    profile = read_records("vllm", [tmp_path / "s.jsonl"])
    assert np.array_equal(profile.load, load.sum(0))
    assert 1 < len(profile.windows) <= 128
    assert np.array_equal(profile.windows.sum(0), load.sum(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 1 is read"),
        ({"p2l_map": [[0, 1]]}, "do not belong together"),
        ({"p2l_map": [[0, 1, 1], [0, 2, 1]]}, "no slot for expert 2"),
        ({"expert_load": [[1, -1, 0], [1, 1, 1]]}, "negative"),
        ({"expert_load": [[1, 1, 1], [1, 1]]}, "differ in length"),
        ({"record_type": "garbage"}, "garbage"),
        ({"expert_load": [[0, 0, 0], [0, 0, 0]]}, "empty"),
    ],
)
def test_damaged_load_statistics_are_refused(change, message, tmp_path):
    write_lines(tmp_path / "s.jsonl", [stats(1, [[1, 2, 3], [1, 2, 3]], [[0, 1, 2], [0, 1, 2]]) | change])
    with pytest.raises(ProfileError, match=message):
        read_records("vllm", [tmp_path / "s.jsonl"])


def a_plan(slots: int, ranks: int = 4, layers: int = 3, method: str = "eplb"):
    rng = np.random.default_rng(slots)
    counts = rng.gamma(0.5, 100, (2, 2, layers, EXPERTS)).astype(np.int64) + 1
    facts = tuple(
        LayerFacts(path=f"l{i}", model_layer=i + DENSE, num_experts=EXPERTS, top_k=2, matrices=()) for i in range(layers)
    )
    profile = Profile(
        model=ModelFacts(name="m", model_type="x", dtype="bf16", fingerprint="f", layers=facts, hidden_layers=layers + DENSE),
        source=Source(scenarios=("a", "b")),
        counts=counts,
        gate_mass=np.zeros((2, layers, EXPERTS)),
        tokens=counts[:, 0, 0].sum(1),
        windows=np.zeros((0, layers, EXPERTS), np.int64),
        window_scenario=np.zeros(0, np.int64),
    )
    return make_plan(profile, method, units=ranks, slots=slots)


@pytest.mark.parametrize("slots", [16, 20, 48])
def test_plan_to_mapping_to_plan_is_the_identity(slots, tmp_path):
    plan = a_plan(slots)
    written = write_plan(plan, "vllm", tmp_path / "m.jsonl")
    record = json.loads((tmp_path / "m.jsonl").read_text())
    assert set(record) == {"record_type", "version", "num_redundant_experts", "num_slots", "initial_global_assignments"}
    assert list(record["initial_global_assignments"]) == ["0", "1", "2"]  # over MoE layers, dense ones not counted
    back = read_plan("vllm", tmp_path / "m.jsonl", plan, 4)
    assert all(np.array_equal(a, b) for a, b in zip(back, slots_of(plan), strict=True))
    assert f'"num_redundant_experts": {slots - 16}' in written.flags
    assert "EQUIPOISE_PLAN" in written.flags


@pytest.mark.parametrize(
    "change",
    [
        {"version": 3},
        {"record_type": "x"},
        {"num_slots": 24},
        {"num_redundant_experts": 1},
        {"initial_global_assignments": {"0": [0]}},
        {"initial_global_assignments": {str(i): [0] * 20 for i in range(3)}},
        {"initial_global_assignments": {str(i): [*range(16), 0, 1, 2, 99] for i in range(3)}},
        {"initial_global_assignments": {str(i): list(range(18)) for i in range(3)}},
        {"initial_global_assignments": {str(i): "abc" for i in range(3)}},
    ],
)
def test_damaged_mappings_are_refused(change, tmp_path):
    plan = a_plan(20)
    write_plan(plan, "vllm", tmp_path / "m.jsonl")
    record = json.loads((tmp_path / "m.jsonl").read_text()) | change
    (tmp_path / "m.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(PlanError):
        read_plan("vllm", tmp_path / "m.jsonl", plan, 4)
