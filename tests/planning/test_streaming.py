from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.artifacts import Plan
from equipoise.errors import EquipoiseError, PlanError
from equipoise.planning.methods import make_plan
from equipoise.planning.streaming.adaptive import Adaptive, adaptive
from equipoise.planning.streaming.decision import Costs, Entry, Ledger, fullest, mean_lis, moved, with_layers
from equipoise.planning.streaming.drift import Window
from equipoise.planning.streaming.policies import POLICIES, make_policy
from equipoise.planning.streaming.trial import Trial
from planning.cases import make_profile, skewed

FREE = Costs(1e-6, 0.0, 0.0)


@pytest.fixture(scope="module")
def published() -> Plan:
    windows = skewed(3, layers=3, experts=8)
    profile = make_profile(windows, importance={"wanda": windows.sum(0).astype(float)}, error={"int8": 0.01})
    return make_plan(profile, "rq-paper")


def copies(plan: Plan) -> list[int]:
    return [next(e for e in range(8) if layer.experts.count(e) == 2) for layer in plan.layers]


def heavy(expert: int, layers: int = 3) -> np.ndarray:
    load = np.full((layers, 8), 10)
    load[:, expert] = 100
    return load


def test_the_published_forms_give_the_copy_to_the_heaviest_of_the_last_step_or_of_all_history(published):
    last, history = make_policy("last_step"), make_policy("all_history")
    plans = {"last": published, "history": published}
    partner = [layer.precisions.index("int8") for layer in published.layers]
    quiet = next(e for e in range(8) if all(published.layers[i].experts[p] != e for i, p in enumerate(partner)))
    others = [e for e in range(8) if e != quiet]
    for load in (heavy(quiet), heavy(quiet), heavy(others[0])):
        for name, policy in (("last", last), ("history", history)):
            made = policy.decide(load, plans[name], FREE)
            plans[name] = made.plan or plans[name]
    assert copies(plans["history"]) == [quiet] * 3
    for layer, plan_layer in enumerate(plans["last"].layers):
        slot = plan_layer.experts.index(others[0])
        beside = [e for e, u in zip(plan_layer.experts, plan_layer.units, strict=True) if u == plan_layer.units[slot]]
        # Where the heaviest is the copy's own neighbour, the next heaviest has it.
        assert copies(plans["last"])[layer] == others[0] or len(beside) == 2
    for plan in plans.values():
        assert [layer.precisions for layer in plan.layers] == [layer.precisions for layer in published.layers]
        assert plan.bytes_by_unit().tolist() == published.bytes_by_unit().tolist()


def test_the_published_forms_need_one_copy_a_layer():
    profile = make_profile(skewed(1), error={"int8": 0.01, "int4-g32": 0.05})
    plan = make_plan(profile, "rq", error_bound=10.0)
    assert max(len(layer.experts) for layer in plan.layers) > 9
    with pytest.raises(PlanError, match="one a layer"):
        make_policy("last_step").decide(profile.load, plan, FREE)


def steps(seed: int, mean_LE: np.ndarray, number: int) -> np.ndarray:
    return np.random.default_rng(seed).poisson(np.broadcast_to(mean_LE, (number, *mean_LE.shape)))


def run(policy, plan, loads, costs):
    made, scores = [], []
    for load in loads:
        scores.append(mean_lis(plan.unit_load(load)))
        decided = policy.decide(load, plan, costs)
        made.append(decided)
        plan = decided.plan or plan
    return plan, made, np.array(scores)


def test_adaptive_follows_a_shift_in_the_step_after_it_keeps_every_byte_and_rests_otherwise(published):
    rng = np.random.default_rng(0)
    first, second = 200 * rng.lognormal(0, 0.8, (2, 3, 8))
    loads = np.concatenate([steps(1, first, 15), steps(2, second, 15)])
    plan, made, scores = run(Adaptive(window=Window(prior_scatter=1.5)), published, loads, Costs(1e-6, 1e-12, 1e-9))
    changes = [step for step, decided in enumerate(made) if decided.slots]
    assert 15 in changes
    assert made[15].changed
    assert not any(made[step].changed for step in range(30) if step != 15)
    assert len(changes) <= 6
    assert scores[17:].mean() < scores[15]
    assert plan.bytes_by_unit().tolist() == published.bytes_by_unit().tolist()
    assert [layer.precisions for layer in plan.layers] == [layer.precisions for layer in published.layers]
    assert Plan.from_json(plan.to_json()) == plan


