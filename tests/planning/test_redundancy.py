from __future__ import annotations

import itertools

import numpy as np
import pytest

from equipoise.artifacts import Profile, Source
from equipoise.errors import PlanError
from equipoise.planning.cost import ActivatedCost
from equipoise.planning.methods import make_plan
from equipoise.planning.redundancy import choose_redundancy
from planning.cases import MATRICES, make_facts, make_profile

EXPERT_BYTES = sum(rows * columns for rows, columns in MATRICES) * 2


def profile_of(load_SLE: np.ndarray, matrices=MATRICES) -> Profile:
    """One scenario per row; windows are the scenarios."""
    load = np.asarray(load_SLE, np.int64)
    counts = np.zeros((len(load), 2, *load.shape[1:]), np.int64)
    counts[:, 0] = load
    return Profile(
        model=make_facts([load.shape[2]] * load.shape[1], matrices=matrices),
        source=Source(scenarios=tuple(f"s{i}" for i in range(len(load)))),
        counts=counts,
        gate_mass=counts.sum(1) * 0.5,
        tokens=load[:, 0].sum(1) // 2,
        windows=load,
        window_scenario=np.arange(len(load)),
    )


def hot_and_flat(seed: int = 0, scenarios: int = 6) -> np.ndarray:
    """[S, 4, 8]: layers 0 and 2 have one very hot expert in every scenario, layers 1 and 3 are nearly flat."""
    rng = np.random.default_rng(seed)
    load = rng.poisson(200, (scenarios, 4, 8))
    load[:, 0, 3] += 2000
    load[:, 2, 5] += 1200
    return load


def test_copies_go_to_the_layers_that_need_them_and_flat_ones_get_none():
    found = choose_redundancy(profile_of(hot_and_flat()), ranks=4, least_gain=0.05)
    assert found.held_out
    assert found.rows[0] > 0
    assert found.rows[2] > 0
    assert (found.rows[1], found.rows[3]) == (0, 0)
    assert found.slots == tuple(8 + 4 * rows for rows in found.rows)
    assert found.chosen_time_L.mean() < 0.8 * found.time_LM[:, 0].mean()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [0, 1, 3, 7])
def test_is_the_best_of_all_choices(seed: int, budget: int):
    """4 layers x 4 options, every one of the 256 choices tried."""
    profile = profile_of(np.random.default_rng(seed).poisson(80 * np.random.default_rng(seed).lognormal(0, 1, (5, 4, 8))))
    found = choose_redundancy(profile, ranks=4, menu=(0, 1, 2, 4), most_bytes=budget * EXPERT_BYTES, least_gain=0.01)
    menu = np.array(found.menu)
    value = found.time_LM + 0.01 * menu
    best = min(
        value[np.arange(4), list(choice)].sum()
        for choice in itertools.product(range(4), repeat=4)
        if menu[list(choice)].sum() <= budget
    )
    assert sum(found.rows) <= budget
    assert value[np.arange(4), [found.menu.index(r) for r in found.rows]].sum() == pytest.approx(best)
    assert found.bytes_per_rank == sum(found.rows) * EXPERT_BYTES


def test_the_value_is_held_out():
    """Judged in sample a copy of each scenario's own hot expert looks worth more than it is."""
    rng = np.random.default_rng(0)
    load = rng.poisson(20, (6, 1, 8))
    load[np.arange(6), 0, np.arange(6)] += 900  # each scenario has its own hot expert
    held_out = choose_redundancy(profile_of(load), ranks=4)
    single = profile_of(load.sum(0, keepdims=True))
    in_sample = choose_redundancy(single, ranks=4)
    assert not in_sample.held_out
    assert "in-sample" in in_sample.note
    assert held_out.time_LM[0, 0] > 1.5 * in_sample.time_LM[0, 0]


def test_windows_are_held_out_where_there_is_one_scenario():
    assert choose_redundancy(make_profile(hot_and_flat()), ranks=4).held_out


def test_activated_experts_make_copies_not_worth_having():
    found = choose_redundancy(profile_of(hot_and_flat()), ranks=4, cost=ActivatedCost(), batch=8192)
    assert found.rows == (0, 0, 0, 0)
    assert found.bytes_per_rank == 0
    assert (found.time_LM[:, -1] > found.time_LM[:, 0]).all()


def test_one_number_for_all_layers():
    found = choose_redundancy(profile_of(hot_and_flat()), ranks=4, per_layer=False)
    assert len(set(found.rows)) == 1
    assert found.rows[0] > 0
    assert choose_redundancy(profile_of(hot_and_flat()), ranks=4, per_layer=False, most_rows=3).rows == (0, 0, 0, 0)


def test_the_price_in_kv_cache():
    found = choose_redundancy(profile_of(hot_and_flat()), ranks=4, most_rows=2)
    assert found.bytes_per_rank == 2 * EXPERT_BYTES
    assert found.kv_tokens(1000) == -(-2 * EXPERT_BYTES // 1000)
    assert f"{2 * EXPERT_BYTES} bytes of KV cache" in found.note


def test_unknown_sizes_can_be_limited_by_rows_but_not_priced():
    profile = profile_of(hot_and_flat(), matrices=())
    found = choose_redundancy(profile, ranks=4, most_rows=1)
    assert sum(found.rows) == 1
    with pytest.raises(PlanError, match="--config"):
        found.kv_tokens(100)
    with pytest.raises(PlanError, match="--config"):
        choose_redundancy(profile, ranks=4, most_bytes=1)


def test_the_slots_are_what_methods_take():
    profile = profile_of(hot_and_flat())
    found = choose_redundancy(profile, ranks=4)
    plan = make_plan(profile, "eplb", units=4, slots=list(found.slots))
    assert [layer.num_slots for layer in plan.layers] == list(found.slots)


def test_experts_that_ranks_do_not_divide_have_slots_to_spare_first():
    load = np.random.default_rng(0).poisson(50, (4, 2, 7))
    assert choose_redundancy(profile_of(load), ranks=4, menu=(0,)).slots == (8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"menu": (-1,)}, r"menu: \[-1\] given"),
        ({"most_bytes": 1, "most_rows": 1}, "both given"),
        ({"most_rows": -1}, r"most_rows: -1 given"),
        ({"batch": 0}, r"batch 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message: str):
    with pytest.raises(PlanError, match=message):
        choose_redundancy(profile_of(hot_and_flat()), ranks=4, **options)
