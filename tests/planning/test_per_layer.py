from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.artifacts import LayerPlan, Plan
from equipoise.errors import PlanError
from equipoise.planning.budget import assumed_error
from equipoise.planning.per_layer import main_slots, round_per_layer
from equipoise.precisions import precision
from planning.cases import MATRICES, make_facts, make_profile

EXPERTS = 4
NAMES = ("bf16", "int8", "int4-g32", "int2-g32")


def plan_of(names: list[list[str]], extra: list[tuple[int, str]] = [], sized: bool = True) -> Plan:  # noqa: B006
    """Every expert once with the given precisions; and copies in the first layer, (expert, precision), on other units."""
    layers = []
    for i, row in enumerate(names):
        copies = extra if i == 0 else []
        experts = [*range(EXPERTS), *(expert for expert, _ in copies)]
        units = [*range(EXPERTS), *((expert + 1) % EXPERTS for expert, _ in copies)]
        shares = [1 / experts.count(expert) for expert in experts]
        layers.append(
            LayerPlan(
                experts=tuple(experts),
                precisions=(*row, *(name for _, name in copies)),
                units=tuple(units),
                shares=tuple(shares),
            )
        )
    model = make_facts([EXPERTS] * len(names), matrices=MATRICES if sized else ())
    exact = all(set(layer.precisions) == {"bf16"} for layer in layers)
    return Plan(
        method="by hand", model=model, units=EXPERTS, unit_bytes=1 << 30,
        exactness="exact" if exact else "weights", layers=tuple(layers),
    )  # fmt: skip


@given(st.lists(st.lists(st.sampled_from(NAMES), min_size=EXPERTS, max_size=EXPERTS), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_the_least_error_within_the_bytes_of_the_plan(names: list[list[str]]) -> None:
    plan = plan_of(names)
    found = round_per_layer(plan)
    chosen = [layer.precisions[0] for layer in found.plan.layers]
    assert all(set(layer.precisions) == {name} for layer, name in zip(found.plan.layers, chosen, strict=True))
    assert found.bytes_after <= found.bytes_before
    mixed = [i for i, row in enumerate(names) if len(set(row)) > 1]
    assert found.rounded == len(mixed)
    assert all(chosen[i] == row[0] for i, row in enumerate(names) if i not in mixed)
    size = {name: plan.model.layers[0].expert_bytes(precision(name)) for name in NAMES}
    error = {name: 0.0 if name == "bf16" else assumed_error(precision(name), 32) for name in NAMES}
    allowed = sum(size[name] for i in mixed for name in names[i])
    used = sorted({name for i in mixed for name in names[i]})
    tried = [
        sum(error[name] for name in choice)
        for choice in itertools.product(used, repeat=len(mixed))
        if EXPERTS * sum(size[name] for name in choice) <= allowed
    ]
    assert sum(error[chosen[i]] for i in mixed) == pytest.approx(min(tried, default=0.0))
    before = np.sqrt(sum(error[name] / EXPERTS for row in names for name in row) / len(names))
    assert found.error_before == pytest.approx(before)
    assert found.error_after == pytest.approx(np.sqrt(sum(error[name] for name in chosen) / len(names)))
    assert not found.measured


def test_copies_are_left_out_and_the_best_one_counts() -> None:
    plan = plan_of([["int4-g32", "int8", "int8", "int8"], ["int8"] * 4], extra=[(0, "int8"), (2, "int4-g32")])
    assert main_slots(plan.layers[0]) == [4, 1, 2, 3]
    found = round_per_layer(plan)
    assert found.rounded == 0
    assert [layer.experts for layer in found.plan.layers] == [(0, 1, 2, 3)] * 2
    assert found.plan.layers[0].units == (1, 1, 2, 3)
    assert {name for layer in found.plan.layers for name in layer.precisions} == {"int8"}
    assert found.bytes_after == found.bytes_before == int(found.plan.bytes_by_unit().sum())
    assert "0 of 2 layers rounded" in str(found)


def test_a_plan_of_the_model_s_own_precision_stays_exact() -> None:
    assert round_per_layer(plan_of([["bf16"] * 4])).plan.exactness == "exact"


def test_unknown_sizes_are_refused() -> None:
    with pytest.raises(PlanError, match="sizes of the experts of 'toy' are not known"):
        round_per_layer(plan_of([["bf16"] * 4], sized=False))


def test_measured_errors_decide_where_a_profile_has_them() -> None:
    """Of two mixed layers in the same bytes, the one that suffers more gets the bits."""
    load = np.full((1, 2, EXPERTS), 100)
    even = make_profile(load, error={"int8": 0.01, "int2-g32": 0.5})
    errors = dict(even.output_error) | {"int2-g32": even.output_error["int2-g32"] * [[0.1], [5.0]]}
    profile = replace(even, output_error=errors)
    half = ["int8", "int2", "int8", "int2"]
    found = round_per_layer(plan_of([half, half]), profile)
    assert [layer.precisions[0] for layer in found.plan.layers] == ["int2-g32", "int8"]
    assert found.measured
    assert found.bytes_after == found.bytes_before
    assert found.error_after < found.error_before
    assert not round_per_layer(plan_of([["int4", "int8", "int8", "int8"]] * 2), profile).measured
    with pytest.raises(PlanError, match="the plan was made for 'toy'"):
        round_per_layer(plan_of([half]), replace(profile, model=profile.model.model_copy(update={"fingerprint": "g"})))
