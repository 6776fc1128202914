"""Profiles, plans and evaluations as tables for a terminal of 80 columns; the numbers are those of `rows`.

Every table says whether its figures were measured or predicted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from equipoise.artifacts import Evaluation, Plan, Profile
from equipoise.reporting.numbers import bytes_text, fixed, percent
from equipoise.reporting.placement import placement_tables
from equipoise.reporting.rows import Rows, evaluation_rows, plan_rows, profile_rows
from equipoise.reporting.style import new_table

RAW = "raw"
"""How tables call the model as it was."""
_percent = partial(percent, unit="%")  # columns are narrow
MOST_WINDOWS = 12
"""Windows that a table shows at most; the others are skipped evenly."""


def profile_tables(profile: Profile) -> list[RenderableType]:
    """A profile's tables: layers, scenarios, windows, importance. All measured."""
    rows = profile_rows(profile)
    model = rows["model"]
    out: list[RenderableType] = [
        _head("profile of", model, f"routing policy {profile.source.routing_policy}, origin {profile.source.origin}")
    ]
    layers = new_table("balance of each layer over its experts (measured)", ["layer", "top-k/E"])
    _columns(layers, ["LIS", "MaxVio", "balance", "Gini", "CV", "heaviest", "unused"])
    for row in rows["layers"]:
        layers.add_row(
            f"{row['layer']}{' enc' if row['stack'] == 'encoder' else ''}",
            f"{row['top_k']}/{row['experts']}",
            *_metrics(row),
            f"{row['heaviest']}: {_percent(row['heaviest_share'])}",
            str(row["unused"]),
        )
    layers.add_section()
    for name in ("mean", "max"):
        layers.add_row(name, "", *_metrics(rows[name]))
    out.append(layers)
    scenarios = new_table("scenarios (measured)", ["scenario"])
    _columns(scenarios, ["tokens", "decode", "LIS mean", "LIS max"])
    for row in rows["scenarios"]:
        scenarios.add_row(
            escape(row["scenario"]),
            f"{row['tokens']:,}",
            _percent(row["decode_share"]),
            fixed(row["lis_mean"]),
            fixed(row["lis_max"]),
        )
    out.append(scenarios)
    if rows["windows"]:
        windows = new_table("LIS of windows, mean over layers (measured)", ["scenario"])
        _columns(windows, ["window", "selections", "instantaneous", "cumulative"])
        for row in _evenly(rows["windows"], MOST_WINDOWS):
            windows.add_row(
                escape(row["scenario"]),
                str(row["window"]),
                f"{row['selections']:,}",
                fixed(row["lis_instantaneous"]),
                fixed(row["lis_cumulative"]),
            )
        out.append(windows)
    if rows["importance"]:
        importance = new_table("importance against load (measured)", ["estimator"])
        _columns(importance, ["rank correlation", "heaviest = most important"])
        for row in rows["importance"]:
            coincide = f"{row['layers_whose_heaviest_is_most_important']} of {row['layers']} layers"
            importance.add_row(escape(row["estimator"]), fixed(row["rank_correlation_with_load"], sign=True), coincide)
        out.append(importance)
    return [*out, *rows["notes"]]


def plan_tables(plan: Plan) -> list[RenderableType]:
    """A plan's tables: what is predicted of it, and the slots of each layer."""
    rows = plan_rows(plan)
    if plan.predicted is not None and plan.predicted.layers:
        return placement_tables(rows)
    units = f"{rows['units']} units of {bytes_text(rows['unit_bytes'])}"
    policy = f"{rows['method']}, {units}, dispatch {rows['dispatch']}, class {rows['exactness']}"
    out: list[RenderableType] = [_head("plan for", rows["model"], policy)]
    predicted = rows["predicted"]
    if predicted:
        table = new_table("on the profile it was made from (predicted)", ["figure"])
        _columns(table, ["value"])
        table.add_row("LIS over units without the plan", fixed(predicted["lis_raw"]))
        table.add_row("LIS over units", f"{fixed(predicted['lis'])} (worst layer {fixed(predicted['lis_max'])})")
        table.add_row("proven lower bound", f"{fixed(predicted['lower_bound'])} (gap {fixed(predicted['gap'])})")
        table.add_row("LIS as the paper counts", fixed(predicted["lis_paper"]))
        error = predicted["output_error"]
        proven = predicted["least_error"]
        least = "" if proven is None else f" (proven least with these copies: {proven:.3g})"
        table.add_row("relative output error", "not measured" if error is None else f"{error:.3g}{least}")
        if predicted["kl"] is not None:
            table.add_row("KL divergence, nats per token", f"{predicted['kl']:.2g}")
        table.add_row("bytes of all slots", f"{bytes_text(predicted['bytes'])} of {bytes_text(predicted['budget_bytes'])}")
        table.add_row("overrun of the fullest unit", bytes_text(predicted["overrun_bytes"]))
        out.append(table)
    layers = new_table("slots of each layer (decided)", ["layer", "slots/E"])
    _columns(layers, ["copied", "most"])
    layers.add_column("formats", overflow="fold")
    _columns(layers, ["bytes"])
    for row in rows["layers"]:
        most = "-" if row["most_copied"] is None else f"{row['most_copied']} x{row['most_copies']}"
        formats = ", ".join(f"{n} {name}" for name, n in row["precisions"].items())
        slots = f"{row['slots']}/{row['experts']}"
        layers.add_row(str(row["layer"]), slots, str(row["copied_experts"]), most, formats, bytes_text(row["bytes"]))
    out.append(layers)
    return out


