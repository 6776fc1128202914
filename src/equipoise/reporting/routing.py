"""A routing policy as rows and as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from equipoise.artifacts.routing import RoutingPolicy


def policy_rows(policy: RoutingPolicy) -> dict[str, Any]:
    """What a policy is, and what it does in each layer, as plain values."""
    return {
        "policy": policy.name,
        "id": policy.id,
        "class": "routing",
        "options": policy.options,
        "model": policy.model,
        "tokens": policy.tokens,
        "mean_k": policy.mean_k,
        "layers": [
            {
                "layer": layer.path,
                "scores": layer.scores,
                "weights": layer.weights,
                "threshold": layer.threshold,
                "bias_span": None if not layer.bias else max(layer.bias) - min(layer.bias),
                "mean_k": layer.mean_k,
            }
            for layer in policy.layers
        ],
    }


def policy_tables(rows: Mapping[str, Any]) -> list[Table | str]:
    """The same for people."""
    told = ", ".join(f"{name} {value}" for name, value in rows["options"].items() if value is not None)
    table = Table(title=f"routing policy {rows['policy']}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("layer", no_wrap=True)
    table.add_column("scores")
    table.add_column("weights")
    for name in ("threshold", "span of the bias", "experts of a token"):
        table.add_column(name, justify="right")
    for row in rows["layers"]:
        figures = ("" if row[name] is None else f"{row[name]:.4g}" for name in ("threshold", "bias_span", "mean_k"))
        table.add_row(escape(row["layer"]), row["scores"], row["weights"], *figures)
    mean = "" if rows["mean_k"] is None else f", {rows['mean_k']:.3f} experts of a token on average"
    return [
        f"model {rows['model']}; {told or 'no options'}",
        f"fitted on {rows['tokens']:,} tokens{mean}; profiles and plans made with it carry {rows['id']}",
        table,
    ]
