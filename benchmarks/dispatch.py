"""Dispatch rules on real routing traces: METRO against the exact solution, and every rule on the same plan and batches.

Run from the repository root, with the traces in $EQUIPOISE_SHARED_DATA/routing:
    python benchmarks/dispatch.py

Plans are EPLB's, made from all documents. In the first table a figure is the largest number of activated replicas on a
rank, mean over layers and batches, and `gap` how far a greedy order is from the exact solution (mean and worst). In the
second, batches are replayed; times are by a table of measured latencies where one of the model's shape is there.
Shapes: L MoE layers, B batches, T tokens, K top-k, R ranks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from planning_traces import data_root, make_profile
from planning_traces import load_trace as load_counts

from equipoise.artifacts import ModelFacts, Profile
from equipoise.dispatch.metro import exact_hosts, greedy_hosts
from equipoise.dispatch.placement import layer_maps
from equipoise.planning.cost import CostModel, PairCost
from equipoise.planning.eplb import eplb
from equipoise.planning.latency_tables import cost_model
from equipoise.simulation import RULES, Trace, load_trace, simulate
from equipoise.simulation.trace import batches_of

TABLE = "aiconfigurator_moe_latency/h100_sxm_moe_trtllm_1.3.0rc20_moe_perf.parquet"
METRO = (
    ("gpt-oss-20b", 8, (40, 48)),
    ("gpt-oss-20b", 16, (48,)),
    ("deepseek-v2-lite", 8, (72, 96)),
    ("deepseek-v2-lite", 16, (80, 96)),
)


def tokens_of(name: str, model: ModelFacts, root: Path) -> Trace:
    """All tokens of a model's traces."""
    if name == "gpt-oss-20b":
        return load_trace(root / "gptoss20b_fingerprint" / "decode_topk_ids.npz", model)
    parts = [load_trace(root / "dsv2lite_esft" / f"{task}.npz", model) for task in ("intent", "summary", "translation")]
    first = np.cumsum([0, *(part.document_T[-1] + 1 for part in parts)])
    documents = np.concatenate([part.document_T + offset for part, offset in zip(parts, first, strict=False)])
    return Trace(name, np.concatenate([part.ids_LTK for part in parts], axis=1), documents)


def metro(name: str, trace: Trace, profile: Profile, ranks: int, slots: int, batch: int, batches: int) -> None:
    """One row: the orders of METRO's greedy rule beside the exact solution and the even split."""
    ids = batches_of(trace, batch, "decode", batches, 0)
    most: dict[str, list[int]] = {"even": [], "id": [], "copies": [], "expected": [], "exact": []}
    for layer, ids_BTK in zip(layer_maps(eplb(profile, units=ranks, seed=0, slots=slots)), ids, strict=True):
        for chosen in ids_BTK:
            load_E = np.bincount(chosen.ravel(), minlength=layer.experts)
            active = np.flatnonzero(load_E).tolist()
            used = [slot for e in active for slot in layer.slots_EC[e, : min(layer.copies_E[e], load_E[e])]]
            for rule, rank in (
                ("even", layer.rank_P[used]),
                ("id", greedy_hosts(active, layer.hosts, ranks, "id")),
                ("copies", greedy_hosts(active, layer.hosts, ranks)),
                ("expected", greedy_hosts(active, layer.hosts, ranks, "expected")),
                ("exact", exact_hosts(active, layer.hosts, ranks)),
            ):
                most[rule].append(int(np.bincount(rank, minlength=ranks).max()))
    figures = {rule: np.array(values, np.float64) for rule, values in most.items()}
    means = "".join(f"{figures[rule].mean():>9.2f}" for rule in most)
    gaps = [figures[rule] / figures["exact"] - 1 for rule in ("id", "copies", "expected")]
    spread = "".join(f"{100 * gap.mean():>9.1f}{100 * gap.max():>7.0f}" for gap in gaps)
    print(f"{name:18}{ranks:>6}{slots:>6}{batch:>6}{means}{spread}")


def rules(
    trace: Trace, profile: Profile, cost: CostModel, phase: str, batch: int, batches: int, ranks: int, slots: int
) -> None:
    """One row per rule: the same plan, the same batches."""
    print(f"\n{trace.name}: {phase} batches of {batch:,} tokens, {ranks} ranks, {slots} slots, cost {cost.name} (replayed)")
    print(f"{'rule':16}{'max/mean':>10}{'replicas':>10}{'step, ' + cost.unit:>12}{'ranks/token':>13}{'weights sent':>14}")
    plans = {"eplb": eplb(profile, units=ranks, seed=0, slots=slots)}
    for rule in RULES.names():
        options = {"least": max(1, batch * trace.ids_LTK.shape[2] // (8 * ranks))} if rule == "llep" else {}
        report = simulate(trace, plans, batch=batch, rule=rule, cost=cost, phase=phase, batches=batches, rule_options=options)
        row = report.parts[0].results[1]
        print(
            f"{rule:16}{row.imbalance.mean:>10.3f}{row.max_activated.mean:>10.2f}{row.step.mean:>12,.3f}"
            f"{row.rank_sends:>13.3f}{row.weights_moved:>14.1f}"
        )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=16, help="batches of each kind at most")
    arguments = parser.parse_args()
    root = data_root() / "routing"
    if not root.is_dir():
        print(f"skipped: no routing traces at {root}; set EQUIPOISE_SHARED_DATA to their parent directory")
        return
    counts = {name: load_counts(name, data_root()) for name in ("gpt-oss-20b", "deepseek-v2-lite")}
    profiles = {name: make_profile(each, np.arange(len(each.scenario))) for name, each in counts.items()}
    traces = {name: tokens_of(name, each.model, root) for name, each in counts.items()}
    heads = "".join(f"{head:>9}" for head in ("even", "by id", "copies", "expected", "exact"))
    gaps = "".join(f"{head:>9}{'worst':>7}" for head in ("id %", "copies %", "expect. %"))
    print(f"{'model':18}{'ranks':>6}{'slots':>6}{'batch':>6}{heads}{gaps}")
    for name, ranks, several in METRO:
        for slots in several:
            for batch in (16, 64, 256):
                metro(name, traces[name], profiles[name], ranks, slots, batch, arguments.batches)
    cost = PairCost()
    if (root / TABLE).is_file():
        cost = cost_model(str(root / TABLE), counts["gpt-oss-20b"].model)
    for phase, batch in (("decode", 64), ("prefill", 8192)):
        rules(traces["gpt-oss-20b"], profiles["gpt-oss-20b"], cost, phase, batch, arguments.batches, 8, 40)
    for phase, batch in (("decode", 64), ("prefill", 2048)):
        rules(traces["deepseek-v2-lite"], profiles["deepseek-v2-lite"], PairCost(), phase, batch, arguments.batches, 8, 72)


if __name__ == "__main__":
    main()
