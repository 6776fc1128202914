"""Balance of placements on the traffic they were made from, against EPLB and the proven lower bound, layer by layer.

Run from the repository root, with the traces in $EQUIPOISE_SHARED_DATA/routing (else ../shared/data/routing):
    OMP_NUM_THREADS=1 python benchmarks/placement_in_sample.py

Columns, over the layers of a trace: mean max/mean rank load of `eplb`, of `robust` and of the bound; the largest ratio of
`robust` to `eplb`; layers in which `robust` is more than 1 % above the bound; slots that hold an expert twice on a rank.
Shapes: S scenarios, L MoE layers, E logical experts.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from planning_traces import data_root, load_trace

from equipoise.planning.eplb import eplb_placement
from equipoise.planning.placement_bound import placement_bound
from equipoise.planning.ranks import rank_load
from equipoise.planning.robust.placement import robust_placement

Floats = NDArray[np.float64]


def traces() -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Name and [S, L, E] counts of each trace."""
    root = data_root()
    for name in ("deepseek-v2-lite", "gpt-oss-20b"):
        trace = load_trace(name, root)
        yield name, np.stack([trace.counts[trace.scenario == s].sum(0) for s in np.unique(trace.scenario)])
    with np.load(root / "routing" / "dsr1_srt_slurm" / "logical_count.npz") as tables:
        counts = np.stack([tables[key] for key in tables.files])
    yield "deepseek-r1", counts[:, counts.sum((0, 2)) > 0]


def ratios(physical_LP: NDArray[np.int64], load_LE: Floats, ranks: int) -> Floats:
    """[L] max/mean rank load."""
    loads = np.stack([rank_load(row, load, ranks) for row, load in zip(physical_LP, load_LE, strict=True)])
    return np.asarray(loads.max(1) / loads.mean(1))


def doubled(physical_LP: NDArray[np.int64], ranks: int) -> int:
    """Slots beyond the first of an expert on one rank."""
    return sum(len(rank) - len(set(rank)) for row in physical_LP.tolist() for rank in np.reshape(row, (ranks, -1)).tolist())


def main() -> None:
    """Print one line for each trace, number of ranks and redundant slots per rank."""
    heads = ("trace", "ranks", "redundant per rank", "eplb", "robust", "bound", "worst robust / eplb", "> 1 % above bound")
    print("| " + " | ".join((*heads, "doubled, eplb", "doubled, robust")) + " |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name, counts_SLE in traces():
        load_LE = counts_SLE.sum(0).astype(np.float64)
        layers, experts = load_LE.shape
        for ranks in (8, 16, 32):
            for redundant in (0, 1):
                if experts % ranks:
                    continue
                slots = experts + redundant * ranks
                theirs = eplb_placement(load_LE, slots, ranks)
                ours = robust_placement(counts_SLE, ranks=ranks, slots=slots)
                bound = np.array([placement_bound(load, slots, ranks) for load in load_LE])
                a, b = ratios(theirs, load_LE, ranks), ratios(ours, load_LE, ranks)
                print(
                    f"| {name} | {ranks} | {redundant} | {a.mean():.4f} | {b.mean():.4f} | {bound.mean():.4f} "
                    f"| {(b / a).max():.4f} | {(b > 1.01 * bound).sum()} of {layers} | {doubled(theirs, ranks)} "
                    f"| {doubled(ours, ranks)} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
