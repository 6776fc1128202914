"""What each part of the rounding is worth: perplexity of shelf models as parts are added one by one. One table a model.

    python benchmarks/rounding_parts.py --data DIRECTORY [--models mixtral-8 qwen3-32] [--formats int3 int2] [--seeds 0 1]

`--data` is the directory that the mix's files are relative to. Calibrated on every other training document of the mix and
judged on the ones between, so that the held-out documents stay unseen by whoever chooses among the parts.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import mean
from time import process_time
from typing import Any

import torch

from equipoise.lab import load
from equipoise.lab.recipe import read_mix
from equipoise.lab.text import domain_documents
from equipoise.models.layers import expert_matrices, find_moe_layers, observe
from equipoise.precisions import precision
from equipoise.profiling.forward import negative_log_likelihood, run_batch
from equipoise.profiling.sequences import Batch, Framing, text_batches
from equipoise.quantization import hadamard
from equipoise.quantization.gptq import gptq
from equipoise.quantization.layer import quantize_experts
from equipoise.quantization.layer_tokens import Call
from equipoise.quantization.methods import METHODS, Method

ROOT = Path(__file__).parents[1]
BARE: Mapping[str, Any] = {"order": "natural", "search": False, "sweeps": 0}
"""The column-by-column rule alone."""
ALONE: Mapping[str, Any] = {"refit": False, "shrink": 0}
"""Experts on their own tokens, matrices on their own."""

Part = tuple[str, str | Method, Mapping[str, Any]]


def parts() -> list[Part]:
    """Label, method and options of each row, from plain rounding to everything."""

    def made(power: int = 0, **options: Any) -> Method:
        return Method(partial(gptq, **options), needs_hessian=True, gate_power=power)

    return [
        ("rtn", "rtn", {}),
        ("rtn-clip", "rtn-clip", {}),
        ("column by column", made(**BARE), ALONE),
        ("+ activation order", made(search=False, sweeps=0), ALONE),
        ("+ search of grids", made(sweeps=0), ALONE),
        ("+ sweep", made(), ALONE),
        ("+ the layer's mean", made(), {"refit": False}),
        ("+ refit = gptq", "gptq", {}),
        ("agq", "agq", {}),
        ("agq2", "agq2", {}),
        ("gptq, rotated", "gptq", {"rotate": True}),
    ]


class _SeenError(Exception):
    """Ends a forward pass once the layer in question has been reached."""


def calls_of(model: Any, index: int, batches: Sequence[Batch]) -> list[Call]:
    """What reaches the experts of a layer; rows are packed, so there is no padding."""
    calls: list[Call] = []

    def keep(*call: torch.Tensor) -> None:
        calls.append(tuple(part.detach().clone() for part in call))  # type: ignore[arg-type]
        raise _SeenError

    handle = observe(find_moe_layers(model)[index], keep)
    for batch in batches:
        with suppress(_SeenError):
            run_batch(model, batch, all_logits=False)
    handle.remove()
    return calls


@torch.no_grad()
def quantize(model: Any, batches: Sequence[Batch], form: str, method: str, options: Mapping[str, Any]) -> float:
    """Put the rounded values of all experts in the place of the weights, layer after layer; returns CPU seconds of rounding."""
    spent = 0.0
    for index, layer in enumerate(find_moe_layers(model)):
        calls = calls_of(model, index, batches)
        start = process_time()
        wanted = [(expert, precision(form)) for expert in range(layer.num_experts)]
        stored, _ = quantize_experts(layer, calls, wanted, method, **options)
        spent += process_time() - start
        for (expert, _), (up, down) in stored.items():
            *ups, last = expert_matrices(layer, expert)
            for weight, value in zip(ups, up.dequantize().split([len(part) for part in ups]), strict=True):
                weight.copy_(value)
            last.copy_(hadamard.rotate(down.dequantize()) if options.get("rotate") else down.dequantize())
    return spent


def perplexity(model: Any, batches: Sequence[Batch]) -> float:
    """Of all labels of the batches."""
    sums = [negative_log_likelihood(model, batch) for batch in batches]
    return math.exp(sum(nll for nll, _ in sums) / sum(count for _, count in sums))


def batches_of(texts: Mapping[str, Sequence[str]], model: Any, tokenizer: Any, tokens: int, seed: int) -> list[Batch]:
    """Packed rows of every domain, `tokens` in all."""
    framing, share = Framing.of(tokenizer, model.config), tokens // len(texts)
    return text_batches(texts, tokenizer, framing, tokens=share, batch_size=8, seed=seed, layout="packed")


def main() -> None:
    """Run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["mixtral-8", "qwen3-32"])
    parser.add_argument("--formats", nargs="+", default=["int3", "int2"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--tokens", type=int, default=11264, help="calibration tokens, over all domains")
    parser.add_argument("--judged", type=int, default=16896, help="tokens that perplexity is taken on")
    given = parser.parse_args()
    documents = domain_documents(read_mix(ROOT / "configs" / "mix.toml"), given.data, "train")
    seen, unseen = ({name: texts[start::2] for name, texts in documents.items()} for start in (0, 1))
    for name in given.models:
        model, tokenizer = load(name, dtype="fp32")
        model.eval()
        original = {key: value.clone() for key, value in model.state_dict().items()}
        judged = batches_of(unseen, model, tokenizer, given.judged, seed=7)
        calibration = [batches_of(seen, model, tokenizer, given.tokens, seed) for seed in given.seeds]
        base = perplexity(model, judged)
        print(f"\n`{name}`: perplexity {base:.3f}; change by seed of the calibration text, CPU seconds of rounding\n")
        print("| | " + " | ".join(given.formats) + " | s |\n|---|" + "---|" * (len(given.formats) + 1))
        for label, method, options in parts():
            if isinstance(method, Method):
                key = f"part-{label.strip('+ ').replace(' ', '-')}"
                if key not in METHODS:
                    METHODS.register(key, summary=label, source="Equipoise")(method)
                method = key
            cells, spent = [], []
            for form in given.formats:
                changes = []
                for batches in calibration:
                    model.load_state_dict(original)
                    spent.append(quantize(model, batches, form, method, options))
                    changes.append(100 * (perplexity(model, judged) / base - 1))
                cells.append(", ".join(f"{change:+.2f} %" for change in changes))
            print(f"| {label} | {' | '.join(cells)} | {mean(spent):.1f} |", flush=True)


if __name__ == "__main__":
    main()
