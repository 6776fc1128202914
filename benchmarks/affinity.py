"""Placement by affinity: certified on small cases, recovered where planted, nothing found where nothing is, and real traces.

Run from the repository root, with the traces in $EQUIPOISE_SHARED_DATA/routing (without them two sections are skipped):
    python benchmarks/affinity.py --json affinity.json
    python benchmarks/affinity.py --only models --data DIRECTORY --write docs/affinity.md      # the one table of all routings

The section of models runs those of the shelf, and the reference model, on the mix's training text and judges on its held-out
text (`--data` is the directory that its files are relative to; without it, on the demo's texts); `--models` names fewer.

Prints Markdown tables; the JSON file holds the same figures with the machine and versions. All figures are replayed on the
tokens that they name: `held out` are documents that the placement was not made from. `crossings`: share of (expert, next
expert) pairs of a token on different ranks; `nodes`: the same for nodes; `fan-out`: ranks that a token's experts of one layer
lie on; `load`: largest rank load over the mean, mean over layers; `by chance`: crossings of the same placement and loads if
every layer were routed by itself. Seconds are processor time of one core.
Shapes: L layers, T tokens, K top-k, E experts, R ranks, N nodes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from affinity_held_out import Source, Tokens, judged, recorded
from numpy.typing import NDArray
from quantization_page import write_between

from equipoise import __version__
from equipoise.lab import shelf
from equipoise.lab.recipe import read_mix
from equipoise.lab.text import domain_documents
from equipoise.models.reference import demo_texts, reference_model_dir
from equipoise.planning.affinity.exact import by_layers, by_program
from equipoise.planning.affinity.exflow import MU, frontier, place
from equipoise.planning.affinity.pairs import Affinity, affinity, chance_crossings, count_pairs, crossings, splits, traffic
from equipoise.planning.affinity.search import search
from equipoise.planning.affinity.task import make_task
from equipoise.planning.eplb import eplb_placement
from equipoise.profiling.loading import load_model, load_tokenizer

Ids = NDArray[np.int64]
Placement = list[NDArray[np.int64]]
Row = dict[str, Any]

REFERENCE = "reference"
MODELS = "Planted cases, traces and models, held-out documents"
"""Title of the section that runs models."""
CASES = ((3, 4, 2, 1), (4, 6, 3, 1), (4, 6, 2, 2), (3, 8, 2, 2), (5, 6, 2, 2), (6, 8, 4, 1), (12, 8, 4, 1), (12, 8, 4, 2))
"""Layers, experts, ranks and top-k of the certified cases; the mixed-integer program runs on the first five."""


def markov(layers: int, experts: int, groups: int, stay: float, tokens: int, k: int, seed: int) -> tuple[Ids, Ids]:
    """Tokens whose experts of a layer are of one planted group, which they keep with probability `stay` at each boundary.

    Returns:
        [L, T, K] experts and [L, E] the planted group of each expert.
    """
    rng = np.random.default_rng(seed)
    group_LE = np.stack([rng.permutation(np.repeat(np.arange(groups), experts // groups)) for _ in range(layers)])
    at, ids = rng.integers(0, groups, tokens), []
    for layer in range(layers):
        if layer:
            at = np.where(rng.random(tokens) < stay, at, (at + rng.integers(1, groups, tokens)) % groups)
        order = rng.random((tokens, experts)) + (group_LE[layer][None, :] != at[:, None])
        ids.append(order.argsort(1)[:, :k])
    return np.stack(ids), group_LE


def independent(layers: int, experts: int, tokens: int, k: int, seed: int) -> Ids:
    """[L, T, K] experts drawn evenly, every layer by itself."""
    return np.random.default_rng(seed).random((layers, tokens, experts)).argsort(2)[:, :, :k]


def physical_of(group_LE: Ids) -> Placement:
    """The placement that puts every group on its own rank."""
    return [np.argsort(row, kind="stable") for row in group_LE]


def certified(seeds: int, seconds: float) -> list[Row]:
    """How often the search reaches the proven optimum of random small cases."""
    rows = []
    for number, (layers, experts, ranks, k) in enumerate(CASES):
        small = number < 5
        row: Row = {"layers": layers, "experts": experts, "ranks": ranks, "top-k": k}
        counts = dict.fromkeys(("cases", "optimal", "MILP proven", "search = MILP"), 0)
        worst = spent = milp_spent = 0.0
        for seed in range(4 * seeds if small else seeds):
            for kind in ("planted", "independent"):
                for mu in (0.0, 0.3):
                    if kind == "planted":
                        ids = markov(layers, experts, ranks, 0.55, 300, k, seed)[0]
                    else:
                        ids = independent(layers, experts, 300, k, seed)
                    places = [np.arange(experts)] * layers
                    task = make_task(affinity(*count_pairs(ids, experts)), places, ranks, mu=mu, together=float(k > 1))
                    began = time.process_time()
                    cost = task.cost(search(task, restarts=4, seed=0)[0])
                    spent += time.process_time() - began
                    exact = by_layers(task)
                    counts["cases"] += 1
                    counts["optimal"] += cost <= exact.cost + 1e-9
                    worst = max(worst, cost / exact.cost - 1)
                    if small and seed < 2:
                        began = time.process_time()
                        program = by_program(task, seconds=seconds)
                        milp_spent += time.process_time() - began
                        counts["MILP proven"] += program.proven
                        counts["search = MILP"] += program.proven and abs(cost - program.cost) <= 1e-6
                        assert not program.proven or abs(program.cost - exact.cost) <= 1e-6, "two exact methods disagree"
        tried = 4 * min(2, 4 * seeds) if small else 0
        row |= counts | {"MILP tried": tried, "worst excess": worst, "search s": spent / counts["cases"]}
        rows.append(row | {"MILP s": milp_spent / tried if tried else None})
    return rows


def planted(seeds: int) -> list[Row]:
    """Held-out crossings of planted groups: contiguous, the planted placement, and what the search finds."""
    rows = []
    for layers, experts, ranks, stay, k in ((12, 8, 4, 0.8, 1), (12, 16, 4, 0.5, 1), (12, 32, 8, 0.8, 2), (24, 64, 8, 0.5, 4)):
        values = []
        for seed in range(seeds):
            ids, group = markov(layers, experts, ranks, stay, 6000, k, seed)
            fit, held = ids[:, :3000], ids[:, 3000:]
            found = place(affinity(*count_pairs(fit, experts)), ranks=ranks, mu=0.0, seed=seed)
            plain = [np.arange(experts)] * layers
            values.append([traffic(held, p, ranks).crossings for p in (plain, physical_of(group), found)])
        mean = np.mean(values, 0)
        row = {"layers": layers, "experts": experts, "ranks": ranks, "top-k": k, "stay": stay}
        rows.append(row | dict(zip(("contiguous", "planted", "found"), mean.tolist(), strict=True)))
    return rows


def unrelated(seeds: int, traces: dict[str, Any]) -> list[Row]:
    """Gain where layers are routed independently, in and out of sample: even load, and the loads of real traces."""
    cases: list[tuple[str, int, int, float, Callable[[int], tuple[Ids, Ids]]]] = []

    def even(experts: int, k: int) -> Callable[[int], tuple[Ids, Ids]]:
        return lambda seed: tuple(np.split(independent(12, experts, 16000, k, seed), 2, axis=1))  # type: ignore[return-value]

    cases += [("even", 8, 4, 0.0, even(8, 1)), ("even", 32, 8, 0.0, even(32, 4)), ("even", 64, 8, MU, even(64, 6))]
    for name, trace in traces.items():
        for mu in (0.0, MU):
            cases.append((f"{name}, layers shuffled", trace["experts"], 8, mu, lambda seed, t=trace: _shuffled(t, seed)))  # type: ignore[misc]
    rows = []
    for name, experts, ranks, mu, draw in cases:
        values = []
        for seed in range(seeds):
            fit, held = draw(seed)
            plain = [np.arange(experts)] * len(fit)
            found = place(affinity(*count_pairs(fit, experts)), ranks=ranks, mu=mu, seed=seed)
            both = [(traffic(ids, plain, ranks), traffic(ids, found, ranks)) for ids in (fit, held)]
            values.append([1 - b.crossings / a.crossings for a, b in both] + [both[1][0].load_ratio, both[1][1].load_ratio])
        mean = np.mean(values, 0).tolist()
        columns = ("gain in sample", "gain held out", "load contiguous", "load found")
        rows.append({"routing": name, "experts": experts, "ranks": ranks, "mu": mu} | dict(zip(columns, mean, strict=True)))
    return rows


def _shuffled(trace: dict[str, Any], seed: int) -> tuple[Ids, Ids]:
    """Halves of a trace whose tokens are shuffled in every layer by itself: loads and co-activation stay, affinity goes."""
    rng = np.random.default_rng(seed)
    ids = np.stack([row[rng.permutation(len(row))] for row in trace["ids"]])
    half = ids.shape[1] // 2
    return ids[:, :half], ids[:, half:]


def load_traces(root: Path) -> dict[str, dict[str, Any]]:
    """Real traces: ids [L, T, K], first [L, T, 1] the heaviest of them (-1 where unknown), document [T] and kind [T] of each
    token, experts. Of gpt-oss-20b every third token.
    """
    traces: dict[str, dict[str, Any]] = {}
    folder = root / "routing" / "dsv2lite_esft"
    if folder.is_dir():
        parts, firsts, document, kind = [], [], [], []
        for index, name in enumerate(("intent", "summary", "translation")):
            with np.load(folder / f"{name}.npz") as data:
                parts.append(data["topk_ids"].astype(np.int64))
                firsts.append(np.full((*parts[-1].shape[:2], 1), -1))
                if "topk_weights" in data.files:  # the experts themselves are in no order
                    firsts[-1] = np.take_along_axis(parts[-1], data["topk_weights"].argmax(2)[..., None], 2)
                document.append(np.repeat(np.arange(len(data["seq_lens"])), data["seq_lens"]) + 1000 * index)
                kind += [name] * parts[-1].shape[1]
        ids = np.concatenate(parts, 1)
        traces["DeepSeek-V2-Lite"] = {"ids": ids, "document": np.concatenate(document), "kind": np.array(kind), "experts": 64}
        traces["DeepSeek-V2-Lite"]["first"] = np.concatenate(firsts, 1)
    folder = root / "routing" / "gptoss20b_fingerprint"
    if folder.is_dir():
        kinds = np.array([d["dataset"].split("_")[0] for d in json.loads((folder / "docs.json").read_text())])
        with np.load(folder / "decode_topk_ids.npz") as data:
            ids, document = data["topk_ids"][::3].astype(np.int64).transpose(1, 0, 2), data["doc"][::3].astype(np.int64)
        kind = np.where(kinds[document] == "mmlu", "mmlu", "other")
        traces["gpt-oss-20b"] = {"ids": np.ascontiguousarray(ids), "document": document, "kind": kind, "experts": 32}
        traces["gpt-oss-20b"]["first"] = ids[..., :1]  # recorded in order of their weights
    return traces


def halves(trace: dict[str, Any], seeds: int) -> Iterator[NDArray[np.bool_]]:
    """[T] tokens to plan on: random halves of the documents."""
    documents = np.unique(trace["document"])
    for seed in range(seeds):
        chosen = np.random.default_rng(seed).permutation(documents)[: len(documents) // 2]
        yield np.isin(trace["document"], chosen)


def all_kinds_but_one(trace: dict[str, Any]) -> Iterator[NDArray[np.bool_]]:
    """[T] tokens to plan on: all kinds of documents but each in turn."""
    for kind in np.unique(trace["kind"]):
        yield trace["kind"] != kind


def placements(pairs: Affinity, load_LE: Ids, ranks: int, nodes: int) -> dict[str, Placement]:
    """The placements to compare."""
    rng, experts = np.random.default_rng(0), load_LE.shape[1]
    return {
        "contiguous": [np.arange(experts)] * len(load_LE),
        "random": [rng.permutation(experts) for _ in load_LE],
        "eplb": list(eplb_placement(load_LE, experts, ranks)),
        f"exflow, mu = {MU:g}": place(pairs, ranks=ranks, nodes=nodes, mu=MU),
        "exflow, mu = 0": place(pairs, ranks=ranks, nodes=nodes, mu=0.0),
    }


def real(
    traces: dict[str, Any], sizes: Sequence[tuple[int, int]], ways: Callable[[dict[str, Any]], Iterator[Any]]
) -> list[Row]:
    """Traffic of held-out tokens of real traces under each placement, mean over the splits."""
    rows: list[Row] = []
    for name, trace in traces.items():
        for ranks, nodes in sizes:
            values: dict[str, list[list[float]]] = {}
            for fit in ways(trace):
                transitions, coactivation = count_pairs(trace["ids"][:, fit], trace["experts"])
                held = trace["ids"][:, ~fit]
                pairs_held = affinity(*count_pairs(held, trace["experts"]))
                load = np.einsum("lee->le", coactivation)
                for method, physical in placements(affinity(transitions, coactivation), load, ranks, nodes).items():
                    met = traffic(held, physical, ranks, nodes)
                    chance = float(chance_crossings(pairs_held, physical, ranks).mean())
                    figures = [met.crossings, chance, met.node_crossings, met.fan_out, met.node_fan_out, met.load_ratio]
                    values.setdefault(method, []).append(figures)
            columns = ("crossings", "by chance", "node crossings", "fan-out", "node fan-out", "load")
            for method, figures in values.items():
                row = {"trace": name, "ranks": ranks, "on nodes": nodes, "placement": method}
                rows.append(row | dict(zip(columns, np.mean(figures, 0).tolist(), strict=True)))
    return rows


def compromise(traces: dict[str, Any]) -> list[Row]:
    """The frontier of crossings and load, in sample and on held-out documents."""
    rows = []
    for name, trace in traces.items():
        fit, experts = next(halves(trace, 1)), trace["experts"]
        pairs = affinity(*count_pairs(trace["ids"][:, fit], experts))
        held = trace["ids"][:, ~fit]
        pairs_held = affinity(*count_pairs(held, experts))
        for point in frontier(pairs, (0.0, 0.1, 0.3, 0.5, 1.0, 2.0, 5.0), ranks=8, restarts=1):
            met = traffic(held, point.physical, 8)
            row = {"trace": name, "mu": point.mu, "crossings in sample": point.crossings, "load in sample": point.load_ratio}
            row |= {"crossings": met.crossings, "fan-out": met.fan_out, "load": met.load_ratio}
            rows.append(row | {"splits": float(splits(pairs_held, point.physical, 8).mean())})
    return rows


def largest() -> list[Row]:
    """Seconds for 58 layers of 256 experts on 32 ranks of 4 nodes, without and with 32 copies a layer."""
    rng = np.random.default_rng(0)
    layers, experts, k, tokens = 58, 256, 8, 3000
    kind = rng.integers(0, 40, tokens)
    taste, fame = rng.normal(0, 1.2, (layers, 40, experts)), rng.normal(0, 0.7, (layers, 1, experts))
    ids = np.stack(
        [(-(t[kind] + f + rng.gumbel(size=(tokens, experts)))).argsort(1)[:, :k] for t, f in zip(taste, fame, strict=True)]
    )
    pairs, rows = affinity(*count_pairs(ids, experts)), []
    for slots in (256, 288):
        began = time.process_time()
        found = place(pairs, ranks=32, nodes=4, slots=slots, restarts=1)
        spent = time.process_time() - began
        plain = float(crossings(pairs, [np.arange(experts)] * layers, 32).mean())
        rows.append({"slots": slots, "seconds": spent, "contiguous": plain, "found": float(crossings(pairs, found, 32).mean())})
    return rows


def everything(traces: dict[str, Any], names: Sequence[str], data: Path | None, tokens: int) -> list[Row]:
    """Planted cases, traces and models in one table, on held-out documents."""
    sources = []
    for stay, k in ((0.8, 1), (0.5, 2), (0.25, 2)):
        ids, _ = markov(12, 16, 4, stay, 6000, k, 0)
        all_tokens = Tokens.ordered(ids, np.arange(6000))
        fit = np.arange(6000) < 3000
        label = "planted" if stay > 0.25 else "planted, no affinity"
        name = f"{label}: 4 groups, stays with {stay:g}"
        sources.append(Source(name, 16, all_tokens.take(fit), all_tokens.take(~fit), planned_ranks=4))
    for name, trace in traces.items():
        known = trace["first"][0, :, 0] >= 0
        all_tokens = Tokens(trace["ids"], trace["first"], trace["document"]).take(known)
        fit = next(halves({"document": all_tokens.group}, 1))
        sources.append(Source(f"{name} (trace)", trace["experts"], all_tokens.take(fit), all_tokens.take(~fit)))
    rows = [row for source in sources for row in judged(source)]
    for name in names:
        model, tokenizer = shelf_model(name)
        fit_text, held_text = model_texts(None if name == REFERENCE else data)
        for source in recorded(name, model, tokenizer, fit_text, held_text, tokens):
            rows += judged(source)
    return rows


def shelf_model(name: str) -> tuple[Any, Any]:
    """A model of the shelf, or the reference model, and its tokenizer."""
    if name != REFERENCE:
        return shelf.load(name)
    directory = str(reference_model_dir())
    return load_model(directory), load_tokenizer(directory)


def model_texts(data: Path | None) -> tuple[Any, Any]:
    """Text to plan on, and text of other documents to judge on."""
    if data is None:
        return demo_texts("calibration"), demo_texts("heldout")
    mix = read_mix(Path(__file__).parents[1] / "configs" / "mix.toml")
    return domain_documents(mix, data, "train"), domain_documents(mix, data, "heldout")


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table."""

    def text(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(text(row[c]) for c in head) + " |" for row in rows])


