"""How long `rq` takes to plan 61 layers of 256 experts on 256 units, beside plain greedy planners in the same run.

Run from the repository root, on one core:
    OMP_NUM_THREADS=1 python benchmarks/planning.py [--json planning.json]

The load is synthetic: log-normal experts, log-normal changes between windows, Poisson counts. Times are the fastest of
the repeats, taken in turn, so that a busy machine hurts all alike; processor time stands beside them for the same
reason. `held out` is a second draw of the same windows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from baselines import alias, eplb
from numpy.typing import NDArray

from equipoise.artifacts import LayerFacts, ModelFacts, Profile, Source
from equipoise.artifacts.files import write_atomic
from equipoise.metrics import lis
from equipoise.planning.methods import make_plan

MATRICES = ((4096, 7168), (7168, 2048))


def synthetic(layers: int, experts: int, windows: int, seed: int) -> tuple[Profile, NDArray[np.int64]]:
    """A profile and the load of other text, with the same experts hot and the same kinds of change between windows."""
    rng = np.random.default_rng(seed)
    base = rng.lognormal(0.0, 1.0, (layers, experts))
    drawn = rng.poisson(20.0 * base * rng.lognormal(0.0, 0.4, (2, windows, layers, experts)))
    facts = tuple(
        LayerFacts(path=f"layers.{i}", model_layer=i, num_experts=experts, top_k=8, matrices=MATRICES) for i in range(layers)
    )
    model = ModelFacts(name="synthetic", model_type="synthetic", dtype="bf16", fingerprint="synthetic", layers=facts)
    counts = np.zeros((1, 2, layers, experts), np.int64)
    counts[0, 0] = drawn[0].sum(0)
    profile = Profile(
        model=model,
        source=Source(origin="synthetic", scenarios=("all",)),
        counts=counts,
        gate_mass=counts.sum(1) / 8.0,
        tokens=counts[:, 0, 0].sum(1) // 8,
        windows=drawn[0],
        window_scenario=np.zeros(windows, np.int64),
    )
    return profile, drawn[1].sum(0)


def unit_loads_eplb(plan_on: NDArray[np.int64], score: NDArray[np.int64]) -> NDArray[np.float64]:
    """[L, U] unit loads of another load under EPLB's plan with two slots per unit."""
    units, rows = plan_on.shape[1], []
    for load, other in zip(plan_on.astype(np.float64), score, strict=True):
        expert, unit = eplb(load, 2 * units, units)
        rows.append(np.bincount(unit, other[expert] / np.bincount(expert)[expert], units))
    return np.array(rows)


def unit_loads_alias(plan_on: NDArray[np.int64], score: NDArray[np.int64]) -> NDArray[np.float64]:
    """[L, U] unit loads of another load under the alias construction."""
    rows = []
    for load, other in zip(plan_on.astype(np.float64), score, strict=True):
        expert, unit, share = alias(load + 1e-9)
        rows.append(np.bincount(unit, other[expert] * share, len(load)))
    return np.array(rows)


def main() -> None:
    """Print one row per planner."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None, help="file for the figures")
    arguments = parser.parse_args()
    profile, other = synthetic(arguments.layers, arguments.experts, arguments.windows, seed=0)
    load = profile.load
    planners: dict[str, Callable[[NDArray[np.int64]], NDArray[np.float64]]] = {
        "rq": lambda score: plan.unit_load(score),
        "eplb (plain numpy)": lambda score: unit_loads_eplb(load, score),
        "alias": lambda score: unit_loads_alias(load, score),
    }
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in planners}
    for _ in range(arguments.repeats):
        for name, unit_load in planners.items():
            began = time.perf_counter(), time.process_time()
            if name == "rq":
                plan = make_plan(profile)
            else:
                unit_load(load)
            spent[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    print(f"{arguments.layers} layers x {arguments.experts} experts on {arguments.experts} units, {arguments.windows} windows")
    print(f"raw LIS {lis(load).mean():.3f}; rq's proven bound {plan.predicted.lower_bound:.4f}\n")
    print(f"{'planner':20} {'seconds':>8} {'processor':>9} {'of eplb':>8} {'in sample':>10} {'held out':>9}")
    rows = []
    for name, unit_load in planners.items():
        scores = [float(lis(unit_load(score)).mean()) for score in (load, other)]
        wall, processor = (min(clock) for clock in zip(*spent[name], strict=True))
        ratios = [mine[1] / base[1] for mine, base in zip(spent[name], spent["eplb (plain numpy)"], strict=True)]
        ratio = processor / min(clock[1] for clock in spent["eplb (plain numpy)"])
        print(f"{name:20} {wall:8.2f} {processor:9.2f} {ratio:8.2f} {scores[0]:10.4f} {scores[1]:9.4f}")
        rows.append(
            {
                "planner": name,
                "seconds": wall,
                "processor": processor,
                "ratios": ratios,
                "in_sample": scores[0],
                "held_out": scores[1],
            }
        )
    if arguments.json:
        write_atomic(arguments.json, json.dumps({"rows": rows, "bound": plan.predicted.lower_bound}, indent=1) + "\n")


if __name__ == "__main__":
    main()
