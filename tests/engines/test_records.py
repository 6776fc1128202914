"""Recorded loads become a profile, or are refused with the reason."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from equipoise.engines.model_config import read_config
from equipoise.engines.records import Recording, as_counts, merged, to_logical, to_profile
from equipoise.errors import ProfileError

DEEPSEEK = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 6,
    "first_k_dense_replace": 2,
    "moe_layer_freq": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "hidden_size": 32,
    "intermediate_size": 128,
    "moe_intermediate_size": 16,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(DEEPSEEK))
    return read_config(path)


def counts(rows: int, experts: int = 8, dense: int = 0, seed: int = 0) -> np.ndarray:
    table = np.random.default_rng(seed).integers(1, 100, (rows, experts))
    table[:dense] = 0
    return table


def recording(rows: int = 6, dense: int = 2, kind="hidden", **fields) -> Recording:
    return Recording(**{"name": "chat", "counts": counts(rows, dense=dense), "rows": kind} | fields)


def test_dense_rows_are_dropped_and_remembered():
    profile = to_profile([recording()], engine="sglang")
    assert profile.counts.shape == (1, 2, 4, 8)
    assert [layer.model_layer for layer in profile.model.layers] == [2, 3, 4, 5]
    assert profile.model.hidden_layers == 6
    assert (profile.load == counts(6, dense=2)[2:]).all()
    assert not profile.model.sized


def test_a_configuration_fills_in_what_records_do_not_tell(config):
    profile = to_profile([recording()], engine="sglang", config=config)
    layer = profile.model.layers[0]
    assert (layer.top_k, layer.num_shared, layer.matrices) == (3, 1, ((32, 32), (32, 16)))
    assert (profile.model.model_type, profile.model.dtype, profile.model.expert_groups) == ("deepseek_v3", "bf16", 4)
    assert profile.model.sized
    assert profile.tokens[0] == -(-counts(6, dense=2).sum(1).max() // 3)


def test_rows_of_moe_layers_find_their_place_by_the_configuration(config):
    profile = to_profile([recording(4, 0, "moe")], engine="omni", config=config)
    assert [layer.model_layer for layer in profile.model.layers] == [2, 3, 4, 5]
    assert profile.model.hidden_layers == 6
    without = to_profile([recording(4, 0, "moe")], engine="omni")
    assert without.model.hidden_layers == 0
    assert without.model.fingerprint == profile.model.fingerprint, "the same model, told or not"


def test_traffics_stay_apart_and_have_windows():
    first = recording(name="chat", windows=np.stack([counts(6, dense=2), counts(6, dense=2, seed=1)]))
    second = recording(name="code", counts=counts(6, dense=2, seed=2))
    profile = to_profile([first, second], engine="sglang", phase="decode")
    assert profile.source.scenarios == ("chat", "code")
    assert profile.window_scenario.tolist() == [0, 0, 1]
    assert (profile.windows[2] == counts(6, dense=2, seed=2)[2:]).all(), "traffic without windows is one window"
    assert not profile.counts[:, 0].any()
    assert profile.counts[:, 1].any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"counts": np.zeros((6, 8), int)}, "all its counts are zero"),
        ({"counts": -counts(6)}, "negative"),
        ({"counts": counts(6) * 1.5}, "fractions"),
        ({"counts": np.full((6, 8), np.nan)}, "NaN"),
        ({"counts": np.full((6, 8), 1 << 62)}, "overflowed"),
        ({"counts": np.full((6, 8), 2**63, np.uint64)}, "overflowed"),
        ({"counts": np.full((6, 8), -1, np.int32).astype(np.uint32).view(np.int32)}, "negative"),
        ({"counts": counts(6).reshape(2, 3, 2, 4)}, "shape"),
        ({"counts": np.zeros((0, 8), int)}, "empty"),
        ({"counts": np.full((6, 8), "many")}, "not counts"),
        ({"windows": np.ones((2, 6, 4), int)}, "windows"),
        ({"top_k": 9}, "top-k 9 of 8"),
        ({"kind": (1, 2, 3)}, "cannot be"),
        ({"kind": (0, 1, 2, 3, 4, 4)}, "cannot be"),
        ({"kind": "moe"}, "recorded nothing"),
        ({"counts": np.ones((2000, 8), int)}, "at most"),
    ],
)
def test_records_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ProfileError, match=message):
        to_profile([recording(**fields)], engine="sglang")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"counts": counts(6, 12, dense=2)}, "physical slots"),
        ({"counts": counts(6, 4, dense=2)}, "4 experts per layer, the model has 8"),
        ({"counts": counts(7, dense=2)}, "7 layers"),
        ({"counts": counts(6, dense=1)}, "layer 1 has counts, but is dense"),
        ({"counts": counts(6, dense=3)}, "MoE layer 2 .* recorded nothing"),
        ({"counts": counts(4)}, "4 layers"),
        ({"top_k": 2}, "top-k is 2 and 3"),
    ],
)
def test_records_of_another_model_are_refused(config, fields, message):
    with pytest.raises(ProfileError, match=message):
        to_profile([recording(**fields)], engine="sglang", config=config)


def test_physical_slots_are_refused_when_only_the_number_of_experts_is_known():
    with pytest.raises(ProfileError, match="physical slots"):
        to_profile([recording(counts=counts(6, 12))], engine="table", experts=8)


def test_traffics_of_different_models_or_names_that_clash_are_refused():
    with pytest.raises(ProfileError, match="one model"):
        to_profile([recording(), recording(name="b", counts=counts(5))], engine="sglang")
    with pytest.raises(ProfileError, match="--scenario"):
        to_profile([recording(), recording()], engine="sglang")
    with pytest.raises(ProfileError, match="no sglang records"):
        to_profile([], engine="sglang")
    with pytest.raises(ProfileError, match="phase"):
        to_profile([recording()], engine="sglang", phase="training")


def test_slots_become_experts():
    slots = np.array([[0, 1, 2, 0], [2, 1, 0, 1]])
    logical = to_logical(np.array([[1, 2, 3, 4], [5, 6, 7, 8]]), slots, "x")
    assert logical.tolist() == [[5, 2, 3], [7, 14, 5]]
    stacked = to_logical(np.stack([[[1, 2, 3, 4], [5, 6, 7, 8]]] * 3), slots, "x")
    assert (stacked == logical).all()
    with pytest.raises(ProfileError, match="no slot for expert 1"):
        to_logical(np.ones((1, 3), int), np.array([[0, 2, 2]]), "x")
    with pytest.raises(ProfileError, match="belong together"):
        to_logical(np.ones((1, 4), int), np.array([[0, 1, 1]]), "x")
    with pytest.raises(ProfileError, match="expert 3 of 3"):
        to_logical(np.ones((1, 4), int), np.array([[0, 1, 2, 3]]), "x", experts=3)


def test_long_records_are_merged_into_stretches_that_lose_nothing():
    steps = np.random.default_rng(0).integers(0, 9, (1000, 3, 4))
    steps[500:520] = 0
    windows = merged(steps, 64)
    assert len(windows) == 64
    assert (windows.sum(0) == steps.sum(0)).all()
    assert len(merged(steps[:10])) == 10
    assert len(merged(np.concatenate([steps[:1], np.zeros((9, 3, 4), int)]))) == 0, "one step is no window"


def test_counts_may_be_floats_that_are_whole():
    assert as_counts([[1.0, 2.0]], "x").dtype == np.int64
    with pytest.raises(ProfileError, match="differ in length"):
        as_counts([[1, 2], [3]], "x")


@pytest.mark.parametrize(
    ("change", "moe"),
    [
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, [2, 4]),
        ({"moe_layer_freq": [0, 1, 1, 0, 1, 1]}, [1, 2, 4, 5]),
        ({"first_k_dense_replace": None, "decoder_sparse_step": 2, "mlp_only_layers": [3]}, [1, 5]),
        ({"first_k_dense_replace": None, "moe_layers": [1, 3, 5]}, [1, 3, 5]),
        ({"first_k_dense_replace": None, "interleave_moe_layer_step": 2, "moe_layer_freq": None}, [1, 3, 5]),
        ({"first_k_dense_replace": None, "expert_layer_period": 3, "expert_layer_offset": 1}, [1, 4]),
    ],
)
def test_which_layers_are_moe(tmp_path, change, moe):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({k: v for k, v in (DEEPSEEK | change).items() if v is not None}))
    assert list(read_config(path).moe_layers) == moe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_routed_experts": None}, "no number of routed experts"),
        ({"n_routed_experts": "8"}, "n_routed_experts is '8'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_experts_per_tok": 9}, "no MoE model"),
        ({"first_k_dense_replace": 6}, "no layer with routed experts"),
    ],
)
def test_configurations_without_experts_are_refused(tmp_path, change, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({k: v for k, v in (DEEPSEEK | change).items() if v is not None}))
    with pytest.raises(ProfileError, match=message):
        read_config(path)


def test_the_language_part_of_a_multimodal_configuration_counts(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vlm", "text_config": DEEPSEEK}))
    assert read_config(tmp_path).num_experts == 8


def test_pairs_are_kept_only_when_every_traffic_has_them():
    pairs = {"transitions": np.ones((3, 8, 8), int), "coactivation": np.ones((4, 8, 8), int)}
    one = recording(4, 0, (2, 3, 4, 5), hidden_layers=6, **pairs)
    profile = to_profile([one, replace(one, name="b")], engine="sglang")
    assert (profile.transitions == 2).all()
    assert profile.coactivation.shape == (4, 8, 8)
    mixed = to_profile([one, replace(one, name="b", transitions=None)], engine="sglang")
    assert mixed.transitions.size == 0
