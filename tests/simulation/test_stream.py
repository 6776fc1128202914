from __future__ import annotations

import numpy as np
import pytest

from equipoise.errors import PlanError
from equipoise.metrics import cumulative_lis, lis
from equipoise.planning.methods import make_plan
from equipoise.planning.streaming.adaptive import Adaptive
from equipoise.planning.streaming.decision import Costs
from equipoise.planning.streaming.policies import make_policy
from equipoise.simulation.stream import replay_stream, unit_load
from planning.cases import make_profile, skewed

COSTS = Costs(1e-6, 1e-10, 1e-7)


@pytest.fixture(scope="module")
def profile():
    windows = skewed(3, layers=3, experts=8)
    return make_profile(windows, importance={"wanda": windows.sum(0).astype(float)}, error={"int8": 0.01, "int4-g32": 0.05})


def stream(seed: int = 0, parts: int = 3, steps: int = 10) -> np.ndarray:
    """Steps of several traffics, one after the other."""
    rng = np.random.default_rng(seed)
    means = 300 * rng.lognormal(0, 0.9, (parts, 3, 8))
    return np.concatenate([rng.poisson(np.broadcast_to(mean, (steps, 3, 8))) for mean in means])


def test_a_static_plan_gives_the_metrics_of_its_units(profile):
    plan, steps = make_plan(profile, "rq-paper"), stream()
    done = replay_stream(steps, plan, make_policy("static"), COSTS)
    units = np.stack([plan.unit_load(step) for step in steps])
    np.testing.assert_allclose(done.instantaneous, lis(units).mean(1))
    np.testing.assert_allclose(done.cumulative, cumulative_lis(units).mean(1))
    np.testing.assert_allclose(done.paper, [plan.lis_paper(step).mean() for step in steps])
    assert done.saved == 0 == done.net
    assert done.ledger.entries == []


def test_a_decision_takes_effect_in_the_next_step_and_is_accounted_for(profile):
    plan, steps = make_plan(profile, "rq-paper"), stream()
    done = replay_stream(steps, plan, make_policy("last_step"), COSTS)
    running = plan
    for step, made in enumerate(done.decisions):
        assert done.instantaneous[step] == pytest.approx(lis(running.unit_load(steps[step])).mean())
        running = made.plan or running
    assert running.layers == done.plan.layers
    assert len(done.ledger.entries) == sum(made.plan is not None for made in done.decisions)
    # What changes won against the plan before them, one after another, is what the stream won against the plan at the start,
    # but for the gains of a change that outlive it.
    first = done.ledger.entries[0]
    expected = sum(
        plan.unit_load(step).max(1).sum() - done.decisions[first.step - 1].plan.unit_load(step).max(1).sum()
        for step in steps[first.step : first.step + first.steps]
    )
    assert first.saved == pytest.approx(expected * COSTS.per_selection)


@pytest.mark.parametrize("seed", range(4))
def test_over_shifts_the_adaptive_policy_beats_both_published_forms_in_the_same_slots(profile, seed):
    plan, steps = make_plan(profile, "rq-paper"), stream(seed)
    scores = {
        name: replay_stream(steps, plan, Adaptive() if name == "ours" else make_policy(name), COSTS)
        for name in ("ours", "last_step", "all_history")
    }
    assert scores["ours"].instantaneous.mean() <= min(scores[n].instantaneous.mean() for n in ("last_step", "all_history"))
    assert len({int(done.bytes[0]) for done in scores.values()}) == 1
    assert all((done.bytes == done.bytes[0]).all() for done in scores.values())


def test_least_loaded_dispatch_is_replayed_as_the_best_split(profile):
    even = make_plan(profile, "rq", dispatch="even", error_bound=1.0)
    plan = even.model_copy(update={"dispatch": "least_loaded"})
    for step in stream()[::10]:
        best, shares = unit_load(plan, step), unit_load(even, step)
        np.testing.assert_allclose(best.sum(1), step.sum(1))
        assert (best.max(1) <= shares.max(1) + 1).all()


def test_a_stream_of_another_shape_is_refused(profile):
    with pytest.raises(PlanError, match="it must have steps of shape"):
        replay_stream(np.zeros((4, 2, 8), np.int64), make_plan(profile, "rq-paper"), make_policy("static"), COSTS)
