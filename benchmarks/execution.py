"""Time of one layer's experts: transformers' own implementations beside slots of every precision, in one process, turn by turn.

    python benchmarks/execution.py --threads 1 --json execution.json

Every round times each contender once, one after the other, so that what else the machine does hits all alike; a ratio is
taken within its round, and the median and the quartiles of the rounds' ratios are printed. Ratios are speeds relative to
transformers' grouped_mm in the layer's own dtype. The error is that of the output, relative to eager in fp32. Beside it
stands the floor: the time that the weights of the experts in use take to be read once at the bandwidth measured here.
`mixed` has a quarter of its experts in the layer's dtype, half in int8 and a quarter in int4, in turn; `replicated` and
`mixed` have copies of a quarter of the experts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

from equipoise.artifacts import LayerPlan
from equipoise.execution import kernels, kernels_nibbles
from equipoise.execution.families import Between
from equipoise.execution.kernels_int8 import has_int8_kernel
from equipoise.execution.kernels_nibbles import has_nibble_kernel
from equipoise.execution.slots import ExpertSlots, SlotGroup, canonical
from equipoise.precisions import precision

Layer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STOCK = ("eager", "batched_mm", "grouped_mm")
BASE = "grouped_mm"
MIXED = ("int8", "int8", "int4")


@dataclass(frozen=True)
class Rows:
    """Tokens of a call that no model makes: all real, in order."""

    real_T: torch.Tensor
    position_T: torch.Tensor


@dataclass(frozen=True)
class Figure:
    """What one contender did at one number of tokens; speeds are relative to grouped_mm in the same round."""

    dtype: str
    contender: str
    tokens: int
    milliseconds: float
    speed: float
    speed_low: float
    speed_high: float
    error: float
    floor_milliseconds: float


def stock(arguments: argparse.Namespace, dtype: str) -> Qwen2MoeExperts:
    """The experts of transformers, with weights that leave the size of their inputs as it is."""
    config = Qwen2MoeConfig(
        hidden_size=arguments.width,
        moe_intermediate_size=arguments.inner,
        num_experts=arguments.experts,
        num_experts_per_tok=arguments.top_k,
    )
    with torch.device("meta"):
        experts = Qwen2MoeExperts(config)
    experts = experts.to(DTYPES[dtype]).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for weight in experts.parameters():
        weight.requires_grad_(False)
        for matrix in weight:  # one expert at a time: both dtypes get the same numbers
            matrix.copy_(torch.randn(matrix.shape, generator=generator) / matrix.shape[-1] ** 0.5)
    return experts


def balanced(experts: Qwen2MoeExperts, dtype: str, precisions: list[str], copies: int, rounded: bool) -> ExpertSlots:
    """The same experts as slots: precisions in turn, the first experts copied."""
    number = experts.num_experts
    held = [*range(number), *range(copies)]
    plan = LayerPlan(
        experts=tuple(held),
        precisions=tuple(precisions[i % len(precisions)] for i in range(len(held))),
        units=(*range(number), *((i + 1) % number for i in range(copies))),
        shares=tuple(0.5 if held.count(expert) > 1 else 1.0 for expert in held),
    )
    shapes = [tuple(experts.gate_up_proj.shape[1:]), tuple(experts.down_proj.shape[1:])]
    groups = {
        name: SlotGroup(
            precision(name),
            sum(canonical(other) == name for other in plan.precisions),
            shapes,
            native=name == dtype,
            biases=False,
            dtype=DTYPES[dtype],
            device=torch.device("cpu"),
        )
        for name in dict.fromkeys(canonical(name) for name in plan.precisions)
    }
    slots = ExpertSlots(plan, 0, "decoder", number, groups)
    slots.batches = lambda _, rows: Rows(torch.ones(rows, dtype=torch.bool), torch.arange(rows))
    if len(groups) == 1 and dtype in groups and not copies:  # the same weights, not a copy: memory is short
        groups[dtype].up, groups[dtype].down = experts.gate_up_proj, experts.down_proj
        return slots
    places = iter(slots.order)
    for group in slots.groups:
        group.int8_activations = rounded
        for index in range(len(group)):
            expert = plan.experts[next(places)]
            group.write(index, (experts.gate_up_proj[expert], experts.down_proj[expert]), (), "rtn")
    return slots


def contenders(arguments: argparse.Namespace, dtype: str) -> dict[str, Layer]:
    """Each way to run the same layer."""
    experts = stock(arguments, dtype)

    def implementation(name: str) -> Layer:
        def run(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            experts.config._experts_implementation = name
            return experts(x, ids, weights)

        return run

    layers = {name: implementation(name) for name in STOCK}
    quarter = max(1, arguments.experts // 4)
    between = Between(experts)
    held = [
        ("slots", [dtype], 0, False),
        ("slots, replicated", [dtype], quarter, False),
        ("slots int8", ["int8"], 0, True),
        ("slots int4", ["int4"], 0, True),
        ("slots mixed", [dtype, *MIXED], quarter, True),
    ]
    if arguments.more:
        held += [
            ("slots int8, inputs not rounded", ["int8"], 0, False),
            ("slots fp8", ["fp8"], 0, True),
            ("slots int3", ["int3"], 0, True),
            ("slots int2", ["int2"], 0, True),
        ]
    for name, precisions, copies, rounded in held:
        slots = balanced(experts, dtype, precisions, copies, rounded)
        layers[name] = lambda x, ids, weights, slots=slots: slots(x, ids, weights, between)
    return layers


def bandwidth() -> float:
    """Bytes per second at which one pass reads memory, the best of several."""
    data = torch.ones(1 << 26)
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        torch.dot(data, data)
        seconds.append(time.perf_counter() - start)
    return data.nbytes / min(seconds)


def weight_bytes(name: str, dtype: str, ids: torch.Tensor, arguments: argparse.Namespace) -> float:
    """Bytes of the weights that a call must read: those of the experts in use, in the contender's precision."""
    shapes = [(2 * arguments.inner, arguments.width), (arguments.width, arguments.inner)]
    size = {form: precision(form).expert_bytes(shapes) for form in (dtype, "int8", "int4", "int3", "int2", "fp8")}
    if name == "batched_mm":
        return float(ids.numel() * size[dtype])
    for form in ("int8", "int4", "int3", "int2", "fp8"):
        if form in name:
            return float(len(ids.unique()) * size[form])
    if "mixed" in name:
        pattern = [dtype, *MIXED]
        return float(sum(size[pattern[expert % 4]] for expert in ids.unique().tolist()))
    return float(len(ids.unique()) * size[dtype])


