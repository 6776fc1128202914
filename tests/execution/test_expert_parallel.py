"""Experts over processes: the model's own logits, each rank its own slots, copies for one batch, and no rank left hanging."""

from __future__ import annotations

import copy
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise.artifacts import Plan
from equipoise.errors import CheckpointError, EquipoiseError, ModelError, PlanError
from equipoise.execution.apply import apply_plan
from equipoise.execution.expert_parallel.meter import ParallelMeter
from equipoise.execution.expert_parallel.ranks import Ranks, start_ranks
from equipoise.execution.expert_parallel.runtime import parallelize, rank_slots, set_rank_dispatch, unlike_copies
from equipoise.models.layers import model_facts
from execution.helpers import make_plan, token_batch
from execution.on_ranks import error, on_ranks, start
from models.architectures import tiny

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")

ARCHITECTURES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe", "phimoe", "llama4", "switch_transformers", "jetmoe")
RULES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("even", {}),
    ("llep", {"least": 1, "gate": 1.0}),
    ("prefill=quota,decode=metro", {}),
)


def on_four_units(plan: Plan) -> Plan:
    layers = tuple(layer.model_copy(update={"units": tuple(u % 4 for u in layer.units)}) for layer in plan.layers)
    return plan.model_copy(update={"units": 4, "layers": layers, "allows_duplicates": True})


def make_model(name: str) -> tuple[Any, Plan, dict[str, torch.Tensor]]:
    """A model whose logits depend on its experts, a plan on four units with copies, and eight rows."""
    model = tiny(name).eval()
    for key, parameter in model.named_parameters():
        if "expert" in key or "router" in key or "gate" in key:
            torch.nn.init.normal_(parameter, std=0.4)
    batch = token_batch(60, (9, 5, 7, 8, 4, 9, 3, 6))
    if name == "switch_transformers":
        batch["decoder_input_ids"] = batch["input_ids"]
    return model, on_four_units(make_plan(model_facts(model, name), extra=4)), batch


