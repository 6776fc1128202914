"""Rounding methods side by side: perplexity and KL of every model at 8, 4, 3 and 2 bits, by the text they are calibrated on.

    python benchmarks/quantization.py --data DIRECTORY --write docs/results.md

All experts of a model are stored in one precision, everything else stays as it was, and computing is in fp32, so that
only the rounded weights differ. Each method that needs text is calibrated on as many tokens of

    in-domain       the training documents of the half of the domains that is judged (technical or language)
    other-domain    those of the other half
    self            text that the model wrote itself (EBSS)

and judged on held-out documents of both halves; in-domain figures join each half under its own calibration. Seeds draw
another sample of the calibration text; the judged text is always the same. Finished cells are kept in `--out`, under the
model's fingerprint and that of the rounding code, and not repeated. `--data` is the directory that the mix's files are
relative to; without it, and for the reference model always, the text is the demo's.
"""

from __future__ import annotations

import argparse
import ast
import copy
import functools
import hashlib
import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quantization_page
import torch
from shelf import texts

import equipoise.quantization
from equipoise.artifacts.files import write_atomic
from equipoise.evaluation import language
from equipoise.execution.apply import apply_plan
from equipoise.lab import shelf
from equipoise.models.layers import model_facts
from equipoise.models.reference import demo_texts, reference_model_dir
from equipoise.planning.uniform import uniform_plan
from equipoise.profiling.loading import load_model, load_tokenizer
from equipoise.profiling.self_sampled import self_texts
from equipoise.profiling.sequences import Batch, Framing, Rows, text_batches
from equipoise.quantization.methods import METHODS

REFERENCE = "reference"
TECHNICAL = {"math", "code", "python", "c", "go", "javascript", "rust"}
"""Domains of the first half; all others are the second, `language`."""
HALVES = ("technical", "language")
SELF = "self"
NO_TEXT = "none"
SEQ_LEN, JUDGED_LEN, BATCH_ROWS = 512, 256, 4


@dataclass(frozen=True)
class Subject:
    """A model under test: itself, and the text that it is judged on and calibrated on."""

    name: str
    model: Any
    tokenizer: Any
    judged: Mapping[str, Rows]
    training: Mapping[str, Sequence[str]]
    cells: Path


@dataclass(frozen=True)
class Cell:
    """One calibration of one method: all widths are rounded from it."""

    method: str
    text: str
    seed: int

    @property
    def file(self) -> str:
        """Name of the file that keeps its figures."""
        return f"{self.method}-{self.text}-{self.seed}.json"


def half_of(domain: str) -> str:
    """The half of the domains that one belongs to."""
    return HALVES[domain not in TECHNICAL]


def subject(name: str, told: argparse.Namespace) -> Subject:
    """Load a model in fp32 and cut the text that it is judged on."""
    directory = str(reference_model_dir() if name == REFERENCE else shelf.path(name))
    model, tokenizer = load_model(directory, dtype="fp32"), load_tokenizer(directory)
    if name == REFERENCE:
        training, judged = demo_texts("calibration"), demo_texts("heldout")
    else:
        training, judged = texts(told.data)
    rows = {
        domain: language.cut(
            tokenizer, model.config, documents, name=domain, seq_len=JUDGED_LEN, tokens=told.heldout_tokens, seed=0
        )
        for domain, documents in judged.items()
    }
    mark = f"{name}-{model_facts(model, name).fingerprint[:12]}-{rounding_code()}"
    return Subject(name, model, tokenizer, rows, training, told.out / f"{mark}-{told.tokens}-{told.heldout_tokens}")


@functools.cache
def rounding_code() -> str:
    """Hash of what the code under `quantization/` does: comments and docstrings left out."""
    digest = hashlib.sha256()
    for file in sorted(Path(equipoise.quantization.__path__[0]).glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = None
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:8]


def cells(methods: Sequence[str], seeds: int) -> Iterator[Cell]:
    """All calibrations, the first seed's first, so that an unfinished run is a whole grid of fewer seeds."""
    for seed in range(seeds):
        for method in methods:
            if METHODS.get(method).needs_hessian:
                yield from (Cell(method, text, seed) for text in (*HALVES, SELF))
            elif seed == 0:
                yield Cell(method, NO_TEXT, 0)


