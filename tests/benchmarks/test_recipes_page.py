"""The page of recipes: figures over seeds, and only what was run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="module")
def pages(script):
    return script("recipes_page")


def judged(seed, scale):
    return {
        "seed": seed, "steps": 9, "perplexity": 80.0 * scale, "other_perplexity": 300.0,
        "maxvio": 0.2, "maxvio_training": 0.1 * scale, "pes": 0.01, "parameters": 7, "experts_per_token": {"a": 2.0},
        "lis": {"mix": 1.5, "inside": {"a": 2.0, "b": 3.0}, "outside": {"c": 4.0}},
        "rq": {"mix": 1.25, "inside": {"a": 1.5, "b": 1.5}, "outside": {"c": 2.5}, "perplexity": 88.0 * scale,
               "other_perplexity": 1.0},
    }  # fmt: skip


def test_mean_and_spread_over_seeds_and_the_share_that_is_removed(pages):
    arm = SimpleNamespace(name="none", group="balance", told="the control")
    text = pages.page(
        [arm, SimpleNamespace(name="unseen", group="balance", told="")], {"none": [judged(0, 1), judged(1, 2)]}, [], None
    )
    assert "| none (the control) | 120.0 ± 56.6 | 300.0 ± 0.0 | 0.150 ± 0.071 | 0.200 ± 0.000 | 3.000 ± 0.000 |" in text
    # Excess 0.5 becomes 0.25; on each domain alone 1.5 becomes 0.5; on others 3 becomes 1.5.
    assert "| 0.50 ± 0.00 | 1.50 ± 0.00 | 3.00 ± 0.00 | 50 ± 0 | 67 ± 0 | 50 ± 0 | 10.00 ± 0.00 |" in text
    assert "unseen" not in text
    assert "dynamic-moe" not in text
    assert "seeds 0, 1; 9 steps" in text


def test_tables_go_between_the_marks_of_the_page(pages, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "".join(f"{name}:\n<!-- {name}: begin -->\nold\n<!-- {name}: end -->\n" for name in ("balance", "simbal", "left"))
    )
    pages.page([SimpleNamespace(name="none", group="balance", told="")], {"none": [judged(0, 1)]}, [], page)
    assert "old" not in page.read_text()
    assert page.read_text().count("| none |") == 3


def test_the_page_has_a_mark_for_every_table(pages):
    text = (Path(__file__).parents[2] / "docs" / "lab-recipes.md").read_text()
    for name in (*pages.GROUPS, "left"):
        assert text.count(f"<!-- {name}: begin -->") == text.count(f"<!-- {name}: end -->") == 1


def test_an_easier_domain_is_one_that_is_predicted_better(pages):
    told = {"loss": {"a": 5.0, "b": 3.0, "c": 4.0}, "domains": {"a": 2.5, "b": 2.0, "c": 9.0}}
    assert pages._hard_minus_easy(told) == 0.5
