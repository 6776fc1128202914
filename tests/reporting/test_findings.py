"""Findings and the next command follow from the values, never from what a report usually says."""

from __future__ import annotations

import dataclasses
import shlex

import numpy as np
import pytest

from equipoise.artifacts.evaluation import Interval
from equipoise.errors import EquipoiseError
from equipoise.metrics import lis
from equipoise.reporting.evidence import Evidence, as_it_is, heaviest_slot, mean, raw_lis
from equipoise.reporting.findings import CANNOT_RELY, candidates, findings
from equipoise.reporting.next_step import next_step
from reporting import report_cases as cases


def topics(evidence: Evidence) -> list[str]:
    return [finding.topic for finding in findings(evidence)]


def text_of(evidence: Evidence, topic: str) -> str:
    return next(f.text for f in candidates(evidence) if f.topic == topic)


def test_load_as_it_is_is_that_of_experts_in_order():
    load = np.array([[1, 2, 3, 4, 0], [5, 6, 7, 8, 9.0]])
    assert as_it_is(load, [4, 5], 2).tolist() == [[3, 7], [5 + 6 + 7, 8 + 9]]
    assert as_it_is(load, [4, 5], 5)[1].tolist() == load[1].tolist()
    assert as_it_is(load[None], [4, 5], 2).shape == (1, 2, 2)


def test_raw_lis_over_as_many_units_as_experts_is_lis():
    profile = cases.profile(cases.facts(narrow=cases.WIDE))
    assert raw_lis(profile.load, profile.widths, cases.WIDE) == pytest.approx(lis(profile.load))


def test_heaviest_slot_is_the_largest_share_of_an_expert():
    profile = cases.profile()
    plan = cases.rq_plan(profile)
    busiest = heaviest_slot(plan, profile.load)
    assert busiest[0, 1] == pytest.approx(profile.load[0, 1] / 3)
    assert busiest[0, 3] == profile.load[0, 3]


def test_three_findings_tell_the_problem_the_remedy_and_its_price():
    profile = cases.profile()
    evidence = Evidence(profile, {"rq": cases.rq_plan(profile)}, cases.evaluation())
    assert topics(evidence) == ["quality", "imbalance", "plan"]  # ten points lost on a task come first
    evidence = dataclasses.replace(evidence, evaluation=_without_tasks(cases.evaluation()))
    assert topics(evidence) == ["imbalance", "plan", "quality"]


def _without_tasks(evaluation):
    bare = tuple(contender.model_copy(update={"tasks": ()}) for contender in evaluation.contenders)
    return evaluation.model_copy(update={"contenders": bare})


def test_figures_of_findings_are_those_of_the_values():
    profile = cases.profile()
    plan = cases.rq_plan(profile)
    evidence = Evidence(profile, {"rq": plan}, cases.evaluation())
    before = mean(raw_lis(profile.load, profile.widths, plan.units))
    assert f"{before:.2f} times the mean load" in text_of(evidence, "imbalance")
    told = text_of(evidence, "plan")
    assert f"LIS {before:.3f} to {mean(plan.lis(profile.load)):.3f}" in told
    assert "Measured on held-out text: 4.000 to 1.100" in told
    assert "+0.10 % (95 % interval -0.20 to +0.40)" in text_of(evidence, "quality")
    assert "not told apart" in text_of(evidence, "quality")
    assert "hellaswag (-10.0 points)" in text_of(evidence, "quality")


def test_an_even_load_is_no_longer_called_uneven():
    even = cases.profile(cases.facts(narrow=cases.WIDE))
    even = dataclasses.replace(even, counts=np.full_like(even.counts, 5000))
    uneven = cases.profile()
    weight = {
        name: next(f.weight for f in candidates(Evidence(p)) if f.topic == "imbalance")
        for name, p in (("even", even), ("uneven", uneven))
    }
    assert weight["even"] < weight["uneven"]
    assert next_step(Evidence(even)).command.startswith("equipoise profile")


def test_a_broken_promise_comes_first():
    evidence = Evidence(cases.profile(), {}, cases.evaluation(kept=False))
    assert topics(evidence)[0] == "promise"


def test_harm_beyond_chance_outweighs_balance():
    profile = cases.profile()
    harmful = cases.evaluation(change=(0.05, 0.04, 0.06))
    evidence = Evidence(profile, {"rq": cases.rq_plan(profile)}, _without_tasks(harmful), files={"profile": "a b.safetensors"})
    assert topics(evidence)[0] == "quality"
    assert "worse by more than chance" in text_of(evidence, "quality")
    words = shlex.split(next_step(evidence).command)
    assert words[1:3] == ["plan", "a b.safetensors"]
    assert float(words[words.index("--error-bound") + 1]) == pytest.approx(0.01)


