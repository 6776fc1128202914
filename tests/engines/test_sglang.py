"""SGLang: recorder files in, expert locations out."""

from __future__ import annotations

import json

import numpy as np
import pytest

from engines_support import placed, recorded
from equipoise.engines import read_plan, read_records, write_plan
from equipoise.errors import PlanError, ProfileError

torch = pytest.importorskip("torch")

LAYERS, EXPERTS, SLOTS, K = 5, 6, 8, 2
MAP = np.stack(
    [np.concatenate([np.random.default_rng(layer).permutation(EXPERTS), [layer % EXPERTS, 1]]) for layer in range(LAYERS)]
)


def choices(rng, tokens: int) -> np.ndarray:
    """[L, T, 8] physical slots of each token, as SGLang pads them; layer 0 is dense."""
    ids = np.full((LAYERS, tokens, 8), -1, np.int32)
    for layer in range(1, LAYERS):
        for token in range(tokens):
            ids[layer, token, :K] = rng.choice(SLOTS, K, replace=False)
    return ids


def slot_counts(ids: np.ndarray) -> np.ndarray:
    return np.stack([np.bincount(row[row >= 0], minlength=SLOTS) for row in ids.reshape(LAYERS, -1)]).astype(np.int32)


def per_token_dump(directory, time: float, seed: int, ranks: int = 2, mode: str = "per_token", **change):
    """Files that ranks write, and the ids in them."""
    rng = np.random.default_rng(seed)
    everything = []
    for rank in range(ranks):
        records = []
        for number, (tokens, forward_mode) in enumerate([(7, 1), (3, 2)]):
            ids = choices(rng, tokens)
            everything.append((forward_mode, ids))
            record = {
                "forward_pass_id": number,
                "rank": rank,
                "gatherer_key": "primary",
                "global_physical_count": torch.from_numpy(slot_counts(ids)),
            }
            if mode == "per_token":
                record |= {
                    "input_ids": list(range(tokens)),
                    "positions": list(range(tokens)),
                    "extend_seq_lens": [tokens],
                    "forward_mode": forward_mode,
                    "topk_ids_of_layer": torch.from_numpy(ids),
                    "misc_objects": [],
                }
            records.append(record | change)
        content = {"records": records, "last_physical_to_logical_map": torch.from_numpy(MAP)}
        torch.save(content, directory / f"expert_distribution_recorder_{time + rank / 10}_{rank}.pt")
    return everything


def logical(everything) -> tuple[np.ndarray, np.ndarray]:
    """[2, L, E] counts by phase and [T, L, K] ids, told by hand."""
    counts = np.zeros((2, LAYERS, EXPERTS), int)
    tokens = []
    for mode, ids in everything:
        for layer in range(1, LAYERS):
            np.add.at(counts[mode - 1, layer], MAP[layer][ids[layer, :, :K]].ravel(), 1)
        tokens += [np.stack([MAP[layer][ids[layer, t, :K]] for layer in range(1, LAYERS)]) for t in range(ids.shape[1])]
    return counts[:, 1:], np.stack(tokens)


