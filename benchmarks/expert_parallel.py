"""One MoE layer over 2 and 4 processes: placements and dispatch rules side by side, with and without skew, prefill and decode.

    python benchmarks/expert_parallel.py --data DIRECTORY --out expert_parallel.json --write docs/expert-parallel.md \
        --plot docs/expert-parallel.svg

Every process has one thread and computes its own rank's slots; the processes talk by gloo. A round runs every contender once,
one after the other, in another order each time, so that what else the machine does hits all alike; a ratio is taken within its
round, against `contiguous`, and its median and quartiles over rounds are told. Times are those of the slowest rank, waiting
counted.

The layer is random; which experts tokens choose is not: `natural` is the routing of a small trained model (shelf, qwen3-32) on
prose and code of --data, the rest is injected: `RATIO:N` sends so many of the selections to the first N experts, `0:0` is
level. Plans are made from other batches of the same traffic, those of `drifted RATIO:N` from natural ones. R&Q plans have as
many bytes as `contiguous`; their errors are assumed, as random weights have nothing to be measured on.
Shapes: B batches, T tokens over all ranks, K top-k, E experts, L layers, R ranks.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from expert_parallel_page import curves, tables, trade_off
from numpy.typing import NDArray
from quantization_page import write_between
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.distributed.expert_parallel import AllToAllEP

from equipoise.artifacts import ModelFacts, Plan, Profile, Source
from equipoise.artifacts.files import write_atomic
from equipoise.execution.expert_parallel.meter import ParallelMeter
from equipoise.execution.expert_parallel.ranks import Ranks
from equipoise.execution.expert_parallel.runtime import parallelize, rank_slots, set_rank_dispatch
from equipoise.models.layers import model_facts
from equipoise.planning.methods import make_plan
from equipoise.simulation.simulate import default_plan

Ints = NDArray[np.int64]
EXPERTS, TOP_K, WIDTH, INNER = 32, 4, 512, 256
LEAST = 128
"""Fewest tokens that LLEP sends weights for (m): below, a rank that has the weights is faster here."""
LLEP = {"least": LEAST, "gate": 1.3}
CONTENDERS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("contiguous", "contiguous", "even", {}),
    ("EPLB", "eplb", "even", {}),
    ("R&Q", "rq", "even", {}),
    ("LLEP", "contiguous", "llep", LLEP),
    ("quota", "contiguous", "quota", {}),
    ("EPLB + metro", "eplb", "metro", {}),
    ("EPLB + least loaded", "eplb", "least_loaded", {}),
    ("R&Q + LLEP", "rq", "llep", LLEP),
    ("R&Q + quota", "rq", "quota", {}),
    ("R&Q + metro", "rq", "metro", {}),
    ("R&Q + least loaded", "rq", "least_loaded", {}),
)
"""Name, placement, rule, its options."""
STOCK = "transformers all_to_all"
"""transformers' own expert parallelism: the placement of `contiguous`."""
CASES = ("0:0", "natural", "0.5:4", "drifted 0.8:4")


@dataclass(frozen=True, eq=False)
class Traffic:
    """Which experts tokens choose.

    Attributes:
        planned: [T, K] what plans are made from.
        served: [T, K] what is run.
    """

    planned: Ints
    served: Ints


def natural(data: Path | None, tokens: int) -> Ints | None:
    """[T, K] choices of the most uneven layer of the trained model; None without data."""
    if data is None:
        return None
    from equipoise.lab import load
    from equipoise.models.layers import find_moe_layers, observe
    from equipoise.profiling.sequences import Framing, text_batches
    from equipoise.profiling.texts import read_documents

    model, tokenizer = load("qwen3-32")
    layers = find_moe_layers(model)
    seen: list[list[Ints]] = [[] for _ in layers]
    handles = [observe(layer, lambda h, ids, w, at=seen[i]: at.append(ids.numpy())) for i, layer in enumerate(layers)]
    files = {"prose": data / "prose_en/heldout.jsonl.gz", "code": data / "code/python_heldout.jsonl.gz"}
    documents = {kind: read_documents([path]) for kind, path in files.items()}
    batches = text_batches(
        documents,
        tokenizer,
        Framing.of(tokenizer, model.config),
        tokens=tokens // 2 + 512,
        seq_len=256,
        batch_size=8,
        layout="packed",
    )
    with torch.no_grad():
        for batch in batches:
            model(input_ids=torch.from_numpy(batch.input_ids))
    for handle in handles:
        handle.remove()
    choices = [np.concatenate(parts) for parts in seen]
    skew = [np.bincount(ids.ravel(), minlength=EXPERTS).max() for ids in choices]
    return choices[int(np.argmax(skew))][:tokens]


