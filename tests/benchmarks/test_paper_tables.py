"""The paper's tables: arms of the ablation as plans, counts that sentences are made of, and figures read from pages."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from equipoise.planning.methods import make_plan
from planning.cases import make_profile, skewed

ROOT = Path(__file__).parents[2]
NAMES = ("ablation_arms", "tables_parts", "tables_tasks", "tables_ablation", "tables_generation", "tables_unmeasured",
         "streaming_figure")  # fmt: skip


@pytest.fixture(scope="module")
def paper(script):
    return SimpleNamespace(**{name: script(name) for name in NAMES})


@pytest.fixture
def profile():
    wanda = np.random.default_rng(3).random((4, 8))
    return make_profile(skewed(1), importance={"wanda": wanda}, error={"int8": 0.01})


def arm(paper, name):
    return next(one for one in (*paper.ablation_arms.ARMS, *paper.ablation_arms.GRID) if one.name == name)


def test_the_published_arm_is_the_published_method(paper, profile):
    published = make_plan(profile, "rq-paper")
    for name in ("R&Q (`rq-paper`)", "heaviest / less important"):
        made = paper.ablation_arms.arm_plan(profile, arm(paper, name), 0)
        assert made.layers == published.layers
        assert made.unit_bytes == published.unit_bytes
        assert made.predicted.lis_paper == published.predicted.lis_paper


def test_bytes_of_the_settings(paper, profile):
    bf16 = sum(layer.num_experts * 2 * (64 * 32 + 32 * 32) for layer in profile.model.layers)

    def share(name):
        return paper.ablation_arms.arm_plan(profile, arm(paper, name), 0).predicted.bytes / bf16

    # One of eight experts: its half is saved, its half is added, or both; scales are what is beyond.
    assert share("only quantize the less important") == pytest.approx(1 - 1 / 16, abs=0.01)
    assert share("only replicate the heavy hitter, the copy quantized") == pytest.approx(1 + 1 / 16, abs=0.01)
    assert share("only replicate the heavy hitter, both quantized") == pytest.approx(1, abs=0.01)
    assert share("quantize all") == pytest.approx(0.5, abs=0.04)
    grid = {share(one.name) for one in paper.ablation_arms.GRID}
    assert len(grid) == 1
    assert grid.pop() == share("R&Q (`rq-paper`)")


def test_who_is_chosen(paper, profile):
    load, wanda = profile.load, profile.importance["wanda"]
    for one in paper.ablation_arms.GRID:
        for layer in range(4):
            copied, partner = paper.ablation_arms.chosen(profile, one, layer, "int8", np.random.default_rng(0))
            assert copied != partner
            if one.copied == "heaviest":
                assert copied == load[layer].argmax()
            if one.copied == "most important":
                assert copied == wanda[layer].argmin()
            others = [e for e in range(8) if e != copied]
            if one.quantized == "least frequent":
                assert partner == min(others, key=lambda e: load[layer, e])
            if one.quantized == "less important":
                assert partner == max(others, key=lambda e: wanda[layer, e])


def test_draws_differ_only_where_something_is_drawn(paper, profile):
    for one in paper.ablation_arms.GRID:
        plans = [paper.ablation_arms.arm_plan(profile, one, seed).layers for seed in range(3)]
        assert (plans[0] == plans[1] == plans[2]) is not one.random


def result(lis_base, lis, lis_paper, value, half, score=0.25):
    return {
        "lis_base": lis_base, "lis": lis, "lis_paper": lis_paper, "score_base": score, "items": 100, "bytes": 98,
        "difference": {"value": value, "low": value - half, "high": value + half},
    }  # fmt: skip


def test_table_2_counts_what_it_says(paper):
    cells = [
        ("switch-8", "mmlu", {"chance": 0.25, "units": 8, "base_bytes": 100, "contenders": {
            "rq-paper": result(2.0, 2.5, 1.0, 0.02, 0.01), "rq": result(2.0, 1.0, 0.9, 0.0, 0.05)}}),
        ("mine", "piqa", {"chance": 0.5, "units": 8, "base_bytes": 100, "contenders": {
            "rq-paper": result(2.0, 1.0, 1.0, -0.01, 0.02, score=0.75), "rq": result(2.0, 1.0, 0.9, -0.2, 0.1, score=0.75)}}),
    ]  # fmt: skip
    text = paper.tables_tasks.page(cells)
    assert "| `switch-8` | mmlu (100) | 2.000 | 2.500 | 1.000 | 1.000 | 25.0 (chance) | 25.0 | +2.0 (+1.0..+3.0) |" in text
    assert "1.54 to 1.30, +2.2 points (quoted)" in text
    assert "| `mine` | piqa (100) | 2.000 | 1.000 | 1.000 | 1.000 | 75.0 | 50.0 |" in text
    assert "lowers the paper's own score in 2 and LIS over units in 1 of 2 cells" in text
    assert "leaves zero out in 2 of 4 differences" in text
    assert "`rq-paper` 1 better and 0 worse of 2, `rq` 0 better and 1 worse of 2" in text
    assert "in 1 of 2 cells" in text


def test_continuations_are_compared_token_by_token(paper):
    module = paper.tables_generation
    assert module.common_prefix([1, 2, 3], [1, 2, 3]) == 3
    assert module.common_prefix([1, 2, 3], [1, 9, 3]) == 1
    assert module.bag_f1([1, 1, 2], [1, 3, 4]) == pytest.approx(1 / 3)
    cell = {
        "answers": {"raw": [[1, 2], [3, 4], [5, 6]], "rq": [[1, 2], [3, 9], [5, 6]]},
        "documents": [[1, 2], [3, 4], [7, 8]],
        "lis": {"raw": [2.0, 2.0], "rq": [1.0, 0.9]},
    }
    assert module.row("raw", cell) == "| raw | 2.000 | 2.000 | | | 66.7 | |"
    told = module.row("rq", cell)
    assert told.startswith("| `rq` | 1.000 | 0.900 | 67 (")
    assert "| 1.7 of 2 | 50.0 | -16.7 (" in told


def test_tables_of_a_page_are_read(paper):
    module = paper.tables_unmeasured
    found = module.tables("## First\n\n| a | |\n|---|---|\n| `x` | 1 |\n| | 2 |\n\n**second**, more\n\n| b |\n|---|\n| 3 |\n")
    assert [table.heading for table in found] == ["First", "second"]
    assert found[0].rows == ({"a": "x", "1": "1"}, {"a": "x", "1": "2"})
    assert module.where(found[1], "b", "3") == {"b": "3"}
    with pytest.raises(SystemExit, match="no row 'z'"):
        module.where(found[0], "a", "z")
    with pytest.raises(SystemExit, match="no table under 'third'"):
        module.only(found, "third")


def test_what_is_not_measured_is_found_on_the_pages(paper):
    module = paper.tables_unmeasured
    for part in (module.ranks, module.kernels, module.memory, module.replanning):
        lines = list(part())
        assert lines
        assert all(line.count("|") == 4 and ".md" in line for line in lines)
    assert "settings" in module.slower()


def test_the_stream_is_cut_into_ten(paper):
    steps = np.arange(23 * 2 * 3).reshape(23, 2, 3)
    cut = paper.streaming_figure.in_segments(steps)
    assert cut.shape == (10, 2, 3)
    assert (cut.sum(0) == steps.sum(0)).all()


def test_the_page_has_a_mark_for_every_table():
    text = (ROOT / "docs" / "paper.md").read_text()
    for name in ("paper-table-2", "paper-table-3", "paper-streaming", "paper-generation", "paper-unmeasured"):
        assert text.count(f"<!-- {name}: begin -->") == text.count(f"<!-- {name}: end -->") == 1