def test_a_plan_that_makes_it_worse_is_told_first():
    profile = cases.profile(hot=0)
    plan = cases.rank_plan(profile, ranks=2)
    lopsided = plan.layers[0].model_copy(update={"units": (1, *(0 for _ in range(cases.WIDE - 1)), 1)})
    worse = plan.model_copy(update={"layers": (lopsided, *plan.layers[1:])})
    evidence = Evidence(profile, {"p": worse})
    assert mean(worse.lis(profile.load)) > mean(raw_lis(profile.load, profile.widths, 2))
    assert topics(evidence)[0] == "worse"
    assert all(f.topic != "plan" for f in candidates(evidence))


def test_a_plan_that_does_not_fit_is_said_and_not_chosen():
    profile = cases.profile()
    fits, bursts = cases.rq_plan(profile), cases.rq_plan(profile, overrun=9_000)
    evidence = Evidence(profile, {"bursts": bursts, "fits": fits})
    assert evidence.best_plan() == ("fits", fits)
    only = Evidence(profile, {"bursts": bursts})
    found = next(f for f in candidates(only) if f.topic == "memory")
    assert "does not fit" in found.text
    assert found.weight > CANNOT_RELY


def test_a_short_text_is_called_short():
    profile = cases.profile(hot=0)
    counts = np.random.default_rng(0).poisson(3, profile.counts.shape)
    counts[:, :, 1, cases.NARROW :] = 0
    short = dataclasses.replace(profile, counts=counts)
    assert topics(Evidence(short))[0] == "chance"
    assert "chance" not in topics(Evidence(profile))


def test_experts_without_tokens_are_counted_where_they_exist():
    profile = cases.profile()
    counts = profile.counts.copy()
    counts[:, :, 1, 4:] = 0
    found = text_of(Evidence(dataclasses.replace(profile, counts=counts)), "unused")
    assert f"2 of {cases.WIDE + cases.NARROW} experts" in found
    assert "layer 4" in found


def test_scenarios_that_differ_only_by_chance_are_not_called_different():
    profile = cases.profile()
    assert "plan from all traffic" in text_of(Evidence(profile), "drift")
    counts = np.repeat(profile.counts[:1], 2, 0)
    same = dataclasses.replace(profile, counts=counts)
    assert "one plan serves both" in text_of(Evidence(same), "drift")
    assert all(f.topic != "drift" for f in candidates(Evidence(cases.profile(scenarios=1))))


def test_a_plan_that_fails_on_one_kind_of_traffic_is_told():
    profile = cases.profile(scenarios=2)
    plan = cases.rq_plan(profile)
    assert any(f.topic == "traffic" and "by itself only" in f.text for f in candidates(Evidence(profile, {"rq": plan})))


def test_a_layer_that_served_nothing_spoils_no_finding():
    profile = cases.profile()
    counts = profile.counts.copy()
    counts[:, :, 1] = 0
    windows = profile.windows.copy()
    windows[:, 1] = 0
    idle = dataclasses.replace(profile, counts=counts, windows=windows)
    evidence = Evidence(idle, {"rq": cases.rq_plan(profile)})
    assert all("nan" not in f.text for f in candidates(evidence))
    nothing = dataclasses.replace(profile, counts=counts * 0, windows=windows * 0)
    assert findings(Evidence(nothing)) == []


def _harmless():
    return cases.evaluation(difference=(-0.01, -0.03, 0.01))


@pytest.mark.parametrize(
    ("evidence", "command"),
    [
        (lambda p: Evidence(p), "plan PROFILE --out rq.plan.json"),
        (lambda p: Evidence(plans={"rq": cases.rq_plan(p)}), "equipoise profile"),
        (lambda p: Evidence(evaluation=cases.evaluation()), "equipoise profile"),
        (
            lambda p: Evidence(p, {"rq": cases.rq_plan(p)}, files={"rq": "x.json"}),
            "x.json --method agq --text FILE --out rq-model && equipoise eval",
        ),
        (lambda p: Evidence(p, {"r": cases.rank_plan(p)}, files={"r": "r.json"}), "simulate --plan r=r.json --profile PROFILE"),
        (lambda p: Evidence(p, {"rq": cases.rq_plan(p)}, cases.evaluation()), "plan PROFILE --error-bound"),
        (lambda p: Evidence(p, {"rq": cases.rq_plan(p)}, _harmless()), "frontier PROFILE --json > frontier.json"),
        (lambda p: Evidence(p, {"rq": cases.rq_plan(p)}, _harmless(), cases.frontier()), "apply "),
        (
            lambda p: Evidence(p, {"rq": cases.rq_plan(p)}, _without_tasks(cases.evaluation()), cases.frontier()),
            "rq-model --task hellaswag",
        ),
    ],
)
def test_the_next_command_follows_from_what_is_there(evidence, command):
    step = next_step(evidence(cases.profile()))
    assert command in step.command
    assert step.why


