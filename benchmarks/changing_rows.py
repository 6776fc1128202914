"""Time of one layer's experts when every call has other numbers of rows, as in serving, beside calls that repeat themselves.

    python benchmarks/changing_rows.py --out changing_rows.json

oneDNN makes code for every number of rows that it meets. `changing` draws the experts of every call anew, `repeated` gives the
same ones each time, which is what benchmarks usually do. `exact rows` multiplies as many rows as an expert has, `in units`
fills them up to a multiple where the matrix is small (`kernels.ROW_UNIT`). Every round times each contender once, in
processor time, on the same choices, in another order each time; ratios are taken within a round, against transformers'
grouped_mm. Computing is in bf16.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch

from equipoise.artifacts.files import write_atomic
from equipoise.execution import kernels
from equipoise.execution.families import Between
from execution import balanced, stock

LAYERS = ((512, 256, 32, 4, 2048), (2048, 768, 64, 8, 512), (1024, 2816, 16, 2, 2048))
"""Width, expert width, experts, top-k, tokens of a call."""


def measure(width: int, inner: int, experts: int, top_k: int, tokens: int, rounds: int) -> list[dict[str, object]]:
    """Ratios of one layer, changing and repeated."""
    given = argparse.Namespace(width=width, inner=inner, experts=experts, top_k=top_k)
    layer = stock(given, "bf16")
    layer.config._experts_implementation = "grouped_mm"
    slots = {"bf16": balanced(layer, "bf16", ["bf16"], 0, False), "int8": balanced(layer, "bf16", ["int8"], 0, True)}
    between = Between(layer)
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1)).bfloat16()
    weights = torch.full((tokens, top_k), 1 / top_k).bfloat16()
    names = ["grouped_mm", *(f"{form}, {how}" for form in slots for how in ("exact rows", "in units"))]
    unit, rows = kernels.ROW_UNIT, []
    for traffic in ("changing", "repeated"):
        draw = torch.Generator().manual_seed(2)
        skew = torch.arange(1, experts + 1).float().pow(-0.5)
        found: dict[str, list[float]] = {name: [] for name in names}
        ids = torch.multinomial(skew.expand(tokens, -1), top_k, generator=draw)
        for number in range(rounds + 3):
            if traffic == "changing":
                ids = torch.multinomial(skew.expand(tokens, -1), top_k, generator=draw)
            for name in random.Random(number).sample(names, len(names)):
                form, _, how = name.partition(", ")
                kernels.ROW_UNIT = unit if how == "in units" else 1
                begun = time.process_time()
                if form == "grouped_mm":
                    layer(x, ids, weights)
                else:
                    slots[form](x, ids, weights, between)
                found[name].append(time.process_time() - begun)
        kernels.ROW_UNIT = unit
        for name in names:
            mine, base = found[name][3:], found["grouped_mm"][3:]
            low, middle, high = statistics.quantiles([b / m for m, b in zip(mine, base, strict=True)], n=4)
            rows.append(
                {
                    "layer": f"{width} x {inner}, top-{top_k} of {experts}, {tokens:,} tokens",
                    "traffic": traffic, "name": name,
                    "milliseconds": 1e3 * statistics.median(mine), "speed": [middle, low, high],
                }
            )  # fmt: skip
    return rows


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=None, help="JSON to write")
    told = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        rows = [row for layer in LAYERS for row in measure(*layer, told.rounds)]
    print("| layer | experts of a call | experts as | ms | speed of grouped_mm's |\n|---|---|---|---:|---:|")
    for row in rows:
        middle, low, high = row["speed"]
        speed = f"{middle:.2f} ({low:.2f}..{high:.2f})"
        print(f"| {row['layer']} | {row['traffic']} | {row['name']} | {row['milliseconds']:.1f} | {speed} |")
    if told.out:
        write_atomic(told.out, json.dumps({"torch": torch.__version__, "rounds": told.rounds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