@pytest.mark.parametrize("mode", ["per_pass", "per_token"])
def test_physical_slots_of_all_ranks_become_experts(tmp_path, mode):
    first = per_token_dump(tmp_path, 100.0, 0, mode=mode)
    second = per_token_dump(tmp_path, 200.0, 1, mode=mode)
    profile = read_records("sglang", [tmp_path], scenarios=["chat", "code"])
    assert profile.source.scenarios == ("chat", "code")
    assert len(profile.source.texts["chat"]) == 2
    assert profile.model.hidden_layers == LAYERS
    assert [layer.model_layer for layer in profile.model.layers] == [1, 2, 3, 4]
    for scenario, everything in enumerate((first, second)):
        counts, tokens = logical(everything)
        assert (profile.scenario_load[scenario] == counts.sum(0)).all()
        if mode == "per_token":
            assert (profile.counts[scenario] == counts).all(), "phases are told apart"
            assert profile.tokens[scenario] == len(tokens)
    assert profile.windows.shape[0] == 4, "each forward pass is a stretch"
    if mode == "per_token":
        tokens = np.concatenate([logical(first)[1], logical(second)[1]])
        assert profile.model.layers[0].top_k == K
        by_hand = np.zeros((EXPERTS, EXPERTS), int)
        for token in tokens:
            for a in token[1]:
                for b in token[2]:
                    by_hand[a, b] += 1
        assert (profile.transitions[1] == by_hand).all()
        assert profile.transitions.shape == (3, EXPERTS, EXPERTS)
        assert (profile.coactivation.diagonal(axis1=1, axis2=2) >= profile.load).all()
    else:
        assert profile.transitions.size == 0


def test_pairs_can_be_left_out(tmp_path):
    per_token_dump(tmp_path, 100.0, 0)
    assert read_records("sglang", [tmp_path], pairs=False).transitions.size == 0


def test_stat_files_have_steps_and_a_buffer_that_is_not_full(tmp_path):
    steps = np.random.default_rng(0).integers(0, 9, (300, LAYERS, EXPERTS)).astype(np.int32)
    steps[:, 0] = 0
    steps[200:] = 0
    content = {"rank": 0, "logical_count": torch.from_numpy(steps), "average_utilization_rate_over_window": None}
    torch.save(content, tmp_path / "expert_distribution_recorder_1.5.pt")
    profile = read_records("sglang", [tmp_path / "expert_distribution_recorder_1.5.pt"], top_k=2)
    assert (profile.load == steps.sum(0)[1:]).all()
    assert len(profile.windows) == 128
    assert (profile.windows.sum(0) == profile.load).all()
    assert profile.source.scenarios == ("expert_distribution_recorder_1.5",)


def test_real_dumps(shared_data):
    directory = shared_data / "routing" / "dsr1_srt_slurm"
    names = [f"expert_distribution_fp4_{w}_compressed.pt" for w in ("1k1k", "1k8k")]
    if not (directory / names[0]).is_file():
        pytest.skip(f"no dumps in {directory}")
    profile = read_records("sglang", [directory / n for n in names], scenarios=["1k1k", "1k8k"], top_k=8)
    table = np.load(directory / "logical_count.npz")
    assert (profile.scenario_load[0] == table["fp4_1k1k"][3:]).all()
    assert [layer.model_layer for layer in profile.model.layers] == list(range(3, 61))
    assert profile.tokens.tolist() == [8_568_624 // 8, 8_207_024 // 8]
    with pytest.raises(ProfileError, match="all its counts are zero"):
        read_records("sglang", [directory / "expert_distribution_fp8_1k1k_compressed.pt"])
    with pytest.raises(ProfileError, match="physical slots"):
        read_records("sglang", [directory / names[0]], experts=128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_physical_count": torch.ones(LAYERS, SLOTS + 1, dtype=torch.int32)}, "the map has"),
        ({"global_physical_count": -torch.ones(LAYERS, SLOTS, dtype=torch.int32)}, "negative"),
        ({"topk_ids_of_layer": torch.full((LAYERS, 7, 8), SLOTS, dtype=torch.int32)}, "Shared experts were fused"),
        ({"topk_ids_of_layer": torch.zeros(LAYERS, 7, 8, dtype=torch.int32)}, "damaged"),
        ({"topk_ids_of_layer": torch.zeros(LAYERS, 7, 8)}, "ids"),
        ({"forward_pass_id": "x"}, "forward_pass_id"),
    ],
)
def test_damaged_records_are_refused(tmp_path, change, message):
    per_token_dump(tmp_path, 100.0, 0, **change)
    with pytest.raises(ProfileError, match=message):
        read_records("sglang", [tmp_path])


