"""Time of single products with one expert's matrix, for every kernel that the execution chooses among.

    python benchmarks/execution_kernels.py --outputs 5632 --inputs 1024 --rows 1 4 16 64 256

Matrices are used in turn, so that weights are not in the cache; a figure is the least processor time of several calls, in
microseconds, on one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import count

import torch
from torch import Tensor
from torch.nn import functional as F

from equipoise.execution import kernels_nibbles
from equipoise.execution.kernels_int8 import Int8Kernel, byte_rows
from equipoise.execution.kernels_nibbles import NibbleKernel


def least(run: Callable[[int], object], calls: int, matrices: int) -> float:
    """Microseconds of the fastest call."""
    turn, seconds = count(), []
    for _ in range(calls):
        start = time.thread_time()
        run(next(turn) % matrices)
        seconds.append(time.thread_time() - start)
    return 1e6 * min(seconds)


def packed_up_to(kernel: NibbleKernel, limit: int, x: Tensor, slot: int) -> Tensor:
    """The 4-bit product, packed up to a number of rows, expanded beyond."""
    kernels_nibbles.PACKED_ROWS = kernels_nibbles.PACKED_ROWS_NO_UNIT = limit
    return kernel.linear(kernel.rows(x), [slot], [len(x)])


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("outputs", 5632), ("inputs", 1024), ("matrices", 8), ("calls", 24)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    slots, outputs, inputs = arguments.matrices, arguments.outputs, arguments.inputs
    weight = torch.randn(slots, outputs, inputs)
    half = weight.bfloat16()
    codes = torch.randint(-127, 128, weight.shape).to(torch.int8)
    scales = torch.rand(slots, outputs).bfloat16()
    bytes_ = Int8Kernel.pack(codes, scales)
    nibbles = NibbleKernel.pack(4, codes % 16 - 8, torch.rand(slots, outputs, inputs // 32).bfloat16(), None)

    def plain_int8(x: Tensor, slot: int) -> Tensor:
        rows = byte_rows(x)
        signed = (rows.codes_NI.to(torch.int16) - 128).to(torch.int8)
        return torch._int_mm(signed, codes[slot].t()).float().mul_(scales[slot]).mul_(rows.scales_N1)

    ways: dict[str, Callable[[Tensor, int], object]] = {
        "fp32": lambda x, slot: F.linear(x, weight[slot]),
        "bf16": lambda x, slot: F.linear(x.bfloat16(), half[slot]),
        "int8": lambda x, slot: bytes_.linear(bytes_.rows(x), [slot], [len(x)]),
        "int8 _int_mm": plain_int8,
        "int8pack bf16": lambda x, slot: torch._weight_int8pack_mm(x.bfloat16(), codes[slot], scales[slot]),
        "int4 packed": lambda x, slot: packed_up_to(nibbles, 1 << 30, x, slot),
        "int4 expanded": lambda x, slot: packed_up_to(nibbles, 0, x, slot),
    }
    print(f"{outputs} x {inputs}, torch {torch.__version__}\n{'rows':>6}" + "".join(f"{name:>15}" for name in ways))
    for rows in arguments.rows:
        x = torch.randn(rows, inputs)
        figures = [least(partial(run, x), arguments.calls, slots) for run in ways.values()]
        print(f"{rows:>6}" + "".join(f"{figure:>15.0f}" for figure in figures))


if __name__ == "__main__":
    main()