def calibration(tested: Subject, cell: Cell, tokens: int) -> list[Batch]:
    """About `tokens` tokens of a cell's text, in equal parts of its domains."""
    if cell.text == NO_TEXT:
        return []
    if cell.text == SELF:
        # A quarter more than is needed: sentences may end before their length.
        documents = self_texts(
            tested.model, tested.tokenizer, sentences=5 * tokens // (4 * SEQ_LEN), length=SEQ_LEN, seed=cell.seed
        )
    else:
        documents = {domain: told for domain, told in tested.training.items() if half_of(domain) == cell.text}
    framing = Framing.of(tested.tokenizer, tested.model.config)
    share = tokens // len(documents)
    return text_batches(
        documents, tested.tokenizer, framing, tokens=share, seq_len=SEQ_LEN, batch_size=BATCH_ROWS, seed=cell.seed
    )


def measure(tested: Subject, cell: Cell, widths: Sequence[str], told: argparse.Namespace) -> dict[str, Any]:
    """Round a model to each width and compare what it predicts with the original, on every judged text."""
    batches = calibration(tested, cell, told.tokens)
    facts = model_facts(tested.model, tested.name)
    contenders, seconds = {}, {}
    for width in widths:
        start = time.perf_counter()
        copied = copy.deepcopy(tested.model)
        options = {"batches": batches} if batches else {}
        contenders[width] = apply_plan(
            copied, uniform_plan(facts, width), method=cell.method, int8_activations=False, **options
        )
        seconds[width] = round(time.perf_counter() - start, 2)
    found: dict[str, Any] = {
        "calibration_tokens": sum(batch.tokens for batch in batches),
        "seconds": seconds,
        "documents": {domain: list(rows.documents) for domain, rows in tested.judged.items()},
        "sums": {width: {} for width in widths},
    }
    for domain, rows in tested.judged.items():
        for width, sums in language.compare(tested.model, contenders, rows, batch_size=BATCH_ROWS).items():
            found["sums"][width][domain] = {
                "tokens": sums.tokens.tolist(),
                "nll_base": sums.nll_base.tolist(),
                "nll": sums.nll.tolist(),
                "kl": sums.kl.tolist(),
            }
    return found


def run(tested: Subject, told: argparse.Namespace) -> dict[Cell, dict[str, Any]]:
    """Every cell of a model's grid, measured now or read from an earlier run."""
    found = {}
    for cell in cells(told.methods, told.seeds):
        file = tested.cells / cell.file
        kept = json.loads(file.read_text()) if file.is_file() else {"sums": {}}
        missing = [width for width in told.widths if width not in kept["sums"]]
        if missing:
            start = time.perf_counter()
            new = measure(tested, cell, missing, told)
            for part in ("sums", "seconds"):
                new[part] = kept.get(part, {}) | new[part]
            kept = new
            tested.cells.mkdir(parents=True, exist_ok=True)
            write_atomic(file, json.dumps(kept))
            print(f"{tested.name} {cell.method} {cell.text} {cell.seed}: {time.perf_counter() - start:.0f} s", flush=True)
        found[cell] = kept
    return found


def main() -> None:
    """Run what is missing, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path("out/quantization"))
    parser.add_argument("--models", nargs="*", default=[*shelf.names(), REFERENCE])
    parser.add_argument("--methods", nargs="*", default=["rtn", "gptq", "agq"])
    parser.add_argument("--widths", nargs="*", default=["int8", "int4", "int3", "int2"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16384, help="of calibration text")
    parser.add_argument("--heldout-tokens", type=int, default=1536, help="of each domain that is judged")
    parser.add_argument("--write", type=Path, default=None, help="Markdown file whose marked part is replaced")
    parser.add_argument("--mark", default="quantization", help="which part")
    told = parser.parse_args()
    page = quantization_page.Page(told.methods, told.widths)
    for name in told.models:
        tested = subject(name, told)
        found = run(tested, told)
        for lines in page.add(name, found, half_of):
            print(lines, flush=True)
    text = page.text(
        f"{told.tokens:,} calibration tokens; {told.heldout_tokens:,} held-out tokens of each domain in rows of {JUDGED_LEN}; "
        f"{told.seeds} seeds; fp32, torch {torch.__version__}, {platform.machine()}."
    )
    print(text)
    told.out.mkdir(parents=True, exist_ok=True)
    write_atomic(told.out / "quantization.md", text + "\n")
    write_atomic(told.out / "quantization.json", json.dumps(page.figures, indent=1))
    if told.write:
        quantization_page.write_between(told.write, told.mark, text)


if __name__ == "__main__":
    main()