def test_adaptive_keeps_the_plan_when_moving_costs_more_than_it_saves(published):
    rng = np.random.default_rng(0)
    first, second = 200 * rng.lognormal(0, 0.8, (2, 3, 8))
    loads = np.concatenate([steps(1, first, 10), steps(2, second, 10)])
    dear, made, _ = run(Adaptive(), published, loads, Costs(1e-6, 1.0, 10.0))
    assert dear.layers == published.layers
    assert any("a change costs" in decided.reason for decided in made)
    # Shares move no byte: with a cheap swap they change although slots are dear.
    shares, _, _ = run(Adaptive(), published, loads, Costs(1e-6, 1.0, 1e-9))
    assert moved(published, shares)[0] == 0
    assert shares.layers != published.layers


def test_a_decision_tells_gain_dwell_and_cost():
    windows = skewed(3, layers=3, experts=8)
    profile = make_profile(windows, importance={"wanda": windows.sum(0).astype(float)}, error={"int8": 0.01})
    plan = make_plan(profile, "rq-paper")
    costs = Costs(1e-3, 1e-9, 1e-6)
    _, made, _ = run(Adaptive(), plan, steps(5, windows.mean(0)[:, ::-1].copy(), 3), costs)
    done = next(decided for decided in made if decided.plan is not None)
    assert done.pays == pytest.approx(done.saved * done.dwell - done.cost)
    assert done.pays > 0
    assert done.cost == pytest.approx(done.bytes * costs.per_byte + costs.per_swap)


def test_a_plan_that_did_not_come_into_force_is_proposed_again(published):
    policy = Adaptive(window=Window(prior_scatter=1.5))
    loads = np.concatenate([steps(1, np.full((3, 8), 100.0), 5), steps(2, heavy(2) * 1.0, 3)])
    made = [policy.decide(load, published, Costs(1e-6, 1e-12, 1e-9)) for load in loads]
    assert [decided.plan is not None for decided in made[5:]] == [True, True, True]


COUNTED = Costs(1e-6, 0.0, 2e-4)


def traffic(seed: int, method: str) -> tuple[Plan, Adaptive, np.ndarray, np.ndarray]:
    """A plan for one traffic, the policy with what its profile knows, and twenty steps of that traffic and of another one."""
    rng = np.random.default_rng(seed)
    first, second = 4000 * rng.lognormal(0, 0.8, (2, 2, 8))
    windows = rng.poisson(np.broadcast_to(first, (8, 2, 8)))
    profile = make_profile(
        windows, importance={"wanda": windows.sum(0).astype(float)}, error={"int8": 0.01, "int4-g32": 0.05}
    )  # fmt: skip
    plan = make_plan(profile, method, **({"error_bound": 1.0} if method == "rq" else {}))
    still, other = (rng.poisson(np.broadcast_to(mean, (20, 2, 8))) for mean in (first, second))
    return plan, adaptive(profile, plan, error_bound=float("inf")), still, other


def settled(policy: Adaptive, plan: Plan, loads: np.ndarray) -> list[Entry]:
    ledger = Ledger()
    for number, load in enumerate(loads, start=1):
        ledger.serve(load, COUNTED.per_selection)
        made = policy.decide(load, plan, COUNTED)
        if made.plan is not None:
            ledger.change(Entry(number, made.pays, made.cost, made.slots, made.bytes), plan, made.plan)
            plan = made.plan
    return ledger.entries


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.sampled_from(["rq", "rq-paper"]))
def test_on_stationary_loads_slots_stay_and_a_planted_shift_is_answered_by_one_change_that_pays(seed, method):
    plan, policy, still, _ = traffic(seed, method)
    entries = settled(policy, plan, still)
    assert not any(entry.slots for entry in entries)
    plan, policy, still, other = traffic(seed, method)
    entries += settled(policy, plan, np.concatenate([still, other]))
    answer = [entry for entry in entries if entry.step in (21, 22)]
    assert len(answer) == 1
    assert answer[0].paid > 0
    assert all(entry.paid > 0 for entry in entries if entry.slots)
    # A refinement of shares may have come too near the end of the stream, and then loses no more than the swap.
    assert all(entry.paid > -COUNTED.per_swap for entry in entries)


