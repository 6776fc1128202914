from __future__ import annotations

import json

import numpy as np
import pytest

from equipoise.artifacts import ModelFacts, Plan, Profile, Source
from equipoise.errors import PlanError
from equipoise.precisions import precision


def test_saved_plan_reads_back_equal(plan, tmp_path):
    plan.save(tmp_path / "x.plan.json")
    assert Plan.load_file(tmp_path / "x.plan.json") == plan


def test_json_puts_each_column_of_a_layer_on_one_line(plan):
    line = [row for row in plan.to_json().splitlines() if '"experts": [0, 1, 2, 3, 1]' in row]
    assert len(line) == 1


def test_unit_load_and_both_scores_by_hand(plan):
    load = np.array([[4, 8, 2, 2], [6, 3, 3, 0]])
    np.testing.assert_allclose(plan.unit_load(load), [[4, 4, 2, 6], [6, 3, 3, 0]])
    np.testing.assert_allclose(plan.lis(load), [4 * 6 / 16, 4 * 6 / 12])
    np.testing.assert_allclose(plan.lis_paper(load), [4 * 4 / 16, 3 * 6 / 12])
    np.testing.assert_allclose(plan.lis_paper(load, count_copies=True), [5 * 4 / 16, 3 * 6 / 12])


def test_bytes_by_unit_count_scales(plan, facts):
    full, small = (facts.layers[0].expert_bytes(precision(n)) for n in ("bf16", "int8"))
    assert full == 2 * (64 * 32 + 32 * 32)
    assert small == 64 * 32 + 32 * 32 + 2 * (64 + 32)
    np.testing.assert_array_equal(plan.bytes_by_unit(), [2 * full, full + small, 2 * full, 2 * small])


def broken(plan: Plan, **columns) -> str:
    data = json.loads(plan.to_json())
    data["layers"][0].update(columns)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"experts": [0, 1, 2, 9, 1]}, r"layers\.0\.experts: expert id 9 is out of range 0\.\.3"),
        ({"experts": [0, 1, 2, -1, 1]}, r"layers\.0\.experts: expert id -1 is out of range"),
        ({"experts": [0, 1, 2, 2, 1]}, r"layers\.0\.experts: expert 3 has no slot"),
        ({"units": [0, 1, 2, 3, 1]}, r"layers\.0\.experts: expert 1 has 2 slots on unit 1"),
        ({"units": [0, 1, 2, 3, 4]}, r"layers\.0\.units: unit 4 is out of range"),
        ({"precisions": ["bf16", "int8", "bf16", "int8", "int7"]}, r"layers\.0\.precisions: unknown precision 'int7'"),
        ({"shares": [1, 0.5, 1, 1, 0.4]}, r"layers\.0\.shares: the shares of expert 1 add up to 0\.9"),
        ({"shares": [1, 1.5, 1, 1, -0.5]}, r"layers\.0\.shares: must be finite and not negative"),
        ({"shares": [1, 1, 1]}, r"layers\.0\.experts: columns differ in length"),
        ({"experts": "none"}, r"layers\.0\.experts: Input should be a valid array"),
        ({"color": "red"}, r"layers\.0\.color: Extra inputs"),
    ],
)
def test_broken_plans_are_refused_with_the_field(plan, columns, message):
    with pytest.raises(PlanError, match=message):
        Plan.from_json(broken(plan, **columns))


def test_other_versions_and_no_json_are_refused(plan, tmp_path):
    with pytest.raises(PlanError, match=r"schema is 'equipoise\.plan/9'"):
        Plan.from_json(plan.to_json().replace("plan/1", "plan/9"))
    with pytest.raises(PlanError, match="Invalid JSON"):
        Plan.from_json("{")
    with pytest.raises(PlanError, match="No such file"):
        Plan.load_file(tmp_path / "absent")


def test_exactness_class_cannot_be_claimed_falsely(plan):
    with pytest.raises(PlanError, match="exactness: 'exact' does not match"):
        Plan.from_json(plan.to_json().replace('"exactness": "weights"', '"exactness": "exact"'))


def test_plan_refuses_another_model_and_another_policy(plan, profile):
    plan.check_profile(profile)
    stranger = ModelFacts.model_validate(profile.model.model_dump() | {"fingerprint": "0" * 64, "name": "other"})
    with pytest.raises(PlanError, match=r"made for 'toy'.*not for 'other'"):
        plan.check_model(stranger)
    fields = {n: getattr(profile, n) for n in ("model", "counts", "gate_mass", "tokens", "windows", "window_scenario")}
    with pytest.raises(PlanError, match=r"policy 'native'.*'top-p'"):
        plan.check_profile(Profile(source=Source(scenarios=("prose", "code"), routing_policy="top-p"), **fields))
