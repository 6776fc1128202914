"""Balance of raw, rq-paper and rq on real routing traces, in sample and on the half of the documents not planned on.

Run from the repository root, with the traces in $EQUIPOISE_SHARED_DATA/routing:
    python benchmarks/planning_traces.py

Columns: `in sample` and `held out` are the mean over layers of LIS over units with the plan's own shares, `by scenario`
the same on each kind of held-out text alone, averaged; `re-solved` is held out with the best shares for that text on
the same slots, which is what a least-loaded dispatch can reach. Means over the splits. Errors are assumed from the
bits, since traces hold no weights; rq-paper takes the least loaded expert as less important for the same reason.
Shapes: D documents, L MoE layers, E logical experts, U units, N slots of a layer.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from baselines import alias, eplb
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_array

from equipoise.artifacts import LayerFacts, LayerPlan, ModelFacts, Plan, Profile, Source
from equipoise.metrics import lis
from equipoise.planning.budget import make_budget, unit_capacity
from equipoise.planning.methods import make_plan

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Trace:
    """Selections of one model by document.

    Attributes:
        model: its layers, with the true sizes of an expert's matrices.
        counts: [D, L, E] selections.
        scenario: [D] index of each document's kind.
        names: names of the kinds.
    """

    model: ModelFacts
    counts: Ints
    scenario: Ints
    names: tuple[str, ...]


def data_root() -> Path:
    """Where the development data lies."""
    return Path(os.environ.get("EQUIPOISE_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


def load_trace(name: str, root: Path) -> Trace:
    """The trace of "deepseek-v2-lite" or "gpt-oss-20b"."""
    return {"deepseek-v2-lite": _deepseek, "gpt-oss-20b": _gpt_oss}[name](root / "routing")


def _facts(name: str, layers: int, experts: int, top_k: int, shared: int, matrices: tuple[tuple[int, int], ...]) -> ModelFacts:
    return ModelFacts(
        name=name,
        model_type=name,
        dtype="bf16",
        fingerprint=name,
        layers=tuple(
            LayerFacts(
                path=f"layers.{i}", model_layer=i, num_experts=experts, top_k=top_k, num_shared=shared, matrices=matrices
            )
            for i in range(layers)
        ),
    )


def _deepseek(folder: Path) -> Trace:
    names = ("intent", "summary", "translation")
    counts, scenario = [], []
    for index, name in enumerate(names):
        with np.load(folder / "dsv2lite_esft" / f"{name}.npz") as data:
            ids, lengths = data["topk_ids"], data["seq_lens"]
        for document in np.split(ids, np.cumsum(lengths)[:-1], axis=1):
            counts.append([np.bincount(layer.ravel(), minlength=64) for layer in document])
            scenario.append(index)
    model = _facts("deepseek-v2-lite", 26, 64, 6, 2, ((2 * 1408, 2048), (2048, 1408)))
    return Trace(model, np.array(counts, np.int64), np.array(scenario), names)


def _gpt_oss(folder: Path) -> Trace:
    with np.load(folder / "gptoss20b_fingerprint" / "counts_per_doc.npz") as data:
        counts = data["counts"].astype(np.int64)
    kinds = [document["dataset"] for document in json.loads((folder / "gptoss20b_fingerprint" / "docs.json").read_text())]
    there = np.flatnonzero(counts.sum((1, 2)))
    names = tuple(sorted({kinds[i] for i in there}))
    model = _facts("gpt-oss-20b", 24, 32, 4, 0, ((5760, 2880), (2880, 2880)))
    return Trace(model, counts[there], np.array([names.index(kinds[i]) for i in there]), names)


def make_profile(trace: Trace, documents: Ints) -> Profile:
    """A profile of some of a trace's documents, each one window."""
    windows, scenario = trace.counts[documents], trace.scenario[documents]
    counts = np.zeros((len(trace.names), 2, *windows.shape[1:]), np.int64)
    np.add.at(counts[:, 0], scenario, windows)
    load = counts.sum(1)
    return Profile(
        model=trace.model,
        source=Source(origin="trace", scenarios=trace.names),
        counts=counts,
        gate_mass=load / trace.model.layers[0].top_k,
        tokens=load[:, 0].sum(1) // trace.model.layers[0].top_k,
        windows=windows,
        window_scenario=scenario,
        importance={"frequency": load.sum(0).astype(np.float64)},
    )


