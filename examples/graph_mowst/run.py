"""Mowst and Mowst-star against an MLP, a GNN and a GNN with an MLP skip, over ten splits of four graphs; one command.

    python examples/graph_mowst/run.py --write

Without `--data DIR` (with DIR/planetoid and DIR/heterophilous) torch-geometric downloads the graphs. A stopped run goes on
where it was. Every model gets the same tuning budget: the same grid of recipes on the first splits, of which the one with the
best mean validation score is taken for all splits.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from mowst.cells import Bench, Cell, controls, models
from mowst.graphs import GRAPHS, SPLITS, load
from mowst.page import page
from mowst.training import Recipe

from equipoise.artifacts.files import write_atomic
from equipoise.errors import EquipoiseError
from equipoise.profiling.progress import ProgressBar

HERE = Path(__file__).parent
GRID = tuple((lr, dropout) for lr in (0.01, 0.003) for dropout in (0.2, 0.5))
"""The recipes that are tried: learning rate and dropout."""


def compare(bench: Bench, told: argparse.Namespace, bar: ProgressBar) -> dict[str, list[Cell]]:
    """Every model and control with its cells, one a split, under its chosen recipe."""
    tuning, splits = range(min(told.tuning_splits, told.splits)), range(told.splits)
    recipes = [Recipe(lr, dropout, hidden=told.hidden, epochs=told.epochs, patience=told.patience) for lr, dropout in GRID]
    work = len(models(bench.strong)) * (len(recipes) * len(tuning) + len(splits)) + len(controls(bench.strong)) * len(splits)
    bar.stage(f"{bench.graph.name}, {bench.strong}", work, "trainings")
    chosen: dict[str, Recipe] = {}
    found: dict[str, list[Cell]] = {}

    def cells(model: str, recipe: Recipe, over: range) -> list[Cell]:
        made = []
        for split in over:
            made.append(bench.cell(model, recipe, split))
            bar.advance(1)
        return made

    for model in models(bench.strong):
        tried = {recipe: sum(cell["validation"] for cell in cells(model, recipe, tuning)) for recipe in recipes}
        chosen[model] = max(recipes, key=lambda recipe: tried[recipe])
        found[model] = cells(model, chosen[model], splits)
    for control, model in controls(bench.strong).items():
        found[control] = cells(control, chosen[model], splits)
    return found


def run(told: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, beside what was found before: by graph and strong expert, the graph's facts and all cells.

    Results and tables are written after each graph.
    """
    file = told.out / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    with ProgressBar(enabled=True) as bar:
        for strong in told.strong:
            for name in told.graphs:
                graph = load(name, told.data, told.out / "graphs")
                found = compare(Bench(graph, strong, told.out / "cells"), told, bar)
                results[f"{name}/{strong}"] = {"graph": graph.facts(), "strong": strong, "found": found}
                write_atomic(file, json.dumps(results) + "\n")
                if told.write:
                    write_atomic(HERE / "RESULTS.md", page(results))
    return results


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", nargs="+", choices=list(GRAPHS), default=list(GRAPHS), help="which graphs")
    parser.add_argument("--strong", nargs="+", choices=["gcn", "sage"], default=["gcn"], help="kinds of the strong expert")
    parser.add_argument("--data", type=Path, default=None, help="directory with planetoid/ and heterophilous/; else downloaded")
    parser.add_argument("--out", type=Path, default=Path("out/graph-mowst"), help="cells, profiles, results.json")
    parser.add_argument("--splits", type=int, default=SPLITS, help=f"how many splits, at most {SPLITS}")
    parser.add_argument("--tuning-splits", type=int, default=2, help="splits on which each recipe is tried")
    parser.add_argument("--hidden", type=int, default=32, help="width of the experts")
    parser.add_argument("--epochs", type=int, default=300, help="most epochs of a model or a turn")
    parser.add_argument("--patience", type=int, default=30, help="epochs without a better validation score")
    parser.add_argument("--threads", type=int, default=1, help="of torch; the matrices are too small for many")
    parser.add_argument("--write", action="store_true", help=f"write the tables to {HERE.name}/RESULTS.md")
    parser.add_argument("--json", action="store_true", help="print results.json instead of tables")
    told = parser.parse_args()
    if not 1 <= told.splits <= SPLITS:
        parser.error(f"--splits {told.splits}: there are {SPLITS}")
    torch.set_num_threads(told.threads)
    torch.sparse.check_sparse_tensor_invariants.disable()  # torch wants a choice; the matrices are made once, by a library
    try:
        results = run(told)
    except EquipoiseError as error:
        parser.exit(1, f"error: {error}\n")
    print(json.dumps(results) if told.json else page(results))


if __name__ == "__main__":
    main()
