from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from equipoise.artifacts import Evaluation, LayerFacts, LayerPlan, ModelFacts, Plan, Predicted, Profile, Source
from equipoise.artifacts.evaluation import Contender, Interval, TaskResult, TextResult
from equipoise.metrics import gini, lis
from equipoise.reporting.rows import evaluation_rows, plan_rows, profile_rows
from equipoise.reporting.tables import evaluation_tables, plan_tables, profile_tables

WIDE, NARROW = 64, 60


@pytest.fixture
def facts() -> ModelFacts:
    layer: dict[str, Any] = {"top_k": 8, "matrices": ((2048, 2048), (2048, 1024))}
    layers = [
        LayerFacts(path=f"model.layers.{i}.mlp.experts", model_layer=i, num_experts=e, **layer)
        for i, e in ((0, WIDE), (1, NARROW))
    ]
    return ModelFacts(name="some/[model]", model_type="olmoe", dtype="bf16", fingerprint="f" * 64, layers=tuple(layers))


@pytest.fixture
def profile(facts: ModelFacts) -> Profile:
    rng = np.random.default_rng(0)
    windows = rng.integers(0, 9000, (30, 2, WIDE))
    windows[:, 1, NARROW:] = 0
    counts = np.zeros((2, 2, 2, WIDE), np.int64)
    counts[0, 0], counts[1, 0], counts[1, 1] = windows[:10].sum(0), windows[10:20].sum(0), windows[20:].sum(0)
    importance = {"wanda": counts.sum((0, 1)) * -1.0, "frequency": counts.sum((0, 1)) * 2.0, "flat": np.ones((2, WIDE))}
    return Profile(
        model=facts,
        source=Source(scenarios=("code", "a[long]scenario")),
        counts=counts,
        gate_mass=counts.sum(1) / 8,
        tokens=np.array([123456, 234567]),
        windows=windows,
        window_scenario=np.repeat([0, 1], [10, 20]),
        importance=importance,
    )


@pytest.fixture
def plan(facts: ModelFacts) -> Plan:
    layers = []
    for e in (WIDE, NARROW):
        shares = [1.0] * e + [1 / 3, 1 / 3]
        shares[5] = 1 / 3
        layers.append(
            LayerPlan(
                experts=(*range(e), 5, 5),
                precisions=("bf16",) * (e - 3) + ("int8", "int8", "int4-g32", "int8", "int8"),
                units=(*range(e), 8, 9),
                shares=tuple(shares),
            )
        )
    predicted = Predicted(
        lis_raw=2.5,
        lis=1.1,
        lis_max=1.2,
        lis_paper=1.3,
        lower_bound=1.05,
        output_error=None,
        bytes=10**9,
        budget_bytes=2 * 10**9,
        overrun_bytes=0,
    )
    return Plan(
        method="rq", model=facts, units=WIDE, unit_bytes=10**8, exactness="weights", layers=tuple(layers), predicted=predicted
    )


def interval(value: float, half: float) -> Interval:
    return Interval(value=value, low=value - half, high=value + half)


@pytest.fixture
def evaluation() -> Evaluation:
    def contender(name: str) -> Contender:
        text = {
            "tokens": 123456,
            "perplexity_base": 16.2,
            "perplexity": 1016.2125,
            "perplexity_change": interval(-0.0012, 0.0008),
        }
        text |= {"kl": interval(0.0123, 0.0003), "top1_agreement": interval(0.987, 0.002)}
        score: dict[str, Any] = {"lis_base": 12.123, "lis": 1.234, "lis_paper": 1.456}
        task = {"metric": "exact_match,flexible-extract", "items": 14042, "score_base": 0.778, "score": 0.771}
        return Contender(
            name=name,
            plan_method="rq-paper",
            exactness="weights",
            expert_bytes=12_345_678_901,
            texts=tuple(TextResult(name=n, **text, **score) for n in ("code", "wiki")),
            tasks=tuple(
                TaskResult(name=n, **task, difference=interval(-0.007, 0.112), **score)
                for n in ("truthfulqa_mc1", "arc_challenge")
            ),
            seconds=1234.56,
        )

    contenders = (contender("rq-paper"), contender("rq"))
    size = 20_000_000_000
    return Evaluation(base="some/[model]", base_fingerprint="f", base_expert_bytes=size, units=64, contenders=contenders)


