"""Every writer: plan -> file -> plan is the identity; what an engine cannot hold is refused with the nearest plan."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines_support import placed, recorded
from equipoise.artifacts import Plan
from equipoise.engines import PLAN_READERS, WRITERS, read_plan, write_plan
from equipoise.engines.deepseek import maps
from equipoise.engines.lmdeploy import loads_for, packed
from equipoise.errors import PlanError
from equipoise.planning.methods import METHODS, make_plan
from equipoise.planning.ranks import slots_of

FILES = {
    "vllm": "x.jsonl",
    "sglang": "x.json",
    "tensorrt-llm": "x.yaml",
    "vllm-ascend": "x.json",
    "omni": "x.npy",
    "lmdeploy": "x.json",
    "deepseek": "x.npz",
}
RANKS, EXPERTS = 4, 8


@pytest.fixture(scope="module")
def profile():
    """A model of six layers, of which the first two and the fifth are dense."""
    return recorded(layers=6, experts=EXPERTS, dense=(0, 1, 4))


def same(engine: str, plan: Plan, path, ranks: int = RANKS) -> bool:
    """Whether the file holds the plan's placement, slot by slot (omni's does not tell the order within a rank)."""
    back = read_plan(engine, path, plan, ranks)
    wanted = slots_of(plan)
    if engine == "omni":
        wanted = [np.sort(p.reshape(ranks, -1), axis=1).ravel() for p in wanted]
    return len(back) == len(wanted) and all(np.array_equal(a, b) for a, b in zip(back, wanted, strict=True))


def test_every_writer_has_a_reader_and_a_case_here():
    assert set(PLAN_READERS.names()) == set(FILES)
    assert set(WRITERS.names()) - set(FILES) == {"vllm-permuted"}, "a checkpoint, which is no plan file"


@pytest.mark.parametrize("redundant", [0, 4, 12, 24])
@pytest.mark.parametrize("engine", FILES)
def test_plan_to_file_to_plan_is_the_identity(tmp_path, profile, engine, redundant):
    plan = placed(profile, RANKS, EXPERTS + redundant, seed=redundant)
    path = tmp_path / FILES[engine]
    if engine == "lmdeploy" and redundant:
        with pytest.raises(PlanError, match="Nearest plan"):
            write_plan(plan, engine, path)
        assert not list(tmp_path.iterdir())
        return
    written = write_plan(plan, engine, path)
    assert written.files == (path,)
    assert str(path) in written.flags
    assert same(engine, plan, path)


@pytest.mark.parametrize("engine", FILES)
def test_slots_may_differ_by_layer_where_the_engine_takes_it(tmp_path, profile, engine):
    plan = placed(profile, RANKS, [8, 16, 12])
    path = tmp_path / FILES[engine]
    if engine == "omni":
        write_plan(plan, engine, path)
        assert same(engine, plan, path)
    else:
        with pytest.raises(PlanError, match=r"one number of slots .* from 8 to 16.*--ranks 4 --slots 12`"):
            write_plan(plan, engine, path)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("engine", FILES)
def test_bits_that_differ_within_a_layer_are_refused(tmp_path, profile, engine):
    plan = placed(profile, RANKS, 8)
    layer = plan.layers[1]
    mixed = layer.model_copy(update={"precisions": ("int8", *layer.precisions[1:])})
    plan = plan.model_copy(update={"layers": (plan.layers[0], mixed, plan.layers[2]), "exactness": "weights"})
    with pytest.raises(PlanError, match=r"one format; layer 1 of this plan has bf16 and int8.*one precision for all slots"):
        write_plan(plan, engine, tmp_path / FILES[engine])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("engine", FILES)
def test_ranks_with_unequal_slots_are_refused(tmp_path, profile, engine):
    plan = placed(profile, RANKS, 8)
    layers = tuple(layer.model_copy(update={"units": (0, 0, 0, 1, 2, 2, 3, 3)}) for layer in plan.layers)
    with pytest.raises(PlanError, match=r"layer 0 of this plan has 1 to 3.*equal slots on each rank.*--slots 8"):
        write_plan(plan.model_copy(update={"layers": layers}), engine, tmp_path / FILES[engine])


@pytest.mark.parametrize("engine", FILES)
def test_duplicates_are_refused_where_the_engine_rejects_them(tmp_path, profile, engine):
    plan = placed(profile, RANKS, 12, seed=3)
    row = [*range(8), 0, 2, 4, 6]
    slots = np.array([[0, 1, 0], [2, 3, 2], [4, 5, 4], [6, 7, 6]]).ravel()
    assert sorted(row) == sorted(slots.tolist())
    layer = plan.layers[0].model_copy(
        update={"experts": tuple(slots.tolist()), "shares": tuple(0.5 if e % 2 == 0 else 1.0 for e in slots)}
    )
    doubled = Plan.model_validate(plan.model_dump(by_alias=True) | {"allows_duplicates": True, "layers": [layer] * 3})
    path = tmp_path / FILES[engine]
    if engine in ("vllm-ascend", "omni", "lmdeploy"):
        with pytest.raises(PlanError, match="Nearest plan"):
            write_plan(doubled, engine, path)
    else:
        write_plan(doubled, engine, path)
        assert same(engine, doubled, path)


@pytest.mark.parametrize("engine", FILES)
def test_a_file_of_another_model_is_refused(tmp_path, profile, engine):
    path = tmp_path / FILES[engine]
    write_plan(placed(profile, RANKS, 8), engine, path)
    for other in (recorded(layers=7, dense=(0, 1, 4)), recorded(layers=6, experts=4, dense=(0, 1, 4))):
        with pytest.raises(PlanError):
            read_plan(engine, path, other, RANKS)


@pytest.mark.parametrize("engine", FILES)
def test_a_writer_leaves_the_old_file_when_it_refuses(tmp_path, profile, engine):
    path = tmp_path / FILES[engine]
    path.write_text("old")
    plan = placed(profile, RANKS, 8)
    layers = tuple(layer.model_copy(update={"units": (0, 0, 0, 1, 2, 2, 3, 3)}) for layer in plan.layers)
    with pytest.raises(PlanError):
        write_plan(plan.model_copy(update={"layers": layers}), engine, path)
    assert path.read_text() == "old"


def test_slots_in_another_order_are_put_in_the_order_of_ranks(tmp_path, profile):
    """Plans that sort their slots by expert, with ranks as units, are held as well."""
    plan = placed(profile, RANKS, 8)
    layers = []
    for layer in plan.layers:
        order = np.argsort(layer.experts)
        columns = {name: tuple(np.array(getattr(layer, name))[order].tolist()) for name in ("experts", "units", "shares")}
        layers.append(layer.model_copy(update=columns))
    shuffled = plan.model_copy(update={"layers": tuple(layers)})
    write_plan(shuffled, "deepseek", tmp_path / "x.npz")
    back = read_plan("deepseek", tmp_path / "x.npz", plan, RANKS)
    for mine, wanted in zip(back, slots_of(plan), strict=True):
        assert (mine.reshape(RANKS, -1) == np.sort(wanted.reshape(RANKS, -1), axis=1)).all()


def test_vllm_ascend_map(tmp_path, profile):
    plan = placed(profile, RANKS, 12)
    path = tmp_path / "x.json"
    write_plan(plan, "vllm-ascend", path)
    data = json.loads(path.read_text())
    assert data["moe_layer_count"] == 3
    assert [layer["layer_id"] for layer in data["layer_list"]] == [0, 1, 2], "MoE layers are counted, not transformer layers"
    device = data["layer_list"][1]["device_list"][2]
    assert device == {"device_id": 2, "device_expert": list(plan.layers[1].experts[6:9])}
    good = path.read_text()
    for old, new, message in [
        ('"moe_layer_count": 3', '"moe_layer_count": 4', "no layer_list"),
        ('"layer_id": 1', '"layer_id": 2', "layer 1 is missing"),
        ('"device_id": 2', '"device_id": 3', "no device 2"),
        ('"device_count": 4', '"device_count": 5', "does not have the devices"),
    ]:
        path.write_text(good.replace(old, new, 1))
        with pytest.raises(PlanError, match=message):
            read_plan("vllm-ascend", path, profile, RANKS)
    path.write_text(good)
    with pytest.raises(PlanError, match="4 devices, 2 ranks"):
        read_plan("vllm-ascend", path, profile, 2)
    data["layer_list"][0]["device_list"][0]["device_expert"] = [1, 1, 2]
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match="an expert twice"):
        read_plan("vllm-ascend", path, profile, RANKS)


def test_omni_pattern(tmp_path, profile):
    plan = placed(profile, RANKS, [8, 16, 12])
    path = tmp_path / "x.npy"
    write_plan(plan, "omni", path)
    pattern = np.load(path)
    assert (pattern.shape, pattern.dtype) == ((RANKS, 3, EXPERTS), np.int32)
    assert pattern.sum((0, 2)).tolist() == [8, 16, 12]
    assert (pattern.sum(2) == pattern.sum(2)[0]).all(), "each rank holds equally many experts of a layer"
    for change, message in [((0, 0, slice(None)), "gives its ranks"), ((slice(None), 0, 0), "has no slot|gives its ranks")]:
        broken = pattern.copy()
        broken[change] = 0
        np.save(path, broken)
        with pytest.raises(PlanError, match=message):
            read_plan("omni", path, profile, RANKS)
    np.save(path, pattern * 2)
    with pytest.raises(PlanError, match="other values than 0 and 1"):
        read_plan("omni", path, profile, RANKS)


def test_real_omni_pattern(shared_data, tmp_path):
    path = next(iter((shared_data / "routing" / "dsv3_omni_placement").glob("*.npy")), None)
    if path is None:
        pytest.skip("no placement pattern in the development data")
    profile = recorded(layers=58, experts=256, dense=())
    physical = read_plan("omni", path, profile, 16)
    from equipoise.planning.ranks import rank_plan

    plan = rank_plan(profile, physical, ranks=16, method="omni", options={})
    write_plan(plan, "omni", tmp_path / "back.npy")
    assert (np.load(tmp_path / "back.npy") == np.load(path)).all()


def test_lmdeploy_arrives_at_the_plan_by_deepseeks_own_algorithm(tmp_path, profile):
    from equipoise.planning.eplb import eplb_placement

    plan = placed(profile, RANKS, 8, seed=5)
    write_plan(plan, "lmdeploy", tmp_path / "x.json")
    table = np.array(json.loads((tmp_path / "x.json").read_text()))
    assert table.shape == (6, EXPERTS), "a row for each transformer layer"
    assert np.array_equal(eplb_placement(table[[2, 3, 5]], EXPERTS, RANKS), np.stack(slots_of(plan)))


def test_lmdeploy_takes_measured_loads_of_a_plan_with_copies(tmp_path, profile):
    plan = placed(profile, RANKS, 12)
    written = write_plan(plan, "lmdeploy", tmp_path / "x.json", profile=profile)
    table = np.array(json.loads((tmp_path / "x.json").read_text()))
    assert (table[[2, 3, 5]] == profile.load).all()
    assert "REDUNDANT_EXPERTS=4" in written.flags
    assert "# measured" in written.flags
    profile.save(tmp_path / "p.profile.safetensors")
    again = write_plan(plan, "lmdeploy", tmp_path / "z.json", profile=str(tmp_path / "p.profile.safetensors"))
    assert again.files[0].read_text() == written.files[0].read_text()
    with pytest.raises(PlanError, match="made for"):
        write_plan(plan, "lmdeploy", tmp_path / "y.json", profile=recorded(layers=4, dense=()))


def test_lmdeploy_cannot_reorder_one_expert_per_rank(tmp_path, profile):
    with pytest.raises(PlanError, match="expert e on rank e"):
        write_plan(placed(profile, 8, 8, seed=1), "lmdeploy", tmp_path / "x.json")
    (tmp_path / "x.json").write_text(json.dumps([[1] * 8] * 6))
    with pytest.raises(PlanError, match="equal loads"):
        read_plan("lmdeploy", tmp_path / "x.json", profile, RANKS)


@settings(max_examples=60, deadline=None)
@given(ranks=st.integers(2, 12), per_rank=st.integers(2, 9), seed=st.integers(0, 2**32 - 1))
def test_loads_lead_deepseeks_packing_to_any_placement(ranks, per_rank, seed):
    slots = np.random.default_rng(seed).permutation(ranks * per_rank)
    assert np.array_equal(packed(loads_for(slots, ranks), ranks), slots)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), layers=st.integers(1, 3), experts=st.integers(1, 9), copies=st.integers(0, 12))
def test_the_three_maps_agree(data, layers, experts, copies):
    extra = data.draw(st.lists(st.integers(0, experts - 1), min_size=copies, max_size=copies))
    rows = [data.draw(st.permutations([*range(experts), *extra])) for _ in range(layers)]
    phy2log = np.array(rows)
    log2phy, logcnt = maps(phy2log, experts)
    assert log2phy.shape == (layers, experts, logcnt.max())
    for layer in range(layers):
        for expert in range(experts):
            slots = log2phy[layer, expert][log2phy[layer, expert] >= 0]
            assert len(slots) == logcnt[layer, expert]
            assert (phy2log[layer, slots] == expert).all()
            assert all(a < b for a, b in pairwise(slots.tolist()))


def test_deepseeks_triple_must_agree(tmp_path, profile):
    path = tmp_path / "x.npz"
    write_plan(placed(profile, RANKS, 12), "deepseek", path)
    arrays = dict(np.load(path))
    arrays["logcnt"] = arrays["logcnt"] + 1
    np.savez(path, **arrays)
    with pytest.raises(PlanError, match="does not belong"):
        read_plan("deepseek", path, profile, RANKS)
    del arrays["logcnt"]
    np.savez(path, **arrays)
    with pytest.raises(PlanError, match="no logcnt"):
        read_plan("deepseek", path, profile, RANKS)


@pytest.mark.parametrize("slots", [8, 16])
@pytest.mark.parametrize("method", [name for name in ("contiguous", "round_robin", "eplb", "robust") if name in METHODS])
def test_what_planners_make_is_held_by_every_engine(tmp_path, profile, method, slots):
    """Plans of every method that places on ranks; published placements may have an expert twice on a rank."""
    plan = make_plan(profile, method, units=RANKS, slots=slots)
    doubled = any(layer.duplicates for layer in plan.layers)
    for engine, name in FILES.items():
        if (doubled and engine in ("vllm-ascend", "omni")) or (engine == "lmdeploy" and slots > EXPERTS):
            with pytest.raises(PlanError, match="Nearest plan"):
                write_plan(plan, engine, tmp_path / name)
        else:
            write_plan(plan, engine, tmp_path / name)
            assert same(engine, plan, tmp_path / name), engine


def test_a_model_of_a_serving_size(tmp_path):
    profile = recorded(layers=13, experts=256, dense=(0, 1, 2), scenarios=1)
    plans = {slots: placed(profile, 32, slots) for slots in (256, 288)}
    for engine in FILES:
        plan = plans[256 if engine == "lmdeploy" else 288]
        write_plan(plan, engine, tmp_path / FILES[engine])
        assert same(engine, plan, tmp_path / FILES[engine], 32), engine


@pytest.mark.parametrize("engine", FILES)
def test_a_plan_of_another_routing_policy_is_refused(tmp_path, profile, engine):
    plan = placed(profile, RANKS, EXPERTS)
    other = plan.model_copy(update={"routing_policy": "bias-1234", "exactness": "routing"})
    with pytest.raises(PlanError, match="routing policy 'bias-1234'"):
        write_plan(other, engine, tmp_path / FILES[engine])
    assert not list(tmp_path.iterdir())
