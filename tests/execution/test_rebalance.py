"""A model whose slots change while it runs: exactness, failures, memory, concurrency."""

from __future__ import annotations

import copy
import gc
import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import equipoise.execution.rebalance.rebalancer as rebalance_module
from equipoise.artifacts import ModelFacts, Plan
from equipoise.errors import EquipoiseError, ModelError, PlanError
from equipoise.execution import slot_group
from equipoise.execution.apply import apply_plan, expert_bytes
from equipoise.execution.balanced_config import plan_of
from equipoise.execution.checkpoint import load, save_balanced
from equipoise.execution.kernels_int8 import has_int8_kernel
from equipoise.execution.kernels_nibbles import has_nibble_kernel
from equipoise.execution.rebalance import swap as rebalance_swap
from equipoise.execution.rebalance.gate import Gate, SwapPostponedError
from equipoise.execution.rebalance.rebalancer import Rebalancer, summary
from equipoise.execution.rebalance.store import ExpertStore, apply_from_store, library_plan
from equipoise.execution.slots import slots_of
from equipoise.models.layers import model_facts
from equipoise.models.recorder import record
from equipoise.planning.streaming.decision import Costs, Decision
from execution.helpers import make_plan, token_batch
from models.architectures import tiny

COSTS = Costs(1e-6, 1e-9, 1e-6, measured=False)
AT_ONCE = {"costs": COSTS, "staging_bytes": 1 << 30}


class Scripted:
    """A policy that asks for given plans, one a step, and then for no other."""

    def __init__(self, *plans: Plan | None) -> None:
        self.plans = list(plans)

    def decide(self, load_LE, plan, costs):
        target = self.plans.pop(0) if self.plans else None
        return Decision(None if target is None or target.layers == plan.layers else target, "told so")


