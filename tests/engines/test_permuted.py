"""A permuted checkpoint is the same model: equal logits in a fresh load, and linear placement that is the plan."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.artifacts import LayerFacts, ModelFacts, Plan, Profile, Source
from equipoise.engines.permuted import ORDER_FILE, PLAN_FILE, permuted_plan, write_permuted
from equipoise.engines.permuted_order import find_order, keeps_groups, linear_slots, order_of
from equipoise.engines.safetensors_rewrite import tensors_of
from equipoise.errors import CheckpointError, PlanError
from equipoise.planning.methods import make_plan
from equipoise.planning.ranks import rank_load, rank_plan, slots_of

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def tiny(family: str):
    """A random model of 3 layers and 8 experts (DeepSeek-V3: the first layer dense, 4 groups)."""
    import transformers as t

    torch.manual_seed(3)
    sized = {"num_hidden_layers": 3, "intermediate_size": 48, "num_experts_per_tok": 2, "pad_token_id": 0}
    if family == "mixtral":
        config = t.MixtralConfig(**COMMON, **sized, num_local_experts=8)
    elif family == "qwen3_moe":
        config = t.Qwen3MoeConfig(**COMMON, **sized, num_experts=8, moe_intermediate_size=24, head_dim=16)
    elif family == "qwen2_moe":
        config = t.Qwen2MoeConfig(
            **COMMON,
            **sized,
            num_experts=8,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=24,
            decoder_sparse_step=1,
        )
    elif family == "olmoe":
        config = t.OlmoeConfig(**COMMON, **sized, num_experts=8)
    elif family == "gpt_oss":
        config = t.GptOssConfig(**COMMON, **sized, num_local_experts=8, head_dim=16)
    else:
        config = t.DeepseekV3Config(
            **COMMON, **sized, n_routed_experts=8, n_shared_experts=1, n_group=4, topk_group=2, first_k_dense_replace=1,
            moe_intermediate_size=24, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
        )  # fmt: skip
    model = t.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "correction_bias" in name:
                tensor.copy_(torch.randn_like(tensor) * 0.1)
            elif "bias" in name or "gate.weight" in name:
                tensor.copy_(torch.randn_like(tensor))
    return model


def facts(layers: list[int], experts: int = 8, groups: int = 1, hidden: int = 3) -> ModelFacts:
    return ModelFacts(
        name="tiny",
        model_type="tiny",
        dtype="fp32",
        fingerprint="f",
        hidden_layers=hidden,
        expert_groups=groups,
        layers=tuple(
            LayerFacts(path=f"model.layers.{i}.mlp.experts", model_layer=i, num_experts=experts, top_k=2, matrices=())
            for i in layers
        ),
    )


def profile_of(model: ModelFacts, seed: int = 0, scenarios: int = 4) -> Profile:
    rng = np.random.default_rng(seed)
    n, e = len(model.layers), model.max_experts
    counts = rng.gamma(0.5, 200, (scenarios, 2, n, e)).astype(np.int64) + 1
    return Profile(
        model=model,
        source=Source(scenarios=tuple(f"s{i}" for i in range(scenarios))),
        counts=counts,
        gate_mass=np.zeros((scenarios, n, e)),
        tokens=counts[:, 0, 0].sum(1),
        windows=np.zeros((0, n, e), np.int64),
        window_scenario=np.zeros(0, np.int64),
    )


def logits(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("slots", [8, 12])
def test_logits_are_equal_in_a_fresh_load(family, slots, tmp_path):
    tiny(family).save_pretrained(tmp_path / "base", max_shard_size="40KB")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    deepseek = family == "deepseek_v3"
    profile = profile_of(facts([1, 2] if deepseek else [0, 1, 2], groups=4 if deepseek else 1))
    profile.save(tmp_path / "p.safetensors")
    wanted = make_plan(profile, "eplb", units=2 if deepseek else 4, slots=slots)
    wrote = write_permuted(wanted, tmp_path / "out", model=tmp_path / "base", profile=tmp_path / "p.safetensors")

    order = json.loads((tmp_path / "out" / ORDER_FILE).read_text())["experts_at_place"]
    assert any(row != sorted(row) for row in order.values())
    held = Plan.load_file(tmp_path / "out" / PLAN_FILE)
    assert {str(facts.model_layer) for facts in held.model.layers} == set(order)
    for row, physical in zip(order.values(), slots_of(held), strict=True):
        assert np.array_equal(linear_slots(np.array(row), slots), physical)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert tmp_path / "out" / "config.json" in wrote.files

    ids = torch.randint(1, 64, (3, 17), generator=torch.Generator().manual_seed(1))
    base, permuted = logits(tmp_path / "base", ids), logits(tmp_path / "out", ids)
    assert torch.allclose(base, permuted, atol=1e-5, rtol=1e-4)
    assert torch.equal(base.argmax(-1), permuted.argmax(-1))


def test_routing_is_the_same_under_new_names(tmp_path):
    """Place p of the permuted model serves what expert order[p] served: the tokens' experts, not only the output, agree."""
    from transformers import AutoModelForCausalLM

    from equipoise.models.recorder import record

    tiny("deepseek_v3").save_pretrained(tmp_path / "base")
    profile = profile_of(facts([1, 2], groups=4))
    profile.save(tmp_path / "p.safetensors")
    write_permuted(
        make_plan(profile, "eplb", units=4, slots=8),
        tmp_path / "out",
        model=tmp_path / "base",
        profile=tmp_path / "p.safetensors",
    )
    ids = torch.randint(1, 64, (4, 30), generator=torch.Generator().manual_seed(2))
    counts = []
    for directory in ("base", "out"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / directory, dtype=torch.float32).eval()
        with record(model, scenarios=("a",)) as recorder, torch.no_grad():
            model(input_ids=ids)
        counts.append(recorder.counts[0, 0])
    order = json.loads((tmp_path / "out" / ORDER_FILE).read_text())["experts_at_place"]
    for base, permuted, row in zip(*counts, order.values(), strict=True):
        assert np.array_equal(base[row], permuted)


