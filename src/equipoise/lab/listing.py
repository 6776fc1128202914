"""The shelf as a table: what was measured of each model when it was put there."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from equipoise.artifacts.evaluation import Interval
from equipoise.lab.card import read_facts
from equipoise.lab.judge import in_percent
from equipoise.lab.shelf import names, path

WANTED = (
    "parameters",
    "active_parameters",
    "perplexity",
    "trigram_perplexity",
    "beside_trigram",
    "dense_perplexity",
    "lis",
    "divergence",
    "importance_correlation",
)
"""Of a card's figures, what the table has."""


def shelf_rows() -> list[dict[str, Any]]:
    """One row a model: its name and the figures of its card."""
    found = {name: read_facts(path(name))[1].model_dump(mode="json") for name in names()}
    return [{"name": name, **{key: facts[key] for key in WANTED}} for name, facts in found.items()]


def shelf_table(rows: list[dict[str, Any]]) -> Table:
    """The rows for a terminal."""
    table = Table(title="shelf: small models for tests and measurements, measured on held-out text")
    heads = (
        "model", "parameters", "active", "perplexity", "trigram", "beside it (95 %)", "dense", "LIS", "JS between domains",
        "removal ~ load",
    )  # fmt: skip
    for place, head in enumerate(heads):
        table.add_column(head, justify="right" if place else "left")
    for row in rows:
        dense, beside = row["dense_perplexity"], Interval.model_validate(row["beside_trigram"])
        table.add_row(
            row["name"], f"{row['parameters']:,}", f"{row['active_parameters']:,}", f"{row['perplexity']:.1f}",
            f"{row['trigram_perplexity']:.1f}", in_percent(beside), "-" if dense is None else f"{dense:.1f}",
            f"{row['lis']:.2f}", f"{row['divergence']:.3f}", f"{row['importance_correlation']:+.2f}",
        )  # fmt: skip
    return table
