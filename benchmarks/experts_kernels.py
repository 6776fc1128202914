"""Time of one layer's experts from slots of each precision beside transformers' own, in one process, turn by turn.

    python benchmarks/experts_kernels.py --width 1024 --inner 1408 --experts 16 --top-k 4 --tokens 1 16 128 512

Every round times each contender once, one after the other, so that what else the machine does hits all alike; a ratio is
taken within its round, and the median and the quartiles of the rounds' ratios are printed.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from equipoise.artifacts import LayerPlan, ModelFacts, Plan
from equipoise.execution.apply import apply_plan
from equipoise.execution.kernels import has_int8_kernel
from equipoise.execution.slots import slots_of
from equipoise.models.layers import model_facts

Layer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Rows:
    """Tokens of a call that no model makes: all real, in order."""

    real_T: torch.Tensor
    position_T: torch.Tensor


def plan_of(facts: ModelFacts, precisions: list[str], copies: int) -> Plan:
    """Experts in turn at the given precisions, the first ones copied."""
    number = facts.layers[0].num_experts
    experts = [*range(number), *range(copies)]
    held = [precisions[i % len(precisions)] for i in range(len(experts))]
    layer = LayerPlan(
        experts=tuple(experts),
        precisions=tuple(held),
        units=(*range(number), *((i + 1) % number for i in range(copies))),
        shares=tuple(0.5 if experts.count(e) > 1 else 1.0 for e in experts),
    )
    exact = set(held) == {facts.dtype}
    return Plan(
        method="benchmark",
        model=facts,
        units=number,
        unit_bytes=1 << 50,
        exactness="exact" if exact else "weights",
        layers=(layer,),
    )


def contenders(arguments: argparse.Namespace) -> dict[str, Layer]:
    """Each way to run the same layer."""
    config = Qwen2MoeConfig(
        vocab_size=32, hidden_size=arguments.width, moe_intermediate_size=arguments.inner, shared_expert_intermediate_size=8,
        num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, num_experts=arguments.experts,
        num_experts_per_tok=arguments.top_k, decoder_sparse_step=1, intermediate_size=8,
    )  # fmt: skip
    model = Qwen2MoeForCausalLM(config).eval()
    facts = model_facts(model, "benchmark")
    half = model.model.layers[0].mlp.experts
    layers: dict[str, Layer] = {"stock fp32": half, "stock bf16": as_bf16(copy.deepcopy(half))}
    quarter = max(1, arguments.experts // 4)
    for name, precisions, copies, activations in (
        ("slots fp32", ["fp32"], 0, False),
        ("slots fp32, copies", ["fp32"], quarter, False),
        ("slots bf16", ["bf16"], 0, False),
        ("slots int8", ["int8"], 0, True),
        ("slots int8, weights only", ["int8"], 0, False),
        ("slots int4", ["int4"], 0, False),
        ("slots bf16+int8+int4, copies", ["bf16", "int8", "int4"], quarter, True),
    ):
        plan = plan_of(facts, precisions, copies)
        balanced = apply_plan(copy.deepcopy(model), plan, int8_activations=activations)
        slots_of(balanced)[0].batches = lambda _, rows: Rows(torch.ones(rows, dtype=torch.bool), torch.arange(rows))
        layers[name] = balanced.model.layers[0].mlp.experts
    return layers


def as_bf16(experts: torch.nn.Module) -> Layer:
    """The stock layer in bf16, inputs and outputs included."""
    experts = experts.to(torch.bfloat16)
    return lambda x, ids, weights: experts(x.bfloat16(), ids, weights.bfloat16()).float()


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 1024), ("inner", 1408), ("experts", 16), ("top-k", 4), ("rounds", 15), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128, 512])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    layers = contenders(arguments)
    console = Console()
    console.print(
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, int8 kernel: {has_int8_kernel()}, "
        f"{arguments.threads} thread(s); {arguments.experts} experts of {arguments.width} x {arguments.inner}, "
        f"top-{arguments.top_k}; {arguments.rounds} rounds. Speed relative to stock fp32: median and quartiles."
    )
    table = Table("experts", *[f"{tokens} tokens" for tokens in arguments.tokens], "error")
    cells: dict[str, list[str]] = {name: [] for name in layers}
    errors: dict[str, float] = {}
    for tokens in arguments.tokens:
        x = torch.randn(tokens, arguments.width)
        scores, ids = torch.rand(tokens, arguments.experts).topk(arguments.top_k)
        weights = scores.softmax(1)
        wanted = layers["stock fp32"](x, ids, weights)
        seconds = np.empty((arguments.rounds, len(layers)))
        for turn in range(-1, arguments.rounds):  # the first round warms up
            for column, (name, layer) in enumerate(layers.items()):
                start = time.perf_counter()
                out = layer(x, ids, weights)
                seconds[turn, column] = time.perf_counter() - start
                errors[name] = float((out - wanted).norm() / wanted.norm())
        speed = seconds[:, :1] / seconds
        low, middle, high = np.quantile(speed, (0.25, 0.5, 0.75), axis=0)
        for column, name in enumerate(layers):
            milliseconds = f"{1e3 * np.median(seconds[:, column]):.2f} ms"
            cells[name].append(f"{milliseconds}  {middle[column]:.2f}x [{low[column]:.2f}, {high[column]:.2f}]")
    for name in layers:
        table.add_row(name, *cells[name], f"{errors[name]:.4f}")
    console.print(table)


if __name__ == "__main__":
    main()
