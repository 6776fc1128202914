from __future__ import annotations

import numpy as np
import pytest

from equipoise.errors import PlanError
from equipoise.planning.methods import make_plan
from planning.cases import MATRICES, make_profile, skewed

LOAD = np.array([[[10, 60, 20, 10], [40, 0, 30, 30]]])
WANDA = np.array([[0.1, 0.2, 0.9, 0.3], [0.9, 0.1, 0.2, 0.3]])


def plan(load=LOAD, wanda=WANDA, dtype: str = "bf16", **options):
    importance = {"wanda": wanda, "gate_norm": wanda}
    return make_plan(make_profile(load, dtype=dtype, importance=importance), "rq-paper", **options)


def slots(layer) -> list[tuple]:
    return list(zip(layer.experts, layer.precisions, layer.units, layer.shares, strict=True))


def test_the_copy_moves_in_with_the_less_important_expert():
    assert slots(plan().layers[0]) == [
        (0, "bf16", 0, 1.0), (1, "bf16", 1, 0.5), (1, "int8", 2, 0.5), (2, "int8", 2, 1.0), (3, "bf16", 3, 1.0)
    ]  # fmt: skip


def test_if_the_heaviest_is_the_less_important_the_next_takes_its_part():
    assert slots(plan().layers[1])[:2] == [(0, "bf16", 0, 0.5), (0, "int8", 3, 0.5)]


def test_scores_are_those_of_the_definition():
    result = plan()
    # Layer 0: units 10, 30, 50, 10; layer 1: 20, 0, 30, 50 of 100 tokens each.
    assert result.lis(LOAD[0]).tolist() == [2.0, 2.0]
    assert result.predicted.lis == 2.0
    assert result.predicted.lis_raw == pytest.approx((2.4 + 1.6) / 2)
    # Per slot, as the paper counts: the largest of 10, 30, 30, 20, 10 and of 20, 20, 0, 30, 30, times m over 100.
    assert result.predicted.lis_paper == pytest.approx(4 * 0.3)
    assert plan(count_copies=True).predicted.lis_paper == pytest.approx(5 * 0.3)


def test_overrun_is_the_scales_and_is_not_hidden():
    result = plan()
    scales = 2 * 2 * sum(rows for rows, _ in MATRICES)
    # Units 2 and 3 hold a pair in one layer each.
    assert result.predicted.overrun_bytes == scales
    assert result.bytes_by_unit().tolist() == [result.unit_bytes] * 2 + [result.unit_bytes + scales] * 2
    assert result.predicted.bytes == result.predicted.budget_bytes + 2 * scales


def test_an_fp32_model_is_counted_in_its_own_bytes():
    result = plan(dtype="fp32")
    assert set(result.layers[0].precisions) == {"fp32", "fp16"}
    assert result.predicted.overrun_bytes == 0
    assert result.predicted.bytes == result.predicted.budget_bytes


def test_direction_and_estimate_are_options():
    lowest = slots(plan(less_important="lowest").layers[0])
    assert lowest[:3] == [(0, "int8", 0, 1.0), (1, "int8", 0, 0.5), (1, "bf16", 1, 0.5)]
    by_norm = plan(importance="gate_norm")
    assert by_norm.options["less_important"] == "lowest"
    assert plan().options["less_important"] == "highest"
    assert by_norm.layers == plan(less_important="lowest").layers


def test_the_split_is_an_option():
    layer = plan(copy_share=0.25).layers[0]
    assert dict(zip(zip(layer.experts, layer.units, strict=True), layer.shares, strict=True))[1, 2] == 0.25


def test_the_copy_never_shares_a_unit_with_its_original():
    load = np.array([[[50, 1, 1, 1]]])
    wanda = np.array([[0.1, 0.9, 0.5, 0.2]])
    result = plan(load, wanda, units=2)
    assert slots(result.layers[0])[:2] == [(0, "bf16", 0, 0.5), (0, "int8", 1, 0.5)]
    assert [s for s in slots(result.layers[0]) if s[1] == "int8"][1][0] == 2


def test_layers_that_served_nothing_or_have_one_expert_stay_as_they_are():
    load = np.array([[[5, 0, 0], [0, 0, 0]]])
    profile = make_profile(load, widths=[1, 3], importance={"wanda": np.ones((2, 3))})
    result = make_plan(profile, "rq-paper")
    assert [layer.num_slots for layer in result.layers] == [1, 3]
    assert result.exactness == "exact"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance": "leave_one_out"}, r"importance: 'leave_one_out' is not in this profile \(it has: gate_norm, wanda\)"),
        ({"less_important": "middle"}, r"less_important: 'middle' given; allowed are 'highest' and 'lowest'"),
        ({"copy_share": 1.5}, r"copy_share: 1.5 given; allowed is a number from 0 to 1"),
        (
            {"precision_name": "fp32"},
            r"precision_name: 'fp32' given; allowed are formats with fewer bits than the model's bf16",
        ),
        ({"units": 1}, r"units: 1 given; a copy needs a second unit"),
    ],
)
def test_refusals_say_what_is_allowed(options, message: str):
    importance = {"gate_norm": WANDA, "wanda": WANDA}
    with pytest.raises(PlanError, match=message):
        make_plan(make_profile(LOAD, importance=importance), "rq-paper", **options)


def test_heaviest_first_even_with_int4():
    result = plan(skewed(0), np.ones((4, 8)), precision_name="int4-g16")
    assert {q for layer in result.layers for q in layer.precisions} == {"bf16", "int4-g16"}
    assert result.predicted.overrun_bytes == 0
