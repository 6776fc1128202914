"""The figures of a report hold the values that they claim to, whatever draws them."""

from __future__ import annotations

import base64
import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.metrics import jensen_shannon, lis
from equipoise.reporting import palette
from equipoise.reporting.charts import Bars, Grid, Intervals, Lines, Points, doublings, ratio_limit, ratio_ticks
from equipoise.reporting.charts_plotly import figure_spec, packed
from equipoise.reporting.evidence import Evidence
from equipoise.reporting.figures_frontier import frontier_figure
from equipoise.reporting.figures_importance import importance_figure, standing
from equipoise.reporting.figures_load import MOST_SCENARIOS, drift_figure, drift_LSS, lis_figure, load_figure
from equipoise.reporting.figures_plan import bits_and_copies, memory_figure, slots_figure, units_figure
from equipoise.reporting.figures_quality import quality_figure
from equipoise.reporting.numbers import bytes_text, percent
from equipoise.reporting.report_parts import make_report
from reporting import report_cases as cases


@pytest.fixture
def evidence() -> Evidence:
    profile = cases.profile()
    plans = {"rq": cases.rq_plan(profile), "ranks": cases.rank_plan(profile, ranks=cases.WIDE)}
    return Evidence(profile, plans, cases.evaluation(), cases.frontier())


def unpacked(spec: dict) -> np.ndarray:
    values = np.frombuffer(base64.b64decode(spec["bdata"]), np.dtype(f"<{spec['dtype']}"))
    return values.reshape([int(n) for n in spec.get("shape", str(values.size)).split(",")])


def views(figure) -> dict:
    return {view.name: view for view in figure.views}


def test_every_figure_is_made_and_says_where_its_figures_come_from(evidence):
    figures = make_report(evidence).figures
    keys = ["load", "lis", "importance", "slots", "units", "memory", "quality", "frontier", "drift"]
    assert [figure.key for figure in figures] == keys
    for figure in figures:
        assert figure.views
        assert all(view.origins for view in figure.views)
        assert figure.caption.endswith(".")
        assert figure.table is not None
        assert all(len(row) == len(figure.table.heads) for row in figure.table.rows)


def test_the_load_map_is_the_load_over_the_mean_and_empty_where_there_is_no_expert(evidence):
    figure = load_figure(evidence)
    grid = views(figure)["all traffic"].chart
    load = evidence.profile.load
    assert grid.values[0] == pytest.approx(load[0] * cases.WIDE / load[0].sum())
    assert np.isnan(grid.values[1, cases.NARROW :]).all()
    assert grid.values[1, : cases.NARROW].mean() == pytest.approx(1.0)
    assert grid.details[1].values[0].sum() == pytest.approx(1.0)
    assert views(figure)["d"].chart.details[0].values.tolist() == evidence.profile.scenario_load[1].tolist()
    after = views(figure)["after rq"]
    assert after.origins == ("predicted",)
    assert after.chart.values[0, 1] == pytest.approx(grid.values[0, 1] / 3)
    assert after.chart.notes[0][1] == "3 slots: int8 33%, int8 33%, int8 33%"
    assert after.chart.notes[0][0] == "bf16"


def test_lis_of_layers_before_and_after(evidence):
    over_units = views(lis_figure(evidence))["over units"].chart
    profile, plans = evidence.profile, evidence.plans
    lines = {line.name: line.values for line in over_units.lines}
    assert lines["rq"].tolist() == plans["rq"].lis(profile.load).tolist()
    assert lines["as it is"][0] == pytest.approx(lis(profile.load, profile.widths)[0])
    paper = {line.name: line.values for line in views(lis_figure(evidence))["as the paper counts"].chart.lines}
    assert paper["rq"].tolist() == plans["rq"].lis_paper(profile.load).tolist()


def test_layers_of_an_encoder_and_a_decoder_are_told_apart():
    profile = cases.profile(cases.facts(stacks=True))
    assert Evidence(profile).layer_labels == ("enc 0", "dec 1")
    assert Evidence(cases.profile()).layer_labels == ("3", "4")


