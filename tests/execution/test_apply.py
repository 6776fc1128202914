from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from equipoise.artifacts import ModelFacts
from equipoise.errors import EquipoiseError, ModelError, PlanError, RecordingError
from equipoise.execution.apply import apply_plan, expert_bytes, set_dispatch, set_int8_activations
from equipoise.execution.meter import SlotMeter
from equipoise.execution.slots import slots_of
from equipoise.models.layers import model_facts
from equipoise.precisions import precision
from execution.helpers import make_plan, token_batch
from models.architectures import ARCHITECTURES, tiny

Fresh = Callable[[], PreTrainedModel]
# One of each way to store and call experts, and the paper's own models.
FAMILIES = [
    "qwen2_moe", "qwen3_moe", "olmoe", "mixtral", "deepseek_v2", "deepseek_v3", "gpt_oss", "nemotron_h", "aria",
    "openai_privacy_filter", "muse_spark", "granitemoe", "qwen3_vl_moe", "switch_transformers", "llama4", "dbrx", "jetmoe",
    "longcat_flash", "step3p7", "zaya",
]  # fmt: skip


def run(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits (or hidden states) of the real tokens."""
    inputs = dict(batch)
    if model.config.is_encoder_decoder:
        inputs |= {f"decoder_{name}": value for name, value in batch.items()}
    with torch.no_grad():
        output = model(**inputs)
    logits = getattr(output, "logits", None)
    logits = output.last_hidden_state if logits is None else logits
    return logits[batch["attention_mask"].bool()]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_exact_plans_change_nothing_but_the_order_of_sums(name: str, left: bool) -> None:
    model = tiny(name)
    batch = token_batch(64, left=left)
    before = run(model, batch)
    balanced = apply_plan(model, make_plan(model_facts(model, name), extra=4))
    assert sum(slots.plan.num_slots - slots.num_experts for slots in slots_of(balanced)) > 0
    torch.testing.assert_close(run(balanced, batch), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_quantized_plans_have_the_planned_bytes_and_small_errors(name: str) -> None:
    model = tiny(name)
    batch = token_batch(64)
    before = run(model, batch)
    plan = make_plan(model_facts(model, name), precisions=("bf16", "int8"), extra=1)
    assert expert_bytes(model) == sum(f.num_experts * f.expert_bytes(precision("fp32")) for f in plan.model.layers)
    balanced = apply_plan(model, plan)
    assert expert_bytes(balanced) == plan.bytes_by_unit().sum()
    after = run(balanced, batch)
    assert torch.isfinite(after).all()
    assert not torch.equal(after, before)
    with SlotMeter(balanced) as meter:
        run(balanced, batch)
    if not ARCHITECTURES[name].padding and name not in {"switch_transformers", "longcat_flash", "zaya"}:
        real = int(batch["attention_mask"].sum())
        assert meter.unit_load.sum(1).tolist() == [real * layer.top_k for layer in plan.model.layers]


def test_a_bf16_model_runs_its_own_precision_and_fewer_bits() -> None:
    model = tiny("qwen3_moe", dtype=torch.bfloat16)
    facts = model_facts(model, "bf16")
    assert facts.dtype == "bf16"
    batch = token_batch(64)
    before = run(model, batch)
    exact = apply_plan(copy.deepcopy(model), make_plan(facts))
    torch.testing.assert_close(run(exact, batch), before, rtol=0.02, atol=0.02)
    mixed = apply_plan(copy.deepcopy(model), make_plan(facts, precisions=("bf16", "int8", "int4")))
    assert run(mixed, batch).dtype is torch.bfloat16
    assert expert_bytes(mixed) < expert_bytes(exact)


def test_unusable_weights_are_refused_before_anything_is_changed(fresh: Fresh, facts: ModelFacts) -> None:
    batch = token_batch(64)
    plan = make_plan(facts, precisions=("fp16", "int8"))
    for value, message in ((float("nan"), "NaN"), (1e6, "65504")):
        model = fresh()
        with torch.no_grad():
            model.model.layers[1].mlp.experts.down_proj[:, 3, 4] = value
        plan_here = plan.model_copy(update={"model": model_facts(model, "tiny")})
        before = run(model, batch)
        with pytest.raises(ModelError, match=message):
            apply_plan(model, plan_here)
        torch.testing.assert_close(run(model, batch), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dispatch", ["even", "least_loaded", "gate_aware"])
def test_the_meter_counts_real_tokens_only(fresh: Fresh, facts: ModelFacts, dispatch: str) -> None:
    plan = make_plan(facts, extra=4, dispatch=dispatch)
    model = apply_plan(fresh(), plan)
    loads = []
    for left in (False, True):
        batch = token_batch(64, (9, 5, 7), left=left)
        with SlotMeter(model) as meter:
            run(model, batch)
        assert [int(load.sum()) for load in meter.slot_load] == [21 * 2] * len(plan.layers)
        assert meter.unit_load.shape == (len(plan.layers), plan.units)
        assert (meter.lis >= 1).all()
        assert (meter.lis_paper(count_copies=True) >= meter.lis_paper()).all()
        loads.append([load.tolist() for load in meter.slot_load])
    if dispatch == "even":
        # Other tokens were drawn for other padding? No: the same lengths and seed, so the same multiset of positions.
        assert [sum(load) for load in loads[0]] == [sum(load) for load in loads[1]]


def test_even_dispatch_does_not_see_the_batch(fresh: Fresh, facts: ModelFacts) -> None:
    model = apply_plan(fresh(), make_plan(facts, precisions=("int4",), extra=4))
    batch = token_batch(64, (9, 5, 7))
    together = run(model, batch)
    alone, start = [], 0
    for row, length in enumerate((9, 5, 7)):
        ids = batch["input_ids"][row : row + 1, :length]
        with SlotMeter(model) as meter:
            alone.append(run(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}))
        assert int(meter.slot_load[0].sum()) == length * 2
        torch.testing.assert_close(alone[-1], together[start : start + length], rtol=1e-5, atol=1e-5)
        start += length


def test_generation_serves_the_same_slots_as_one_pass(fresh: Fresh, facts: ModelFacts) -> None:
    model = apply_plan(fresh(), make_plan(facts, extra=4))
    prompt = token_batch(64, (6,))
    with SlotMeter(model) as stepwise:
        out = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    ids = out[:, :-1]  # the last token was never fed
    with SlotMeter(model) as at_once:
        run(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert [a.tolist() for a in stepwise.slot_load] == [b.tolist() for b in at_once.slot_load]


def test_dispatch_and_int8_activations_can_be_switched(fresh: Fresh, facts: ModelFacts) -> None:
    model = apply_plan(fresh(), make_plan(facts, precisions=("int8",), extra=4))
    batch = token_batch(64, (9, 9, 9))
    score = {}
    for dispatch in ("even", "least_loaded"):
        set_dispatch(model, dispatch)
        with SlotMeter(model) as meter:
            run(model, batch)
        score[dispatch] = meter.lis.mean()
    assert score["least_loaded"] <= score["even"]
    set_int8_activations(model, True)
    assert torch.isfinite(run(model, batch)).all()
    with pytest.raises(EquipoiseError, match="unknown dispatch 'best'"):
        set_dispatch(model, "best")


def test_a_deep_copy_runs_on_its_own(fresh: Fresh, facts: ModelFacts) -> None:
    model = apply_plan(fresh(), make_plan(facts, precisions=("int8", "fp32")))
    batch = token_batch(64)
    before = run(model, batch)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for group in slots_of(model)[0].groups:
            for tensor in group.state_dict().values():
                tensor.zero_()
    torch.testing.assert_close(run(twin, batch), before, rtol=0, atol=0)
    assert not torch.equal(run(model, batch), before)


def test_what_cannot_be_applied_is_refused(fresh: Fresh, facts: ModelFacts) -> None:
    plan = make_plan(facts)
    other = tiny("olmoe")
    with pytest.raises(PlanError, match="profile this model and plan again"):
        apply_plan(other, plan)
    model = apply_plan(fresh(), plan)
    with pytest.raises(PlanError, match="carries a plan already"):
        apply_plan(model, plan)
    dense = fresh()
    dense.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ModelError, match="quantized already"):
        apply_plan(dense, plan)
    nllb = tiny("nllb_moe")
    with pytest.raises(ModelError, match="NllbMoeExperts cannot be balanced"):
        apply_plan(nllb, make_plan(model_facts(nllb, "nllb")))
    with pytest.raises(ModelError, match="apply a plan first"):
        SlotMeter(fresh())
    with pytest.raises(ModelError, match="apply a plan first"):
        set_dispatch(fresh(), "even")
    with pytest.raises(RecordingError, match="saw no tokens"), SlotMeter(model):
        pass


def test_a_refused_plan_leaves_the_model_as_it_was(fresh: Fresh, facts: ModelFacts) -> None:
    model = fresh()
    batch = token_batch(64)
    before = run(model, batch)
    with pytest.raises(EquipoiseError, match="unknown quantization method 'best'"):
        apply_plan(model, make_plan(facts, precisions=("int8",)), method="best")
    torch.testing.assert_close(run(model, batch), before, rtol=0, atol=0)
    assert expert_bytes(model) == facts.layers[0].num_experts * sum(f.expert_bytes(precision("fp32")) for f in facts.layers)