def printed(tables: list[Any]) -> str:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in tables:
        console.print(table)
    return console.export_text()


def test_profile_rows_are_the_metrics_of_the_counts(profile: Profile) -> None:
    rows = profile_rows(profile)
    width = np.array([WIDE, NARROW])
    assert [row["lis"] for row in rows["layers"]] == pytest.approx(lis(profile.load, width).tolist())
    assert rows["mean"]["gini"] == pytest.approx(gini(profile.load, width).mean())
    assert rows["max"]["lis"] == pytest.approx(lis(profile.load, width).max())
    assert rows["layers"][1]["heaviest"] == int(profile.load[1].argmax())
    assert [row["lis_max"] for row in rows["scenarios"]] == pytest.approx(lis(profile.scenario_load, width).max(1).tolist())
    assert rows["scenarios"][0]["decode_share"] == 0.0
    assert rows["scenarios"][1]["decode_share"] > 0.3
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


@pytest.mark.parametrize(("each", "told"), [(99, ["code", "a[long]scenario"]), (100, [])])
def test_a_scenario_with_too_few_tokens_is_told(profile: Profile, each: int, told: list[str]) -> None:
    counts = np.zeros_like(profile.counts)
    counts[:, 0, 0], counts[:, 0, 1, :NARROW] = each, each
    few = Profile(
        model=profile.model, source=profile.source, counts=counts, gate_mass=counts.sum(1) / 8, tokens=profile.tokens,
        windows=profile.windows[:0], window_scenario=profile.window_scenario[:0],
    )  # fmt: skip
    assert [note.split("'")[1] for note in profile_rows(few)["notes"]] == told


def test_windows_run_on_within_a_scenario_and_start_anew_with_the_next(profile: Profile) -> None:
    rows = profile_rows(profile)["windows"]
    assert [row["window"] for row in rows] == [*range(10), *range(20)]
    first = [row for row in rows if row["window"] == 0]
    assert all(row["lis_instantaneous"] == row["lis_cumulative"] for row in first)
    last = lis(profile.windows[10:].sum(0), [WIDE, NARROW]).mean()
    assert rows[-1]["lis_cumulative"] == pytest.approx(last)


def test_importance_is_set_against_load_by_rank(profile: Profile) -> None:
    rows = {row["estimator"]: row for row in profile_rows(profile)["importance"]}
    assert rows["frequency"]["rank_correlation_with_load"] == pytest.approx(1.0)
    assert rows["frequency"]["layers_whose_heaviest_is_most_important"] == 2
    assert rows["wanda"]["rank_correlation_with_load"] == pytest.approx(-1.0)
    assert rows["flat"]["rank_correlation_with_load"] is None


def test_a_layer_that_served_nothing_has_no_balance(profile: Profile) -> None:
    counts = profile.counts.copy()
    counts[:, :, 1] = 0
    empty = Profile(
        model=profile.model, source=profile.source, counts=counts, gate_mass=profile.gate_mass, tokens=profile.tokens,
        windows=profile.windows[:0], window_scenario=profile.window_scenario[:0],
    )  # fmt: skip
    rows = profile_rows(empty)
    assert rows["layers"][1]["lis"] is None
    assert rows["mean"]["lis"] == rows["layers"][0]["lis"]
    assert rows["windows"] == rows["importance"] == []
    json.dumps(rows, allow_nan=False)
    assert " - " in printed(profile_tables(empty))