def test_a_rank_that_is_missing_is_noticed(tmp_path):
    per_token_dump(tmp_path, 100.0, 0, ranks=3)
    next(tmp_path.glob("*_1.pt")).unlink()
    with pytest.raises(ProfileError, match="files per rank"):
        read_records("sglang", [tmp_path])


def test_other_files_are_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "model.pt")
    with pytest.raises(ProfileError, match="not a file of SGLang's recorder"):
        read_records("sglang", [tmp_path / "model.pt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ProfileError, match="no sglang records"):
        read_records("sglang", [tmp_path / "empty"])


@pytest.mark.parametrize("ending", [".json", ".pt"])
@pytest.mark.parametrize("slots", [8, 16])
def test_the_file_holds_the_map_of_all_layers_and_no_other_key(tmp_path, ending, slots):
    profile = recorded(layers=6, dense=(0, 1))
    plan = placed(profile, ranks=4, slots=slots)
    written = write_plan(plan, "sglang", tmp_path / f"plan{ending}")
    path = written.files[0]
    content = json.loads(path.read_text()) if ending == ".json" else torch.load(path, weights_only=True)
    assert list(content) == ["physical_to_logical_map"]
    table = np.asarray(content["physical_to_logical_map"])
    assert table.shape == (6, slots)
    assert (table[0] == np.arange(slots) % 8).all(), "dense layers hold every expert too, for SGLang indexes them"
    assert (table[2:] == [layer.experts for layer in plan.layers]).all()
    assert f"--ep-num-redundant-experts {slots - 8}" in written.flags
    assert f"--init-expert-location {path}" in written.flags


def test_a_plan_that_does_not_know_its_dense_layers_needs_the_configuration(tmp_path):
    profile = recorded(dense=())
    unknown = profile.model.model_copy(update={"hidden_layers": 0})
    plan = placed(profile, 4, 8).model_copy(update={"model": unknown})
    with pytest.raises(PlanError, match="--config"):
        write_plan(plan, "sglang", tmp_path / "x.json")
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps({"num_hidden_layers": 5, "first_k_dense_replace": 1, "num_experts": 8, "num_experts_per_tok": 2})
    )
    write_plan(plan, "sglang", tmp_path / "x.json", config=config)
    assert len(json.loads((tmp_path / "x.json").read_text())["physical_to_logical_map"]) == 5
    back = read_plan("sglang", tmp_path / "x.json", unknown, 4, config=config)
    assert [b.tolist() for b in back] == [list(layer.experts) for layer in plan.layers]
    config.write_text(json.dumps({"num_hidden_layers": 9, "num_experts": 8, "num_experts_per_tok": 2}))
    with pytest.raises(PlanError, match=r"config\.json of the plan's model"):
        write_plan(plan, "sglang", tmp_path / "y.json", config=config)


def test_files_that_sglang_would_refuse_are_refused(tmp_path):
    profile = recorded()
    path = tmp_path / "x.json"
    good = [list(range(8))] * 4
    for content, message in [
        ({"physical_to_logical_map": good, "logical_count": good}, "keys beside"),
        ({"logical_count": good}, "no physical_to_logical_map"),
        ({"physical_to_logical_map": good[:3]}, "3 rows"),
        ({"physical_to_logical_map": [*good[:3], [0]]}, "differ in length"),
        ({"physical_to_logical_map": [[*range(7), 9]] * 4}, "expert ids"),
        ({"physical_to_logical_map": [[*range(7), 0]] * 4}, "expert 7 has no slot"),
        ({"physical_to_logical_map": [[*range(7), 7.0]] * 4}, "list of expert ids"),
        ([], "not a plan"),
    ]:
        path.write_text(json.dumps(content))
        with pytest.raises(PlanError, match=message):
            read_plan("sglang", path, profile, 4)
    with pytest.raises(PlanError, match="name the file"):
        write_plan(placed(profile, 4, 8), "sglang", tmp_path / "x.bin")
