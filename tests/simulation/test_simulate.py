"""The whole simulation: labels, refusals, findings, and the report's file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dispatch.cases import make_model, make_plan, random_ids
from equipoise.artifacts import Profile, Source
from equipoise.errors import EquipoiseError, PlanError, ProfileError
from equipoise.planning.cost_measured import GroupCost, Roofline
from equipoise.simulation import SimulationReport, Trace, simulate
from equipoise.simulation.simulate import DEFAULT

MODEL = make_model(2, 8, 2)
COPIED = [[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]] * 2


def make_trace(tokens: int = 600, seed: int = 0) -> Trace:
    ids = random_ids(np.random.default_rng(seed), 2, tokens, 2, 8)
    return Trace(f"trace{seed}", ids, np.arange(tokens) // 50)


def make_profile(trace: Trace, sha: str = "") -> Profile:
    counts = np.stack([np.bincount(layer.ravel(), minlength=8) for layer in trace.ids_LTK])
    return Profile(
        model=MODEL,
        source=Source(scenarios=("all",), text_sha256=sha, origin="table"),
        counts=np.stack([counts, 0 * counts])[None],
        gate_mass=counts[None] * 0.5,
        tokens=np.array([trace.tokens]),
        windows=counts[None],
        window_scenario=np.zeros(1, np.int64),
    )


PLANS = {"copied": make_plan(MODEL, COPIED, 4), "turned": make_plan(MODEL, [[7, 0, 6, 1, 5, 2, 4, 3]] * 2, 4)}


def test_parts_say_where_their_figures_come_from():
    trace = make_trace()
    report = simulate(make_profile(trace), PLANS, held_out=make_trace(seed=1), batch=60, rule="vllm")
    assert [(p.origin, p.sample, p.name) for p in report.parts] == [("estimated", "in", "all"), ("replayed", "out", "trace1")]
    assert [r.name for r in report.parts[0].results] == [DEFAULT, "copied", "turned"]
    assert [r.sample for r in report.parts[0].results] == ["out", "in", "in"]
    assert {r.sample for r in report.parts[1].results} == {"out"}
    assert report.parts[1].batches == 10
    assert report.parts[1].tokens == 600
    assert report.parts[0].results[0].rank_hops is None
    assert report.parts[1].results[0].rank_hops is not None
    assert (report.reference, report.ranks, report.rule, report.unit) == (DEFAULT, 4, "vllm", "pairs")


def test_same_seed_same_report_and_the_file_is_the_report(tmp_path: Path):
    report = simulate(make_trace(), PLANS, batch=60, rule="sglang-dynamic", seed=3)
    assert report == simulate(make_trace(), PLANS, batch=60, rule="sglang-dynamic", seed=3)
    report.save(tmp_path / "s.json")
    assert SimulationReport.load_file(tmp_path / "s.json") == report
    (tmp_path / "s.json").write_text('{"schema": 1}')
    with pytest.raises(EquipoiseError, match="not a valid simulation"):
        SimulationReport.load_file(tmp_path / "s.json")


def test_a_contiguous_plan_is_the_reference():
    plans = {**PLANS, "linear": make_plan(MODEL, [list(range(8))] * 2, 4, method="contiguous")}
    report = simulate(make_trace(), plans, batch=60)
    assert report.reference == "linear"
    assert [r.name for r in report.parts[0].results] == list(plans)


def test_the_engines_own_placement_is_that_of_a_contiguous_plan():
    plans = {"linear": make_plan(MODEL, [list(range(8))] * 2, 4)}
    base, linear = simulate(make_trace(), plans, batch=60).parts[0].results
    assert base.step_times == linear.step_times
    assert base.ranks == linear.ranks


def test_findings_name_what_gets_worse():
    """Four hot experts on two ranks: copies on the others level tokens, and activate more replicas in a small batch."""
    rng = np.random.default_rng(0)
    hot = random_ids(rng, 2, 960, 2, 4)
    cold = 4 + random_ids(rng, 2, 960, 2, 4)
    trace = Trace("t", np.where(rng.random((2, 960, 1)) < 0.9, hot, cold), np.arange(960) // 8)
    # Each rank: two own experts, and a copy of a hot one.
    plan = make_plan(MODEL, [[0, 1, 2, 2, 3, 0, 4, 5, 1, 6, 7, 3]] * 2, 4)
    report = simulate(trace, {"copies": plan}, batch=16, phase="decode", cost="activated")
    (finding, disagreement) = report.parts[0].findings
    assert finding.startswith("copies against no plan: better: tokens of the fullest rank -")
    assert "WORSE: activated replicas of the fullest rank +" in finding
    assert "fewest activated replicas under no plan" in disagreement
    base, copies = report.parts[0].results
    assert copies.step.mean > base.step.mean
    one_host = simulate(trace, {"copies": plan}, batch=16, phase="decode", cost="activated", rule="metro").parts[0].results[1]
    assert one_host.step.mean < copies.step.mean


def test_plans_from_another_profile_are_out_of_sample():
    trace = make_trace()
    plans = {"mine": make_plan(MODEL, COPIED, 4, sha="a"), "other": make_plan(MODEL, COPIED, 4, sha="b")}
    results = simulate(make_profile(trace, "a"), plans, batch=60).parts[0].results
    assert [r.sample for r in results] == ["out", "in", "out"]


def test_held_out_traffic_must_be_held_out():
    plans = {"mine": make_plan(MODEL, COPIED, 4, sha="a")}
    with pytest.raises(PlanError, match="made from the very traffic"):
        simulate(None, plans, held_out=make_profile(make_trace(), "a"), batch=60)
    with pytest.raises(PlanError, match="same counts"):
        simulate(make_profile(make_trace(), "a"), plans, held_out=make_trace(), batch=60)


def test_a_cost_table_that_no_roofline_fits_is_warned_of():
    shape = (np.array([1.0, 1000.0]), np.array([1.0, 2.0]))
    for error, warned in ((0.05, False), (0.4, True)):
        cost = GroupCost("t", 8, 2, np.array([4.0]), (shape,), Roofline(0.1, 0.0, 0.1, 0.001, error))
        notes = " ".join(simulate(make_trace(), PLANS, batch=60, cost=cost).notes)
        assert ("40 % off" in notes) == warned


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"plans": {}}, PlanError, "at least one plan"),
        ({"source": None}, PlanError, "needs traffic"),
        ({"plans": {DEFAULT: PLANS["copied"]}}, PlanError, "another name"),
        ({"plans": {**PLANS, "x": make_plan(MODEL, [list(range(8))] * 2, 2)}}, PlanError, "2 ranks on 1 nodes"),
        ({"batch": 0}, PlanError, "batch: 0"),
        ({"batches": -1}, PlanError, "batches: -1"),
        ({"phase": "both"}, PlanError, "prefill and decode"),
        ({"batch": 601}, ProfileError, "fewer than one batch"),
        ({"rule": "vlm"}, EquipoiseError, "Did you mean 'vllm'"),
        ({"rule_options": {"x": 1}}, EquipoiseError, "no option 'x'"),
        ({"cost": "token"}, PlanError, "allowed are tokens, activated"),
        ({"source": Trace("t", np.zeros((2, 70, 1), int), np.zeros(70, int))}, ProfileError, "top-1"),
        ({"source": Trace("t", random_ids(np.random.default_rng(0), 3, 70, 2, 8), np.zeros(70, int))}, ProfileError, "3 MoE"),
    ],
)
def test_refused_with_the_reason(change: dict, error: type[Exception], message: str):
    arguments = {"source": make_trace(), "plans": PLANS, "batch": 60, **change}
    with pytest.raises(error, match=message):
        simulate(arguments.pop("source"), arguments.pop("plans"), **arguments)


def test_more_experts_than_ranks_divide():
    model = make_model(1, 7, 2)
    trace = Trace("t", random_ids(np.random.default_rng(0), 1, 100, 2, 7), np.zeros(100, int))
    plan = make_plan(model, [[0, 1, 2, 3, 4, 5, 6, 0]], 4)
    assert simulate(trace, {"p": plan}, batch=50).parts[0].results[0].slots == 7