def test_importance_by_place_and_by_layer(evidence):
    figure = importance_figure(evidence)
    assert list(views(figure)) == ["gate_norm", "wanda", "by layer"]
    correlation = {line.name: line.values for line in views(figure)["by layer"].chart.lines}
    assert correlation["wanda"] == pytest.approx(-1.0)
    cloud = views(figure)["wanda"].chart.clouds[0]
    assert len(cloud.x) == len(cloud.labels) == cases.WIDE + cases.NARROW
    assert cloud.x + cloud.y == pytest.approx(1.0)
    assert importance_figure(Evidence(cases.profile(importance=False))) is None


def test_many_experts_are_counted_in_cells():
    model = cases.facts(layers=12, experts=256, narrow=256)
    figure = importance_figure(Evidence(cases.profile(model)))
    grid = views(figure)["wanda"].chart
    assert isinstance(grid, Grid)
    assert grid.values.sum() == 12 * 256
    assert grid.values[0, 0] > 0  # the most important, on the first row, are the least loaded
    assert grid.values[0, -1] == 0


@given(st.lists(st.integers(0, 5), min_size=2, max_size=30))
def test_standing_keeps_order_and_ties(values):
    place = standing(np.array(values))
    assert ((place >= 0) & (place <= 1)).all()
    for i, a in enumerate(values):
        for j, b in enumerate(values):
            assert (a < b) == (place[i] < place[j])


def test_drift_is_the_divergence_and_its_diagonal_the_chance():
    profile = cases.profile()
    drift = drift_LSS(profile, [0, 1])
    assert drift[:, 0, 1] == pytest.approx(jensen_shannon(*profile.scenario_load))
    assert drift[:, 0, 1].tolist() == drift[:, 1, 0].tolist()
    halves = profile.windows[0:4:2].sum(0), profile.windows[1:4:2].sum(0)
    assert drift[:, 0, 0] == pytest.approx(jensen_shannon(*halves))
    assert (drift[:, 0, 0] < drift[:, 0, 1]).all()


def test_scenarios_with_one_window_have_no_diagonal():
    profile = cases.profile()
    one = dataclasses.replace(profile, windows=profile.scenario_load, window_scenario=np.arange(2))
    grid = views(drift_figure(Evidence(one)))["between scenarios"].chart
    assert np.isnan(np.diagonal(grid.values)).all()
    assert np.isfinite(grid.values[0, 1])
    assert drift_figure(Evidence(cases.profile(scenarios=1))) is None


def test_many_scenarios_are_limited_to_the_busiest():
    profile = cases.profile()
    counts = np.concatenate([profile.counts[:1] * (s + 1) for s in range(12)])
    source = profile.source.model_copy(update={"scenarios": tuple(f"s{s}" for s in range(12))})
    many = dataclasses.replace(
        profile, source=source, counts=counts, gate_mass=counts.sum(1) / 2, tokens=np.arange(12) + 1,
        windows=profile.windows[:0], window_scenario=profile.window_scenario[:0],
    )  # fmt: skip
    figure = load_figure(Evidence(many))
    assert [view.name for view in figure.views][1:] == [f"s{s}" for s in range(12 - MOST_SCENARIOS, 12)]
    assert "4 scenarios with fewer tokens are not drawn" in figure.caption


def test_bits_and_copies_of_every_expert(evidence):
    plan = evidence.plans["rq"]
    bits, copies = bits_and_copies(plan)
    assert bits[0].tolist() == [16, 8, 16, 16, 16, 4, 16, 16]
    assert copies[0].tolist() == [1, 3, 1, 1, 1, 1, 1, 1]
    assert np.isnan(bits[1, cases.NARROW :]).all()
    grid = views(slots_figure(evidence))["bits rq"].chart
    assert [grid.levels[int(v)] for v in grid.values[0]] == ["16", "8", "16", "16", "16", "4", "16", "16"]
    assert "bits ranks" not in views(slots_figure(evidence))  # all in the model's own format
    table = slots_figure(evidence).table
    assert table.rows[0] == ["rq", "rq", "weights", "10 bf16, 6 int8, 2 int4-g32", "18", "4", "2", "8", "0.0200", "-"]