def test_an_alternative_is_judged_by_steps_that_it_was_not_chosen_on_and_by_its_standard_error(published):
    other = make_policy("last_step").decide(heavy(6), published, FREE).plan
    trial = Trial(other, (heavy(6) * 1.0, np.full(3, 170.0)), chosen_on=2)
    assert trial.regret == 0
    assert not trial.pays(published, FREE, 2.0)
    loads = steps(1, heavy(6) * 1.0, 4)
    for load in loads[:2]:
        trial.serve(load, published, 1.0)
    assert trial.over
    less = [fullest(published, load) - fullest(other, load) for load in loads[:2]]
    assert trial.regret == pytest.approx(sum(less))
    assert trial.error == pytest.approx(np.std(less, ddof=1) * np.sqrt(2))
    sure = (trial.regret - trial.error) * 1e-6
    assert sure > 0
    assert trial.pays(published, Costs(1e-6, 0.0, sure / 2 * 0.99), 2.0)
    assert not trial.pays(published, Costs(1e-6, 0.0, sure / 2 * 1.01), 2.0)


def test_a_single_step_is_trusted_as_far_as_counts_scatter(published):
    other = make_policy("last_step").decide(heavy(6), published, FREE).plan
    sums = fullest(published, heavy(6)) + fullest(other, heavy(6))
    for scatter in (1.0, 25.0):
        trial = Trial(other, (heavy(6) * 1.0, np.full(3, 170.0)), chosen_on=1)
        trial.serve(heavy(6), published, scatter)
        assert trial.error == pytest.approx(np.sqrt(scatter * sums))


@pytest.mark.parametrize("wrong", [{"most_moves": -1}, {"error_bound": -0.1}, {"odds": 0.0}])
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(PlanError, match="given; allowed are"):
        Adaptive(**wrong)


def test_new_slots_do_not_add_to_an_error_beyond_the_bound():
    windows = skewed(7, layers=2, experts=8)
    profile = make_profile(windows, importance={"wanda": windows.sum(0).astype(float)}, error={"int8": 0.5})
    plan = make_plan(profile, "rq-paper")
    loads = steps(5, windows.mean(0)[:, ::-1].copy(), 4)
    free, _, _ = run(adaptive(profile, plan, error_bound=1e9), plan, loads, FREE)
    bound, _, _ = run(adaptive(profile, plan, error_bound=0.0), plan, loads, FREE)

    def error(which: Plan) -> float:
        share = loads.sum(0) / loads.sum((0, 2))[:, None]
        quantized = [
            sum(s * share[i, e] for e, p, s in zip(c.experts, c.precisions, c.shares, strict=True) if p == "int8")
            for i, c in enumerate(which.layers)
        ]
        return sum(quantized)

    assert error(bound) <= error(plan) + 1e-9 < error(free)


def test_the_ledger_counts_against_the_plan_before():
    windows = skewed(3, layers=1, experts=4)
    profile = make_profile(windows, importance={"wanda": windows.sum(0).astype(float)}, error={"int8": 0.01})
    plan = make_plan(profile, "rq-paper")
    other = make_policy("last_step").decide(heavy(3)[:1, :4] * 0 + np.array([[1, 1, 1, 50]]), plan, FREE).plan or plan
    ledger = Ledger()
    ledger.serve(windows[0], 1.0)
    ledger.change(Entry(1, 5.0, 2.0, 1, 10), plan, other)
    ledger.serve(windows[0], 1.0)
    expected = plan.unit_load(windows[0]).max(1).sum() - other.unit_load(windows[0]).max(1).sum()
    assert ledger.entries[0].paid == pytest.approx(expected - 2.0)
    assert ledger.entries[0].steps == 1


def test_policies_are_listed_and_unknown_ones_and_options_refused(published):
    assert POLICIES.names() == ["static", "all_history", "last_step", "adaptive"]
    assert make_policy("static").decide(heavy(0), published, FREE).plan is None
    with pytest.raises(EquipoiseError, match="Did you mean 'adaptive'"):
        make_policy("adaptve")
    with pytest.raises(PlanError, match="does not take"):
        make_policy("last_step", nonsense=1)


def test_layers_that_make_no_plan_are_refused(published):
    broken = published.layers[0].model_copy(update={"experts": (0,) * published.layers[0].num_slots})
    with pytest.raises(PlanError, match="has no slot"):
        with_layers(published, (broken, *published.layers[1:]))