def test_the_published_plan_is_carried_out_as_published():
    profile = cases.profile()
    plan = cases.rq_plan(profile).model_copy(update={"method": "rq-paper"})
    assert "apply" in (command := next_step(Evidence(plans={"p": plan}, profile=profile)).command)
    assert "--method" not in command


def test_a_model_that_is_there_is_used_and_not_written_again():
    profile = cases.profile()
    plans = {"rq": cases.rq_plan(profile)}
    judged = cases.evaluation(difference=(-0.01, -0.03, 0.01))
    name = judged.contenders[0].name
    models = {name: "out/model"}
    on_text = next_step(Evidence(profile, plans, _without_tasks(judged), cases.frontier(), models=models))
    assert on_text.command.startswith("equipoise evaluate ")
    assert " out/model --task" in on_text.command
    done = next_step(Evidence(profile, plans, judged, cases.frontier(), models=models))
    assert done.command == "equipoise inspect out/model/equipoise.plan.json"


def test_records_without_sizes_lead_to_a_placement():
    assert "--ranks" in next_step(Evidence(cases.profile(cases.facts(sized=False)))).command


def test_values_of_different_models_are_refused():
    profile = cases.profile()
    plan = cases.rq_plan(profile)
    other = plan.model_copy(update={"model": plan.model.model_copy(update={"fingerprint": "e" * 64})})
    with pytest.raises(EquipoiseError, match="made for"):
        Evidence(profile, {"other": other})
    with pytest.raises(EquipoiseError, match="made for"):
        Evidence(plans={"rq": plan, "other": other})
    with pytest.raises(EquipoiseError, match="values of one model"):
        Evidence(profile, evaluation=cases.evaluation().model_copy(update={"base_fingerprint": "e" * 64}))
    with pytest.raises(EquipoiseError, match="nothing to report"):
        Evidence()


def test_plans_for_different_units_are_compared_by_what_they_leave_of_the_imbalance():
    profile = cases.profile()
    rq, ranks = cases.rq_plan(profile), cases.rank_plan(profile)
    evidence = Evidence(profile, {"ranks": ranks, "rq": rq})
    left = {
        name: (mean(p.lis(profile.load)) - 1) / (mean(raw_lis(profile.load, profile.widths, p.units)) - 1)
        for name, p in evidence.plans.items()
    }
    best = evidence.best_plan()
    assert best is not None
    assert left[best[0]] == min(left.values())
    assert "units" in text_of(evidence, "plan")


def test_intervals_decide_what_is_said_of_quality():
    def said(low: float, high: float) -> str:
        change = Interval(value=(low + high) / 2, low=low, high=high)
        return text_of(Evidence(evaluation=cases.evaluation(change=(change.value, low, high))), "quality")

    assert "worse by more than chance" in said(0.001, 0.002)
    assert "better by more than chance" in said(-0.002, -0.001)
    assert "not told apart from no change" in said(-0.001, 0.002)


@pytest.mark.parametrize("name", ["rq:least_loaded", "rq-least_loaded", "out/rq-least_loaded-model", "rq-least_loaded-model"])
def test_an_evaluated_model_finds_its_plan_by_the_names_that_the_commands_give(name):
    profile = cases.profile()
    plans = {"rq": cases.rq_plan(profile), "rq-least_loaded": cases.rq_plan(profile)}
    evidence = Evidence(profile, plans)
    assert evidence.plan_of(name, "rq") is plans["rq-least_loaded"]
    assert evidence.plan_of("other", "rq") is None
    assert Evidence(profile, {"mine": plans["rq"]}).plan_of("other", "rq") is plans["rq"]


def test_a_plan_beside_the_best_that_is_worse_than_none_is_called_so():
    profile = cases.profile()
    one = cases.rank_plan(profile, ranks=2)
    layers = []
    for layer in one.layers:  # all on one rank but a hundredth of expert 1
        shares = [1.0] * (layer.num_slots - 1)
        shares[1] = 0.99
        layers.append(layer.model_copy(update={"units": (*(0 for _ in shares), 1), "shares": (*shares, 0.01)}))
    bad = one.model_copy(update={"layers": tuple(layers)})
    told = text_of(Evidence(profile, {"good": cases.rq_plan(profile), "bad": bad}), "plan")
    assert "bad" in told
    assert "less even than as it is" in told
