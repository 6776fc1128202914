"""Text that models write themselves beside real text of their domain, on as many tokens. One table.

    python benchmarks/self_sampled.py --data DIRECTORY --write docs/self-sampled.md     # the trained models of the shelf
    python benchmarks/self_sampled.py --models reference --sentences 16                 # the embedded default model

Every text is measured alike: as profiling reads it (tokenized anew), under the model in float32. "real" is the text that the
model was made on, equal parts of each domain. Also shown: that a model whose logits are not numbers is refused. `--data` is
the directory that the mix's files are relative to; without it, the texts of the demo are used. `--write` puts the table
between the file's marks. Times are of one run on a machine that may have been busy; they tell the order of magnitude.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from quantization_page import write_between
from rich.console import Console

from equipoise.artifacts.files import write_atomic
from equipoise.errors import ModelError
from equipoise.lab.recipe import read_mix
from equipoise.lab.shelf import names, path
from equipoise.lab.text import domain_documents
from equipoise.models.reference import demo_texts, reference_model_dir
from equipoise.profiling.loading import load_model, load_tokenizer
from equipoise.profiling.self_sampled import self_sampled
from equipoise.profiling.self_sampled_report import TextReport, measure_text
from equipoise.profiling.sequences import Framing, build_rows

ROOT = Path(__file__).parents[1]
HEAD = (
    "| model | text | tokens | sigma | LIS | LIS, worst layer | perplexity | zlib ratio | rows below 0.1 | seconds |",
    "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
)
SAMPLERS = ("balanced", "ebss", "plain")


def real_text(name: str, data: Path | None) -> Mapping[str, Sequence[str]]:
    """Domain -> documents of the kind that a model was made on."""
    if name == "reference" or data is None:
        return demo_texts("calibration")
    return domain_documents(read_mix(ROOT / "configs" / "mix.toml"), data, "heldout")


def equal_parts(texts: Mapping[str, Sequence[str]], model: Any, tokenizer: Any, tokens: int, length: int) -> list[str]:
    """Excerpts of every domain, as many tokens of each."""
    framing = Framing.of(tokenizer, model.config)
    found = []
    for name, documents in texts.items():
        rows = build_rows(documents, tokenizer, framing, scenario=name, tokens=tokens // len(texts), seq_len=length)
        found += [tokenizer.decode(ids) for ids in rows.content]
    return found


def measure(name: str, data: Path | None, sentences: int, length: int, batch_size: int, seed: int) -> list[dict[str, Any]]:
    """Reports of all texts of one model."""
    directory = str(reference_model_dir()) if name == "reference" else str(path(name))
    model, tokenizer = load_model(directory, dtype="fp32"), load_tokenizer(directory)
    reports: list[tuple[str, TextReport, float]] = []
    for sampler in SAMPLERS:
        begun = time.perf_counter()
        found = self_sampled(
            model, tokenizer, sampler=sampler, sentences=sentences, length=length, batch_size=batch_size, seed=seed
        )
        reports.append((sampler, found.report, time.perf_counter() - begun))
    begun = time.perf_counter()
    real = equal_parts(real_text(name, data), model, tokenizer, reports[0][1].tokens, length)
    reports.append(("real", measure_text(model, tokenizer, real, seq_len=length), time.perf_counter() - begun))
    return [{"model": name, "text": text, "seconds": seconds, **report.as_dict()} for text, report, seconds in reports]


def refusal(name: str) -> str:
    """What is said of a model whose weights are finite and whose logits are not."""
    model, tokenizer = load_model(str(path(name)), dtype="fp32"), load_tokenizer(str(path(name)))
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)
        model.get_output_embeddings().weight.mul_(100)
    try:
        self_sampled(model, tokenizer, sentences=1, length=16, progress=False)
    except ModelError as error:
        return str(error)
    raise AssertionError("a model without finite logits wrote text")


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of the table."""
    return [
        *HEAD,
        *(
            f"| {r['model']} | {r['text']} | {r['tokens']:,} | {r['sigma']:.4f} | {r['lis']:.3f} | {r['lis_max']:.2f} | "
            f"{r['perplexity']:.1f} | {r['compressibility']:.3f} | {r['degenerate']:.0%} | {r['seconds']:.0f} |"
            for r in rows
        ),
    ]


def main() -> None:
    """Measure, print, and write if told to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=None, help="names on the shelf, or `reference`  [default: the shelf]")
    parser.add_argument("--data", type=Path, help="directory of real text")
    parser.add_argument("--sentences", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path("out/self-sampled.json"), help="figures; models in it are not run again"
    )
    parser.add_argument("--write", type=Path, help="page whose table is replaced")
    given = parser.parse_args()
    torch.set_num_threads(1)
    options = {"sentences": given.sentences, "length": given.length, "batch_size": given.batch_size, "seed": given.seed}
    kept = json.loads(given.out.read_text()) if given.out.is_file() else []
    console = Console()
    for name in given.models or names():
        if not any(run["model"] == name and run["options"] == options for run in kept):
            rows = measure(name, given.data, **options)
            kept = [run for run in kept if run["model"] != name]
            kept.append({"model": name, "options": options, "rows": rows})
            write_atomic(given.out, json.dumps(kept, indent=1))
            console.print("\n".join(table(rows)), markup=False, soft_wrap=True)
    rows = [row for run in kept for row in run["rows"]]
    lines = table(rows)
    console.print("\n".join(lines), markup=False, soft_wrap=True)
    console.print(f"a model whose logits are not numbers: {refusal('mixtral-8')}", markup=False, soft_wrap=True)
    if given.write:
        write_between(given.write, "self-sampled", "\n".join(["", *lines, ""]))


if __name__ == "__main__":
    main()
