"""Figures of plans: bits and copies of every expert, the load of every unit, and the memory.

Shapes: L MoE layers, E logical experts of the widest layer, U units.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from equipoise.artifacts import Plan
from equipoise.metrics import lis
from equipoise.precisions import precision
from equipoise.reporting.charts import RAW, Bars, Detail, Figure, Grid, Line, Lines, Table, View
from equipoise.reporting.evidence import Evidence, as_it_is, is_placement, mean
from equipoise.reporting.figures_load import over_mean, slot_notes
from equipoise.reporting.numbers import binary_unit, bytes_text, fixed, percent

Floats = NDArray[np.float64]


def slots_figure(evidence: Evidence) -> Figure | None:
    """The fewest bits and the copies of every expert, one view each for every plan; copies alone where all bits are equal."""
    if not evidence.plans:
        return None
    views = []
    for name, plan in evidence.plans.items():
        bits_LE, copies_LE = bits_and_copies(plan)
        notes = slot_notes(plan)
        own = "" if len(evidence.plans) == 1 else f" {name}"
        present = np.union1d(bits_LE[np.isfinite(bits_LE)], precision(plan.model.dtype).bits)  # the model's own are neutral
        if len(present) > 1:
            level = np.where(np.isfinite(bits_LE), np.searchsorted(present, np.nan_to_num(bits_LE)), np.nan)
            labels = [f"{bits:.0f}" for bits in present]
            grid = Grid(
                level, evidence.layer_labels, None, "layer", "expert", "bits", "bits", labels,
                [Detail("slots", copies_LE)], notes,
            )  # fmt: skip
            views.append(View(f"bits{own}", grid, ("decided",), "The fewest bits that a copy of the expert has."))
        most = int(np.nanmax(copies_LE))
        labels = [str(n) for n in range(1, most + 1)]
        grid = Grid(
            copies_LE - 1, evidence.layer_labels, None, "layer", "expert", "slots", "copies", labels,
            [Detail("bits at least", bits_LE)], notes,
        )  # fmt: skip
        views.append(View(f"copies{own}", grid, ("decided",), "" if most > 1 else "This plan copies no expert."))
    caption = "What a plan prescribes for every expert: in how many bits it is stored, and on how many slots."
    return Figure("slots", "Bits and copies", caption, views, _slots_table(evidence))


def bits_and_copies(plan: Plan) -> tuple[Floats, Floats]:
    """[L, E] fewest bits among an expert's slots, and its number of slots; nan in experts that do not exist."""
    shape = len(plan.layers), plan.model.max_experts
    bits, copies = np.full(shape, np.inf), np.zeros(shape)
    for i, layer in enumerate(plan.layers):
        experts = list(layer.experts)
        size = {name: precision(name).bits for name in set(layer.precisions)}
        np.minimum.at(bits[i], experts, [size[name] for name in layer.precisions])
        np.add.at(copies[i], experts, 1)
    there = copies > 0
    return np.where(there, bits, np.nan), np.where(there, copies, np.nan)


def _slots_table(evidence: Evidence) -> Table:
    rows = []
    for name, plan in evidence.plans.items():
        formats = Counter(p for layer in plan.layers for p in layer.precisions)
        slots, experts = sum(formats.values()), int(evidence.widths.sum())
        copied = int(np.nansum(bits_and_copies(plan)[1] > 1))
        stored = ", ".join(f"{n:,} {p}" for p, n in formats.most_common())
        error, kl = (None, None) if plan.predicted is None else (plan.predicted.output_error, plan.predicted.kl)
        rows.append(
            [name, plan.method, plan.exactness, stored, f"{slots:,}", f"{slots - experts:,}", f"{copied:,}", str(plan.units),
             fixed(error, 4), fixed(kl, 5)]
        )  # fmt: skip
    heads = ["plan", "method", "class", "slots by format", "slots", "more than experts", "experts copied", "units"]
    return Table([*heads, "output error (predicted)", "KL (predicted)"], rows, 4)


def units_figure(evidence: Evidence) -> Figure | None:
    """The load of every unit (rank) over the mean, before and after, and what placements are expected to do held out."""
    profile = evidence.profile
    if profile is None or not evidence.plans:
        return None
    views = []
    ranks = all(is_placement(plan) for plan in evidence.plans.values())
    word = "rank" if ranks else "unit"
    for units in sorted({plan.units for plan in evidence.plans.values()}):
        loads = as_it_is(profile.load, evidence.widths, units)
        same = len({plan.units for plan in evidence.plans.values()}) == 1
        views.append(View("as it is" if same else f"as it is, {units}", _units_grid(evidence, loads, word), ("measured",)))
    for name, plan in evidence.plans.items():
        grid = _units_grid(evidence, plan.unit_load(profile.load), word)
        views.append(View(f"after {name}", grid, ("predicted",)))
    placements = {name: plan for name, plan in evidence.plans.items() if is_placement(plan)}
    for name, plan in placements.items():
        views.append(
            View("forecast" if len(placements) == 1 else f"forecast {name}", _forecast(evidence, plan), ("predicted",))
        )
    worst = {name: lis(plan.unit_load(profile.load)) for name, plan in evidence.plans.items()}
    heads = ["layer", *(f"max/mean {name}" for name in worst)]
    rows = [[label, *(fixed(values[i]) for values in worst.values())] for i, label in enumerate(evidence.layer_labels)]
    rows.append(["mean", *(fixed(mean(values)) for values in worst.values())])
    caption = (
        f"The load of every {word} over the mean {word}. In a row of neutral cells no {word} waits for another; "
        "the largest value of a row is the layer's max/mean."
    )
    return Figure("units", f"Load of every {word}", caption, views, Table(heads, rows))


