"""The live view of a stream: what Prometheus metrics say, on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from equipoise.errors import EquipoiseError, missing_package
from equipoise.reporting.style import new_table

if TYPE_CHECKING:
    from rich.console import RenderableType

BLOCKS = "▁▂▃▄▅▆▇█"
WIDEST = 40
"""Layers, and steps of a history, that are drawn in one line."""

Samples = Mapping[str, Mapping[str, float]]
"""Name -> label ("" where there is none) -> value."""


def read_metrics(text: str) -> dict[str, dict[str, float]]:
    """The samples of Equipoise in a text of Prometheus metrics.

    Args:
        text: what `/metrics` answers.

    Raises:
        EquipoiseError: `prometheus-client` is not installed, or the text holds none of ours.
    """
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError as error:
        raise missing_package("watching needs", "prometheus-client") from error
    found: dict[str, dict[str, float]] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith("equipoise_") and not sample.name.endswith("_created"):
                    label = next(iter(sample.labels.values()), "")
                    found.setdefault(sample.name.removeprefix("equipoise_"), {})[label] = float(sample.value)
    except ValueError as error:
        raise EquipoiseError(f"this is no text of Prometheus metrics: {error}.") from error
    if "lis" not in found:
        raise EquipoiseError("there are no metrics of a stream here; give the address or file of `equipoise stream --metrics`.")
    return found


def live_view(samples: Samples, history: Sequence[float] = ()) -> RenderableType:
    """The state of a stream in one screen.

    Args:
        samples: as `read_metrics` gives them.
        history: LIS of the latest steps, for a line of them.
    """
    from rich.console import Group
    from rich.text import Text

    def one(name: str) -> float:
        return samples.get(name, {}).get("", float("nan"))

    table = new_table("stream", ("balance",), ("now",))
    table.add_row("LIS over units, last step", f"{one('lis'):.4f}")
    table.add_row("LIS over units, all steps", f"{one('cumulative_lis'):.4f}")
    table.add_row("balancedness", f"{one('balancedness'):.4f}")
    table.add_row("drift from the planned load", f"{one('drift_bits'):.4f} bits")
    table.add_row("steps / tokens", f"{one('steps_total'):,.0f} / {one('tokens_total'):,.0f}")
    work = new_table("changes of plan", ("what",), ("so far",))
    outcomes = samples.get("replans_total", {})
    for outcome in ("swapped", "kept", "postponed", "failed"):
        alarm = "bold red" if outcome == "failed" and outcomes.get(outcome) else ""
        work.add_row(f"steps {outcome}", f"{outcomes.get(outcome, 0):,.0f}", style=alarm)
    work.add_row("slots moved", f"{one('moved_slots_total'):,.0f}")
    work.add_row("bytes moved", f"{one('moved_bytes_total'):,.0f}")
    seconds = samples.get("seconds_total", {})
    for stage in ("planning", "staging", "paused"):
        work.add_row(f"seconds {stage}", f"{seconds.get(stage, 0):.4f}")
    work.add_row("seconds won, costs deducted", f"{one('won_seconds'):.4f}")
    work.add_row("plan, bytes", f"{one('plan_bytes'):,.0f}")
    work.add_row("staged, bytes (limit)", f"{one('staged_bytes'):,.0f} ({one('staging_limit_bytes'):,.0f})")
    layers = [value for _, value in sorted(samples.get("layer_lis", {}).items(), key=lambda item: int(item[0]))]
    parts: list[RenderableType] = [table, Text(), work]
    for title, values in (("LIS by layer ", layers), ("LIS by step  ", history)):
        if values:
            shown = values[-WIDEST:] if title.startswith("LIS by step") else values[:WIDEST]
            parts.append(Text(f"{title}{sparkline(shown)}  {min(shown):.3f}..{max(shown):.3f}"))
    return Group(*parts)


def sparkline(values: Sequence[float]) -> str:
    """Values as a line of blocks, from 1, which is balance, to the largest."""
    top = max([*values, 1.0 + 1e-9])
    return "".join(BLOCKS[min(len(BLOCKS) - 1, int((max(value, 1.0) - 1.0) / (top - 1.0) * len(BLOCKS)))] for value in values)


def stream_tables(rows: Mapping[str, Any]) -> list[RenderableType]:
    """What became of a stream: one table of its figures, one of its changes of plan.

    Args:
        rows: as `equipoise stream --json` prints them.
    """
    table = new_table(f"stream under policy {rows['policy']} (measured)", ("what",), ("",))
    table.add_row("steps / tokens", f"{rows['steps']:,} / {rows['tokens']:,}")
    for name, key in (
        ("LIS over units, mean over steps", "mean_instantaneous_lis"),
        ("LIS over units, all steps", "cumulative_lis"),
    ):
        table.add_row(name, "" if rows[key] is None else f"{rows[key]:.4f}")
    table.add_row("changes of plan / failed / postponed", f"{rows['swapped']} / {rows['failed']} / {rows['postponed']}")
    table.add_row("bytes moved / most staged", f"{rows['moved_bytes']:,} / {rows['most_staged_bytes']:,}")
    for stage in ("planning", "staging", "paused"):
        table.add_row(f"seconds {stage}", f"{rows[f'seconds_{stage}']:.4f}")
    changes = new_table(
        "changes of plan", ("after step",), ("slots", "bytes", "predicted, s", "cost, s", "saved, s", "paid, s")
    )
    for entry in rows["changes"]:
        figures = (f"{entry[key]:.4f}" for key in ("predicted", "cost", "saved", "paid"))
        changes.add_row(str(entry["step"]), f"{entry['slots']:,}", f"{entry['bytes']:,}", *figures)
    return [table, changes]