@torch.no_grad()
def measure(arguments: argparse.Namespace, dtype: str, read: float, console: Console) -> list[Figure]:
    """All contenders of one dtype at every number of tokens."""
    layers = contenders(arguments, dtype)
    console.print(f"{dtype}: layers built")
    figures = []
    for tokens in arguments.tokens:
        generator = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, arguments.width, generator=generator).to(DTYPES[dtype])
        scores, ids = torch.rand(tokens, arguments.experts, generator=generator).topk(arguments.top_k)
        weights = scores.softmax(1).to(DTYPES[dtype])
        gathered = 3 * ids.numel() * arguments.width * arguments.inner * DTYPES[dtype].itemsize
        able = [name for name in layers if name != "batched_mm" or gathered <= arguments.memory * 2**30]
        reference = layers["eager"](x, ids, weights).float()
        seconds: dict[str, list[float]] = {name: [] for name in able}
        errors = {}
        rounds = max(3, arguments.rounds if tokens < 512 else arguments.rounds // 3)
        for turn in range(-1, rounds):  # the first round warms up
            for name in able:
                if name == "batched_mm" and turn > 3:
                    continue  # its ratio is far from all others'; three turns say it
                start = time.perf_counter()
                out = layers[name](x, ids, weights)
                elapsed = time.perf_counter() - start
                if turn >= 0:
                    seconds[name].append(elapsed)
                errors[name] = float((out.float() - reference).norm() / reference.norm())
        for name in able:
            speed = np.array(seconds[BASE][: len(seconds[name])]) / np.array(seconds[name])
            low, middle, high = np.quantile(speed, (0.25, 0.5, 0.75))
            floor = weight_bytes(name, dtype, ids, arguments) / read
            figures.append(
                Figure(
                    dtype, name, tokens, 1e3 * statistics.median(seconds[name]), float(middle), float(low), float(high),
                    errors[name], 1e3 * floor,
                )
            )  # fmt: skip
        console.print(f"{dtype}, {tokens} tokens: {rounds} rounds done")
    return figures


def show(figures: list[Figure], arguments: argparse.Namespace, console: Console) -> None:
    """One table per dtype."""
    for dtype in arguments.dtypes:
        table = Table("experts", *[f"{tokens} tokens" for tokens in arguments.tokens], "error", title=dtype)
        mine = [figure for figure in figures if figure.dtype == dtype]
        for name in dict.fromkeys(figure.contender for figure in mine):
            row = {figure.tokens: figure for figure in mine if figure.contender == name}
            cells = [
                f"{row[t].speed:.2f}x [{row[t].speed_low:.2f}, {row[t].speed_high:.2f}] {row[t].milliseconds:.1f} ms "
                f"(floor {row[t].floor_milliseconds:.1f})"
                if t in row
                else "-"
                for t in arguments.tokens
            ]
            table.add_row(name, *cells, f"{max(figure.error for figure in row.values()):.4f}")
        console.print(table)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 1024), ("inner", 2816), ("experts", 64), ("top-k", 8), ("rounds", 12), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256, 512, 2048])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--more", action="store_true", help="also fp8, int3, int2, and int8 with inputs as they are")
    parser.add_argument("--memory", type=float, default=2.5, help="GiB that batched_mm may gather; left out beyond")
    parser.add_argument("--no-bf16-unit", action="store_true", help="as on a CPU without: neither oneDNN nor slots use it")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.no_bf16_unit:
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_VNNI"  # read at oneDNN's first use
        kernels.has_bfloat16_unit = kernels_nibbles.has_bfloat16_unit = lambda: False
    read = bandwidth()
    facts = {
        "torch": torch.__version__, "machine": platform.machine(), "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": arguments.threads, "read_bytes_per_second": read, "bf16_unit": kernels.has_bfloat16_unit(),
        "int8_kernel": has_int8_kernel(), "nibble_kernel": has_nibble_kernel(), "width": arguments.width,
        "inner": arguments.inner, "experts": arguments.experts, "top_k": arguments.top_k, "rounds": arguments.rounds,
        "load_average": os.getloadavg()[0],
    }  # fmt: skip
    console = Console(width=200)
    console.print(facts)
    figures = [figure for dtype in arguments.dtypes for figure in measure(arguments, dtype, read, console)]
    show(figures, arguments, console)
    if arguments.json is not None:
        content = {"facts": facts, "figures": [asdict(figure) for figure in figures]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
