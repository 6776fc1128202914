from __future__ import annotations

import numpy as np
import pytest

from equipoise.errors import PlanError
from equipoise.planning.budget import UnreachableError, assumed_error, make_budget, sixteen_bit, unit_capacity
from equipoise.precisions import precision
from planning.cases import make_facts, make_profile, skewed

NAMES = ("bf16", "int8", "int4")


def test_a_unit_is_one_original_expert_of_every_layer():
    facts = make_facts([8, 8, 8])
    assert unit_capacity(facts, 8) == 3 * facts.layers[0].expert_bytes(precision("bf16"))
    assert unit_capacity(facts, 4) == 2 * unit_capacity(facts, 8)


def test_layers_of_different_width_share_the_pool():
    facts = make_facts([8, 4])
    assert unit_capacity(facts, 8) == 12 * facts.layers[0].expert_bytes(precision("bf16")) // 8


def test_experts_count_in_at_most_sixteen_bits():
    assert [sixteen_bit(make_facts([2], dtype)).name for dtype in ("fp32", "fp16", "bf16")] == ["bf16", "fp16", "bf16"]
    assert unit_capacity(make_facts([4], "fp32"), 4) == unit_capacity(make_facts([4], "bf16"), 4)


def test_bytes_count_scales():
    budget = make_budget(make_profile(skewed(0)), 8, NAMES, 1.0)
    weights = sum(r * c for r, c in ((64, 32), (32, 32)))
    assert budget.sizes[0].tolist() == [2 * weights, weights + 2 * 96, weights // 2 + 2 * 96]


def test_measured_errors_are_used_and_unseen_experts_are_not_free():
    windows = skewed(1)
    windows[:, :, 0] = 0
    budget = make_budget(make_profile(windows, error={"int8": 0.01, "int4-g32": 0.08}), 8, NAMES, 1.0)
    assert budget.measured == (True, True, True)
    assert (budget.errors[..., 0] == 0).all()
    assert (budget.errors[:, 0, 1:] > 0).all()
    # One token more of the layer's mean error for each of 8 experts among at least a thousand tokens.
    assert np.sqrt(budget.errors.sum(1)[:, 1]) == pytest.approx(0.01, rel=0.01)


def test_without_measurement_errors_are_assumed_from_the_bits():
    budget = make_budget(make_profile(skewed(2)), 8, NAMES, 1.0)
    assert budget.measured == (True, False, False)
    expected = [0.0, assumed_error(precision("int8"), 32), assumed_error(precision("int4"), 32)]
    assert budget.errors.sum(1) == pytest.approx(np.tile(expected, (4, 1)))
    share = budget.errors[0, :, 1] / budget.errors[0, :, 1].sum()
    assert np.abs(share - skewed(2).sum(0)[0] / skewed(2).sum(0)[0].sum()).max() < 0.01


@pytest.mark.parametrize(("name", "columns"), [("int8", 512), ("int8", 64), ("int4-g32", 512), ("int4-g64", 512)])
def test_assumed_error_is_that_of_gaussian_weights(name: str, columns: int):
    form = precision(name)
    weights = np.random.default_rng(0).standard_normal((2000, columns))
    group = form.group or columns
    blocks = weights.reshape(2000, -1, group)
    step = np.abs(blocks).max(2, keepdims=True) / (2 ** (form.bits - 1) - 1)
    rounded = np.round(blocks / step) * step
    one_matrix = ((rounded - blocks) ** 2).mean()
    assert assumed_error(form, columns) == pytest.approx(2 * one_matrix, rel=0.06)


def test_fewer_bits_are_assumed_worse():
    errors = [assumed_error(precision(n), 256) for n in ("fp32", "fp16", "bf16", "int8", "int4-g16", "int4-g64")]
    assert errors == sorted(errors)


@pytest.mark.parametrize("fraction", [0, -1.0, float("nan"), 65, True, "half"])
def test_refuses_a_fraction_out_of_range(fraction):
    with pytest.raises(PlanError, match=r"bytes_fraction: .* given; allowed is above 0"):
        make_budget(make_profile(skewed(0)), 8, NAMES, fraction)


def test_refuses_bytes_that_hold_no_copy_of_every_expert():
    with pytest.raises(UnreachableError, match=r"0\.1 allows .* one copy of every expert in int4-g32 needs .*more bytes"):
        make_budget(make_profile(skewed(0)), 8, NAMES, 0.1)


def test_refuses_no_formats():
    with pytest.raises(PlanError, match="precisions: none given"):
        make_budget(make_profile(skewed(0)), 8, (), 1.0)