def test_plan_rows_count_slots_copies_and_bytes(plan: Plan) -> None:
    rows = plan_rows(plan)
    layer = rows["layers"][0]
    assert (layer["slots"], layer["copied_experts"], layer["most_copied"], layer["most_copies"]) == (66, 1, 5, 3)
    assert layer["precisions"] == {"bf16": 61, "int8": 4, "int4-g32": 1}
    assert rows["bytes"] == sum(row["bytes"] for row in rows["layers"]) == int(plan.bytes_by_unit().sum())
    assert rows["predicted"]["gap"] == pytest.approx(0.05)
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


def test_evaluation_rows_are_the_file_and_relative_bytes(evaluation: Evaluation) -> None:
    rows = evaluation_rows(evaluation)
    assert [c.pop("bytes_of_base") for c in rows["contenders"]] == [12_345_678_901 / 20_000_000_000] * 2
    for row, contender in zip(rows["contenders"], evaluation.contenders, strict=True):
        text = contender.texts[-1]
        assert row.pop("excess_removed") == pytest.approx(1 - (text.lis - 1) / (text.lis_base - 1))
    assert Evaluation.model_validate(rows) == evaluation


def test_tables_say_what_is_measured_and_what_is_predicted(profile: Profile, plan: Plan, evaluation: Evaluation) -> None:
    decided = printed(plan_tables(plan))
    assert "predicted" in decided
    assert "measured)" not in decided
    for tables in (profile_tables(profile), evaluation_tables(evaluation)):
        assert "measured" in printed(tables)
        assert "predicted)" not in printed(tables)


def test_tables_fit_80_columns_with_every_number_whole(profile: Profile, plan: Plan, evaluation: Evaluation) -> None:
    for tables, wanted in (
        (profile_tables(profile), ["some/[model]", "a[long]scenario", "234,567", "+1.000", "mean", "8/60"]),
        (plan_tables(plan), ["61 bf16, 4 int8, 1 int4-g32", "5 x3", "not measured", "1.050 (gap 0.050)"]),
        (
            evaluation_tables(evaluation),
            [
                "1016.212",
                "-0.20..-0.04",
                "0.0120..0.0126",
                "98.5..98.9",
                "-11.9..+10.5",
                "77.8",
                "61.7%",
                "11.50 GiB",
                "12.123",
            ],
        ),
    ):
        text = printed(tables)
        assert max(map(len, text.splitlines())) <= 80
        for piece in wanted:
            assert piece in text
        assert "…" not in text


def test_a_tiny_divergence_is_not_shown_as_none(evaluation: Evaluation) -> None:
    first, *others = evaluation.contenders
    texts = tuple(t.model_copy(update={"kl": Interval(value=2.3e-9, low=1.2e-9, high=3.4e-9)}) for t in first.texts)
    tiny = evaluation.model_copy(update={"contenders": (first.model_copy(update={"texts": texts}), *others)})
    text = printed(evaluation_tables(tiny))
    assert "1.2e-09..3.4e-09" in text
    assert max(map(len, text.splitlines())) <= 80


def test_many_windows_are_thinned_but_the_last_is_shown(profile: Profile) -> None:
    text = printed(profile_tables(profile))
    table = text[text.index("LIS of windows") :]
    lines = [line for line in table.splitlines() if line.strip().startswith(("code", "a[long]"))]
    assert len(lines) == 12
    assert " 19 " in lines[-1]


def test_a_plan_without_prediction_and_an_evaluation_without_tasks(plan: Plan, evaluation: Evaluation) -> None:
    assert "predicted" not in printed(plan_tables(plan.model_copy(update={"predicted": None})))
    bare = tuple(c.model_copy(update={"tasks": (), "promise_kept": False}) for c in evaluation.contenders)
    text = printed(evaluation_tables(evaluation.model_copy(update={"contenders": bare})))
    assert "truthfulqa" not in text
    assert "BROKEN" in text


def test_tables_need_no_torch() -> None:
    code = "import sys, equipoise.reporting.tables; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
