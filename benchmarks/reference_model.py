"""Perplexity and routing skew of the reference model beside the dense model that it is carved from.

    python benchmarks/reference_model.py                     # the cached model, on text that every machine can have
    python benchmarks/reference_model.py --data DIR          # on prose, math, wiki and code from a directory of real text
    python benchmarks/reference_model.py --data DIR --calibrate-on-data   # carve anew on that directory's training text

Text: sequences of 512 tokens, spread evenly over each domain's documents, which are joined by <|endoftext|>; no BOS.
"mean" is the exponential of the mean loss over the domains. LIS is num_experts * largest load / total load per layer.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from equipoise.metrics import lis
from equipoise.models.reference import demo_texts, reference_model_dir
from equipoise.models.reference.build import DEFAULT_RECIPE, carve_model, dense_gguf
from equipoise.models.reference.dense import load_dense, load_tokenizer

HELDOUT = {
    "prose": "prose_en/heldout.jsonl.gz",
    "math": "math/openstax_heldout.jsonl.gz",
    "wiki": "wiki/wikitext2_raw_test.txt.gz",
    "code": "code/python_heldout.jsonl.gz",
}
TRAINING = {
    "prose": "prose_en/train.jsonl.gz",
    "math": "math/openstax_train.jsonl.gz",
    "wiki": "wiki/wikitext2_valid_tokens.txt.gz",
    "code": "code/python_train.jsonl.gz",
    "textbook": "textbook/openstax_train.jsonl.gz",
    "chat": "chat/topicalchat_train.jsonl.gz",
}
LENGTH = 512


def documents(path: Path) -> list[str]:
    """Texts of a .jsonl.gz file (field "text") or the whole of a .txt.gz file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [file.read()] if path.name.endswith(".txt.gz") else [json.loads(line)["text"] for line in file]


def spread(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, sequences: int) -> torch.Tensor:
    """[sequences, LENGTH] tokens, evenly spaced over the first 300 documents joined (each cut at 400,000 characters)."""
    tokens = [token for text in texts[:300] for token in (*tokenizer(text[:400_000]).input_ids, 0)]
    pieces = len(tokens) // LENGTH
    starts = [(2 * i + 1) * pieces // (2 * sequences) * LENGTH for i in range(sequences)]
    return torch.tensor([tokens[start : start + LENGTH] for start in starts])


@torch.inference_mode()
def losses(model: torch.nn.Module, text: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Mean loss per token of each domain."""
    result = {}
    for domain, tokens in text.items():
        total = 0.0
        for batch in tokens.split(4):
            logits = model(batch).logits[:, :-1].float()
            total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).item() * len(batch)
        result[domain] = total / len(tokens)
    return result


@torch.inference_mode()
def routing_skew(model: torch.nn.Module, text: Mapping[str, torch.Tensor]) -> list[float]:
    """LIS of each layer over all the text."""
    counts = torch.zeros(len(model.model.layers), model.config.num_experts)

    def count(layer: int, experts: torch.Tensor) -> None:
        counts[layer] += torch.bincount(experts.flatten(), minlength=counts.shape[1])

    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _module, _inputs, output, index=index: count(index, output[2]))
        for index, layer in enumerate(model.model.layers)
    ]
    for tokens in text.values():
        for batch in tokens.split(4):
            model.model(batch)
    for hook in hooks:
        hook.remove()
    return lis(counts.numpy()).tolist()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("EQUIPOISE_SHARED_DATA"), help="directory of real text")
    parser.add_argument("--calibrate-on-data", action="store_true", help="carve anew on DIR's training text, 6 x 4 sequences")
    parser.add_argument("--sequences", type=int, default=8, help="held-out sequences per domain")
    options = parser.parse_args()
    if options.data and not options.data.is_dir():
        parser.error(
            f"--data: there is no directory '{options.data}'; leave it out to use the default model's own held-out text"
        )
    torch.set_num_threads(2)

    gguf = dense_gguf()
    dense, tokenizer = load_dense(gguf), load_tokenizer(gguf)
    sources = (
        {domain: documents(options.data / file) for domain, file in HELDOUT.items()} if options.data else demo_texts("heldout")
    )
    text = {domain: spread(texts, tokenizer, options.sequences) for domain, texts in sources.items()}
    start = time.perf_counter()
    if options.calibrate_on_data:
        tokens = torch.cat([spread(documents(options.data / file), tokenizer, 4) for file in TRAINING.values()])
        model = carve_model(dense, tokens, DEFAULT_RECIPE)
    else:
        model = AutoModelForCausalLM.from_pretrained(reference_model_dir(), dtype=torch.float32)
    seconds = time.perf_counter() - start

    table = Table("model", *text, "mean", title=f"perplexity, {options.sequences} x {LENGTH} tokens per domain")
    means = []
    for name, contender in (("dense", dense), ("carved", model)):
        loss = losses(contender, text)
        means.append(math.exp(sum(loss.values()) / len(loss)))
        table.add_row(name, *(f"{math.exp(value):.2f}" for value in loss.values()), f"{means[-1]:.2f}")
    skew = routing_skew(model, text)
    console = Console()
    console.print(table)
    console.print(
        f"carved / dense {means[1] / means[0]:.3f}; LIS over layers: mean {sum(skew) / len(skew):.2f}, max {max(skew):.2f}"
    )
    console.print(f"model built or loaded in {seconds:.0f} s, load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