def test_units_are_maps_of_unit_load_and_placements_have_a_forecast(evidence):
    figure = units_figure(evidence)
    plan = evidence.plans["ranks"]
    load = plan.unit_load(evidence.profile.load)
    grid = views(figure)["after ranks"].chart
    assert grid.values.max(1) == pytest.approx(lis(load))
    lines = {line.name: line.values for line in views(figure)["forecast"].chart.lines}
    assert lines["scenarios held out"].tolist() == [1.4, 1.4]
    assert figure.title == "Load of every unit"
    alone = Evidence(evidence.profile, {"ranks": cases.rank_plan(evidence.profile, held_out=None)})
    figure = units_figure(alone)
    assert figure.title == "Load of every rank"
    assert "scenarios held out" not in {line.name for line in views(figure)["forecast"].chart.lines}


def test_memory_adds_up_to_the_bytes_of_the_plan(evidence):
    chart = memory_figure(evidence).views[0].chart
    size = {"KiB": 1024, "MiB": 1024**2}[chart.x_name.split()[-1]]
    totals = np.sum([values for _, values in chart.parts], 0) * size
    plan = evidence.plans["rq"]
    assert totals[1] == pytest.approx(plan.bytes_by_unit().sum())
    assert chart.parts[0][0] == "bf16"
    marks = {(where, name): value * size for where, value, name in chart.marks}
    assert marks[1, "measured from the tensors"] == pytest.approx(120_000)
    assert marks[1, "what the units hold"] == pytest.approx(plan.units * plan.unit_bytes)
    unsized = cases.profile(cases.facts(sized=False))
    assert memory_figure(Evidence(unsized, {"ranks": cases.rank_plan(unsized)})) is None


def test_quality_has_every_text_and_task_with_its_interval(evidence):
    figure = quality_figure(evidence)
    assert list(views(figure)) == ["perplexity", "KL", "top-1", "tasks", "balance"]
    first = views(figure)["perplexity"].chart.estimates[0]
    assert (first.group, first.series) == ("c", "rq")
    assert (first.value, first.low, first.high) == pytest.approx((0.1, -0.2, 0.4))
    assert "+0.10 % (-0.20..+0.40)" in figure.table.rows[0]
    assert {e.series for e in views(figure)["balance"].chart.estimates} == {"as it is", "rq"}


def test_the_frontier_is_drawn_with_the_plans_of_the_page(evidence):
    figure = frontier_figure(evidence)
    assert list(views(figure)) == ["by bytes", "by error"]
    clouds = {cloud.name: cloud for cloud in views(figure)["by bytes"].chart.clouds}
    assert len(clouds["error up to 0.05"].x) == 2
    assert len(clouds["error up to 0"].x) == 1  # half the bytes without error: no plan
    assert list(clouds["plans of this page"].labels) == ["plan rq"]
    assert len(figure.table.rows) == 4
    assert frontier_figure(dataclasses.replace(evidence, frontier=())) is None


@pytest.mark.parametrize(
    "evidence",
    [
        Evidence(cases.profile()),
        Evidence(cases.profile(cases.facts(sized=False))),
        Evidence(cases.profile(scenarios=1, importance=False)),
        Evidence(plans={"rq": cases.rq_plan(cases.profile())}),
        Evidence(plans={"exact": cases.rq_plan(cases.profile(), exact=True)}),
        Evidence(evaluation=cases.evaluation()),
        Evidence(cases.profile(), {"rq": cases.rq_plan(cases.profile()).model_copy(update={"predicted": None})}),
    ],
    ids=["profile", "records", "bare profile", "plan", "exact plan", "evaluation", "plan without prediction"],
)
def test_a_report_of_whatever_there_is(evidence):
    report = make_report(evidence)
    assert report.figures
    for figure in report.figures:
        json.dumps(figure_spec(figure), allow_nan=False)


