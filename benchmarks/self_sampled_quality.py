"""What self-written text is worth for rounding: experts at 2 bits by GPTQ, calibrated on several texts, as many tokens of each.

    python benchmarks/self_sampled_quality.py --data DIRECTORY --write docs/self-sampled.md

Judged on held-out text of all domains: KL divergence of the rounded model's predictions from the original's, in nats per
token, each of `--seeds` runs with other calibration text. "in-domain" is training text of all domains in equal parts, "prose"
is one of them. Everything is in float32, so that only the rounded experts differ. Finished cells are kept in `--out`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from quantization_page import write_between
from rich.console import Console

from equipoise.artifacts.files import write_atomic
from equipoise.execution.layerwise import Calibration, quantize_model
from equipoise.lab import load
from equipoise.lab.recipe import read_mix
from equipoise.lab.text import domain_documents
from equipoise.models.layers import model_facts
from equipoise.planning.uniform import uniform_plan
from equipoise.profiling.forward import run_batch
from equipoise.profiling.self_sampled import self_sampled
from equipoise.profiling.sequences import IGNORED, Batch, Framing, text_batches

ROOT = Path(__file__).parents[1]
LENGTH, JUDGED, ROWS = 256, 1500, 8
OWN: dict[str, tuple[str, dict[str, float]]] = {
    "balanced": ("balanced", {}),
    "balanced, 2 branches": ("balanced", {"width": 2}),
    "balanced, from the 32 likeliest": ("balanced", {"top": 32}),
    "balanced, likelihood weighs (tau 0.2)": ("balanced", {"tau": 0.2}),
    "plain": ("plain", {}),
    "ebss": ("ebss", {}),
}
REAL = ("in-domain", "prose")

Texts = Mapping[str, Sequence[str]]


def batches(texts: Texts, model: Any, tokenizer: Any, tokens: int, seed: int) -> list[Batch]:
    """Equal parts of every text, `tokens` in all."""
    framing = Framing.of(tokenizer, model.config)
    share = tokens // len(texts)
    return text_batches(texts, tokenizer, framing, tokens=share, seq_len=LENGTH, batch_size=ROWS, seed=seed)


def predictions(model: Any, judged: Sequence[Batch]) -> list[torch.Tensor]:
    """[T, V] log-probabilities at the scored positions of each batch."""
    return [
        run_batch(model, batch, all_logits=True).logits[torch.from_numpy(batch.labels) != IGNORED].log_softmax(-1)
        for batch in judged
    ]


def divergence(base: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """Mean KL divergence in nats per token."""
    total = sum(float((one.exp() * (one - two)).sum()) for one, two in zip(base, other, strict=True))
    return total / sum(map(len, base))


def cell(name: str, text: str, precision: str, tokens: int, seed: int, train: Texts, heldout: Texts) -> dict[str, Any]:
    """One model rounded with one calibration text."""
    model, tokenizer = load(name, dtype="fp32")
    judged = batches(heldout, model, tokenizer, JUDGED * len(heldout), 0)
    base = predictions(model, judged)
    if text in OWN:
        sampler, options = OWN[text]
        sentences = -(-tokens // LENGTH)
        own = self_sampled(
            model, tokenizer, sampler=sampler, sentences=sentences, length=LENGTH, batch_size=8, seed=seed, **options
        )
        given: Texts = {"own": own.texts}
    else:
        given = train if text == "in-domain" else {text: train[text]}
    plan = uniform_plan(model_facts(model, name), precision)
    quantize_model(model, plan, Calibration(batches(given, model, tokenizer, tokens, seed)))
    return {"model": name, "text": text, "precision": precision, "tokens": tokens, "seed": seed,
            "kl": divergence(base, predictions(model, judged))}  # fmt: skip


def table(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of the table: mean and range over seeds."""
    models = list(dict.fromkeys(c["model"] for c in cells))
    lines = [f"| calibration text | {' | '.join(models)} |", f"|---|{'---:|' * len(models)}"]
    for text in dict.fromkeys(c["text"] for c in cells):
        row = []
        for model in models:
            found = [c["kl"] for c in cells if (c["model"], c["text"]) == (model, text)]
            row.append(f"{sum(found) / len(found):.4f} ({min(found):.4f} - {max(found):.4f})" if found else "")
        lines.append(f"| {text} | {' | '.join(row)} |")
    return lines


def main() -> None:
    """Measure, print, and write if told to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory of real text")
    parser.add_argument("--models", nargs="+", default=["mixtral-8", "deepseek-64"])
    parser.add_argument("--texts", nargs="+", default=[*REAL, *OWN], choices=[*REAL, *OWN])
    parser.add_argument("--precision", default="int2-g32")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out/self-sampled-quality.json"))
    parser.add_argument("--write", type=Path, help="page whose table is replaced")
    given = parser.parse_args()
    torch.set_num_threads(1)
    mix = read_mix(ROOT / "configs" / "mix.toml")
    train, heldout = (domain_documents(mix, given.data, split) for split in ("train", "heldout"))
    cells: list[dict[str, Any]] = json.loads(given.out.read_text()) if given.out.is_file() else []
    wanted = [(m, t, given.precision, given.tokens, s) for s in range(given.seeds) for m in given.models for t in given.texts]
    console = Console()
    for key in wanted:
        if not any((c["model"], c["text"], c["precision"], c["tokens"], c["seed"]) == key for c in cells):
            cells.append(cell(*key, train, heldout))
            write_atomic(given.out, json.dumps(cells, indent=1))
            console.print(cells[-1], soft_wrap=True)
    order = {(m, t): i for i, (m, t) in enumerate((m, t) for t in given.texts for m in given.models)}
    chosen = [c for c in cells if (c["model"], c["text"]) in order and c["precision"] == given.precision]
    chosen = sorted((c for c in chosen if c["tokens"] == given.tokens), key=lambda c: order[c["model"], c["text"]])
    lines = table(chosen)
    console.print("\n".join(lines), markup=False, soft_wrap=True)
    if given.write:
        write_between(given.write, "self-sampled-quality", "\n".join(["", *lines, ""]))


if __name__ == "__main__":
    main()
