"""How long it takes to read one expert's stored matrix as floats, in every format, and how many bytes it is.

All are read in turn, so that a drift of the machine's speed hits all alike; times are ratios to reading int8, of each turn.
Beside ours: 4-bit codes as halves of a row in the low and high nibbles of bytes, which unpack without interleaving, and
compressed-tensors' own unpacking of the same words (codes alone, without scales) where it is installed.

    python benchmarks/formats.py [--rows 2816] [--columns 1024] [--turns 41] [--threads 1] [--dtype float32] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from equipoise.precisions import precision
from equipoise.quantization.codes import unpack
from equipoise.quantization.formats import quantize

FORMATS = ("int8", "int8-g128", "fp8", "int4-g128", "int4-g32", "int4-g32-asym", "int3-g32", "int2-g32")


def readers(weight: Tensor, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """What is timed, by name."""
    stored = {name: quantize(weight, name) for name in FORMATS}
    found: dict[str, Callable[[], Tensor]] = {name: lambda m=m: m.dequantize(dtype) for name, m in stored.items()}
    found["16 bits to float, for scale"] = lambda: weight.bfloat16().to(dtype)
    columns = weight.shape[1]
    codes = {name: stored[name] for name in ("int4-g32", "int3-g32", "int2-g32")}
    for name, matrix in codes.items():
        found[f"{name}, codes alone"] = lambda m=matrix: unpack(m.packed, columns, m.precision)
    low, high = unpack(stored["int4-g32"].packed, columns, precision("int4")).to(torch.int16).chunk(2, dim=-1)
    halves = ((low & 15) | (high << 4)).to(torch.uint8).view(torch.int8)
    found["4 bits in halves, codes alone"] = lambda: torch.cat(((halves << 4) >> 4, halves >> 4), dim=-1)
    if find_spec("compressed_tensors"):
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        for name, matrix in codes.items():
            bits = matrix.precision.bits
            found[f"{name}, compressed-tensors' codes"] = lambda m=matrix, b=bits: unpack_from_int32(m.packed, b, weight.shape)
    return found


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 2816), ("columns", 1024), ("turns", 41), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    weight = torch.randn(given.rows, given.columns, generator=torch.Generator().manual_seed(0))
    timed = readers(weight, getattr(torch, given.dtype))
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(given.turns + 1):
        for name, read in timed.items():
            start = time.perf_counter()
            read()
            if turn:  # the first turn warms up
                seconds[name].append(time.perf_counter() - start)
    rows = {}
    for name, taken in seconds.items():
        ratios = sorted(mine / base for mine, base in zip(taken, seconds["int8"], strict=True))
        quarter = len(ratios) // 4
        rows[name] = {
            "bytes": precision(name).matrix_bytes(given.rows, given.columns) if name in FORMATS else None,
            "milliseconds": statistics.median(taken) * 1e3,
            "ratio": statistics.median(ratios),
            "middle_half": [ratios[quarter], ratios[-1 - quarter]],
        }
    if given.json:
        print(json.dumps({"arguments": vars(given), "rows": rows}, indent=2))
        return
    print(f"[{given.rows}, {given.columns}] to {given.dtype}, {given.threads} thread(s), {given.turns} turns")
    for name, row in rows.items():
        size = f"{row['bytes']:>10,}" if row["bytes"] else " " * 10
        low, high = row["middle_half"]
        print(f"{name:<38} {size} bytes  {row['milliseconds']:7.2f} ms  x{row['ratio']:.2f} ({low:.2f}-{high:.2f})")


if __name__ == "__main__":
    main()