def injected(case: str, tokens: int, rng: np.random.Generator) -> Ints:
    """[T, K] choices of which a part falls on the first few experts, evenly; `0:0` is even over all."""
    ratio, hot = float(case.partition(":")[0]), int(case.partition(":")[2])
    chance = np.full(EXPERTS, (1 - ratio) / max(EXPERTS - hot, 1))
    chance[:hot] = ratio / max(hot, 1)
    # In each column on its own, hot or not; distinct experts within a token.
    goes_hot = rng.random((tokens, TOP_K)) < ratio
    hot_ids = rng.random((tokens, max(hot, TOP_K))).argsort(1)[:, :TOP_K]
    cold_ids = hot + rng.random((tokens, EXPERTS - hot)).argsort(1)[:, :TOP_K]
    return np.where(goes_hot, hot_ids, cold_ids)


def traffic(case: str, calm: Ints | None, tokens: int, seed: int) -> Traffic | None:
    """The traffic of a case; None where it needs data that is not there."""
    rng = np.random.default_rng(seed)
    kind = case.removeprefix("drifted ")
    if calm is None and (kind == "natural" or kind != case):
        return None
    if kind == "natural":
        assert calm is not None, "checked above"
        order = rng.permutation(len(calm) // 64)  # stretches of 64 tokens stay together
        rows = (order[:, None] * 64 + np.arange(64)).ravel()
        half = len(rows) // 2
        return Traffic(calm[rows[:half]], calm[rows[half:]])
    planned = calm if kind != case else injected(kind, tokens, rng)
    assert planned is not None, "checked above"
    return Traffic(planned, injected(kind, tokens, rng))


def profile_of(facts: ModelFacts, planned: Ints, windows: int = 8) -> Profile:
    """What a profile of this traffic would say of the layer's load."""
    parts = [np.bincount(part.ravel(), minlength=EXPERTS) for part in np.array_split(planned, windows)]
    windows_WLE = np.stack(parts)[:, None]
    counts = np.zeros((1, 2, 1, EXPERTS), np.int64)
    counts[0, 0] = windows_WLE.sum(0)
    return Profile(
        model=facts, source=Source(scenarios=("all",)), counts=counts, gate_mass=counts.sum(1) / TOP_K,
        tokens=np.array([len(planned)]), windows=windows_WLE, window_scenario=np.zeros(windows, np.int64),
    )  # fmt: skip


def plans_of(facts: ModelFacts, planned: Ints, ranks: int, extra: float) -> dict[str, Plan]:
    """The placements that are compared."""
    profile = profile_of(facts, planned)
    slots = int(np.ceil(EXPERTS * extra / ranks)) * ranks
    return {
        "contiguous": default_plan(facts, ranks),
        "eplb": make_plan(profile, "eplb", units=ranks, slots=slots),
        "rq": make_plan(profile, "rq", units=ranks),
    }


@dataclass(frozen=True, eq=False)
class Tokens:
    """What dispatch knows of the tokens of a call."""

    real_T: torch.Tensor
    position_T: torch.Tensor
    decode: bool


def tiny_model() -> Any:
    """A model of one MoE layer in bf16."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=64, moe_intermediate_size=INNER, num_experts=EXPERTS,
        num_experts_per_tok=TOP_K, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, norm_topk_prob=True,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()


def run_rank(
    ranks: Ranks, plans: dict[str, dict[str, Plan]], flows: dict[str, Traffic], sizes: dict[str, int], rounds: int
) -> dict[str, Any]:
    """All cases on one rank: case -> phase -> contender -> figures of each round."""
    found: dict[str, Any] = {}
    for case, flow in flows.items():
        models = {}
        for placement, plan in plans[case].items():
            models[placement] = tiny_model()
            parallelize(models[placement], ranks, plan)
        found[case] = {"expert_bytes": {name: expert_bytes(model, ranks) for name, model in models.items()}}
        stock = stock_layer(ranks)
        for phase, tokens in sizes.items():
            rng = np.random.default_rng(1)
            rows: dict[str, list[dict[str, Any]]] = {name: [] for name in (STOCK, *(c[0] for c in CONTENDERS))}
            for step in range(rounds + 1):  # the first lays out storage
                chosen = batch_of(flow.served, tokens, phase, rng)
                mine = np.array_split(chosen, ranks.size)[ranks.rank]
                generator = torch.Generator().manual_seed(step * ranks.size + ranks.rank)
                hidden = torch.randn(len(mine), WIDTH, generator=generator).to(torch.bfloat16)
                position = torch.from_numpy(rng.integers(0, 4096, tokens))[: len(mine)]
                known = Tokens(torch.ones(len(mine), dtype=torch.bool), position, phase == "decode")
                gates = torch.full((len(mine), TOP_K), 1 / TOP_K, dtype=torch.bfloat16)
                ranks.meet("beginning together")
                with torch.no_grad():
                    begun = time.perf_counter()
                    stock(hidden, torch.from_numpy(mine), gates)
                took = ranks.gather(torch.tensor([time.perf_counter() - begun], dtype=torch.float64), "gathering times")
                if step:
                    rows[STOCK].append({"layer_ms": 1e3 * float(took.max())})
                turn = step % len(CONTENDERS)
                for name, placement, rule, options in CONTENDERS[turn:] + CONTENDERS[:turn]:
                    set_rank_dispatch(models[placement], rule, options)
                    slots = rank_slots(models[placement])[0]
                    slots.batches = lambda stack, rows, known=known: known
                    ranks.meet("beginning together")
                    with torch.no_grad(), ParallelMeter(models[placement]) as meter:
                        slots(hidden, torch.from_numpy(mine), gates, slots.activate)
                    if step:
                        rows[name].append(meter.report().rows())
                    else:
                        meter.report()
            found[case][phase] = rows
    return found


def stock_layer(ranks: Ranks) -> AllToAllEP:
    """The same layer under transformers' own expert parallelism, `all_to_all`: this rank's shard."""
    experts = tiny_model().model.layers[0].mlp.experts
    count = EXPERTS // ranks.size
    for name in ("gate_up_proj", "down_proj"):
        shard = getattr(experts, name).detach()[ranks.rank * count : (ranks.rank + 1) * count].clone()
        experts._parameters[name] = torch.nn.Parameter(shard, requires_grad=False)
    experts.num_experts, experts._is_expert_parallel = count, True
    experts.config._experts_implementation = "grouped_mm"
    mesh = dist.device_mesh.init_device_mesh("cpu", (ranks.size, 1), mesh_dim_names=("ep", "tp"))
    return AllToAllEP(experts, mesh["ep"], mesh["tp"])


def expert_bytes(model: Any, ranks: Ranks) -> int:
    """Bytes of experts over all ranks."""
    held = sum(group.nbytes for slots in rank_slots(model) for group in slots.groups)
    return int(ranks.gather(torch.tensor([held]), "gathering bytes").sum())


def batch_of(served: Ints, tokens: int, phase: str, rng: np.random.Generator) -> Ints:
    """[T, K] a batch: consecutive tokens in prefill, tokens from anywhere in decode."""
    if phase == "decode":
        return served[rng.choice(len(served), tokens, replace=False)]
    first = int(rng.integers(0, len(served) - tokens + 1))
    return served[first : first + tokens]


def worker(rank: int, size: int, directory: Path, run: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """One process."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(directory / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=300))
    with Ranks(rank, size, 300.0) as ranks:
        found = run(ranks, *args)
    if rank == 0:
        (directory / "found.json").write_text(json.dumps(found))


def on_processes(size: int, run: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """What `run(ranks, *args)` gives on rank 0 of so many processes."""
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        processes = [fork.Process(target=worker, args=(rank, size, Path(name), run, args)) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit(f"a process of {size} ended with {[process.exitcode for process in processes]}")
        found: dict[str, Any] = json.loads((Path(name) / "found.json").read_text())
    return found


def summary(found: dict[str, Any], ranks: int) -> list[dict[str, Any]]:
    """One row for each case, phase and contender: medians over rounds, ratios within rounds."""
    rows = []
    for case, by_phase in found.items():
        for phase, by_name in by_phase.items():
            if phase == "expert_bytes":
                continue
            base = by_name["contiguous"]
            for name, placement in ((STOCK, "contiguous"), *((c[0], c[1]) for c in CONTENDERS)):
                mine = by_name[name]
                ratio = [one["layer_ms"] / other["layer_ms"] for one, other in zip(mine, base, strict=True)]
                middle = {key: statistics.median(one[key] for one in mine) for key in mine[0] if key != "rows_by_rank"}
                low, mid, high = statistics.quantiles(ratio, n=4, method="inclusive") if len(ratio) > 1 else [ratio[0]] * 3
                rows.append(
                    {
                        "ranks": ranks, "case": case, "phase": phase, "contender": name, **middle,
                        "expert_bytes": by_phase["expert_bytes"][placement], "ratio": mid, "ratio_q1": low, "ratio_q3": high,
                    }
                )  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="directory of text; without it the natural cases are left out")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--prefill", type=int, default=2048, help="tokens of a batch over all ranks")
    parser.add_argument("--decode", type=int, default=64, help="tokens of a step over all ranks")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--extra", type=float, default=1.25, help="slots of EPLB over experts")
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--out", type=Path, default=None, help="JSON to write")
    parser.add_argument("--write", type=Path, default=None, help="page whose tables are written anew")
    parser.add_argument("--plot", type=Path, default=None, help="picture of memory against traffic (.svg or .png)")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    begun = time.perf_counter()
    facts = model_facts(tiny_model(), "one layer")
    calm = natural(given.data, 8 * given.prefill)
    flows = {case: flow for case in given.cases if (flow := traffic(case, calm, 4 * given.prefill, 0)) is not None}
    rows, sizes = [], {"prefill": given.prefill, "decode": given.decode}
    for size in given.ranks:
        plans = {case: plans_of(facts, flow.planned, size, given.extra) for case, flow in flows.items()}
        rows += summary(on_processes(size, run_rank, plans, flows, sizes, given.rounds), size)
    points = []
    for case, flow in flows.items():
        batches = [batch_of(flow.served, given.prefill, "prefill", np.random.default_rng(s)) for s in range(8)]
        counts = np.stack([np.bincount(batch.ravel(), minlength=EXPERTS) for batch in batches])
        points += [
            {"case": case, **point} for point in curves(profile_of(facts, flow.planned), counts, max(given.ranks), LEAST)
        ]
    result = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads_per_process": 1},
        "layer": {"experts": EXPERTS, "top_k": TOP_K, "width": WIDTH, "inner": INNER, "dtype": "bf16"},
        "tokens": sizes, "rounds": given.rounds, "least": LEAST, "seconds": time.perf_counter() - begun,
        "rows": rows, "trade_off": points,
    }  # fmt: skip
    text = tables(result)
    print(text)
    if given.out:
        write_atomic(given.out, json.dumps(result, indent=2) + "\n")
    if given.write:
        write_between(given.write, "expert_parallel.py", text)
    if given.plot:
        trade_off(points, given.plot, max(given.ranks))


if __name__ == "__main__":
    main()
