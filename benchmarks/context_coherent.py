"""Decode over 2 and 4 processes: tokens that go to their expert and back, against tokens that stay where it ran.

    python benchmarks/context_coherent.py --data DIRECTORY --out context_coherent.json --write docs/expert-parallel.md

Models of top-k 1: shelf models whose configuration is set to one expert a token (they were trained with more, so this is
about where tokens go, not about what they say), and a wider one of random weights. Placements
are made from a profile of other documents than those that are decoded. Every process has one thread; the processes talk by
gloo. A round runs a prompt and then the steps under every contender, in another order each time; a ratio is taken within its
round against `own, contiguous`. Times are those of the slowest rank. The text goes on as it was written (no sampling), so all
contenders decode the same tokens. Finished models and numbers of ranks are kept in --out.
Shapes: B rows over all ranks, H ranks, L MoE layers, E experts, P slots.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from expert_parallel import on_processes
from quantization_page import write_between
from shelf import texts
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from equipoise.artifacts import Plan, Profile
from equipoise.artifacts.files import write_atomic
from equipoise.execution.expert_parallel.meter import ParallelMeter
from equipoise.execution.expert_parallel.ranks import Ranks
from equipoise.execution.expert_parallel.runtime import parallelize
from equipoise.lab import load, path
from equipoise.planning.affinity.pairs import affinity, crossings
from equipoise.planning.methods import make_plan
from equipoise.profiling.calibrate import profile
from equipoise.profiling.sequences import Framing, text_batches
from equipoise.simulation.simulate import default_plan

CONTENDERS = (
    ("own, contiguous", "own", "contiguous"),
    ("own, exflow", "own", "exflow"),
    ("coherent, contiguous", "coherent", "contiguous"),
    ("coherent, eplb", "coherent", "eplb"),
    ("coherent, exflow", "coherent", "exflow"),
    ("coherent, exflow, mu = 0", "coherent", "exflow, mu = 0"),
)
"""Name, context, placement."""
BASE = CONTENDERS[0][0]
WIDE = "random, 8 layers of 512"
CASES = ("mixtral-8", "qwen3-32", WIDE)
PROMPT = 32
PAYS = 0.95
"""Ratio of times below which a contender is said to be faster, where the quartiles agree."""
HEADS = (
    "context, placement", "ms a step", "time / own, contiguous", "CPU ms a step", "prompt, ratio", "rows moved",
    "crossings, predicted", "crossings, measured", "tokens KB", "context KB", "max / mean load",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Case:
    """A model, what its placements are made from, and the text that it decodes.

    Attributes:
        model: of top-k 1.
        profile: its load and transitions on other documents.
        ids_BT: tokens, the prompt first.
        facts: what is told of it.
    """

    model: Any
    profile: Profile
    ids_BT: torch.Tensor
    facts: dict[str, Any]


def make_case(name: str, data: Path | None, rows: int, steps: int, tokens: int) -> Case:
    """A case by its name."""
    fit, held = texts(data)
    _, tokenizer = load("mixtral-8")  # one tokenizer for the whole shelf
    if name == WIDE:
        torch.manual_seed(0)
        config = Qwen3MoeConfig(
            vocab_size=8192, hidden_size=512, intermediate_size=512, moe_intermediate_size=512, num_experts=16,
            num_experts_per_tok=1, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=1, head_dim=64,
        )  # fmt: skip
        model = Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()
    else:
        config = AutoConfig.from_pretrained(path(name))
        config.num_experts_per_tok = 1
        model = AutoModelForCausalLM.from_pretrained(path(name), config=config, dtype="auto").eval()
    measured = profile(
        model, tokenizer, {kind: list(documents) for kind, documents in fit.items()}, tokens=tokens // len(fit), seq_len=256,
        importance=(), name=name,
    )  # fmt: skip
    width = PROMPT + steps
    batches = text_batches(
        held, tokenizer, Framing.of(tokenizer, model.config), tokens=-(-rows // len(held)) * width * 2, seq_len=width,
        batch_size=1, layout="packed",
    )  # fmt: skip
    full = [batch.input_ids for batch in batches if batch.input_ids.shape[1] == width]
    ids_BT = torch.from_numpy(np.concatenate(full[:: max(1, len(full) // rows)][:rows]))
    assert len(ids_BT) == rows, f"{len(ids_BT)} rows of text for {rows}"
    text = model.config
    facts = {
        "layers": len(measured.model.layers),
        "experts": measured.model.layers[0].num_experts,
        "width": text.hidden_size,
        "kv_width": 2
        * text.num_key_value_heads
        * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads),
        "vocabulary": text.vocab_size,
        "trained_top_k": None
        if name == WIDE
        else int(json.loads((path(name) / "config.json").read_text())["num_experts_per_tok"]),
    }
    return Case(model, measured, ids_BT, facts)


def plans_of(measured: Profile, ranks: int) -> dict[str, Plan]:
    """The placements, all without copies."""
    experts = measured.model.layers[0].num_experts
    return {
        "contiguous": default_plan(measured.model, ranks),
        "eplb": make_plan(measured, "eplb", units=ranks, slots=experts),
        "exflow": make_plan(measured, "exflow", units=ranks),
        "exflow, mu = 0": make_plan(measured, "exflow", units=ranks, mu=0.0),
    }


def predicted(measured: Profile, plan: Plan) -> float:
    """Crossings of a boundary, mean over boundaries, as the profile's pairs say."""
    physical = [np.array(layer.experts)[np.argsort(layer.units, kind="stable")] for layer in plan.layers]
    return float(crossings(affinity(measured.transitions), physical, plan.units).mean())