def test_without_copies_or_groups_the_plan_is_held_exactly():
    profile = profile_of(facts([0, 1, 2]))
    plan = make_plan(profile, "eplb", units=4, slots=8)
    held, orders = permuted_plan(plan, None)
    assert held is plan
    assert all(np.array_equal(o, p) for o, p in zip(orders, slots_of(plan), strict=True))


def test_a_plan_that_no_order_is_needs_a_profile():
    profile = profile_of(facts([0, 1, 2]))
    plan = make_plan(profile, "eplb", units=4, slots=12)
    with pytest.raises(PlanError, match=r"copies others than the first experts.*--profile"):
        permuted_plan(plan, None)
    held, _ = permuted_plan(plan, profile)
    assert held.method == "permuted"
    assert all(layer.duplicates == 0 for layer in held.layers)


def test_a_plan_of_another_model_is_refused(tmp_path):
    tiny("olmoe").save_pretrained(tmp_path / "base")
    plan = make_plan(profile_of(facts([0, 1])), "eplb", units=4, slots=8)
    with pytest.raises(PlanError, match=r"2 MoE layers of 8 experts.*has 3 of 8"):
        write_permuted(plan, tmp_path / "out", model=tmp_path / "base")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["truncated", "header", "index", "sibling", "named", "twice", "no_files", "not_empty"])
def test_damaged_or_unknown_checkpoints_leave_nothing_behind(damage, tmp_path):
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    tiny("olmoe").save_pretrained(base, max_shard_size="40KB")
    shard = sorted(base.glob("*.safetensors"))[0]
    plan = make_plan(profile_of(facts([0, 1, 2])), "eplb", units=4, slots=8)
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "header":
        shard.write_bytes((1 << 62).to_bytes(8, "little") + shard.read_bytes()[8:])
    elif damage == "index":
        shard.unlink()
    elif damage == "sibling":
        tensors = load_file(shard)
        tensors["model.layers.1.mlp.gate.tid2eid"] = torch.zeros(8, 2, dtype=torch.int64)
        save_file(tensors, shard)
        (base / "model.safetensors.index.json").unlink()
    elif damage == "named":
        config = json.loads((base / "config.json").read_text())
        config["quantization_config"] = {"ignore": ["model.layers.1.mlp.experts.3.down_proj"]}
        (base / "config.json").write_text(json.dumps(config))
    elif damage == "twice":
        (base / "consolidated.safetensors").write_bytes(shard.read_bytes())
    elif damage == "no_files":
        for path in base.glob("*.safetensors"):
            path.unlink()
    else:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError):
        write_permuted(plan, tmp_path / "out", model=base)
    left = [p.name for p in tmp_path.iterdir()]
    assert sorted(left) == (["base", "out"] if damage == "not_empty" else ["base"])


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=200))
def test_garbage_is_refused(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("g") / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError):
        tensors_of(path)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    groups=st.sampled_from([1, 2, 4]),
    ranks=st.sampled_from([2, 4, 8]),
    copies=st.sampled_from([0, 8, 16]),
)
def test_orders_keep_groups_and_balance_better_than_none(seed, groups, ranks, copies):
    rng = np.random.default_rng(seed)
    load_SE = rng.gamma(0.4, 1.0, (3, 16)) + 1e-6
    slots = 16 + copies
    order = find_order(load_SE, slots, ranks, groups)
    assert sorted(order.tolist()) == list(range(16))
    assert keeps_groups(order, groups)
    assert np.array_equal(order_of(linear_slots(order, slots), 16, groups), order)
    share = load_SE / load_SE.sum(1, keepdims=True)
    before, after = (rank_load(linear_slots(o, slots), share, ranks).max(-1).mean() for o in (np.arange(16), order))
    assert after <= before + 1e-9
    if groups == 1 and ranks == 2 and not copies:
        assert after < 0.75


def test_a_placement_with_the_copies_elsewhere_is_no_order():
    plan = rank_plan(profile_of(facts([0], experts=4)), [np.array([0, 1, 2, 3, 1, 0, 2, 3])], ranks=2, method="x", options={})
    assert order_of(slots_of(plan)[0], 4, 1) is None
    assert order_of(np.array([2, 0, 1, 3, 2, 0]), 4, 1).tolist() == [2, 0, 1, 3]
