"""Tokens that stay where their expert ran: the model's own logits and tokens, the rows that move, and who is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import StaticCache

from equipoise.artifacts import LayerPlan, Plan
from equipoise.errors import EquipoiseError, ModelError
from equipoise.execution.apply import apply_plan
from equipoise.execution.expert_parallel.meter import ParallelMeter
from equipoise.execution.expert_parallel.ranks import Ranks
from equipoise.execution.expert_parallel.residency import homes, move_rows, rows_on
from equipoise.execution.expert_parallel.runtime import parallelize, set_rank_dispatch
from equipoise.execution.routing.attach import attach_policy
from equipoise.models.layers import find_moe_layers, model_facts, observe
from equipoise.models.policy_marks import policy_id
from equipoise.planning.affinity.exflow import place
from equipoise.planning.affinity.pairs import affinity, count_pairs, crossings
from execution.helpers import make_plan, token_batch
from execution.on_ranks import on_ranks
from execution.routing_cases import fitted
from models.architectures import tiny

needs_gloo = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")

FIELDS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_hidden_layers": 3, "sliding_window": 4},  # shorter than the prompts
    "qwen3_moe": {"num_hidden_layers": 4, "mlp_only_layers": [1]},  # a dense layer between
    "deepseek_v3": {"num_hidden_layers": 3, "first_k_dense_replace": 1},  # a dense layer first, shared experts
    "llama4": {"num_hidden_layers": 4, "interleave_moe_layer_step": 2},  # a shared expert, every other layer dense
    "gpt_oss": {},  # full and sliding attention in turn
    "olmoe": {},
    "qwen2_moe": {},  # a gated shared expert
}
"""Decoders in which a token has one expert."""
SIX = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def top_one(name: str, **fields: Any) -> Any:
    """A tiny model of top-k 1 whose logits depend on its experts, and whose tokens on what came before."""
    model = tiny(name, **{"num_experts_per_tok": 1, **FIELDS.get(name, {}), **fields})
    for key, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.4 if "expert" in key or "router" in key or "gate" in key else 0.2)
    return model


def on_units(plan: Plan, units: int) -> Plan:
    layers = tuple(layer.model_copy(update={"units": tuple(u % units for u in layer.units)}) for layer in plan.layers)
    return plan.model_copy(update={"units": units, "layers": layers, "allows_duplicates": True})


def placed(plan: Plan, physical: list[Any], ranks: int) -> Plan:
    """The plan's model with each rank's experts, rank by rank."""
    layers = tuple(
        LayerPlan(
            experts=tuple(int(e) for e in row),
            units=tuple(i * ranks // len(row) for i in range(len(row))),
            shares=tuple(1 / list(row).count(e) for e in row),
            precisions=(plan.model.dtype,) * len(row),
        )
        for row in physical
    )
    return plan.model_copy(update={"units": ranks, "layers": layers})


def generated(model: Any, batch: dict[str, torch.Tensor], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and logits of each step."""
    with torch.no_grad():
        found = model.generate(**batch, **SIX, **options)
    return found.sequences, torch.stack(found.logits)


def run_all(ranks: Ranks, cases: dict[str, Any]) -> dict[str, torch.Tensor]:
    out = {}
    for name, (model, plan, batch) in cases.items():
        parallelize(model, ranks, plan, context="coherent")
        with torch.no_grad():
            out[f"{name} logits"] = model(**batch).logits
        out[f"{name} tokens"], out[f"{name} steps"] = generated(model, batch)
        one = {key: value[:1] for key, value in batch.items()}
        out[f"{name} alone"] = generated(model, one)[0]
        if name == "mixtral":
            out["beams"] = model.generate(**batch, max_new_tokens=5, num_beams=2, do_sample=False)
            set_rank_dispatch(model, "prefill=llep,decode=even", {"least": 1, "gate": 1.0})
            out["spilled"] = generated(model, batch)[0]
    return out


@needs_gloo
@pytest.mark.parametrize(("size", "architectures"), [(1, 2), (2, 7), (4, 3)])
def test_logits_and_tokens_are_the_models_own(size: int, architectures: int, tmp_path: Path):
    cases, batch = {}, token_batch(60, (9, 5, 7, 8, 4), left=True)
    for name in list(FIELDS)[:architectures]:
        model = top_one(name)
        cases[name] = (model, on_units(make_plan(model_facts(model, name), extra=3), 4), batch)
    found = on_ranks(size, tmp_path, run_all, cases)
    real = batch["attention_mask"].bool()
    for name, (model, *_) in cases.items():
        with torch.no_grad():
            logits = model(**batch).logits
        tokens, steps = generated(model, batch)
        alone = generated(model, {key: value[:1] for key, value in batch.items()})[0]
        assert len(set(tokens[:, -6:].flatten().tolist())) > 5, "the model says more than one thing"
        scale = float(logits.abs().max())
        for one in found:
            assert float((one[f"{name} logits"] - logits)[real].abs().max()) < 1e-5 * scale, name
            assert torch.equal(one[f"{name} tokens"], tokens), name
            assert torch.equal(one[f"{name} alone"], alone), f"{name}, fewer rows than ranks"
            assert float((one[f"{name} steps"] - steps).abs().max()) < 1e-5 * scale, name
            assert torch.equal(one[f"{name} steps"], found[0][f"{name} steps"]), "all ranks have the same, bit for bit"
            if name == "mixtral":
                assert torch.equal(one["spilled"], tokens)
                assert torch.equal(one["beams"], model.generate(**batch, max_new_tokens=5, num_beams=2, do_sample=False))


