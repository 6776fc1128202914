"""A simulation's tables and picture."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dispatch.cases import make_model, make_plan, random_ids
from equipoise.errors import EquipoiseError
from equipoise.reporting.simulation import simulation_tables
from equipoise.reporting.simulation_plot import simulation_plot
from equipoise.simulation import SimulationReport, Trace, simulate


@pytest.fixture(scope="module")
def report() -> SimulationReport:
    model = make_model(2, 8, 2)
    traces = [Trace(f"t{i}", random_ids(np.random.default_rng(i), 2, 400, 2, 8), np.arange(400) // 40) for i in range(2)]
    plans = {"[bold]copied": make_plan(model, [[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]] * 2, 4, nodes=2)}
    return simulate(traces[0], plans, held_out=traces[1], batch=40, rule="llep", rule_options={"least": 1, "gate": 1.0})


def text_of(rows: dict) -> str:
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    for part in simulation_tables(rows):
        console.print(part)
    return console.file.getvalue()


def test_tables_show_what_the_report_holds(report: SimulationReport):
    text = text_of(report.model_dump(mode="json"))
    assert max(map(len, text.splitlines())) <= 80
    assert "in sample: t0, 10 batches (replayed)" in text
    assert "out of sample: t1, 10 batches (replayed)" in text
    assert "no plan" in text
    flat = " ".join(text.split())
    assert "rule llep, least 1, gate 1.0" in flat
    assert "[bold]copied" in "".join(text.split())  # names are text, not markup
    for part in report.parts:
        for result in part.results:
            assert f"{result.imbalance.mean:.3f}" in flat
            assert f"{result.rank_sends:.3f}" in flat
            assert f"{result.weights_moved:.1f}" in flat
    assert "WORSE" in flat
    assert "no GPU was run" in flat


def test_estimates_are_called_so_and_missing_figures_are_dashes(report: SimulationReport):
    rows = report.model_dump(mode="json")
    part = rows["parts"][0]
    part["origin"] = "estimated"
    for result in part["results"]:
        result |= {"rank_hops": None, "node_hops": None, "bytes_moved": None, "max_bytes": None, "uncovered": 0.25}
        result["ranks"]["bytes"] = None
    rows["parts"] = [part]
    text = text_of(rows)
    assert "(estimated)" in text
    assert "(replayed)" not in text
    assert "25.0% of times lie beyond the cost table" in " ".join(text.split())
    assert "bytes read" not in text.split("* ")[0]


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_picture_is_written_whole(report: SimulationReport, tmp_path: Path, ending: str):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"s.{ending}"
    simulation_plot(report.model_dump(mode="json"), path)
    assert path.read_bytes().startswith(b"\x89PNG" if ending == "png" else b"<?xml")
    assert path.stat().st_size > 5_000
    assert list(tmp_path.iterdir()) == [path]


def test_pictures_that_cannot_be(report: SimulationReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = report.model_dump(mode="json")
    with pytest.raises(EquipoiseError, match=r"allowed endings are \.png, \.svg"):
        simulation_plot(rows, tmp_path / "s.jpg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(EquipoiseError, match="pip install matplotlib"):
        simulation_plot(rows, tmp_path / "s.png")
    assert not list(tmp_path.iterdir())