def evaluation_tables(evaluation: Evaluation) -> list[RenderableType]:
    """An evaluation's tables: bytes, each text, and the tasks as the paper's Table 2 lays them out. All measured."""
    rows = evaluation_rows(evaluation)
    contenders = rows["contenders"]
    head = f"evaluation beside {escape(rows['base'])}; LIS over {rows['units']} units; low..high: paired 95 % intervals"
    out: list[RenderableType] = [Text.from_markup(f"[bold]{head}[/bold]")]
    sizes = new_table("experts in memory (measured from the tensors)", ["model", "method", "class"])
    _columns(sizes, ["bytes", "of raw", "seconds"])
    sizes.add_row(RAW, "-", "-", bytes_text(rows["base_expert_bytes"]), _percent(1.0), f"{rows['base_seconds']:.1f}")
    for c in contenders:
        size = _percent(c["bytes_of_base"])
        promise = {True: " (kept)", False: " (BROKEN)", None: ""}[c["promise_kept"]]
        sizes.add_row(
            escape(c["name"]),
            c["plan_method"],
            c["exactness"] + promise,
            bytes_text(c["expert_bytes"]),
            size,
            f"{c['seconds']:.1f}",
        )
    out.append(sizes)
    out += [_text_table(i, contenders) for i in range(len(contenders[0]["texts"]) if contenders else 0)]
    if any(c["tasks"] for c in contenders):
        out.append(_task_table(contenders))
    return [*out, *(_conclusion(c) for c in contenders if c["texts"])]


def _conclusion(contender: Rows) -> Text:
    """One contender in one sentence: balance, bytes and perplexity on the last text, which is all of them together."""
    text = contender["texts"][-1]
    change = text["perplexity_change"]
    gone = contender["excess_removed"]
    verdict = (
        "" if gone is None else f", {_percent(abs(gone))} {'of the' if gone >= 0 else 'more'} imbalance{' gone' * (gone >= 0)}"
    )
    order = contender["batch_order_kl"]
    told = "" if order is None else f"; another order of the same batch: KL {order:.1e} nats"
    return Text.from_markup(
        f"[bold]{escape(contender['name'])}[/bold]: LIS {fixed(text['lis_base'])} -> {fixed(text['lis'])}{verdict}; "
        f"{_percent(contender['bytes_of_base'])} of the bytes; perplexity {100 * change['value']:+.2f} % "
        f"({100 * change['low']:+.2f}..{100 * change['high']:+.2f}){told}"
    )


def _text_table(index: int, contenders: Sequence[Rows]) -> Table:
    first = contenders[0]["texts"][index]
    table = new_table(f"text {escape(first['name'])}: {first['tokens']:,} predicted tokens (measured)", ["model"])
    _columns(table, ["ppl", "change %", "KL, nats", "top-1 %", "LIS", "paper"])
    table.add_row(RAW, f"{first['perplexity_base']:.3f}", "", "", "", fixed(first["lis_base"]), "")
    for c in contenders:
        text = c["texts"][index]
        table.add_row(
            escape(c["name"]),
            f"{text['perplexity']:.3f}",
            _interval(text["perplexity_change"], 100, "+.2f"),
            _interval(text["kl"], 1, ".4f" if text["kl"]["value"] >= 1e-3 else ".1e"),
            _interval(text["top1_agreement"], 100, ".1f"),
            fixed(text["lis"]),
            fixed(text["lis_paper"]),
        )
    return table


def _task_table(contenders: Sequence[Rows]) -> Table:
    table = new_table("tasks, with metric and items: balance and accuracy (measured)", ["task", "model"])
    _columns(table, ["LIS raw", "LIS", "paper", "% raw", "%", "difference"])
    for i, task in enumerate(contenders[0]["tasks"]):
        for c in contenders:
            mine = c["tasks"][i]
            first = c is contenders[0]
            table.add_row(
                f"{escape(task['name'])}\n{task['metric'].split(',')[0]}, {task['items']:,}" if first else "",
                escape(c["name"]),
                fixed(mine["lis_base"]),
                fixed(mine["lis"]),
                fixed(mine["lis_paper"]),
                f"{100 * mine['score_base']:.1f}",
                f"{100 * mine['score']:.1f}",
                _interval(mine["difference"], 100, "+.1f"),
            )
        table.add_section()
    return table


def _head(what: str, model: Rows, more: str) -> Text:
    layers = f"{model['moe_layers']} MoE layers, up to {model['max_experts']} experts, {model['dtype']}"
    title = f"[bold]{what} {escape(model['name'])}[/bold] ({escape(model['model_type'])}: {layers})"
    return Text.from_markup(f"{title}\n{escape(more)}")


def _columns(table: Table, names: Iterable[str]) -> None:
    for name in names:
        table.add_column(name, justify="right", overflow="fold")


def _metrics(row: Rows) -> list[str]:
    return [fixed(row[name]) for name in ("lis", "maxvio", "balancedness", "gini", "cv")]


def _interval(interval: dict[str, Any], scale: float, spec: str) -> str:
    value, low, high = (format(scale * interval[key], spec) for key in ("value", "low", "high"))
    return f"{value}\n{low}..{high}"


def _evenly(rows: Sequence[Rows], most: int) -> list[Rows]:
    if len(rows) <= most:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]
