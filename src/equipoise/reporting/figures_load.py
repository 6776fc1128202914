"""Figures of the load: where tokens go, how uneven that is before and after, how it differs between kinds of traffic.

Shapes: S scenarios, W windows, L MoE layers, E logical experts of the widest layer, U units.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from equipoise.artifacts import Plan, Profile
from equipoise.metrics import jensen_shannon, lis
from equipoise.reporting.charts import RAW, Detail, Figure, Grid, Line, Lines, Origin, Table, View
from equipoise.reporting.evidence import Evidence, heaviest_slot, mean, raw_lis
from equipoise.reporting.numbers import fixed, percent, plural

Floats = NDArray[np.float64]
MOST_SCENARIOS = 8
"""Scenarios that have a view or a row of their own in a figure; the ones with the most selections."""


def load_figure(evidence: Evidence) -> Figure | None:
    """The load of every expert over its layer's mean: all traffic, each scenario, and the busiest slot under each plan."""
    profile = evidence.profile
    if profile is None:
        return None
    views = [View("all traffic", _load_grid(evidence, profile.load, profile.load), ("measured",))]
    if len(profile.source.scenarios) > 1:
        views += [
            View(profile.source.scenarios[s], _load_grid(evidence, (load := profile.scenario_load[s]), load), ("measured",))
            for s in busiest_scenarios(profile)
        ]
    for name, plan in evidence.plans.items():
        grid = _load_grid(evidence, heaviest_slot(plan, profile.load), profile.load, plan)
        views.append(View(f"after {name}", grid, ("predicted",), "Each cell is the busiest copy of an expert."))
    left_out = len(profile.source.scenarios) - MOST_SCENARIOS
    caption = (
        "One row per MoE layer, one column per expert. The colour is the load over the layer's mean expert: an expert at 4x is "
        "waited for by a device that holds an expert at 1x. Experts that served nothing are at the blue end."
    )
    if left_out > 0:
        caption += f" {plural(left_out, 'scenario')} with fewer tokens are not drawn."
    return Figure("load", "Where the tokens go", caption, views, _layer_table(evidence))


def busiest_scenarios(profile: Profile) -> list[int]:
    """Indices of the scenarios that are drawn, in the profile's order."""
    total_S = profile.scenario_load.sum((1, 2))
    return sorted(np.argsort(-total_S, kind="stable")[:MOST_SCENARIOS].tolist())


def over_mean(load: ArrayLike, total: ArrayLike, width: ArrayLike) -> Floats:
    """[L, N] load over the layer's mean of `width` entries; nan beyond the width and in layers that served nothing."""
    values, sums, n = np.asarray(load, np.float64), np.asarray(total, np.float64), np.asarray(width)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = values * n[:, None] / sums[:, None]
    return np.where((np.arange(values.shape[1]) < n[:, None]) & (sums[:, None] > 0), ratio, np.nan)


def _load_grid(evidence: Evidence, shown_LE: ArrayLike, load_LE: ArrayLike, plan: Plan | None = None) -> Grid:
    """A map of the shown load; pointing at a cell tells the expert's own load, its share, and its bits under a plan."""
    load = np.asarray(load_LE, np.float64)
    total = load.sum(1)
    share = over_mean(load, total, evidence.widths) / evidence.widths[:, None]
    details = [Detail("selections", load), Detail("of the layer's selections", share, ".2%")]
    plans = [plan] if plan is not None else list(evidence.plans.values())[:1]
    notes = slot_notes(plans[0]) if plans else [[evidence.model.dtype] * load.shape[1]] * load.shape[0]  # type: ignore[union-attr]
    if plans and plan is None:
        name = next(iter(evidence.plans))
        notes = [[f"{name}: {note}" for note in row] for row in notes]
    values = over_mean(shown_LE, total, evidence.widths)
    return Grid(
        values, evidence.layer_labels, None, "layer", "expert", "times the mean load", details=details, notes=notes
    )  # fmt: skip


def slot_notes(plan: Plan) -> list[list[str]]:
    """[L][E] what a plan makes of each expert, such as "bf16" or "2 slots: int8 60 %, int8 40 %"."""
    width = plan.model.max_experts
    out = []
    for layer in plan.layers:
        slots: list[list[tuple[str, float]]] = [[] for _ in range(width)]
        for expert, precision, share in zip(layer.experts, layer.precisions, layer.shares, strict=True):
            slots[expert].append((precision, share))
        out.append([_slots_text(own) for own in slots])
    return out