def own_rows(ranks: Ranks, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    rows = len(batch["input_ids"])
    return {key: value[ranks.rank * rows // ranks.size :][: rows // ranks.size] for key, value in batch.items()}


def run_all(ranks: Ranks, cases: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Logits of each architecture under each rule, of this rank's rows, and of all rows where the batch is shared."""
    out = {}
    for name, (model, plan, batch) in cases.items():
        for shared in (False, True):
            mine = copy.deepcopy(model)
            parallelize(mine, ranks, plan, shared=shared)
            for rule, options in RULES[shared:]:
                set_rank_dispatch(mine, rule, options)
                with torch.no_grad():
                    out[f"{name} {rule} {shared}"] = mine(**(batch if shared else own_rows(ranks, batch))).logits
    return out


@pytest.mark.parametrize(("size", "architectures"), [(1, 5), (2, 9), (4, 5)])
def test_logits_are_the_models_own_on_any_number_of_ranks(size: int, architectures: int, tmp_path: Path):
    cases = {name: make_model(name) for name in ARCHITECTURES[:architectures]}
    found = on_ranks(size, tmp_path, run_all, cases)
    for name, (model, _, batch) in cases.items():
        with torch.no_grad():
            expected = model(**batch).logits
            experts = [p for key, p in model.named_parameters() if "expert" in key and p.dim() > 1]
            for parameter in experts:
                parameter[0].zero_() if parameter.dim() > 2 else parameter.zero_()
            without = model(**batch).logits
        real = batch["attention_mask"].bool()
        scale = float((expected - without)[real].abs().max())  # what experts matter
        assert scale > 1e-3, name
        for rule, _ in RULES:
            own = torch.cat([one[f"{name} {rule} False"] for one in found])
            assert float((own - expected)[real].abs().max()) < 1e-3 * scale, f"{name} {rule}"
            for one in found if rule != "even" else ():
                assert float((one[f"{name} {rule} True"] - expected)[real].abs().max()) < 1e-3 * scale, f"{name} {rule} shared"


def run_balanced(
    ranks: Ranks, model: Any, batch: dict[str, torch.Tensor], plan: Plan | None, plan_is_mixed: bool
) -> dict[str, torch.Tensor]:
    parallelize(model, ranks, plan, dispatch="even", int8_activations=False)
    out = {}
    rules = ["even"] if plan_is_mixed else ["even", "llep", "metro"]
    for rule in rules:
        set_rank_dispatch(model, rule, {"least": 1, "gate": 1.0} if rule == "llep" else {})
        with torch.no_grad(), ParallelMeter(model) as meter:
            out[rule] = model(**own_rows(ranks, batch)).logits
        out[f"{rule} sent"] = torch.tensor(meter.report().values["received_bytes"].sum())
    return out


@pytest.mark.parametrize("alike", [True, False])
def test_quantized_slots_travel_and_run_as_they_are_stored(alike: bool, tmp_path: Path):
    model, plan, batch = make_model("qwen3_moe")
    extra = 0 if alike else 4  # without copies there is something to send
    plan = on_four_units(make_plan(plan.model, extra=extra, precisions=["int8", "int4-g16", plan.model.dtype]))
    if alike:
        layers = []
        for layer in plan.layers:
            of = dict(zip(layer.experts, layer.precisions, strict=True))
            layers.append(layer.model_copy(update={"precisions": tuple(of[e] for e in layer.experts)}))
        plan = plan.model_copy(update={"layers": tuple(layers)})
    balanced = apply_plan(copy.deepcopy(model), plan, int8_activations=False).eval()
    with torch.no_grad():
        expected, full = balanced(**batch).logits, model(**batch).logits
    real = batch["attention_mask"].bool()
    assert float((expected - full)[real].abs().max()) > 1e-2  # rounding shows
    sliced = on_ranks(2, tmp_path / "sliced", run_balanced, balanced, batch, None, not alike)
    rounded = on_ranks(2, tmp_path / "rounded", run_balanced, model, batch, plan, not alike)
    for found in (sliced, rounded):
        for rule in ("even", "llep", "metro") if alike else ("even",):
            logits = torch.cat([one[rule] for one in found])
            assert float((logits - expected)[real].abs().max()) < 1e-5, rule
    if alike:
        assert float(sliced[0]["llep sent"]) > 0


def held_bytes(ranks: Ranks, model: Any, plan: Plan) -> dict[str, torch.Tensor]:
    parallelize(model, ranks, plan)
    names = [name for name, _ in model.named_parameters() if "experts.gate_up_proj" in name]
    assert not names, "the original weights are freed"
    return {"bytes": torch.tensor(sum(group.nbytes for slots in rank_slots(model) for group in slots.groups))}


def test_each_rank_holds_its_own_slots_alone(tmp_path: Path):
    model, plan, _ = make_model("mixtral")
    found = [int(one["bytes"]) for one in on_ranks(4, tmp_path, held_bytes, model, plan)]
    assert found == plan.bytes_by_unit().tolist()
    assert sum(found) == plan.bytes_by_unit().sum()


def run_skewed(ranks: Ranks, model: Any, plan: Plan, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rows and bytes of LLEP: on its own load, and with the router made level."""
    parallelize(model, ranks, plan, dispatch="llep", options={"least": 4, "gate": 1.0})
    out = {}
    for name in ("skewed", "level"):
        with torch.no_grad(), ParallelMeter(model) as meter:
            if name == "level":  # rank r's tokens go to the two experts in turn
                for slots in rank_slots(model):
                    hidden, k = torch.randn(12, 32), 2
                    ids = (torch.arange(24) % slots.num_experts).view(12, k)
                    slots.batches = lambda stack, rows: LevelBatch()
                    slots(hidden, ids, torch.ones(12, k) / k, slots.activate)
            else:
                model(**own_rows(ranks, batch))
        report = meter.report().values
        out |= {f"{name} rows": torch.tensor(report["rows"]), f"{name} bytes": torch.tensor(report["received_bytes"])}
    return out


class LevelBatch:
    decode = False
    real_T = torch.ones(12, dtype=torch.bool)
    position_T = torch.arange(12)


def test_llep_keeps_its_bound_and_moves_nothing_when_load_is_level(tmp_path: Path):
    model, plan, batch = make_model("mixtral")
    experts = plan.model.layers[0].num_experts
    layer = plan.layers[0].model_copy(
        update={
            "experts": tuple(range(experts)),
            "units": tuple(e * 2 // experts for e in range(experts)),
            "shares": (1.0,) * experts,
            "precisions": (plan.model.dtype,) * experts,
        }
    )
    contiguous = plan.model_copy(update={"units": 2, "layers": (layer,) * len(plan.layers)})
    found = on_ranks(2, tmp_path, run_skewed, model, contiguous, batch)[0]
    rows = found["skewed rows"]  # [L, C, R]
    capacity = -(-rows.sum(2) // 2)
    assert (rows.amax(2) <= capacity + 4).all()
    assert found["skewed bytes"].sum() > 0
    assert found["level bytes"].sum() == 0
    assert (found["level rows"] == 24).all()


class Step(LevelBatch):
    """Tokens of a rank that decodes, or not."""

    def __init__(self, tokens: int, decode: bool) -> None:
        self.real_T, self.position_T, self.decode = torch.ones(tokens, dtype=torch.bool), torch.arange(tokens), decode


def run_odd_steps(ranks: Ranks, model: Any, plan: Plan) -> dict[str, torch.Tensor]:
    """A step in which one rank decodes and the other does not, and steps in which one rank has no token."""
    parallelize(model, ranks, plan, dispatch="prefill=llep,decode=metro", options={"least": 1, "gate": 1.0})
    slots, out = rank_slots(model)[0], {}
    generator = torch.Generator().manual_seed(ranks.rank)
    for name, tokens, decode in (("differ", 6, ranks.rank == 0), ("agree", 6, True), ("empty", 6 * ranks.rank, False)):
        hidden = torch.randn(tokens, 32, generator=generator)
        ids = torch.randint(0, slots.num_experts, (tokens, 1), generator=generator)
        step = Step(tokens, decode)
        slots.batches = lambda stack, rows, step=step: step
        with torch.no_grad(), ParallelMeter(model) as meter:
            out[f"{name} out"] = slots(hidden, ids, torch.ones(tokens, 1), slots.activate)
            for other in rank_slots(model)[1:]:
                other.batches = slots.batches
                other(hidden, ids, torch.ones(tokens, 1), other.activate)
        out[f"{name} decode"] = torch.tensor(meter.report().values["decode"])
        out |= {f"{name} hidden": hidden, f"{name} ids": ids}
    return out


def test_ranks_agree_on_a_phase_and_may_have_no_token(tmp_path: Path):
    model, plan, _ = make_model("mixtral")
    found = on_ranks(2, tmp_path, run_odd_steps, model, plan)
    for one in found:
        assert not one["differ decode"].any()
        assert one["agree decode"].all()
        assert not one["empty decode"].any()
    assert found[0]["empty out"].shape == (0, 32)
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        for name in ("differ", "agree", "empty"):
            for one in found:
                ids = one[f"{name} ids"]
                expected = experts(one[f"{name} hidden"], ids, torch.ones(len(ids), 1)) if len(ids) else one[f"{name} out"]
                assert torch.allclose(one[f"{name} out"], expected, atol=1e-5), name


SIX = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def run_phases(ranks: Ranks, model: Any, plan: Plan, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tokens that greedy generation adds on each rank, and what its steps activated under even and under METRO."""
    parallelize(model, ranks, plan)
    out = {}
    for rule in ("even", "prefill=even,decode=metro"):
        set_rank_dispatch(model, rule)
        with torch.no_grad(), ParallelMeter(model) as meter:
            out[rule] = model.generate(**own_rows(ranks, batch), **SIX, synced_gpus=ranks.size > 1)
        report = meter.report()
        assert report.select(decode=False).calls == 1
        out[f"{rule} activated"] = torch.tensor(report.select(decode=True).values["activated"].sum(2).mean())
    return out


def test_decode_may_follow_another_rule_than_prefill(tmp_path: Path):
    model, plan, _ = make_model("qwen3_moe")
    batch = token_batch(60, (9, 5, 7, 8, 4, 9, 3, 6), left=True)
    each = tuple(range(plan.model.layers[0].num_experts))
    layer = plan.layers[0].model_copy(  # every expert on both ranks
        update={
            "experts": each * 2,
            "units": (0,) * len(each) + (1,) * len(each),
            "shares": (0.5,) * 2 * len(each),
            "precisions": (plan.model.dtype,) * 2 * len(each),
        }
    )
    plan = plan.model_copy(update={"units": 2, "layers": (layer,) * len(plan.layers)})
    found = on_ranks(2, tmp_path, run_phases, model, plan, batch)
    with torch.no_grad():
        expected = model.generate(**batch, **SIX)
    for rule in ("even", "prefill=even,decode=metro"):
        assert torch.equal(torch.cat([one[rule] for one in found]), expected)
    assert found[0]["prefill=even,decode=metro activated"] < found[0]["even activated"]


def run_for_ever(ranks: Ranks, model: Any, plan: Plan, batch: dict[str, torch.Tensor], directory: Path) -> None:
    parallelize(model, ranks, plan, dispatch="llep", options={"least": 1, "gate": 1.0})
    for step in range(1_000_000):
        with torch.no_grad():
            model(**own_rows(ranks, batch))
        if step == 2:
            (directory / f"running{ranks.rank}").touch()


@pytest.mark.parametrize(("how", "within_s"), [(signal.SIGKILL, 5.0), (signal.SIGSTOP, 8.0)])
def test_a_rank_that_dies_or_hangs_ends_the_others(how: signal.Signals, within_s: float, tmp_path: Path):
    model, plan, batch = make_model("mixtral")
    timeout_s = 3.0
    processes = start(4, tmp_path, run_for_ever, model, plan, batch, tmp_path, timeout_s=timeout_s)
    try:
        end = time.monotonic() + 60
        while len(list(tmp_path.glob("running*"))) < 4:
            assert time.monotonic() < end
            assert all(process.is_alive() for process in processes), [error(tmp_path, r) for r in range(4)]
            time.sleep(0.05)
        os.kill(processes[2].pid, how)
        begun = time.monotonic()
        for rank in (0, 1, 3):
            processes[rank].join(60)
        took = time.monotonic() - begun
        assert [processes[rank].exitcode for rank in (0, 1, 3)] == [1, 1, 1]
        assert took < within_s + timeout_s  # the machine may be busy
        for rank in (0, 1, 3):
            said = error(tmp_path, rank)
            assert said.startswith(f"ParallelError: rank {rank} of 4 lost the others while exchanging"), said
            assert "has not answered for 3 s" in said
    finally:
        for process in processes:
            process.kill()


def test_what_cannot_be_is_refused(tmp_path: Path):
    model, plan, _ = make_model("mixtral")
    alone = Ranks()
    with pytest.raises(ModelError, match="not divided among ranks"):
        set_rank_dispatch(model, "even")
    with pytest.raises(PlanError, match="needs a plan"):
        parallelize(model, alone)
    with pytest.raises(EquipoiseError, match=r"unknown dispatch 'lep'.*Did you mean 'llep'"):
        parallelize(model, alone, plan, dispatch="lep")
    with pytest.raises(EquipoiseError, match="has no option 'least'; it has: none"):
        parallelize(model, alone, plan, dispatch="even", options={"least": 1})
    with pytest.raises(EquipoiseError, match="name a rule, or both"):
        parallelize(model, alone, plan, dispatch="prefill=even")
    with pytest.raises(EquipoiseError, match="gate_aware ranks an expert's tokens"):
        parallelize(model, alone, plan, dispatch="gate_aware")
    unlike = on_four_units(make_plan(plan.model, extra=6, precisions=["int8", plan.model.dtype]))
    assert unlike_copies(unlike)
    with pytest.raises(PlanError, match=r"copies in \w+ and \w+, which are not interchangeable"):
        parallelize(model, alone, unlike, dispatch="metro")
    parallelize(model, alone, unlike, dispatch="metro", mixed="label")
    with pytest.raises(ModelError, match="divided among ranks already"):
        parallelize(model, alone, plan)
    with pytest.raises(CheckpointError, match="save it before it is divided"):
        model.save_pretrained(tmp_path)


def test_processes_start_only_as_torchrun_starts_them(monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with start_ranks() as ranks:
        assert (ranks.rank, ranks.size) == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EquipoiseError, match="MASTER_PORT not set; start the processes by torchrun"):
        start_ranks()
