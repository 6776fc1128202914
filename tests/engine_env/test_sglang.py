"""SGLang's own parser loads what is written for it; DeepSeek's own algorithm, which SGLang contains, agrees as well.

Its package needs a GPU, but the module that parses `--init-expert-location` does not: it is loaded from the unpacked wheel
(in the environment of `make test-engines`, or where EQUIPOISE_SGLANG says) with the server's settings given by hand.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from engines_support import placed, recorded
from equipoise.engines import write_plan
from equipoise.planning.ranks import rank_plan, slots_of

pytestmark = pytest.mark.engines
EXPERTS, RANKS, LAYERS = 8, 4, 6


def load(file: str, name: str) -> ModuleType:
    """A module of SGLang, installed or unpacked, from its file alone; skips where there is none."""
    pytest.importorskip("torch")
    told = os.environ.get("EQUIPOISE_SGLANG")
    places = [Path(told)] if told else [Path(sys.prefix) / "sglang", *(Path(p) for p in sys.path if p)]
    source = next((p for place in places if (p := place / "sglang" / "srt" / "eplb" / file).is_file()), None)
    if source is None:
        pytest.skip("SGLang's sources are not here; unpack its wheel and set EQUIPOISE_SGLANG to run this")
    spec = importlib.util.spec_from_file_location(name, source)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


@pytest.fixture
def sglang(monkeypatch):
    """SGLang's module, and the settings that it reads."""
    moe = SimpleNamespace(
        ep_num_redundant_experts=0,
        ep_dispatch_algorithm="static",
        init_expert_location="trivial",
        ep_join_mode="none",
        moe_a2a_backend="none",
        eplb_algorithm="auto",
    )
    parallel = SimpleNamespace(ep_size=RANKS, nnodes=1, elastic_ep_initial_size=None)
    context = ModuleType("sglang.srt.runtime_context")
    context.get_device = lambda: SimpleNamespace(device="cpu")
    context.get_exec = lambda: SimpleNamespace(moe=moe)
    context.get_parallel = lambda: parallel
    context.get_resources = lambda: SimpleNamespace()
    elastic = ModuleType("sglang.srt.elastic_ep.elastic_ep")
    elastic.elastic_expanded_world_enabled = lambda: False
    for name in ("sglang", "sglang.srt", "sglang.srt.elastic_ep"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "sglang.srt.runtime_context", context)
    monkeypatch.setitem(sys.modules, "sglang.srt.elastic_ep.elastic_ep", elastic)
    module = load("expert_location.py", "sglang.srt.eplb.expert_location")
    facts = module.ModelConfigForExpertLocation(num_layers=LAYERS, num_logical_experts=EXPERTS)
    monkeypatch.setattr(module.ModelConfigForExpertLocation, "from_model_config", staticmethod(lambda _: facts))
    return module, moe


@pytest.mark.parametrize("dispatch", ["static", "dynamic"])
@pytest.mark.parametrize("ending", [".json", ".pt"])
@pytest.mark.parametrize("redundant", [0, 4, 24])
def test_sglang_loads_the_file(tmp_path, sglang, redundant, ending, dispatch):
    module, moe = sglang
    profile = recorded(layers=LAYERS, experts=EXPERTS, dense=(0, 1))
    plan = placed(profile, RANKS, EXPERTS + redundant)
    path = tmp_path / f"x{ending}"
    write_plan(plan, "sglang", path)
    moe.init_expert_location, moe.ep_num_redundant_experts, moe.ep_dispatch_algorithm = str(path), redundant, dispatch
    for rank in range(RANKS):
        metadata = module.compute_initial_expert_location_metadata(model_config=None, moe_ep_rank=rank)
        assert metadata.num_layers == LAYERS
        assert metadata.num_local_physical_experts == (EXPERTS + redundant) // RANKS
        assert (metadata.physical_to_logical_map[2:].numpy() == np.stack(slots_of(plan))).all()
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                slots = metadata.logical_to_all_physical(layer, expert)
                assert slots, "every expert of every row, dense ones too, has a slot"
                assert (metadata.physical_to_logical_map[layer, slots] == expert).all()


def test_sglang_refuses_another_key(tmp_path, sglang):
    """What our reader refuses is what SGLang refuses."""
    module, moe = sglang
    moe.init_expert_location = '{"physical_to_logical_map": [[0, 1, 2, 3, 4, 5, 6, 7]], "made_by": "somebody"}'
    with pytest.raises(TypeError, match="made_by"):
        module.compute_initial_expert_location_metadata(model_config=None, moe_ep_rank=0)


def test_deepseeks_algorithm_arrives_at_the_plan_from_the_loads_written_for_lmdeploy(tmp_path):
    """lmdeploy runs this algorithm on the loads, with one group on one node."""
    import torch

    deepseek = load("eplb_algorithms/deepseek.py", "deepseek_eplb")
    profile = recorded(layers=7, experts=64, dense=(0,))
    plan = placed(profile, 8, 64)
    write_plan(plan, "lmdeploy", tmp_path / "x.json")
    loads = torch.tensor(json.loads((tmp_path / "x.json").read_text()))
    physical, _, _ = deepseek.rebalance_experts(loads, 64, 1, 1, 8, enable_hierarchical=True)
    assert (physical[1:].numpy() == np.stack(slots_of(plan))).all()


def test_the_triple_is_that_of_deepseeks_algorithm(tmp_path):
    import torch

    deepseek = load("eplb_algorithms/deepseek.py", "deepseek_eplb")
    profile = recorded(layers=4, experts=32, dense=(0,), scenarios=1)
    triple = deepseek.rebalance_experts(torch.from_numpy(profile.load.copy()), 48, 1, 1, 8, enable_hierarchical=False)
    phy2log, log2phy, logcnt = (t.numpy() for t in triple)
    plan = rank_plan(profile, list(phy2log), ranks=8, method="eplb", options={})
    write_plan(plan, "deepseek", tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as arrays:
        assert (arrays["phy2log"] == phy2log).all()
        assert (arrays["logcnt"] == logcnt).all()
        assert (np.sort(arrays["log2phy"], 2) == np.sort(log2phy, 2)).all(), "the order of copies is free"
        assert {k: (a.dtype, a.shape) for k, a in arrays.items()} == {
            "phy2log": (np.int64, (3, 48)),
            "log2phy": (np.int64, log2phy.shape),
            "logcnt": (np.int64, (3, 32)),
        }