def _slots_text(slots: Sequence[tuple[str, float]]) -> str:
    if len(slots) < 2:
        return slots[0][0] if slots else ""
    return (
        f"{len(slots)} slots: " + ", ".join(f"{name} {share:.0%}" for name, share in slots[:6]) + (", ..." * (len(slots) > 6))
    )


def _layer_table(evidence: Evidence) -> Table:
    profile = evidence.profile
    assert profile is not None, "only made with a profile"
    load, widths = profile.load, evidence.widths
    score = lis(load, widths)
    after = {name: plan.lis(load) for name, plan in evidence.plans.items()}
    heads = ["layer", "experts", "top-k", "selections", "busiest expert", "its share", "unused", "LIS"]
    rows = []
    for i, (label, facts) in enumerate(zip(evidence.layer_labels, profile.model.layers, strict=True)):
        own = load[i, : facts.num_experts]
        total = int(own.sum())
        busiest = [str(int(own.argmax())), percent(own.max() / total)] if total else ["-", "-"]
        rows.append(
            [
                label,
                str(facts.num_experts),
                str(facts.top_k),
                f"{total:,}",
                *busiest,
                str(int((own == 0).sum())),
                fixed(score[i]),
            ]
            + [fixed(values[i]) for values in after.values()]
        )
    return Table(heads + [f"LIS {name} (predicted)" for name in after], rows)


def lis_figure(evidence: Evidence) -> Figure | None:
    """LIS of every layer before and after, over units and as the paper counts."""
    profile = evidence.profile
    if profile is None:
        return None
    load, widths, labels = profile.load, evidence.widths, evidence.layer_labels
    units = sorted({plan.units for plan in evidence.plans.values()}) or [profile.model.max_experts]
    before = [
        Line("as it is" if len(units) == 1 else f"as it is, {u} units", raw_lis(load, widths, u), RAW, dashed=i > 0)
        for i, u in enumerate(units)
    ]
    over_units = [Line(name, plan.lis(load), k) for k, (name, plan) in enumerate(evidence.plans.items())]
    per_slot = [Line(name, plan.lis_paper(load), k) for k, (name, plan) in enumerate(evidence.plans.items())]
    origins: tuple[Origin, ...] = ("measured", "predicted") if evidence.plans else ("measured",)
    note = "The line as it is was measured; the plans' are what their shares make of that load." if evidence.plans else ""
    one = (1.0, "balance")
    views = [View("over units", Lines(labels, [*before, *over_units], "layer", "LIS", one), origins, note)]
    paper = Lines(labels, [Line("as it is", lis(load, widths), RAW), *per_slot], "layer", "LIS per slot", one)
    views.append(View("as the paper counts", paper, origins, f"{note} Every slot counts as a unit of its own.".strip()))
    caption = (
        "Load-Imbalance Score: the busiest unit's load over the mean, 1 is balance. A unit is a device or an equal part of the "
        "memory; what the busiest takes longer than the mean, all others wait."
    )
    return Figure("lis", "Imbalance of every layer", caption, views, _lis_table(evidence))


def _lis_table(evidence: Evidence) -> Table:
    profile = evidence.profile
    assert profile is not None, "only made with a profile"
    heads = ["model", "units", "LIS mean", "LIS worst layer", "as the paper counts", "origin"]
    rows = []
    for u in sorted({plan.units for plan in evidence.plans.values()} | {profile.model.max_experts}):
        raw, paper = raw_lis(profile.load, evidence.widths, u), lis(profile.load, evidence.widths)
        rows.append(["as it is", str(u), fixed(mean(raw)), fixed(_worst(raw)), fixed(mean(paper)), "measured"])
    for name, plan in evidence.plans.items():
        score = plan.lis(profile.load)
        rows.append(
            [
                name,
                str(plan.units),
                fixed(mean(score)),
                fixed(_worst(score)),
                fixed(mean(plan.lis_paper(profile.load))),
                "predicted",
            ]
        )
    return Table(heads, rows)


def _worst(values_L: Floats) -> float:
    known = values_L[np.isfinite(values_L)]
    return float(known.max()) if known.size else float("nan")


