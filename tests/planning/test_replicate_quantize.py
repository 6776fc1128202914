from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.artifacts import Plan
from equipoise.errors import PlanError
from equipoise.metrics import lis
from equipoise.planning.budget import UnreachableError
from equipoise.planning.methods import make_plan
from equipoise.precisions import precision
from planning.cases import loads, make_profile, skewed

ERRORS = {"int8": 0.01, "int4-g32": 0.08}


def total_error(plan: Plan, profile) -> float:
    """Relative RMS error of a plan, from the profile's measured errors alone."""
    total = 0.0
    for index, layer in enumerate(plan.layers):
        for expert, name, share in zip(layer.experts, layer.precisions, layer.shares, strict=True):
            if name != profile.model.dtype:
                total += share * profile.relative_error(name)[index, expert]
    return float(np.sqrt(total / len(plan.layers)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("units", [2, 4, 8, 12])
def test_units_hold_their_bytes_and_the_error_its_bound(seed: int, units: int):
    profile = make_profile(skewed(seed, layers=6), error=ERRORS)
    plan = make_plan(profile, units=units, error_bound=0.04)
    assert plan.bytes_by_unit().max() <= plan.unit_bytes
    assert plan.predicted.overrun_bytes == 0
    assert plan.predicted.bytes == plan.bytes_by_unit().sum()
    assert total_error(plan, profile) <= plan.predicted.output_error * 1.001 <= 0.04 * 1.002
    assert plan.predicted.lower_bound <= plan.predicted.lis + 1e-6
    assert plan.predicted.lis == pytest.approx(plan.lis(profile.load).mean())


@given(loads(), st.sampled_from([1, 2, 3, 5]), st.sampled_from([0.02, 0.1, 1.0]))
@settings(max_examples=80, deadline=None)
def test_never_worse_than_the_model_as_it_is(windows, units: int, error_bound: float):
    profile = make_profile(windows, error=ERRORS)
    try:
        plan = make_plan(profile, units=units, error_bound=error_bound)
    except UnreachableError:
        # Experts that do not divide evenly among units need fewer bits than a tight bound allows.
        assert windows.shape[2] % units or windows.shape[2] < units
        return
    assert plan.predicted.lis <= plan.predicted.lis_raw + 1e-9
    assert plan.bytes_by_unit().max() <= plan.unit_bytes
    assert Plan.from_json(plan.to_json()) == plan


def test_balances_where_bytes_and_error_allow():
    profile = make_profile(skewed(0, layers=8, experts=16), error=ERRORS)
    plan = make_plan(profile)
    assert plan.predicted.lis_raw > 2
    assert plan.predicted.lis < 1.02
    assert plan.exactness == "weights"


def test_no_error_allowed_leaves_the_model_as_it_is():
    profile = make_profile(skewed(1))
    plan = make_plan(profile, error_bound=0)
    assert plan.exactness == "exact"
    assert plan.predicted.lis == pytest.approx(lis(profile.load).mean())
    assert plan.predicted.lower_bound == pytest.approx(plan.predicted.lis, rel=1e-4)
    assert plan.predicted.output_error == 0.0


def test_no_error_allowed_still_places_experts_on_ranks():
    profile = make_profile(skewed(2, layers=6, experts=16))
    plan = make_plan(profile, units=4, error_bound=0)
    assert plan.exactness == "exact"
    assert [layer.num_slots for layer in plan.layers] == [16] * 6
    assert plan.predicted.lis < 1 + 0.5 * (plan.predicted.lis_raw - 1)


def test_twice_the_bytes_balance_without_error():
    plan = make_plan(make_profile(skewed(3)), error_bound=0, bytes_fraction=2.2)
    assert plan.exactness == "exact"
    assert plan.predicted.lis < 1.02


def test_balance_is_given_up_little_by_little():
    profile = make_profile(skewed(4, layers=6, experts=16), error=ERRORS)
    scores = [make_plan(profile, error_bound=bound).predicted.lis for bound in (0, 0.002, 0.005, 0.01, 0.03)]
    assert scores[0] > scores[1] > scores[2] > scores[3] > scores[4] >= 1


def test_an_fp32_model_is_planned_in_sixteen_bits():
    plan = make_plan(make_profile(skewed(5), dtype="fp32"), error_bound=0.01)
    assert {q for layer in plan.layers for q in layer.precisions} <= {"bf16", "int8", "int4-g32"}
    assert plan.exactness == "weights"


def test_assumed_errors_are_not_passed_off_as_measured():
    assert make_plan(make_profile(skewed(6))).predicted.output_error is None
    assert make_plan(make_profile(skewed(6))).options["errors"] == "assumed"
    assert make_plan(make_profile(skewed(6), error=ERRORS)).options["errors"] == "measured"


def test_other_formats_fit_without_change():
    plan = make_plan(make_profile(skewed(7)), precisions=["bf16", "int8", "int4-g16", "int4-g64"], error_bound=0.2)
    assert {q for layer in plan.layers for q in layer.precisions} <= {"bf16", "int8", "int4-g16", "int4-g64"}


def test_is_deterministic_and_carries_its_origin():
    profile = make_profile(skewed(8))
    first, second = make_plan(profile, seed=3), make_plan(profile, seed=3)
    assert first.to_json() == second.to_json()
    assert (first.seed, first.profile_sha256, first.routing_policy) == (3, "a1", "native")
    first.check_profile(profile)


@pytest.mark.parametrize("seed", range(3))
def test_copies_of_an_expert_have_one_precision_at_little_cost(seed: int):
    profile = make_profile(skewed(seed, layers=6), error=ERRORS)
    alike, own = (make_plan(profile, alike=value) for value in (True, False))
    for layer in alike.layers:
        names = dict(zip(layer.experts, layer.precisions, strict=True))
        assert all(names[e] == q for e, q in zip(layer.experts, layer.precisions, strict=True))
    assert alike.bytes_by_unit().max() <= alike.unit_bytes
    assert alike.predicted.least_error <= alike.predicted.output_error + 1e-12
    assert alike.predicted.lis < own.predicted.lis + 0.02


def test_fewer_bits_than_four_are_used_where_bytes_are_short():
    errors = {"int8": 0.005, "int4-g32": 0.05, "int3-g32": 0.1, "int2-g32": 0.3}
    profile = make_profile(skewed(3, layers=6, experts=16), error=errors)
    plan = make_plan(profile, bytes_fraction=0.4, error_bound=0.2)
    assert {q for layer in plan.layers for q in layer.precisions} & {"int3-g32", "int2-g32"}
    assert plan.bytes_by_unit().max() <= plan.unit_bytes
    coarse = make_plan(profile, bytes_fraction=0.4, error_bound=0.2, precisions=["bf16", "int8", "int4-g32"])
    assert plan.predicted.lis < coarse.predicted.lis


def test_sensitive_layers_keep_more_bits_and_the_divergence_is_predicted():
    plain = make_profile(skewed(4, layers=4), error=ERRORS)
    weighted = replace(plain, sensitivity=np.repeat([[10.0], [1.0], [1.0], [1.0]], 8, 1))
    plans = [make_plan(p, error_bound=0.03, bytes_fraction=0.7) for p in (plain, weighted)]
    first = [sum(s * plain.relative_error(q)[0, e] for e, q, s in zip(plan.layers[0].experts, plan.layers[0].precisions,
             plan.layers[0].shares, strict=True) if q != "bf16") for plan in plans]  # fmt: skip
    assert first[1] < 0.5 * first[0]
    assert plans[0].predicted.kl is None
    assert plans[1].predicted.kl == pytest.approx(plans[1].predicted.output_error ** 2 * 4 * 13 / 4)


def test_sensitive_experts_of_a_layer_keep_more_bits():
    plain = make_profile(skewed(4, layers=4), error=ERRORS)
    careful = np.ones((4, 8))
    careful[:, ::2] = 10.0
    plan = make_plan(replace(plain, sensitivity=careful), error_bound=0.03, bytes_fraction=0.7)
    bits = np.zeros(2)
    for layer in plan.layers:
        for expert, form in zip(layer.experts, layer.precisions, strict=True):
            bits[expert % 2] += precision(form).bits
    slots = np.bincount([expert % 2 for layer in plan.layers for expert in layer.experts])
    assert bits[0] / slots[0] > bits[1] / slots[1] + 1


def test_bits_by_frequency_never_beat_bits_by_error():
    windows = skewed(6, layers=6)
    profile = make_profile(windows, error=ERRORS)
    rng = np.random.default_rng(0)
    uneven = {name: error * rng.lognormal(0, 1, error.shape) for name, error in profile.output_error.items()}
    profile = replace(profile, output_error=uneven)
    ours, theirs = (make_plan(profile, bits_by=objective).predicted for objective in ("error", "frequency"))
    assert ours.output_error < theirs.output_error
    assert ours.bytes <= ours.budget_bytes
    assert theirs.bytes <= theirs.budget_bytes


def test_scale_of_the_counts_does_not_matter():
    windows = skewed(9)
    plans = [make_plan(make_profile(windows * factor), error_bound=0.05) for factor in (1, 10)]
    assert plans[1].predicted.lis == pytest.approx(plans[0].predicted.lis, abs=0.01)
    assert sum(p.num_slots for p in plans[1].layers) == pytest.approx(sum(p.num_slots for p in plans[0].layers), abs=6)


def test_names_of_experts_do_not_matter():
    windows = skewed(10, layers=6)
    order = np.random.default_rng(0).permutation(8)
    plain, renamed = (make_plan(make_profile(w, error=ERRORS)).predicted for w in (windows, windows[:, :, order]))
    assert renamed.lis == pytest.approx(plain.lis, abs=0.005)
    assert renamed.output_error == pytest.approx(plain.output_error, rel=0.1)


def test_unseen_experts_and_silent_layers_are_kept():
    windows = skewed(11)
    windows[:, 1] = 0
    windows[:, :, 5] = 0
    plan = make_plan(make_profile(windows, error=ERRORS))
    assert all(set(layer.experts) == set(range(8)) for layer in plan.layers)
    assert plan.layers[1].num_slots == 8
    assert np.isfinite(plan.predicted.lis)
    silent = make_plan(make_profile(np.zeros((2, 2, 4), int)))
    assert (silent.predicted.lis, silent.predicted.lis_raw, silent.predicted.lower_bound) == (1.0, 1.0, 1.0)


def test_layers_may_differ_in_width():
    windows = skewed(12)
    windows[:, 2:, 5:] = 0
    plan = make_plan(make_profile(windows, widths=[8, 8, 5, 5], error=ERRORS), error_bound=0.05)
    assert plan.units == 8
    assert [len(set(layer.experts)) for layer in plan.layers] == [8, 8, 5, 5]
    assert plan.bytes_by_unit().max() <= plan.unit_bytes


def test_holds_better_on_other_text_than_raw():
    """Plan on some windows, score on others of the same kind, with the plan's own shares."""
    drawn = skewed(13, layers=12, experts=16, windows=60)
    plan = make_plan(make_profile(drawn[::2], error=ERRORS))
    other = drawn[1::2].sum(0)
    excess = (plan.lis(other).mean() - 1) / (lis(other).mean() - 1)
    assert excess < 0.15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"error_bound": -0.1}, r"error_bound: -0.1 given; allowed is a number from 0 to inf"),
        ({"error_bound": float("nan")}, r"error_bound: nan given"),
        ({"error_bound": "small"}, r"error_bound: 'small' given"),
        ({"tolerance": -1}, r"tolerance: -1 given"),
        ({"bytes_fraction": 0}, r"bytes_fraction: 0 given; allowed is above 0"),
        ({"bytes_fraction": 0.2}, r"bytes_fraction: 0.2 allows .* allow more bytes"),
        ({"bytes_fraction": 0.6, "error_bound": 0.0}, r"error_bound: 0.0 given, but in .* the least is 0\.\d+; allow more"),
        ({"precisions": []}, r"precisions: none given"),
    ],
)
def test_refusals_say_what_is_allowed(options, message: str):
    with pytest.raises(PlanError, match=message):
        make_plan(make_profile(skewed(0)), **options)