def test_charts_carry_their_values_to_plotly(evidence):
    report = make_report(evidence)
    kinds = {type(view.chart) for figure in report.figures for view in figure.views}
    assert kinds == {Grid, Lines, Points, Bars, Intervals}
    by_key = {figure.key: figure_spec(figure) for figure in report.figures}
    trace = by_key["load"]["views"][0]["data"][0]
    shown = load_figure(evidence).views[0].chart
    ratio = unpacked(trace["customdata"])[..., 0]
    assert ratio == pytest.approx(shown.values, rel=1e-3, nan_ok=True)
    assert unpacked(trace["customdata"])[..., 1] == pytest.approx(shown.details[0].values)  # counts are exact
    assert 2.0 ** unpacked(trace["z"])[0, 1] == pytest.approx(shown.values[0, 1], rel=2e-2)
    assert np.isnan(unpacked(trace["z"])[1, cases.NARROW :]).all()


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_packed_numbers_keep_three_digits_and_whole_ones_all(values):
    array = np.array(values)
    assert unpacked(packed(array, "f8")) == pytest.approx(array, rel=1e-3, abs=1e-300)
    whole = np.floor(array)
    assert unpacked(packed(whole, "f4")).tolist() == whole.astype(np.float32).tolist()


def test_ratios_are_shown_by_doublings_between_the_ends_of_the_scale(evidence):
    values = np.array([0.0, 0.5, 1.0, 2.0, 64.0, np.nan])
    assert doublings(values, 3.0)[:5].tolist() == [-3.0, -1.0, 0.0, 1.0, 3.0]
    assert np.isnan(doublings(values, 3.0)[5])
    places, labels = ratio_ticks(2.0)
    assert labels == ["1/4x", "1/2x", "1x", "2x", "4x"]
    assert [2**place for place in places] == [0.25, 0.5, 1, 2, 4]
    assert 1 <= ratio_limit(load_figure(evidence).views) <= 5


def test_both_themes_have_every_colour():
    assert palette.LIGHT.keys() == palette.DARK.keys()
    for name in ("ratio", "amount", "bits", "copies"):
        ends = palette.scale(palette.LIGHT, name)
        assert palette.steps(palette.LIGHT, name, len(ends)) == ends
    assert palette.steps(palette.LIGHT, "bits", 1) == palette.scale(palette.LIGHT, "bits")[-1:]


@pytest.mark.parametrize("theme", [palette.LIGHT, palette.DARK], ids=["light", "dark"])
def test_text_and_series_stand_out_from_their_ground(theme):
    """Contrast as WCAG 2.2 defines it: 4.5 for text, 3 for what else must be seen."""

    def luminance(colour: str) -> float:
        channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    def contrast(one: str, other: str) -> float:
        low, high = sorted((luminance(theme[one]), luminance(theme[other])))
        return (high + 0.05) / (low + 0.05)

    for name in ("ink", "soft", "measured", "predicted", "decided", "quoted", "accent"):
        assert contrast(name, "surface") >= 4.5, name
        assert contrast(name, "ground") >= 4.5, name
    for name in ("raw", *(f"c{k}" for k in range(palette.SERIES))):
        assert contrast(name, "surface") >= 3, name


def test_numbers_in_words():
    assert [bytes_text(n) for n in (0, 1023, 1024, 3 * 2**20)] == ["0 B", "1023 B", "1.00 KiB", "3.00 MiB"]
    assert bytes_text(5 * 2**50) == "5120.00 TiB"
    assert percent(-0.000001, 2, sign=True) == "+0.00 %"
    assert percent(float("nan")) == percent(None) == "-"
