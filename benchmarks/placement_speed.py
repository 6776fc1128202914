"""How long EPLB's placement takes here, in plain Python and in vLLM's policy, side by side in one run; and our own methods.

Run from the repository root, on one core (with vLLM in the environment its policy takes part):
    OMP_NUM_THREADS=1 python benchmarks/placement_speed.py

58 layers of 256 experts, 288 slots, 32 ranks; synthetic log-normal loads. The contenders run in turn, so that other work on
the machine hurts all alike; a ratio is taken within each turn, and its median, least and greatest over the turns are printed,
of wall-clock and of processor time, which other work disturbs less. All placements are compared first: the ratios are of
equal results.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from equipoise.artifacts import LayerFacts, ModelFacts, Profile, Source
from equipoise.artifacts.files import write_atomic
from equipoise.planning.eplb import eplb_placement
from equipoise.planning.methods import METHODS, make_plan
from equipoise.planning.ranks import rank_load
from equipoise.planning.redundancy import choose_redundancy

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "planning"))
from eplb_reference import place  # the oracle of the tests, one slot at a time

Placement = NDArray[np.int64]


def loads(layers: int, experts: int, scenarios: int, seed: int) -> NDArray[np.int64]:
    """[S, L, E] counts, below 2^24 so that float32 holds them, with experts that are hot in some scenarios only."""
    rng = np.random.default_rng(seed)
    base = rng.lognormal(0.0, 1.0, (layers, experts))
    return rng.poisson(2000.0 * base * rng.lognormal(0.0, 0.5, (scenarios, layers, experts)))


def profile_of(load_SLE: NDArray[np.int64]) -> Profile:
    """A profile of one prefill scenario per row."""
    scenarios, layers, experts = load_SLE.shape
    facts = tuple(
        LayerFacts(path=f"layers.{i}", model_layer=i, num_experts=experts, top_k=8, matrices=()) for i in range(layers)
    )
    counts = np.zeros((scenarios, 2, layers, experts), np.int64)
    counts[:, 0] = load_SLE
    return Profile(
        model=ModelFacts(name="synthetic", model_type="synthetic", dtype="bf16", fingerprint="synthetic", layers=facts),
        source=Source(origin="synthetic", scenarios=tuple(f"s{i}" for i in range(scenarios))),
        counts=counts,
        gate_mass=np.zeros(load_SLE.shape),
        tokens=load_SLE[:, 0].sum(1) // 8,
        windows=load_SLE,
        window_scenario=np.arange(scenarios),
    )


def vllm_policy() -> Callable[[NDArray[np.int64], int, int], Placement] | None:
    """The default policy of vLLM, where it is installed."""
    try:
        import torch
        from vllm.distributed.eplb.policy.default import DefaultEplbPolicy
    except ImportError:
        return None

    def policy(load_LE: NDArray[np.int64], slots: int, ranks: int) -> Placement:
        return DefaultEplbPolicy.rebalance_experts(torch.from_numpy(load_LE), slots, 1, 1, ranks).numpy()

    return policy


def rank_loads(physical_LP: Placement, load_LE: NDArray[np.int64], ranks: int) -> NDArray[np.float64]:
    """[L, R] loads, ascending: of experts with equal loads, any may be where the other is."""
    return np.sort([rank_load(physical, load, ranks) for physical, load in zip(physical_LP, load_LE, strict=True)])


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and processor time of one call."""
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    """Print times and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 58), ("experts", 256), ("slots", 288), ("ranks", 32), ("scenarios", 50), ("turns", 11)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, default=None, help="file for the figures")
    args = parser.parse_args()
    load_SLE = loads(args.layers, args.experts, args.scenarios, seed=0)
    load_LE = load_SLE.sum(0)
    assert load_LE.max() < 2**24, "float32 does not hold these counts"
    contenders: dict[str, Callable[[], Placement]] = {
        "equipoise": lambda: eplb_placement(load_LE, args.slots, args.ranks),
        "plain Python": lambda: np.array(place(load_LE.tolist(), args.slots, args.ranks)),
    }
    policy = vllm_policy()
    if policy:
        contenders["vLLM DefaultEplbPolicy"] = lambda: policy(load_LE, args.slots, args.ranks)
    ours = rank_loads(contenders["equipoise"](), load_LE, args.ranks)
    for name, run in contenders.items():
        same = np.allclose(rank_loads(run(), load_LE, args.ranks), ours, rtol=1e-12)
        print(f"{name:24} {'the same rank loads in every layer' if same else 'OTHER RANK LOADS'}")
    turns = [{name: seconds(run) for name, run in contenders.items()} for _ in range(args.turns)]
    print(f"\n{args.layers} layers x {args.experts} experts, {args.slots} slots, {args.ranks} ranks, {args.turns} turns")
    rows: list[dict[str, object]] = []
    for clock, kind in enumerate(("wall-clock", "processor")):
        for name in contenders:
            spent, ours = (np.array([turn[who][clock] for turn in turns]) for who in (name, "equipoise"))
            ratio = spent / ours
            rows.append({"clock": kind, "contender": name, "seconds": float(np.median(spent)), "ratios": ratio.tolist()})
            print(
                f"{kind:11} {name:24} median {1e3 * np.median(spent):8.1f} ms   "
                f"x{np.median(ratio):6.1f} of ours (least {ratio.min():.1f}, greatest {ratio.max():.1f})"
            )
    if not policy:
        print("vLLM is not installed here; run in an environment that has it to compare with its policy.")
    profile = profile_of(load_SLE)
    print(f"\nwhole plans from {args.scenarios} scenarios, validated and with forecasts")
    current = make_plan(profile, "eplb", units=args.ranks, slots=args.slots)
    fresh = profile_of(loads(args.layers, args.experts, 8, seed=1))
    whole: dict[str, Callable[[], object]] = {
        method: partial(make_plan, profile, method, units=args.ranks, slots=args.slots)
        for method in ("contiguous", "eplb", "robust")
        if method in METHODS
    }
    whole["incremental, 8 scenarios, 64 moves"] = partial(
        make_plan, fresh, "incremental", units=args.ranks, slots=args.slots, current=current, most_moves=64
    )
    whole["choose_redundancy"] = partial(choose_redundancy, profile, ranks=args.ranks)
    for name, run in whole.items():
        wall, processor = seconds(run)
        print(f"{name:36} {wall:8.2f} s wall-clock {processor:8.2f} s processor")
        rows.append({"clock": "processor", "contender": f"whole plan, {name}", "seconds": processor})
    if args.json:
        write_atomic(args.json, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
