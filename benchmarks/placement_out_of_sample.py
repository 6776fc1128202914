"""Balance of placements on traffic they were not made from: one scenario of real routing traces held out at a time.

Run from the repository root, with the traces in DIR/routing (default: $EQUIPOISE_SHARED_DATA, else ../shared/data):
    OMP_NUM_THREADS=1 python benchmarks/placement_out_of_sample.py [--data DIR] [--json OUT.json]

For every held-out scenario all methods plan from the others; `eplb` from their summed counts. A cell is balancedness (mean over
max rank load) on the held-out scenario's counts, mean over layers and held-out scenarios. `robust` is planned three times, by
what a recording may hold: counts of each domain; also those of each document; also short windows and the pairs of experts that
tokens chose together. `own traffic` is EPLB planned on the held-out counts themselves: more than any plan can know.
Replayed are the real counts of held-out traffic, with copies of an expert sharing its tokens evenly.
Shapes: D documents, W windows, L MoE layers, E logical experts, K top-k, T tokens of a document.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from equipoise.artifacts import LayerFacts, ModelFacts, Plan, Profile, Source
from equipoise.artifacts.files import write_atomic
from equipoise.metrics import balancedness
from equipoise.planning.methods import make_plan
from equipoise.planning.robust.method import robust

Ints = NDArray[np.int64]

RICH, DOCUMENTS, DOMAINS = "windows and pairs", "documents", "domains"


@dataclass(frozen=True, eq=False)
class Trace:
    """Selections of one model, document by document.

    Attributes:
        name, experts, top_k: the model.
        counts: [D, L, E] selections.
        windows: [W, L, E] selections in stretches of a few tokens; window_document: [W] their documents.
        pairs: [D, L, E, E] tokens that chose both of two experts.
        domain: [D] name of each document's domain.
        held: kind of hold-out -> [D] part in which the document is held out, "" for never.
    """

    name: str
    experts: int
    top_k: int
    counts: Ints
    windows: Ints
    window_document: Ints
    pairs: NDArray[np.int32]
    domain: NDArray[np.str_]
    held: dict[str, NDArray[np.str_]]


@dataclass(frozen=True)
class Row:
    """One line of the table: means over layers and held-out scenarios."""

    trace: str
    held_out: str
    ranks: int
    redundant_per_rank: int
    scenarios: int
    contiguous: float
    eplb: float
    own_traffic: float
    robust: dict[str, float]
    defaults_kept: dict[str, int]
    worst_in_sample_against_eplb: float
    duplicates: int


def tally(documents: Iterator[NDArray[np.integer]], experts: int, window: int) -> tuple[Ints, Ints, Ints, NDArray[np.int32]]:
    """Counts, windows, documents of the windows and pairs of documents given as expert ids [L, T, K]."""
    counts, windows, owner, pairs = [], [], [], []
    for index, ids_LTK in enumerate(documents):
        n_layers, n_tokens, _ = ids_LTK.shape
        chosen = np.zeros((n_layers, n_tokens, experts), np.float32)
        np.put_along_axis(chosen, ids_LTK.astype(np.int64), 1.0, 2)
        parts = max(1, round(n_tokens / window))
        starts = np.linspace(0, n_tokens, parts + 1).astype(int)[:-1]
        windows.append(np.add.reduceat(chosen, starts, axis=1).transpose(1, 0, 2).astype(np.int64))
        owner.append(np.full(parts, index))
        counts.append(chosen.sum(1).astype(np.int64))
        pairs.append((chosen.transpose(0, 2, 1) @ chosen).astype(np.int32))
    return np.stack(counts), np.concatenate(windows), np.concatenate(owner), np.stack(pairs)


def deepseek(folder: Path, window: int) -> Trace:
    """DeepSeek-V2-Lite on three tasks."""
    documents, domain = [], []
    for name in ("intent", "summary", "translation"):
        with np.load(folder / "dsv2lite_esft" / f"{name}.npz") as data:
            parts = np.split(data["topk_ids"], np.cumsum(data["seq_lens"])[:-1], axis=1)
        documents += parts
        domain += [name] * len(parts)
    tasks = np.array(domain)
    return Trace("DeepSeek-V2-Lite", 64, 6, *tally(iter(documents), 64, window), tasks, {"task": tasks})


def gpt_oss(folder: Path, window: int) -> Trace:
    """gpt-oss-20b on questions of many subjects, from four collections."""
    with np.load(folder / "gptoss20b_fingerprint" / "decode_topk_ids.npz") as data:
        ids_TLK, document_T = data["topk_ids"], data["doc"]
    about = json.loads((folder / "gptoss20b_fingerprint" / "docs.json").read_text())
    stretches = np.split(np.arange(len(document_T)), np.flatnonzero(np.diff(document_T)) + 1)
    which = [about[document_T[rows[0]]] for rows in stretches]
    subjects = np.array([document["category"] for document in which])
    families = {"mmlu_pro": "MMLU-Pro", "mmlu": "MMLU", "Polyglot": "Polyglot-or-Not", "tulu3": "Tulu 3"}
    collection = np.array([next(v for k, v in families.items() if document["dataset"].startswith(k)) for document in which])
    some = np.where(np.isin(subjects, np.unique(subjects)[::6]), subjects, "")
    tallied = tally((ids_TLK[rows].transpose(1, 0, 2) for rows in stretches), 32, window)
    return Trace("gpt-oss-20b", 32, 4, *tallied, subjects, {"collection": collection, "subject (every 6th of 72)": some})


def profile_of(trace: Trace, kept_D: NDArray[np.bool_], inputs: str) -> Profile:
    """A profile of some documents, with as much in it as `inputs` says; scenarios are domains."""
    names, scenario = np.unique(trace.domain[kept_D], return_inverse=True)
    n_layers = trace.counts.shape[1]
    counts = np.zeros((len(names), 2, n_layers, trace.experts), np.int64)
    np.add.at(counts[:, 0], scenario, trace.counts[kept_D])
    windows, owner = np.zeros((0, n_layers, trace.experts), np.int64), np.zeros(0, np.int64)
    if inputs == DOCUMENTS:
        windows, owner = trace.counts[kept_D], scenario
    pairs = np.zeros((0, 0, 0), np.int64)
    if inputs == RICH:
        used = kept_D[trace.window_document]
        windows, owner = trace.windows[used], scenario[(np.cumsum(kept_D) - 1)[trace.window_document[used]]]
        pairs = trace.pairs[kept_D].sum(0, dtype=np.int64)
    facts = tuple(
        LayerFacts(path=f"layers.{i}", model_layer=i, num_experts=trace.experts, top_k=trace.top_k, matrices=())
        for i in range(n_layers)
    )
    return Profile(
        model=ModelFacts(name=trace.name, model_type=trace.name, dtype="bf16", fingerprint=trace.name, layers=facts),
        source=Source(origin="trace", scenarios=tuple(names.tolist())),
        counts=counts,
        gate_mass=np.zeros((len(names), n_layers, trace.experts)),
        tokens=counts[:, 0, 0].sum(1) // trace.top_k,
        windows=windows,
        window_scenario=owner,
        coactivation=pairs,
    )


def score(plan: Plan, held_LE: Ints) -> float:
    """Balancedness on held-out counts, mean over layers."""
    return float(np.nanmean(balancedness(plan.unit_load(held_LE))))


def compare(trace: Trace, kind: str, ranks: int, redundant: int, inputs: tuple[str, ...], slack: float = 0.01) -> Row:
    """All methods on every held-out scenario of one kind."""
    slots = trace.experts + ranks * redundant
    part_D = trace.held[kind]
    scores: dict[str, list[float]] = {}
    kept = dict.fromkeys(inputs, 0)
    worst, duplicates = -np.inf, 0
    scenarios = [name for name in np.unique(part_D) if name]
    for name in scenarios:
        held_LE = trace.counts[part_D == name].sum(0)
        profile = profile_of(trace, part_D != name, DOMAINS)
        plans = {method: make_plan(profile, method, units=ranks, slots=slots) for method in ("contiguous", "eplb")}
        own = profile_of(trace, part_D == name, DOMAINS)
        plans["own traffic"] = make_plan(own, "eplb", units=ranks, slots=slots)
        for given in inputs:
            plan = robust(profile_of(trace, part_D != name, given), units=ranks, seed=0, slots=slots, slack=slack)
            plans[f"robust, {given}"] = plan
            assert plan.predicted is not None, "planners predict"
            if plan.options["emitted"] == "default":
                kept[given] += 1
                continue
            duplicates += sum(layer.duplicates for layer in plan.predicted.layers)
            theirs = plans["eplb"].predicted
            assert theirs is not None, "planners predict"
            pairs = zip(plan.predicted.layers, theirs.layers, strict=True)
            worst = max(worst, *(mine.in_sample - other.in_sample for mine, other in pairs))
        for key, plan in plans.items():
            scores.setdefault(key, []).append(score(plan, held_LE))
    mean = {key: float(np.mean(values)) for key, values in scores.items()}
    return Row(
        trace=trace.name, held_out=kind, ranks=ranks, redundant_per_rank=redundant, scenarios=len(scenarios),
        contiguous=mean["contiguous"], eplb=mean["eplb"], own_traffic=mean["own traffic"],
        robust={given: mean[f"robust, {given}"] for given in inputs}, defaults_kept=kept,
        worst_in_sample_against_eplb=float(worst), duplicates=duplicates,
    )  # fmt: skip


def line(row: Row) -> str:
    """One row of the Markdown table."""
    best = list(row.robust)[-1]
    cells = [
        f"{row.trace}, {row.held_out}", str(row.ranks), str(row.redundant_per_rank), f"{row.contiguous:.3f}", f"{row.eplb:.3f}",
        *(f"**{value:.3f}**" if given == best else f"{value:.3f}" for given, value in row.robust.items()),
        f"{100 * (row.robust[best] - row.eplb):+.1f}", f"{row.own_traffic:.3f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print one Markdown table; write everything as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("EQUIPOISE_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--data", type=Path, default=Path(default), help="folder that holds routing/")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--redundant", type=int, nargs="+", default=[0, 1], help="redundant slots per rank")
    parser.add_argument("--window", type=int, default=16, help="tokens of a short window")
    parser.add_argument("--slack", type=float, default=0.01, help="of robust: load in sample above the lower bound")
    parser.add_argument("--inputs", nargs="+", default=[DOMAINS, DOCUMENTS, RICH], choices=[DOMAINS, DOCUMENTS, RICH])
    parser.add_argument("--traces", nargs="+", default=["deepseek", "gpt-oss"], choices=["deepseek", "gpt-oss"])
    parser.add_argument("--kinds", nargs="+", default=["task", "collection", "subject"], help="what is held out")
    parser.add_argument("--json", type=Path, help="write figures, machine and versions to this file")
    given = parser.parse_args()
    folder = given.data / "routing"
    if not folder.is_dir():
        print(
            f"skipped: no routing traces at {folder}; give --data DIR, or set EQUIPOISE_SHARED_DATA to the parent of routing/"
        )
        return
    began = time.perf_counter()
    names = " | ".join(f"`robust`, {name}" for name in given.inputs)
    print(f"| held out | ranks | redundant per rank | `contiguous` | `eplb` | {names} | gain, points | own traffic |")
    print("|" + "---|" * (7 + len(given.inputs)))
    rows = []
    for load in (f for n, f in (("deepseek", deepseek), ("gpt-oss", gpt_oss)) if n in given.traces):
        trace = load(folder, given.window)
        for kind in (k for k in trace.held if k.split()[0] in given.kinds):
            for ranks in given.ranks:
                for redundant in given.redundant:
                    rows.append(compare(trace, kind, ranks, redundant, tuple(given.inputs), given.slack))
                    print(line(rows[-1]), flush=True)
    last = given.inputs[-1]
    gains = [100 * (row.robust[last] - row.eplb) for row in rows]
    over = [100 * (row.robust[last] - row.contiguous) for row in rows]
    print(
        f"\nGain over eplb: mean {np.mean(gains):+.1f} points, least {min(gains):+.1f}. Over contiguous: least {min(over):+.1f}"
    )
    worst = max(row.worst_in_sample_against_eplb for row in rows)
    print(f"In sample, worst layer against eplb: {worst:+.4f} of max/mean; duplicates: {sum(row.duplicates for row in rows)}.")
    seconds = time.perf_counter() - began
    print(f"{seconds:.0f} s wall, {time.process_time():.0f} s processor.")
    if given.json:
        about = {
            "machine": platform.processor() or platform.machine(), "python": platform.python_version(), "seconds": seconds,
            "versions": {name: importlib.metadata.version(name) for name in ("numpy", "scipy", "equipoise")},
            "window": given.window, "slack": given.slack, "rows": [asdict(row) for row in rows],
        }  # fmt: skip
        write_atomic(given.json, json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