def run_quantized(ranks: Ranks, balanced: Any, model: Any, plan: Plan, batch: Any) -> dict[str, torch.Tensor]:
    out = {}
    for name, mine, given_plan in (("sliced", balanced, None), ("rounded", model, plan)):
        parallelize(mine, ranks, given_plan, context="coherent", int8_activations=False)
        out[f"{name} tokens"], out[name] = generated(mine, batch)
    return out


@needs_gloo
@pytest.mark.parametrize("extra", [0, 4])
def test_quantized_slots_and_unlike_copies_compute_what_the_plan_says(extra: int, tmp_path: Path):
    model, batch = top_one("qwen3_moe"), token_batch(60, (9, 5, 7, 8), left=True)
    facts = model_facts(model, "x")
    plan = on_units(make_plan(facts, extra=extra, precisions=["int8", "int4-g16", facts.dtype]), 2)
    balanced = apply_plan(copy.deepcopy(model), plan, int8_activations=False).eval()
    tokens, steps = generated(balanced, batch)
    assert float((generated(model, batch)[1] - steps).abs().max()) > 1e-2  # rounding shows
    for one in on_ranks(2, tmp_path, run_quantized, balanced, model, plan, batch):
        for name in ("sliced", "rounded"):
            assert torch.equal(one[f"{name} tokens"], tokens)
            assert float((one[name] - steps).abs().max()) < 1e-5 * float(steps.abs().max())


def run_placements(ranks: Ranks, model: Any, plans: dict[str, Plan], batch: Any) -> dict[str, torch.Tensor]:
    out = {}
    for name, plan in plans.items():
        mine = copy.deepcopy(model)
        parallelize(mine, ranks, plan, context="coherent")
        with ParallelMeter(mine) as meter:
            generated(mine, batch)
        report = meter.report().select(decode=True)
        out[f"{name} moved"] = torch.tensor(report.moved_L)
        out[f"{name} context"] = torch.tensor(report.rows()["context_bytes_moved"])
        out[f"{name} token bytes"] = torch.tensor(report.values["token_bytes"].sum())
        out[f"{name} rows"] = torch.tensor(report.values["rows"].sum((1, 2)))
    return out


@needs_gloo
def test_rows_move_as_often_as_their_experts_pairs_say(tmp_path: Path):
    """Decode alone: what is predicted from pairs of experts of its tokens is what is measured, and exflow lowers it."""
    model, batch = top_one("mixtral", num_hidden_layers=5), token_batch(60, (9, 5, 7, 8, 4, 6, 9, 3), left=True)
    layers = find_moe_layers(model)
    seen: list[list[Any]] = [[] for _ in layers]
    handles = [observe(one, lambda h, ids, w, at=seen[i]: at.append(ids.numpy().copy())) for i, one in enumerate(layers)]
    generated(model, batch)
    for handle in handles:
        handle.remove()
    pairs = affinity(count_pairs(np.stack([np.concatenate(steps[1:]) for steps in seen]), 6)[0])
    facts = make_plan(model_facts(model, "x"), extra=0)
    rows = {"contiguous": [np.arange(6)] * 5, "exflow": place(pairs, ranks=2, mu=0.0), "everywhere": [np.tile(range(6), 2)] * 5}
    found = on_ranks(2, tmp_path, run_placements, model, {n: placed(facts, row, 2) for n, row in rows.items()}, batch)[0]
    for name in ("contiguous", "exflow"):
        assert found[f"{name} moved"][1:].tolist() == pytest.approx(crossings(pairs, rows[name], 2).tolist(), abs=1e-12)
        moved = float((found[f"{name} moved"] * found[f"{name} rows"]).sum())
        assert float(found[f"{name} token bytes"]) == pytest.approx(moved * 32 * 4)  # one hidden state for each, one way
    assert found["exflow moved"][1:].sum() < 0.8 * found["contiguous moved"][1:].sum()
    assert float(found["everywhere moved"].sum()) == 0  # a copy on every rank: nobody leaves home
    assert found["contiguous rows"].tolist() == [8 * 5] * 5
    state = 5 * 2 * 4 * 8 + 32  # keys and values of five layers, four heads of eight, and the hidden state
    for name in rows:
        assert float(found[f"{name} context"]) == 8 * state * 4  # of every row, to the one other rank