def _units_grid(evidence: Evidence, load_LU: Floats, word: str) -> Grid:
    total_L = load_LU.sum(1)
    width = np.full(len(load_LU), load_LU.shape[1])
    ratio = over_mean(load_LU, total_L, width)
    with np.errstate(all="ignore"):
        worst = np.broadcast_to(lis(load_LU)[:, None], load_LU.shape)
    details = [Detail("max/mean of the layer", worst, ".3f")]
    return Grid(ratio, evidence.layer_labels, None, "layer", word, "times the mean load", details=details)


def _forecast(evidence: Evidence, plan: Plan) -> Lines:
    """A placement's forecast, layer by layer."""
    assert plan.predicted is not None, "a placement has a forecast"
    layers = plan.predicted.layers
    held = np.array([np.nan if layer.out_of_sample is None else layer.out_of_sample for layer in layers])
    lines = [
        Line("in sample", np.array([layer.in_sample for layer in layers]), 0),
        Line("scenarios held out", held, 1),
        Line("proven bound, in sample", np.array([layer.lower_bound for layer in layers]), RAW, dashed=True),
    ]
    shown = [line for line in lines if np.isfinite(line.values).any()]
    return Lines(evidence.layer_labels, shown, "layer", "max/mean", (1.0, "balance"))


def memory_figure(evidence: Evidence) -> Figure | None:
    """Bytes of the experts before and after by format, what was measured, and how full the fullest unit is."""
    model = evidence.model
    if model is None or not model.sized or not evidence.plans:
        return None
    native = precision(model.dtype)
    before = sum(layer.num_experts * layer.expert_bytes(native) for layer in model.layers)
    stored: list[Counter[str]] = [Counter({native.name: before})]
    rows = [["as it is", bytes_text(before), percent(1.0), "-", "-", _measured(evidence, None)]]
    for name, plan in evidence.plans.items():
        by_format: Counter[str] = Counter()
        for layer, facts in zip(plan.layers, model.layers, strict=True):
            for format_name, slot in zip(layer.precisions, layer.slot_bytes(facts).tolist(), strict=True):
                by_format[format_name] += slot
        stored.append(by_format)
        total, fullest = sum(by_format.values()), int(plan.bytes_by_unit().max())
        rows.append(
            [
                name,
                bytes_text(total),
                percent(total / before),
                bytes_text(fullest),
                percent(fullest / plan.unit_bytes),
                _measured(evidence, name),
            ]
        )
    formats = sorted({f for one in stored for f in one}, key=lambda f: (-precision(f).bits, f))
    size, unit = binary_unit(before)
    parts = [(f, [one[f] / size for one in stored]) for f in formats]
    marks = [
        (k + 1, plan.units * plan.unit_bytes / size, "what the units hold")
        for k, plan in enumerate(evidence.plans.values())
        if any({*layer.precisions} != {plan.model.dtype} for layer in plan.layers)
    ]
    if evidence.evaluation is not None:
        marks.append((0, evidence.evaluation.base_expert_bytes / size, "measured from the tensors"))
        for k, name in enumerate(evidence.plans):
            own = [c for c in evidence.evaluation.contenders if evidence.plan_of(c.name, c.plan_method) is evidence.plans[name]]
            marks += [(k + 1, c.expert_bytes / size, "measured from the tensors") for c in own[:1]]
    chart = Bars(["as it is", *evidence.plans], parts, f"experts, {unit}", marks)
    origins = ("predicted", "measured") if evidence.evaluation is not None else ("predicted",)
    heads = ["model", "experts", "of the original", "fullest unit", "of its capacity", "measured"]
    caption = "Bytes of all expert tensors by storage format, scales counted; nothing else of the model changes."
    return Figure("memory", "Memory", caption, [View("bytes", chart, origins)], Table(heads, rows))  # type: ignore[arg-type]


def _measured(evidence: Evidence, name: str | None) -> str:
    """Bytes that the evaluation measured, of a plan's model or of the base."""
    evaluation = evidence.evaluation
    if evaluation is None:
        return "-"
    if name is None:
        return bytes_text(evaluation.base_expert_bytes)
    own = [c for c in evaluation.contenders if evidence.plan_of(c.name, c.plan_method) is evidence.plans[name]]
    return bytes_text(own[0].expert_bytes) if own else "-"