def run_rank(ranks: Ranks, case: Case, plans: Mapping[str, Plan], rounds: int) -> dict[str, Any]:
    """All contenders on one rank: figures of a metered round, and the times of the others."""
    models = {}
    for name, context, placement in CONTENDERS:
        models[name] = copy.deepcopy(case.model)
        parallelize(models[name], ranks, plans[placement], context=context)  # type: ignore[arg-type]
    share = len(case.ids_BT) // ranks.size
    own = case.ids_BT[ranks.rank * share : (ranks.rank + 1) * share]
    found: dict[str, Any] = {name: {"prompt_ms": [], "step_ms": [], "cpu_ms": []} for name, *_ in CONTENDERS}
    for name, context, _ in CONTENDERS:  # the first run lays out storage
        with ParallelMeter(models[name]) as meter:
            decode(ranks, models[name], case.ids_BT if context == "coherent" else own)
        report = meter.report().select(decode=True)
        figures = report.rows()
        found[name] |= {
            "rows_moved": figures["rows_moved"],
            "crossings": float(report.moved_L[1:].mean()) if context == "coherent" else None,
            "token_bytes": float(report.values["token_bytes"].sum((0, 2)).mean()),
            "context_bytes": figures["context_bytes_moved"],
            "context_ms": figures["context_ms"],
            "imbalance": figures["imbalance"],
        }
    for step in range(rounds):
        turn = step % len(CONTENDERS)
        for name, context, _ in CONTENDERS[turn:] + CONTENDERS[:turn]:
            took = decode(ranks, models[name], case.ids_BT if context == "coherent" else own)
            slowest = ranks.gather(torch.tensor(took, dtype=torch.float64), "gathering times").amax(0).tolist()
            for kind, seconds in zip(("prompt_ms", "step_ms", "cpu_ms"), slowest, strict=True):
                found[name][kind].append(1e3 * seconds)
    return found