@given(st.data())
def test_moves_bring_every_row_to_its_rank(data: st.DataObject):
    ranks, rows = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 12))
    owner, target = (np.array(data.draw(st.lists(st.integers(0, ranks - 1), min_size=rows, max_size=rows)), int) for _ in "ab")
    moves = [move_rows(owner, target, rank, ranks) for rank in range(ranks)]
    sent = [rows_on(owner, r)[move.leaves_N] for r, move in enumerate(moves)]
    assert sum(map(len, sent)) == moves[0].crossings == int((owner != target).sum())
    for rank, move in enumerate(moves):
        begins = [int(sum(other.send_H[:rank])) for other in moves]
        came = [s[b : b + other.send_H[rank]] for s, b, other in zip(sent, begins, moves, strict=True)]
        assert move.receive_H == [len(part) for part in came]
        assert move.send_H[rank] == 0
        held = np.concatenate([rows_on(owner, rank)[move.stays_N], *came])
        assert held[move.order_N].tolist() == rows_on(target, rank).tolist()
    assert np.ptp(np.bincount(homes(rows, ranks), minlength=ranks)) <= 1


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("mixtral", {"num_experts_per_tok": 2}, "sends a token to 2 experts, which may lie on as many ranks.*takes top-k 1"),
        ("phimoe", {"num_experts_per_tok": 1}, "sends a token to 2 experts"),  # its router takes two whatever it is told
        ("switch_transformers", {}, "has several stacks of layers"),
        ("granitemoe", {"num_experts_per_tok": 1, "residual_multiplier": 0.5}, "is not x \\+ attention"),
        ("cohere2_moe", {"num_experts_per_tok": 1}, "has no post_attention_layernorm"),
        ("qwen3_next", {"num_experts_per_tok": 1}, "Qwen3NextDecoderLayer has no self_attn"),
        ("deepseek_v32", {"num_experts_per_tok": 1}, "cannot keep a cache with DynamicIndexedLayer"),
        ("zaya", {}, "may be given none of a token"),
    ],
)
def test_models_whose_tokens_cannot_stay_are_refused(name: str, fields: dict[str, Any], reason: str):
    model = tiny(name, **fields)
    plan = make_plan(model_facts(model, name))
    with pytest.raises(ModelError, match=reason):
        parallelize(model, Ranks(), plan, context="coherent")
    parallelize(model, Ranks(), plan)  # it is as it was


def test_a_policy_may_leave_one_expert_but_not_look_at_the_batch():
    model, batch = tiny("mixtral"), token_batch(60, (9, 5), left=True)
    policy = fitted(model, "static_k", {"k": 1})
    attach_policy(model, policy)
    expected = generated(model, batch)
    plan = make_plan(model_facts(model, "x")).model_copy(update={"routing_policy": policy.id, "exactness": "routing"})
    parallelize(model, Ranks(), plan, context="coherent")
    assert torch.equal(generated(model, batch)[0], expected[0])
    model = top_one("olmoe")
    attach_policy(model, fitted(model, "laser_style", {"share": 1, "t": 0.0}))
    plan = make_plan(model_facts(model, "x")).model_copy(update={"routing_policy": policy_id(model), "exactness": "routing"})
    with pytest.raises(ModelError, match="'laser_style' looks at all tokens of a batch"):
        parallelize(model, Ranks(), plan, context="coherent")


def test_what_cannot_be_is_refused():
    model = top_one("olmoe")
    plan = make_plan(model_facts(model, "x"))
    alone = Ranks()
    with pytest.raises(EquipoiseError, match=r"unknown context 'coherant'.*Did you mean 'coherent'"):
        parallelize(model, alone, plan, context="coherant")
    with pytest.raises(EquipoiseError, match="leave `shared` out"):
        parallelize(model, alone, plan, context="coherent", shared=True)
    with pytest.raises(EquipoiseError, match="only prefill has a choice: prefill=NAME,decode=even"):
        parallelize(model, alone, plan, context="coherent", dispatch="prefill=quota,decode=metro")
    parallelize(model, alone, plan, context="coherent", dispatch="prefill=quota,decode=even")
    with pytest.raises(EquipoiseError, match="only prefill has a choice"):
        set_rank_dispatch(model, "llep")
    ids = torch.tensor([[3, 4, 5]])
    with pytest.raises(ModelError, match="output_hidden_states asks for what every layer made"):
        model(input_ids=ids, output_hidden_states=True)
    with pytest.raises(ModelError, match="cannot keep a cache with StaticLayer"):
        model(input_ids=ids, past_key_values=StaticCache(config=model.config, max_cache_len=8))
    with pytest.raises(ModelError, match=r"is given 'attention_mask' of shape \(3, 1, 3, 3\) for a batch of 1"):
        model(input_ids=ids, attention_mask=torch.ones(3, 1, 3, 3, dtype=torch.bool))
    assert model(input_ids=ids).logits.shape[:2] == (1, 3)  # a forward that failed leaves nothing behind
