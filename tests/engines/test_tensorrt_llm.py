"""TensorRT-LLM: statistics directories in, load balancer YAML out."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from engines_support import placed, recorded
from equipoise.engines import read_plan, read_records, write_plan
from equipoise.errors import PlanError, ProfileError

EXPERTS = 8


def statistics(directory, ranks: int = 3, iterations=range(100, 110), layers=(3, 4, 5), seed: int = 0) -> np.ndarray:
    """A directory as the engine writes it, and the sum over ranks [T, L, E]."""
    directory.mkdir()
    rng = np.random.default_rng(seed)
    total = np.zeros((len(iterations), len(layers), EXPERTS), int)
    for rank in range(ranks):
        counts = rng.integers(0, 50, total.shape)
        total += counts
        tensors = {f"{i}_{layer}": counts[t, n] for t, i in enumerate(iterations) for n, layer in enumerate(layers)}
        save_file(tensors, directory / f"rank{rank}.safetensors")
        save_file({"100_3": np.zeros((5, 2), np.int32)}, directory / f"rank{rank}_raw.safetensors")
    (directory / "meta_info.json").write_text(json.dumps({"num_experts": EXPERTS, "num_experts_per_token": 2}))
    return total


def test_ranks_are_added_and_iterations_are_windows(tmp_path):
    chat, code = statistics(tmp_path / "chat"), statistics(tmp_path / "code", seed=1)
    profile = read_records("tensorrt-llm", [tmp_path / "chat", tmp_path / "code"])
    assert profile.source.scenarios == ("chat", "code")
    assert (profile.scenario_load[0] == chat.sum(0)).all()
    assert (profile.windows == np.concatenate([chat, code])).all()
    assert [layer.model_layer for layer in profile.model.layers] == [3, 4, 5]
    assert profile.model.layers[0].top_k == 2
    assert profile.model.hidden_layers == 0, "the engine does not say how many layers the model has"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "rank1.safetensors").unlink(), r"ranks \[0, 2\]"),
        (lambda d: (d / "meta_info.json").unlink(), "is not a file"),
        (lambda d: (d / "meta_info.json").write_text('{"num_experts": 9, "num_experts_per_token": 2}'), "counts 8 experts"),
        (lambda d: (d / "meta_info.json").write_text('{"num_experts": true}'), "num_experts is True"),
        (lambda d: (d / "meta_info.json").write_text("[]"), "num_experts is None"),
        (lambda d: save_file({"1_x": np.ones(8, int)}, d / "rank0.safetensors"), "<iteration>_<layer>"),
        (lambda d: save_file({"100_9": np.ones(8, int)}, d / "rank3.safetensors"), "is missing"),
        (lambda d: save_file({f"200_{n}": np.ones(8, int) for n in (3, 4, 5)}, d / "rank3.safetensors"), "iterations between"),
        (lambda d: save_file({"100_3": -np.ones(8, int)}, d / "rank0.safetensors"), "negative"),
        (lambda d: (d / "rank0.safetensors").write_bytes((d / "rank0.safetensors").read_bytes()[:-9]), "is not a safetensors"),
    ],
)
def test_directories_that_are_not_whole_are_refused(tmp_path, damage, message):
    statistics(tmp_path / "d")
    damage(tmp_path / "d")
    with pytest.raises(ProfileError, match=message):
        read_records("tensorrt-llm", [tmp_path / "d"])


def test_a_file_in_place_of_a_directory(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(ProfileError, match="not a directory"):
        read_records("tensorrt-llm", [tmp_path / "x"])
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "meta_info.json").write_text('{"num_experts": 8, "num_experts_per_token": 2}')
    with pytest.raises(ProfileError, match=r"ranks \[\]"):
        read_records("tensorrt-llm", [tmp_path / "d"])


@pytest.mark.parametrize("slots", [8, 16])
def test_yaml_by_transformer_layer(tmp_path, slots):
    yaml = pytest.importorskip("yaml")
    profile = recorded(layers=5, dense=(0, 2))
    plan = placed(profile, 4, slots)
    written = write_plan(plan, "tensorrt-llm", tmp_path / "x.yaml")
    content = yaml.safe_load((tmp_path / "x.yaml").read_text())
    assert sorted(content) == ["initial_global_assignments", "layer_updates_per_iter", "num_slots"]
    assert (content["num_slots"], content["layer_updates_per_iter"]) == (slots, 0)
    assert content["initial_global_assignments"] == {
        layer: list(p.experts) for layer, p in zip((1, 3, 4), plan.layers, strict=True)
    }
    assert len((tmp_path / "x.yaml").read_text().splitlines()) == 2 + 1 + 3, "one line per layer"
    assert "enable_attention_dp: true" in written.flags
    assert yaml.safe_load(written.flags)["moe_expert_parallel_size"] == 4


def test_yaml_that_the_engine_would_refuse(tmp_path):
    yaml = pytest.importorskip("yaml")
    profile = recorded(layers=3)
    path = tmp_path / "x.yaml"
    good = {"num_slots": 8, "initial_global_assignments": {1: list(range(8)), 2: list(range(8))}, "layer_updates_per_iter": 0}
    for change, message in [
        ({"ep_size": 4}, "fields that TensorRT-LLM"),
        ({"num_slots": 9}, "num_slots = 9"),
        ({"initial_global_assignments": {1: list(range(8))}}, r"absent: \[2\]"),
        ({"initial_global_assignments": {0: [0], 1: list(range(8)), 2: list(range(8))}}, "assignments of 3 layers"),
        ({"initial_global_assignments": {1: list(range(8)), 2: [0] * 8}}, "expert 1 has no slot"),
        ({"initial_global_assignments": {"1": list(range(8)), "2": list(range(8))}}, "absent"),
        ({"initial_global_assignments": [1]}, "no initial_global_assignments"),
    ]:
        path.write_text(yaml.safe_dump(good | change))
        with pytest.raises(PlanError, match=message):
            read_plan("tensorrt-llm", path, profile, 4)
    path.write_text(yaml.safe_dump(good))
    with pytest.raises(PlanError, match="cannot be divided among 3 ranks"):
        read_plan("tensorrt-llm", path, profile, 3)
    path.write_text("a: [1, 2")
    with pytest.raises(ProfileError, match="not a YAML file"):
        read_plan("tensorrt-llm", path, profile, 4)