def halves(trace: Trace, splits: int) -> Iterator[tuple[Ints, Ints]]:
    """Documents to plan on and documents to score on: random halves of each kind."""
    for seed in range(splits):
        rng = np.random.default_rng(seed)
        groups = [rng.permutation(np.flatnonzero(trace.scenario == s)) for s in range(len(trace.names))]
        plan = np.concatenate([group[: len(group) // 2] for group in groups])
        yield plan, np.setdiff1d(np.arange(len(trace.scenario)), plan)


def baseline(profile: Profile, name: str) -> Plan:
    """A plan by one of the plain planners, two slots per unit, all int8 (so it exceeds the bytes by the scales)."""
    load, units = profile.load.astype(np.float64), profile.model.max_experts
    layers = []
    for row in load:
        if name == "alias":
            expert, unit, share = alias(row + 1e-9)
        else:
            expert, unit = eplb(row, 2 * units, units)
            pair, first = np.unique(np.stack([expert, unit]), axis=1, return_index=True)  # EPLB may put two copies on one unit
            share = np.array([((expert == e) & (unit == u)).sum() for e, u in pair.T]) / np.bincount(expert)[pair[0]]
            expert, unit = expert[first], unit[first]
        experts, on, shares = (tuple(column.tolist()) for column in (expert, unit, share))
        layers.append(LayerPlan(experts=experts, precisions=("int8",) * len(experts), units=on, shares=shares))
    size = unit_capacity(profile.model, units)
    return Plan(method=name, model=profile.model, units=units, unit_bytes=size, exactness="weights", layers=tuple(layers))


def assumed_rms(plan: Plan, profile: Profile) -> float:
    """Relative RMS error of the layers' routed output that the bits alone let one assume."""
    budget = make_budget(profile, plan.units, ("bf16", "int8", "int4-g32"), 1.0)
    names = [p.name for p in budget.precisions]
    total = 0.0
    for layer, errors in zip(plan.layers, budget.errors, strict=True):
        total += float(np.sum(layer.shares * errors[list(layer.experts), [names.index(q) for q in layer.precisions]]))
    return float(np.sqrt(total / len(plan.layers)))


def resolved_lis(plan: Plan, load_LE: Ints) -> NDArray[np.float64]:
    """[L] least LIS over units on the plan's slots when shares are chosen for this very load (linear program)."""
    return np.array([_least(layer, load, plan.units) for layer, load in zip(plan.layers, load_LE, strict=True)])


def _least(layer: LayerPlan, load_E: Ints, units: int) -> float:
    expert, unit = np.array(layer.experts), np.array(layer.units)
    n, p = len(expert), units * load_E[expert] / load_E.sum()
    rows = np.concatenate([unit, np.arange(units)])
    columns = np.concatenate([np.arange(n), np.full(units, n)])
    on_unit = coo_array((np.concatenate([p, -np.ones(units)]), (rows, columns)), (units, n + 1))
    whole = coo_array((np.ones(n), (expert, np.arange(n))), (len(load_E), n + 1))
    cost = np.zeros(n + 1)
    cost[n] = 1.0
    return float(linprog(cost, on_unit, np.zeros(units), whole, np.ones(len(load_E)), method="highs").fun)


def contenders(profile: Profile, error_bound: float) -> dict[str, Plan]:
    """The plans to compare, by name."""
    return {
        "rq-paper": make_plan(profile, "rq-paper", importance="frequency"),
        "eplb": baseline(profile, "eplb"),
        "alias": baseline(profile, "alias"),
        "rq": make_plan(profile, "rq", error_bound=error_bound),
    }


def main() -> None:
    """Print one table per trace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=int, default=3, help="random halvings of the documents")
    parser.add_argument("--error-bound", type=float, default=0.03)
    arguments = parser.parse_args()
    if not (data_root() / "routing").is_dir():
        print(f"skipped: no routing traces at {data_root() / 'routing'}; set EQUIPOISE_SHARED_DATA to their parent directory")
        return
    columns = ("in sample", "held out", "by scenario", "re-solved", "slots/U", "8-bit", "4-bit", "bytes", "overrun", "error")
    head = f"{'plan':9}" + "".join(f"{column:>12}" for column in columns)
    for name in ("deepseek-v2-lite", "gpt-oss-20b"):
        trace = load_trace(name, data_root())
        began = time.perf_counter()
        whole = make_plan(make_profile(trace, np.arange(len(trace.scenario))), error_bound=arguments.error_bound).predicted
        seconds = time.perf_counter() - began
        print(
            f"\n{name}: {len(trace.scenario)} documents, {len(trace.model.layers)} layers x {trace.model.max_experts} experts"
        )
        print(f"rq on all documents: {whole.lis:.4f} (worst layer {whole.lis_max:.4f}, bound {whole.lower_bound:.4f}, ", end="")
        print(f"raw {whole.lis_raw:.4f}) in {seconds:.2f} s")
        print(head)
        rows: dict[str, list[tuple[float, ...]]] = {}
        for documents, others in halves(trace, arguments.splits):
            profile, held = make_profile(trace, documents), trace.counts[others]
            kinds = [held[trace.scenario[others] == s].sum(0) for s in np.unique(trace.scenario[others])]
            raw = [lis(x).mean() for x in (profile.load, held.sum(0), kinds)]
            rows.setdefault("raw", []).append((*raw, np.nan, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0))
            for key, plan in contenders(profile, arguments.error_bound).items():
                names = [q for layer in plan.layers for q in layer.precisions]
                per_unit = plan.bytes_by_unit()
                rows.setdefault(key, []).append(
                    (
                        plan.lis(profile.load).mean(),
                        plan.lis(held.sum(0)).mean(),
                        float(np.mean([plan.lis(kind).mean() for kind in kinds])),
                        resolved_lis(plan, held.sum(0)).mean(),
                        len(names) / len(plan.layers) / plan.units,
                        names.count("int8") / len(names),
                        names.count("int4-g32") / len(names),
                        per_unit.sum() / (plan.units * plan.unit_bytes),
                        max(0, per_unit.max() - plan.unit_bytes) / plan.unit_bytes,
                        assumed_rms(plan, profile),
                    )
                )
        for key, values in rows.items():
            a = np.mean(values, 0)
            scores = "".join(f"{x:12.4f}" for x in a[:5])
            print(f"{key:9}{scores}" + "".join(f"{x:12.2%}" for x in a[5:]))


if __name__ == "__main__":
    main()