def drift_LSS(profile: Profile, chosen: Sequence[int]) -> Floats:
    """[L, S, S] Jensen-Shannon divergence of the loads of each pair of scenarios, in bits.

    The diagonal compares every other window of a scenario with the rest: what two halves of the same traffic differ by.
    It is nan where a scenario has one window.
    """
    load_SLE = profile.scenario_load[list(chosen)].astype(np.float64)
    out = jensen_shannon(load_SLE[:, None], load_SLE[None]).transpose(2, 0, 1)
    for i, s in enumerate(chosen):
        own_WLE = profile.windows[profile.window_scenario == s]
        halves = own_WLE[0::2].sum(0), own_WLE[1::2].sum(0)
        out[:, i, i] = jensen_shannon(*halves) if len(own_WLE) > 1 else np.nan
    return out


def mean_drift(drift: Floats) -> Floats:
    """[S, S] mean over the layers in which both served something; nan where there is none."""
    known = np.isfinite(drift)
    return np.where(known.any(0), np.where(known, drift, 0.0).sum(0) / np.maximum(known.sum(0), 1), np.nan)


def drift_figure(evidence: Evidence) -> Figure | None:
    """How far apart the loads of the scenarios are, and what each plan makes of every scenario by itself."""
    profile = evidence.profile
    if profile is None or len(profile.source.scenarios) < 2:
        return None
    chosen = busiest_scenarios(profile)
    names = [profile.source.scenarios[s] for s in chosen]
    drift = drift_LSS(profile, chosen)
    average = mean_drift(drift)
    between = Grid(
        average, names, names, "scenario", "scenario", "bits", scale="amount", numbers=".3f",
        details=[Detail("worst layer", np.nan_to_num(drift, nan=-1.0).max(0), ".3f")],
    )  # fmt: skip
    views = [View("between scenarios", between, ("measured",))]
    pairs = [(i, j) for i in range(len(names)) for j in range(i)]
    furthest = sorted(pairs, key=lambda pair: -np.nan_to_num(average[pair]))[:3]
    lines = [Line(f"{names[j]} - {names[i]}", drift[:, i, j], k) for k, (i, j) in enumerate(furthest)]
    by_layer = Lines(evidence.layer_labels, lines, "layer", "divergence, bits")
    views.append(View("by layer", by_layer, ("measured",), "The pairs that are furthest apart." if len(pairs) > 3 else ""))
    scores = _scenario_lis(evidence, profile, chosen)
    lines = [Line(name, values, k - 1) for k, (name, values) in enumerate(scores.items())]
    origins: tuple[Origin, ...] = ("measured", "predicted") if evidence.plans else ("measured",)
    views.append(View("LIS of each", Lines(names, lines, "scenario", "LIS, mean over layers", (1.0, "balance")), origins))
    caption = (
        "Jensen-Shannon divergence between the loads of two kinds of traffic: 0 for the same shares, 1 for none in common. "
        "The diagonal compares two halves of the same traffic and so tells how much of a difference is chance."
    )
    rows = []
    for i, s in enumerate(chosen):
        others = np.where(np.arange(len(chosen)) == i, -1.0, np.nan_to_num(average[i], nan=-1.0))
        j = int(others.argmax())
        rows.append(
            [names[i], names[j], f"{int(profile.tokens[s]):,}", fixed(others[j]), fixed(average[i, i])]
            + [fixed(values[i]) for values in scores.values()]
        )
    heads = ["scenario", "furthest from", "tokens", "by, bits", "its halves differ by", *(f"LIS {name}" for name in scores)]
    return Figure("drift", "How traffic differs", caption, views, Table(heads, rows, 2))


def _scenario_lis(evidence: Evidence, profile: Profile, chosen: Sequence[int]) -> dict[str, Floats]:
    """Mean LIS over units of each chosen scenario: as it is (in the first plan's units), and under each plan."""
    units = next((plan.units for plan in evidence.plans.values()), profile.model.max_experts)
    load = profile.scenario_load
    out = {"as it is": np.array([mean(raw_lis(load[s], evidence.widths, units)) for s in chosen])}
    return out | {name: np.array([mean(plan.lis(load[s])) for s in chosen]) for name, plan in evidence.plans.items()}
