"""The arithmetic behind the tables of the quantization benchmarks: which calibration stands where, what is beyond chance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture(scope="module")
def page(script) -> ModuleType:
    return script("quantization_page")


@dataclass(frozen=True)
class Cell:
    method: str
    text: str
    seed: int


DOCUMENTS = {"c": [0, 0, 1, 2], "prose": [0, 1, 1, 2]}


def half_of(domain: str) -> str:
    return "technical" if domain == "c" else "language"


def measured(loss_by_domain: dict[str, float]) -> dict:
    """What a run keeps: 10 tokens a row, a loss of 2 nats a token before, and of so many nats more after."""
    rng = np.random.default_rng(0)
    sums = {}
    for domain, more in loss_by_domain.items():
        noise = rng.normal(0, 1e-3, 4)
        sums[domain] = {
            "tokens": [10.0] * 4,
            "nll_base": [20.0] * 4,
            "nll": (20.0 + 10 * more + noise).tolist(),
            "kl": [10 * more] * 4,
        }
    return {"documents": DOCUMENTS, "sums": {"int4": sums}}


def grid() -> dict:
    """GPTQ costs 0.01 on the half that it was calibrated on and 0.03 on the other; RTN 0.05; own text 0.02."""
    cells = {Cell("rtn", "none", 0): measured({"c": 0.05, "prose": 0.05})}
    for seed in range(2):
        cells[Cell("gptq", "technical", seed)] = measured({"c": 0.01, "prose": 0.03})
        cells[Cell("gptq", "language", seed)] = measured({"prose": 0.01, "c": 0.03})
        cells[Cell("gptq", "self", seed)] = measured({"prose": 0.02, "c": 0.02})
    return cells


def test_each_half_is_pooled_under_the_calibration_of_its_place(page: ModuleType) -> None:
    pooled = page.pool(grid(), "int4", half_of)
    expected = {("rtn", "none"): 0.05, ("gptq", "in-domain"): 0.01, ("gptq", "other-domain"): 0.03, ("gptq", "self"): 0.02}
    assert set(pooled) == set(expected)
    for variant, more in expected.items():
        assert pooled[variant].change().value == pytest.approx(np.expm1(more), abs=1e-3)
        assert pooled[variant].kl() == pytest.approx(more)
        assert pooled[variant].tokens_G.tolist() == [20, 10, 10, 10, 20, 10]  # rows of one document are one unit


def test_seeds_are_rows_and_are_averaged(page: ModuleType) -> None:
    pooled = page.pool(grid(), "int4", half_of)
    assert pooled[("rtn", "none")].nll_SG.shape == (1, 6)
    assert pooled[("gptq", "self")].nll_SG.shape == (2, 6)
    assert pooled[("gptq", "self")].changes().mean() == pytest.approx(pooled[("gptq", "self")].change().value, rel=1e-6)


def test_a_difference_is_beyond_chance_only_if_every_seed_agrees(page: ModuleType) -> None:
    tokens, base = np.full(6, 100.0), np.full(6, 200.0)
    low = page.Pooled(tokens, base, np.stack([base + 1, base + 1]), np.zeros((2, 6)))
    high = page.Pooled(tokens, base, np.stack([base + 9, base + 9]), np.zeros((2, 6)))
    torn = page.Pooled(tokens, base, np.stack([base + 9, base + 0.5]), np.zeros((2, 6)))
    better, sure = low.against(high)
    assert sure
    assert better.value == pytest.approx(np.expm1(-0.08))
    assert high.against(low)[1]
    assert not torn.against(low)[1]
    assert not low.against(low)[1]


def test_the_page_counts_what_it_shows(page: ModuleType) -> None:
    whole = page.Page(["rtn", "gptq"], ["int4"])
    rows = list(whole.add("small", grid(), half_of))
    assert len(rows) == 1
    assert whole.variants == [("rtn", "none"), ("gptq", "in-domain"), ("gptq", "other-domain"), ("gptq", "self")]
    text = whole.text("foot")
    assert "**GPTQ, in-domain, against RTN**: better 1, worse 0, not told apart 0 of 1" in text
    assert "AGQ" not in text  # nothing is said of what was not measured
    assert whole.figures["small"]["int4"]["gptq/self"]["kl_by_seed"] == pytest.approx([0.02, 0.02])


def test_only_the_marked_part_of_a_file_changes(page: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "results.md"
    file.write_text("before\n<!-- x: begin -->\nold\n<!-- x: end -->\nafter\n")
    page.write_between(file, "x", "new")
    assert file.read_text() == "before\n<!-- x: begin -->\nnew\n<!-- x: end -->\nafter\n"
    with pytest.raises(SystemExit, match="no '<!-- y: begin -->'"):
        page.write_between(file, "y", "new")