@pytest.fixture(scope="module")
def store(original: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return ExpertStore.create(original, tmp_path_factory.mktemp("store"), ["int8", "int4"])


@pytest.fixture(scope="module")
def plans(facts: ModelFacts) -> tuple[Plan, Plan]:
    """Two plans of the same slots, with experts dealt otherwise."""
    formats = ["fp32", "int8", "int4-g32"]
    old, new = (make_plan(facts, precisions=formats, extra=4, seed=seed) for seed in (1, 2))
    return old, new


@pytest.fixture
def balanced(fresh: Callable[[], PreTrainedModel]) -> Callable[[Plan], PreTrainedModel]:
    return lambda plan: apply_plan(fresh(), plan)


def logits(model: PreTrainedModel, seed: int = 0) -> torch.Tensor:
    with torch.no_grad():
        return model(**token_batch(64, (9, 5), seed=seed)).logits


def generate(model: PreTrainedModel, seed: int = 0, tokens: int = 16) -> torch.Tensor:
    prompt = token_batch(64, (7,), seed=seed)
    return model.generate(**prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


def test_after_a_swap_the_model_is_what_the_new_plan_makes_of_the_original(balanced, plans, store):
    old, new = plans
    model, wanted = balanced(old), balanced(new)
    with Rebalancer(model, Scripted(new), store, step_tokens=1, **AT_ONCE, background=False) as rebalancer:
        assert torch.equal(logits(model), logits(balanced(old)))
        report = rebalancer.advance()
        assert report is not None
        assert report.outcome == "swapped"
        assert torch.equal(logits(model), logits(wanted))
    for mine, theirs in zip(slots_of(model), slots_of(wanted), strict=True):
        ours, reference = mine.state_dict(), theirs.state_dict()
        assert ours.keys() == reference.keys()
        assert all(torch.equal(ours[name], reference[name]) for name in ours)
    assert plan_of(model) == new


def test_a_swapped_model_saves_and_loads(balanced, plans, store, tmp_path):
    old, new = plans
    model = balanced(old)
    with Rebalancer(model, Scripted(new), store, step_tokens=1, **AT_ONCE, background=False) as rebalancer:
        logits(model)
        rebalancer.advance()
    save_balanced(model, None, tmp_path / "saved")
    # Views of a file are aligned otherwise than memory of one's own, which shows in the last bits.
    torch.testing.assert_close(logits(load(tmp_path / "saved")), logits(model), rtol=0, atol=1e-6)
    assert Plan.load_file(tmp_path / "saved" / "equipoise.plan.json").layers == new.layers


def test_applying_from_the_store_is_applying(fresh, balanced, plans, store):
    model = fresh()
    apply_from_store(model, plans[0], store)
    assert torch.equal(logits(model), logits(balanced(plans[0])))
    with pytest.raises(PlanError, match="carries a plan already"):
        apply_from_store(model, plans[0], store)


def test_every_forward_of_a_request_that_straddles_a_swap_is_of_the_old_or_the_new_plan(balanced, plans, store):
    """Tokens before the swap are the old plan's, those after it the new plan's on the cache that the old one left."""
    old, new = plans
    model, before, after = balanced(old), balanced(old), balanced(new)
    ids, steps, swap_at = token_batch(64, (7,))["input_ids"], 12, 5
    seen, expected = [], []
    with Rebalancer(model, Scripted(new), store, step_tokens=1, **AT_ONCE, background=False) as rebalancer, torch.no_grad():
        for models, found in (((model,) * 2, seen), ((before, after), expected)):
            token, cache = ids, None
            for step in range(steps):
                running = models[step >= swap_at]
                if running is model and step == swap_at:
                    assert rebalancer.advance(close=True).outcome == "swapped"
                out = running(input_ids=token, past_key_values=cache, use_cache=True)
                cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
                found.append(out.logits)
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    assert not torch.equal(seen[-1], generate_logits(before, ids, steps)), "the two plans should differ, or this tests nothing"


def generate_logits(model, ids, steps):
    with torch.no_grad():
        token, cache = ids, None
        for _ in range(steps):
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
            cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    return out.logits


def test_pinned_requests_in_several_threads_give_what_one_plan_gives_while_plans_change_under_them(balanced, plans, store):
    old, new = plans
    model = balanced(old)
    allowed = {seed: [generate(balanced(plan), seed, tokens=10) for plan in plans] for seed in range(3)}
    assert any(not torch.equal(*pair) for pair in allowed.values())
    policy = Scripted(*(new if i % 2 == 0 else old for i in range(1000)))
    outputs: list[tuple[int, torch.Tensor]] = []
    errors: list[BaseException] = []

    def serve(seed: int, rebalancer: Rebalancer) -> None:
        try:
            for _ in range(3):
                with rebalancer.request():
                    outputs.append((seed, generate(model, seed, tokens=10)))
        except BaseException as error:
            errors.append(error)

    with Rebalancer(model, policy, store, step_tokens=8, **AT_ONCE, patience=30) as rebalancer:
        threads = [threading.Thread(target=serve, args=(seed, rebalancer)) for seed in allowed]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert len(outputs) == 9
    assert sum(report.outcome == "swapped" for report in rebalancer.reports) >= 2
    for seed, output in outputs:
        assert any(torch.equal(output, one) for one in allowed[seed])


def test_generate_goes_on_while_the_background_swaps_and_loses_no_token(balanced, plans, store):
    old, new = plans
    model = balanced(old)
    policy = Scripted(*(new if i % 2 == 0 else old for i in range(1000)))
    with Rebalancer(model, policy, store, step_tokens=4, **AT_ONCE) as rebalancer:
        outputs = [generate(model, seed=1, tokens=40) for _ in range(3)]
    assert all(output.shape == (1, 47) for output in outputs)
    assert sum(report.outcome == "swapped" for report in rebalancer.reports) >= 2
    assert {report.outcome for report in rebalancer.reports} <= {"swapped", "kept"}
    # Every token served was counted, but those of a step that was not closed yet.
    assert sum(report.tokens for report in rebalancer.reports) <= 3 * 46
    assert plan_of(model).layers == rebalancer.plan.layers


STEPS_OF_A_SWAP = ["decide", "check", "rounds", "copy_into", "like", "packed", "exchange_first", "exchange_second", "config"]


@pytest.mark.parametrize("where", STEPS_OF_A_SWAP)
def test_a_failure_at_any_step_of_a_swap_leaves_the_plan_in_force_and_loses_no_request(
    where, balanced, plans, store, monkeypatch, caplog
):
    old, new = plans
    model, reference = balanced(old), balanced(old)
    expected = generate(reference)
    before = {name: tensor.clone() for slots in slots_of(model) for name, tensor in slots.state_dict().items()}
    policy = Scripted(new)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(f"forced at {where}")

    if where == "decide":
        monkeypatch.setattr(policy, "decide", fail)
    elif where == "check":
        monkeypatch.setattr(rebalance_module, "check_change", fail)
    elif where == "rounds":
        monkeypatch.setattr(rebalance_module, "rounds", fail)
    elif where == "copy_into":
        monkeypatch.setattr(ExpertStore, "copy_into", fail)
    elif where == "like":
        monkeypatch.setattr("equipoise.execution.slot_group.SlotGroup.like", fail)
    elif where == "packed":
        monkeypatch.setattr(rebalance_swap, "packed", fail)
    elif where.startswith("exchange"):
        which = slots_of(model)[where == "exchange_second"]
        once = iter([fail])
        original = type(which).exchange

        def exchange(self, other):
            if self is which and (failing := next(once, None)):
                failing()
            original(self, other)

        monkeypatch.setattr(type(which), "exchange", exchange)
    else:
        kind = type(model.config.quantization_config)
        old_text = model.config.quantization_config.plan

        def setter(self, value):
            if value != old_text:
                fail()
            self.__dict__["plan"] = value

        monkeypatch.setattr(kind, "plan", property(lambda self: self.__dict__["plan"], setter), raising=False)
    with Rebalancer(model, policy, store, step_tokens=1, **AT_ONCE, background=False) as rebalancer:
        first = generate(model)
        report = rebalancer.advance()
        second = generate(model)
    assert report is not None
    assert report.outcome == "failed"
    assert f"forced at {where}" in report.reason
    assert "plan in force stays" in report.reason
    assert "forced at" in caplog.text
    monkeypatch.undo()
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    assert rebalancer.plan.layers == old.layers == plan_of(model).layers
    after = {name: tensor for slots in slots_of(model) for name, tensor in slots.state_dict().items()}
    assert all(torch.equal(before[name], after[name]) for name in before)
    # And once the cause is gone, the change succeeds.
    with Rebalancer(model, Scripted(new), store, step_tokens=1, **AT_ONCE, background=False) as again:
        generate(model)
        assert again.advance().outcome == "swapped"
    assert torch.equal(generate(model), generate(balanced(new)))


def test_a_failure_in_the_background_does_not_end_the_stream_and_is_backed_off(balanced, plans, store):
    old, _new = plans
    model = balanced(old)
    calls = []

    class Broken:
        def decide(self, load_LE, plan, costs):
            calls.append(1)
            raise ValueError("no plan today")

    with Rebalancer(model, Broken(), store, step_tokens=1, **AT_ONCE) as rebalancer:
        for seed in range(12):
            logits(model, seed)
            while rebalancer.steps <= seed:
                time.sleep(0.001)
    outcomes = [report.outcome for report in rebalancer.reports]
    assert outcomes[0] == "failed"
    assert len(calls) == outcomes.count("failed") < 12
    assert torch.equal(logits(model), logits(balanced(old)))


def test_a_forward_that_fails_is_not_counted_and_lets_the_next_one_in(balanced, plans, store):
    model = balanced(plans[0])
    with Rebalancer(model, Scripted(), store, step_tokens=1, **AT_ONCE, background=False) as rebalancer:
        handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
        with pytest.raises(RuntimeError, match="broken"):
            logits(model)
        handle.remove()
        assert rebalancer.advance() is None
        logits(model)
        assert rebalancer.advance().tokens == 14


def test_loads_are_those_that_the_recorder_sees_and_units_serve_them(balanced, plans, store):
    model = balanced(plans[0])
    seen = []

    class Spy:
        def decide(self, load_LE, plan, costs):
            seen.append(np.array(load_LE))
            assert costs.measured
            assert costs.per_selection > 0
            return Decision(None, "looking")

    with Rebalancer(model, Spy(), store, step_tokens=1, background=False) as rebalancer, record(model) as recorder:
        logits(model)
        model.generate(**token_batch(64, (4, 9), left=True), max_new_tokens=3, min_new_tokens=3)
        report = rebalancer.advance()
    assert np.array_equal(seen[0], recorder.counts.sum((0, 1)))
    assert report.tokens == int(recorder.tokens.sum())
    assert 1 <= report.lis == report.cumulative_lis
    assert "measured" not in report.reason
    json.dumps([r.row() for r in rebalancer.reports], allow_nan=False)


def test_staging_stays_within_its_bound_by_rounds_and_the_old_storage_is_freed(balanced, plans, store):
    old, new = plans
    model = balanced(old)
    size = expert_bytes(model)
    most = max(rebalance_swap.staging_bytes(old, layer, columns) for layer, columns in enumerate(new.layers))
    held = [weakref.ref(group) for slots in slots_of(model) for group in slots.groups]
    with Rebalancer(
        model, Scripted(new), store, step_tokens=1, costs=COSTS, background=False, staging_bytes=most
    ) as rebalancer:
        logits(model)
        report = rebalancer.advance()
    assert report.outcome == "swapped"
    assert 0 < report.staged_bytes <= most < size
    gc.collect()
    kept = {id(group) for slots in slots_of(model) for group in slots.groups}
    assert all(ref() is None or id(ref()) in kept for ref in held)
    assert torch.equal(logits(model), logits(balanced(new)))
    assert expert_bytes(model) == expert_bytes(balanced(new))
    with Rebalancer(model, Scripted(old), store, step_tokens=1, costs=COSTS, background=False, staging_bytes=8) as tight:
        logits(model)
        failed = tight.advance()
    assert failed.outcome == "failed"
    assert "staging_bytes: 8 given" in failed.reason


def test_a_plan_of_more_bytes_than_the_model_has_is_refused(balanced, plans, store):
    tight = plans[0].model_copy(update={"unit_bytes": 1})
    wide = tuple(columns.model_copy(update={"precisions": ("fp32",) * 10}) for columns in tight.layers)
    larger = tight.model_copy(update={"layers": wide, "unit_bytes": 1 << 30})
    model = balanced(tight)
    with Rebalancer(model, Scripted(larger), store, step_tokens=1, **AT_ONCE, background=False) as rebalancer:
        logits(model)
        report = rebalancer.advance()
    assert report.outcome == "failed"
    assert "more than the" in report.reason


def test_a_failure_in_a_later_round_leaves_the_plan_of_the_round_before(balanced, plans, store, monkeypatch):
    old, new = plans
    model = balanced(old)
    second, original = slots_of(model)[1], type(slots_of(model)[1]).exchange

    def exchange(self, other):
        if self is second:
            raise RuntimeError("forced")
        original(self, other)

    monkeypatch.setattr(type(second), "exchange", exchange)
    with Rebalancer(model, Scripted(new), store, step_tokens=1, costs=COSTS, background=False) as rebalancer:
        logits(model)
        report = rebalancer.advance()
    monkeypatch.undo()
    assert report.outcome == "failed"
    assert "round 2" in report.reason
    between = old.model_copy(update={"layers": (new.layers[0], old.layers[1])})
    assert rebalancer.plan.layers == plan_of(model).layers == between.layers
    assert torch.equal(logits(model), logits(balanced(between)))


def test_rounds_are_plans_in_their_own_right(plans):
    old, new = plans
    ways = rebalance_swap.rounds(old, new, 1 << 40)
    assert ways == [new]
    one_by_one = rebalance_swap.rounds(old, new, max(rebalance_swap.staging_bytes(old, i, c) for i, c in enumerate(new.layers)))
    assert len(one_by_one) == 2
    assert one_by_one[-1] == new
    assert one_by_one[0].layers == (new.layers[0], old.layers[1])
    assert rebalance_swap.rounds(old, old, 1) == []


def test_formats_that_the_store_lacks_are_made_ahead_in_the_background(original, balanced, plans, tmp_path):
    lean = ExpertStore.create(original, tmp_path / "lean", ["int8", "int4"], ahead=False)
    assert len(lean.missing()) == 4
    with Rebalancer(balanced(plans[0]), Scripted(), lean, **AT_ONCE):
        until = time.monotonic() + 20
        while lean.missing() and time.monotonic() < until:
            time.sleep(0.01)
    assert lean.missing() == []


def test_a_store_made_ahead_is_that_made_when_needed(original, store, tmp_path):
    lean = ExpertStore.create(original, tmp_path / "lean", ["int8", "int4"], ahead=False)
    for layer, form in lean.missing():
        lean.make(layer, form)
        name = f"layer-{layer:05d}-{form}.safetensors"
        assert (lean.directory / name).read_bytes() == (store.directory / name).read_bytes()


def test_a_store_of_another_model_or_formats_is_refused(fresh, balanced, plans, store, tmp_path):
    other = fresh()
    with torch.no_grad():
        other.model.layers[0].mlp.experts.down_proj += 1
    with pytest.raises(EquipoiseError, match="holds the experts of"):
        ExpertStore.create(other, store.directory, ["int8"])
    with pytest.raises(EquipoiseError, match="holds no store"):
        ExpertStore(tmp_path)
    model = balanced(plans[0])
    small = ExpertStore.create(fresh(), tmp_path / "small", ["int8"])
    with pytest.raises(EquipoiseError, match="int4-g32"):
        Rebalancer(model, Scripted(), small)
    with pytest.raises(ModelError, match="not balanced"):
        Rebalancer(fresh(), Scripted(), store)
    with pytest.raises(ModelError, match="carries a plan already"):
        ExpertStore.create(model, tmp_path / "late", ["int8"])


def test_a_damaged_store_fails_the_swap_and_not_the_model(original, balanced, plans, tmp_path):
    old, new = plans
    broken = ExpertStore.create(original, tmp_path / "broken", ["int8", "int4"])
    for path in broken.directory.glob("layer-*-int*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    model = balanced(old)
    with Rebalancer(model, Scripted(new), broken, step_tokens=1, **AT_ONCE, background=False) as rebalancer:
        logits(model)
        report = rebalancer.advance()
    assert report.outcome == "failed"
    assert "safetensors" in report.reason
    assert torch.equal(logits(model), logits(balanced(old)))


def test_slots_that_stay_are_copied_out_of_a_kernel_s_own_layout_which_stays_in_use(balanced, plans, store, monkeypatch):
    monkeypatch.setattr(slot_group, "LARGE_ELEMENTS", 0)
    old, new = plans
    model, wanted = balanced(old), balanced(new)
    with Rebalancer(model, Scripted(new, old, new), store, step_tokens=1, **AT_ONCE, background=False) as rebalancer:
        for _ in range(3):
            logits(model)
            layouts = [dict(group._packed) for slots in slots_of(model) for group in slots.groups]
            for slots in slots_of(model):
                for group in slots.groups:
                    group.contents()
            assert layouts == [dict(group._packed) for slots in slots_of(model) for group in slots.groups]
            assert rebalancer.advance().outcome == "swapped"
    if not (has_int8_kernel() or has_nibble_kernel()):
        pytest.skip("this CPU has no kernel with a layout of its own")
    assert any(layouts)
    assert torch.equal(logits(model), logits(wanted))


def test_pinned_requests_hold_a_swap_back_and_it_is_postponed(balanced, plans, store):
    old, new = plans
    model = balanced(old)
    with Rebalancer(model, Scripted(new), store, step_tokens=1, **AT_ONCE, patience=0.05) as rebalancer:
        with rebalancer.request():
            first = logits(model)
            until = time.monotonic() + 20
            while not rebalancer.reports and time.monotonic() < until:
                time.sleep(0.01)
            assert torch.equal(logits(model), first), "a pinned request sees one plan"
        assert rebalancer.reports[0].outcome == "postponed"
    assert rebalancer.plan.layers == old.layers


def test_a_change_from_within_a_request_is_refused_instead_of_waiting_for_itself(balanced, plans, store):
    model = balanced(plans[0])
    rebalancer = Rebalancer(model, Scripted(plans[1]), store, step_tokens=1, **AT_ONCE, background=False)
    with rebalancer, rebalancer.request():
        logits(model)
        report = rebalancer.advance()
    assert report.outcome == "failed"
    assert "within a request" in report.reason


def test_the_gate_keeps_forwards_apart_and_lets_the_swap_in():
    gate, inside, most = Gate(), [], []
    stop = threading.Event()

    def forwards() -> None:
        while not stop.is_set():
            gate.enter()
            inside.append(1)
            most.append(len(inside))
            inside.pop()
            gate.leave()

    threads = [threading.Thread(target=forwards) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        with gate.closed(10):
            assert not inside
    stop.set()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    with gate.request():
        other: list[BaseException] = []

        def close() -> None:
            try:
                with gate.closed(0.01):
                    pass
            except SwapPostponedError as error:
                other.append(error)

        waiting = threading.Thread(target=close)
        waiting.start()
        waiting.join()
    assert len(other) == 1


def test_the_summary_adds_up(balanced, plans, store):
    old, new = plans
    model = balanced(old)
    with Rebalancer(model, Scripted(new, old), store, step_tokens=1, **AT_ONCE, background=False) as rebalancer:
        for seed in range(3):
            logits(model, seed)
            rebalancer.advance()
    rows = summary(list(rebalancer.reports), rebalancer.ledger)
    assert rows["steps"] == 3
    assert rows["swapped"] == 2
    assert rows["tokens"] == 42
    assert rows["moved_bytes"] == sum(change["bytes"] for change in rows["changes"]) > 0
    assert rows["mean_instantaneous_lis"] == pytest.approx(np.mean([report.lis for report in rebalancer.reports]))
    with pytest.raises(PlanError, match="background"), Rebalancer(model, Scripted(), store, **AT_ONCE) as busy:
        busy.advance()


def test_hooks_are_gone_after_the_context(balanced, plans, store):
    model = balanced(plans[0])
    before = copy.deepcopy(model)
    with Rebalancer(model, Scripted(), store, **AT_ONCE, background=False):
        pass
    assert [len(m._forward_hooks) for m in model.modules()] == [len(m._forward_hooks) for m in before.modules()]
    assert all(not slots.listeners for slots in slots_of(model))


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    yield
    assert not [t for t in threading.enumerate() if t.name == "equipoise-rebalancer"]


def test_store_files_are_listed_by_layer_and_format(store: ExpertStore, facts: ModelFacts):
    files = {path.name for path in Path(store.directory).glob("*.safetensors")}
    assert files == {f"layer-{i:05d}-{form}.safetensors" for i in range(len(facts.layers)) for form in store.formats}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4", "switch_transformers", "jetmoe", "dbrx", "deepseek_v3"])
def test_every_kind_of_experts_module_changes_its_slots_as_a_plan_would_have_made_them(name, tmp_path):
    original = tiny(name)
    facts = model_facts(original, name)
    old, new = (make_plan(facts, precisions=["fp32", "int8"], extra=3, seed=seed) for seed in (1, 2))
    store = ExpertStore.create(original, tmp_path, ["int8"])
    model, wanted = (apply_plan(copy.deepcopy(original), plan) for plan in (old, new))
    batch = token_batch(64, (9, 5))
    if model.config.is_encoder_decoder:
        batch = {**batch, "decoder_input_ids": batch["input_ids"][:, :4]}
    with Rebalancer(model, Scripted(new), store, step_tokens=1, **AT_ONCE, background=False) as rebalancer, torch.no_grad():
        model(**batch)
        report = rebalancer.advance()
        assert report.outcome == "swapped", report.reason
        assert torch.equal(model(**batch).logits, wanted(**batch).logits)


@pytest.mark.parametrize("where", ["copy_into", "exchange"])
def test_failures_in_the_background_while_generate_goes_on_change_no_token(where, balanced, plans, store, monkeypatch):
    old, new = plans
    model = balanced(old)
    expected = generate(balanced(old), tokens=40)

    def fail(*_: object) -> None:
        raise RuntimeError("forced")

    if where == "copy_into":
        monkeypatch.setattr(ExpertStore, "copy_into", fail)
    else:
        monkeypatch.setattr(type(slots_of(model)[1]), "exchange", fail)
    with Rebalancer(model, Scripted(*[new] * 1000), store, step_tokens=2, **AT_ONCE) as rebalancer:
        assert all(torch.equal(generate(model, tokens=40), expected) for _ in range(2))
        until = time.monotonic() + 20
        while not rebalancer.reports and time.monotonic() < until:
            time.sleep(0.01)
    assert any(report.outcome == "failed" for report in rebalancer.reports)
    assert rebalancer.plan.layers == old.layers


def test_experts_rounded_by_another_method_are_kept_as_a_store(fresh, facts, store, tmp_path):
    library = library_plan(facts, ["int8", "int4"])
    kept = ExpertStore.keep(apply_plan(fresh(), library), tmp_path / "kept", facts, "rtn")
    assert kept.missing() == []
    assert kept.formats == store.formats
    for path in store.directory.glob("*.safetensors"):
        assert (kept.directory / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(ModelError, match="library plan"):
        ExpertStore.keep(apply_plan(fresh(), make_plan(facts)), tmp_path / "other", facts, "rtn")


def test_a_store_of_experts_stored_otherwise_is_refused(original, balanced, plans, tmp_path):
    other = ExpertStore.create(original, tmp_path / "rotated", ["int8", "int4"])
    other.rotated = True
    with pytest.raises(PlanError, match="rounded rotated"):
        Rebalancer(balanced(plans[0]), Scripted(), other)