def decode(ranks: Ranks, model: Any, ids_BT: torch.Tensor) -> tuple[float, float, float]:
    """Seconds of the prompt, and of a step after it; seconds of this process's CPU in a step."""
    steps = range(PROMPT, ids_BT.shape[1])
    ranks.meet("beginning together")
    begun = time.perf_counter()
    with torch.no_grad():
        cache = model(input_ids=ids_BT[:, :PROMPT], use_cache=True, logits_to_keep=1).past_key_values
        after, busy = time.perf_counter(), time.process_time()
        for at in steps:
            model(input_ids=ids_BT[:, at : at + 1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        ended, busy = time.perf_counter(), time.process_time() - busy
    return after - begun, (ended - after) / len(steps), busy / len(steps)


def summary(found: Mapping[str, Any], case: Case, plans: Mapping[str, Plan]) -> list[dict[str, Any]]:
    """One row for each contender."""
    rows = []
    for name, context, placement in CONTENDERS:
        mine = found[name]
        row: dict[str, Any] = {"contender": name, **{key: value for key, value in mine.items() if not isinstance(value, list)}}
        row["predicted"] = predicted(case.profile, plans[placement]) if context == "coherent" else None
        for kind in ("step", "prompt", "cpu"):
            times, base = mine[f"{kind}_ms"], found[BASE][f"{kind}_ms"]
            ratio = [a / b for a, b in zip(times, base, strict=True)]
            quartiles = statistics.quantiles(ratio, n=4, method="inclusive") if len(ratio) > 1 else ratio * 3
            row |= {f"{kind}_ms": statistics.median(times), f"{kind}_ratio": quartiles}
        rows.append(row)
    return rows


def table(result: Mapping[str, Any]) -> str:
    """All rows as Markdown."""
    said = [
        f"{result['rows']} sequences over all ranks, a prompt of {PROMPT} tokens and {result['steps']} steps; "
        f"{result['rounds']} rounds, gloo, one thread a process on {result['cores']} cores. Measured, medians over rounds, "
        "of ratios also the quartiles; *predicted* is what the profile's pairs of experts say, of other documents. Rows moved: "
        "those that another rank served than the one that they were on, per layer. KB: over all ranks and layers, per step. "
        "CPU ms: of the busiest process, all its threads; unlike time it does not wait for others."
    ]
    for key, cell in result["cells"].items():
        facts = cell["facts"]
        note = (
            "random weights"
            if facts["trained_top_k"] is None
            else f"top-1 set in its configuration, trained with top-{facts['trained_top_k']}"
        )
        said += [
            "",
            f"**{key}**: {facts['layers']} layers of {facts['experts']} experts, {facts['width']} wide, keys and values "
            f"{facts['kv_width']} ({note})",
            "",
            "| " + " | ".join(HEADS) + " |",
            "|---|" + "---:|" * (len(HEADS) - 1),
        ]
        for row in cell["rows"]:
            low, mid, high = row["step_ratio"]
            crossed = ("", "") if row["crossings"] is None else (f"{row['predicted']:.3f}", f"{row['crossings']:.3f}")
            cells = [row["contender"], f"{row['step_ms']:.1f}", f"{mid:.2f} ({low:.2f}..{high:.2f})"]
            cells += [f"{row['cpu_ms']:.1f}", f"{row['prompt_ratio'][1]:.2f}", f"{row['rows_moved']:.1f}", *crossed]
            cells += [f"{row[key] / 1e3:,.1f}" for key in ("token_bytes", "context_bytes")] + [f"{row['imbalance']:.2f}"]
            said.append("| " + " | ".join(cells) + " |")
    every = [(key, row) for key, cell in result["cells"].items() for row in cell["rows"] if row["contender"] != BASE]
    faster = [f"{row['contender']} ({key})" for key, row in every if row["step_ratio"][2] < PAYS]
    slower = [f"{row['contender']} ({key})" for key, row in every if row["step_ratio"][0] > 1 / PAYS]
    said += ["", f"Steps faster than {BASE} by 5 % and more, quartiles included: {'; '.join(faster) or 'none'}."]
    said += ["", f"Slower by 5 % and more, quartiles included: {'; '.join(slower) or 'none'}."]
    return "\n".join(said)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not kept, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="directory of text; the demo's without it")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rows", type=int, default=32, help="sequences over all ranks")
    parser.add_argument("--steps", type=int, default=16, help="tokens that are decoded of each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16384, help="of the profile")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--out", type=Path, default=None, help="JSON to write, and to go on from")
    parser.add_argument("--write", type=Path, default=None, help="page whose table is written anew")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    settings = {name: getattr(given, name) for name in ("rows", "steps", "rounds", "tokens")}
    result: dict[str, Any] = settings | {"cores": os.cpu_count(), "cells": {}}
    if given.out and given.out.is_file():
        kept = json.loads(given.out.read_text())
        result["cells"] = kept["cells"] if all(kept[name] == value for name, value in settings.items()) else {}
    for name in given.cases:
        missing = [size for size in given.ranks if f"{name}, {size} ranks" not in result["cells"]]
        case = make_case(name, given.data, given.rows, given.steps, given.tokens) if missing else None
        for size in missing:
            assert case is not None, "made for what is missing"
            plans = plans_of(case.profile, size)
            found = on_processes(size, run_rank, case, plans, given.rounds)
            result["cells"][f"{name}, {size} ranks"] = {"facts": case.facts, "rows": summary(found, case, plans)}
            if given.out:
                write_atomic(given.out, json.dumps(result, indent=2) + "\n")
    text = table(result)
    print(text)
    if given.write:
        write_between(given.write, "context_coherent.py", text)


if __name__ == "__main__":
    main()
