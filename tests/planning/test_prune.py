"""Which experts are kept: scores, mixtures of domains, groups, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.artifacts import LayerFacts, ModelFacts, Plan, Profile, Source
from equipoise.errors import EquipoiseError, PlanError
from equipoise.planning.methods import METHODS, make_plan
from equipoise.planning.prune import keep_experts, mixed, score_kept, warning
from equipoise.planning.prune_scores import PRUNING

EXPERTS, LAYERS = 8, 2
DOMAINS = ("math", "code")


def facts(groups: int = 1, top_k: int = 2, experts: int = EXPERTS) -> ModelFacts:
    layer = {"num_experts": experts, "top_k": top_k, "matrices": ((8, 4), (4, 4))}
    layers = tuple(LayerFacts(path=f"layers.{i}.experts", model_layer=i, **layer) for i in range(LAYERS))
    return ModelFacts(name="toy", model_type="toy", dtype="bf16", fingerprint="f", layers=layers, expert_groups=groups)


def profile(score_SLE: np.ndarray | None = None, model: ModelFacts | None = None, **importance: np.ndarray) -> Profile:
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 50, (len(DOMAINS), 2, LAYERS, EXPERTS))
    return Profile(
        model=model or facts(),
        source=Source(scenarios=DOMAINS),
        counts=counts,
        gate_mass=rng.random((len(DOMAINS), LAYERS, EXPERTS)),
        tokens=np.array([10, 10]),
        windows=counts.sum(1),
        window_scenario=np.arange(2),
        importance=importance,
        scenario_importance={} if score_SLE is None else {"easy_ep": score_SLE},
    )


def scores(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((len(DOMAINS), LAYERS, EXPERTS)) ** 4


def test_the_best_experts_of_each_layer_are_kept_and_all_else_is_left_out():
    score = scores()
    plan = make_plan(profile(score), "prune", keep=0.5, domains=["code"])
    for layer, kept in zip(plan.layers, plan.kept, strict=True):
        assert layer.experts == kept
        assert layer.shares == (1.0,) * 4
    assert [set(kept) for kept in plan.kept] == [set(np.argsort(-score[1, i])[:4].tolist()) for i in range(LAYERS)]
    assert (plan.exactness, plan.units, plan.unit_bytes) == ("capacity", 4, 2 * 2 * 48)
    assert Plan.from_json(plan.to_json()) == plan
    assert "code alone" in warning(plan)
    best = np.sort(score[1], axis=1)[:, ::-1]
    assert score_kept(profile(score), plan) == pytest.approx(best[:, :4].sum(1) / best.sum(1))


def test_mixed_domains_are_sums_of_normalised_scores():
    score = scores()
    score[0] *= 1e6  # a domain of many tokens has no more say than another
    wanted = score[0] / score[0].sum(1, keepdims=True) + score[1] / score[1].sum(1, keepdims=True)
    assert mixed(score) == pytest.approx(wanted)
    plan = make_plan(profile(score), "prune", keep=0.25)
    assert [set(kept) for kept in plan.kept] == [set(np.argsort(-row)[:2].tolist()) for row in wanted]
    assert mixed(np.stack([score[0], np.zeros_like(score[0])])) == pytest.approx(score[0] / score[0].sum(1, keepdims=True))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_groups_keep_as_many_each(data):
    groups = data.draw(st.sampled_from([1, 2, 4]))
    keep = data.draw(st.floats(0.5, 1.0))
    score = np.array(data.draw(st.lists(st.floats(0, 1), min_size=32, max_size=32))).reshape(LAYERS, 16)
    kept = keep_experts(score, facts(groups, experts=16), keep)
    size = 16 // groups
    each = len(kept[0]) // groups
    assert abs(each - keep * size) <= 0.5
    for layer, ids in enumerate(kept):
        assert ids == sorted(set(ids))
        for group in range(groups):
            mine = [e for e in ids if e // size == group]
            left = [e for e in range(group * size, (group + 1) * size) if e not in mine]
            assert len(mine) == each
            assert not left or score[layer, mine].min() >= score[layer, left].max()


def test_every_score_reads_what_it_says():
    measured = {name: np.random.default_rng(3).random((LAYERS, EXPERTS)) for name in ("gate_norm", "leave_one_out")}
    given = profile(scores(), **measured)
    wanted = {
        "easy-ep": scores(), "gate": given.gate_mass, "frequency": given.scenario_load,
        "reap": measured["gate_norm"][None], "leave-one-out": measured["leave_one_out"][None],
    }  # fmt: skip
    for name, score in wanted.items():
        assert PRUNING.get(name)(given, DOMAINS, 0) == pytest.approx(score)
    one, two = (make_plan(given, "prune", score="random", seed=seed) for seed in (0, 1))
    assert one.kept == make_plan(given, "prune", score="random", seed=0).kept != two.kept
    assert set(PRUNING.names()) == {*wanted, "random"}
    assert all(entry.summary and entry.source for entry in PRUNING)
    assert "prune" in METHODS


def test_keeping_all_is_exact_and_warns_of_nothing():
    plan = make_plan(profile(scores()), "prune", keep=1.0)
    assert (plan.exactness, plan.prunes, warning(plan)) == ("exact", False, "")
    plan.require_all_experts("applied")


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (facts(), {"keep": 0.0}, "keep: 0.0 given"),
        (facts(), {"keep": True}, "keep: True given"),
        (facts(top_k=3), {"keep": 0.25}, "leaves 2 of 8 experts in layer 0, and a token is sent to 3; keep at least 0.375"),
        (facts(groups=4), {"keep": 0.5}, "one expert in each of the 4 groups of layer 0.*keep at least 1"),
        (facts(), {"domains": ["law"]}, "domains: law given; the profile has: math, code"),
        (facts(), {"domains": []}, "domains: none given"),
        (facts(), {"score": "easyep"}, "unknown pruning score 'easyep'.*Did you mean 'easy-ep'"),
        (facts(), {"score": "easy-ep"}, "needs the importance estimate 'easy_ep'.*it has: gate_norm"),
        (facts(), {"score": "leave-one-out"}, "needs the importance estimate 'leave_one_out'"),
        (facts(), {"score": "reap", "domains": ["math"]}, "of all scenarios of the profile together"),
    ],
)
def test_what_cannot_be_is_refused(model, options, message):
    given = profile(None if "score" in options else scores(), model, gate_norm=np.ones((LAYERS, EXPERTS)))
    with pytest.raises(EquipoiseError, match=message):
        make_plan(given, "prune", **options)


def test_a_plan_file_whose_slots_are_not_the_kept_experts_is_refused():
    plan = make_plan(profile(scores()), "prune")
    spoiled = plan.to_json().replace('"exactness": "capacity"', '"exactness": "exact"')
    with pytest.raises(PlanError, match="exactness: 'exact' does not match what the plan does, which is 'capacity'"):
        Plan.from_json(spoiled)
    with pytest.raises(PlanError, match="kept: the plan has 2 layers, kept has 1"):
        Plan.from_json(plan.model_copy(update={"kept": plan.kept[:1]}).to_json())
    with pytest.raises(PlanError, match=r"layers\.0\.experts: the slots hold experts"):
        Plan.from_json(plan.model_copy(update={"kept": ((0, 1),) * 2}).to_json())
    with pytest.raises(PlanError, match="leaves out experts, so it is not carried out by slots"):
        plan.require_all_experts("carried out by slots")


def test_a_profile_of_another_routing_policy_is_refused():
    native = profile(gate_norm=np.ones((LAYERS, EXPERTS)))
    other = replace(native, source=native.source.model_copy(update={"routing_policy": "top_p-1234"}))
    with pytest.raises(PlanError, match="made under the routing policy 'top_p-1234'"):
        make_plan(other, "prune", score="random")