def main() -> None:
    """Print the tables and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="random cases or splits of each kind")
    parser.add_argument("--milp-seconds", type=float, default=60.0, help="limit of each mixed-integer program")
    parser.add_argument("--large", action="store_true", help="also time 58 layers of 256 experts (a minute or more)")
    parser.add_argument("--only", default="", help="sections whose title has this in it")
    parser.add_argument("--trace", default="", help="traces whose name has this in it")
    parser.add_argument("--models", default=None, help="models to run, by commas; none with ''  [default: shelf, reference]")
    parser.add_argument("--data", type=Path, help="directory of the mix's texts  [default: the demo's texts]")
    parser.add_argument("--tokens", type=int, default=8192, help="of each model, to plan on and to judge on")
    parser.add_argument("--write", type=Path, help="page to write the table of models into, between its marks")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    root = Path(os.environ.get("EQUIPOISE_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    traces = {name: trace for name, trace in load_traces(root).items() if arguments.trace in name}
    seeds = arguments.seeds
    sections: dict[str, Callable[[], list[Row]]] = {
        "Small cases against the proven optimum": lambda: certified(seeds, arguments.milp_seconds),
        "Planted groups, held out": lambda: planted(seeds),
        "No affinity": lambda: unrelated(seeds, traces),
    }
    if traces:
        sections["Real traces, held-out documents"] = lambda: real(traces, ((8, 2), (16, 4)), lambda t: halves(t, seeds))
        sections["Real traces, held-out kinds of documents"] = lambda: real(traces, ((8, 2),), all_kinds_but_one)
        sections["Frontier, 8 ranks, held-out documents"] = lambda: compromise(traces)
    else:
        print(f"no routing traces at {root / 'routing'}; set EQUIPOISE_SHARED_DATA to run on them\n")
    chosen = [*shelf.names(), REFERENCE] if arguments.models is None else [n for n in arguments.models.split(",") if n]
    sections[MODELS] = lambda: everything(traces, chosen, arguments.data, arguments.tokens)
    if arguments.large:
        sections["As large as DeepSeek-V3"] = largest
    cpu = next((x.split(":")[1].strip() for x in _lines("/proc/cpuinfo") if x.startswith("model name")), platform.processor())
    result: dict[str, Any] = {
        "machine": {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {"equipoise": __version__, "numpy": np.__version__, "scipy": scipy.__version__},
    }
    for name, run in sections.items():
        if arguments.only not in name:
            continue
        began = time.process_time()
        result[name] = run()
        print(f"## {name}\n\n{table(result[name])}\n\n({time.process_time() - began:.0f} s)\n", flush=True)
    if arguments.write and MODELS in result:
        write_between(arguments.write, "affinity", table(result[MODELS]))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


if __name__ == "__main__":
    main()
