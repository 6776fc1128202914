"""The main job on every model of the shelf: raw, rq-paper and rq, judged on held-out text. One table.

    python benchmarks/shelf.py --data DIRECTORY --write docs/results.md

`--data` is the directory that the mix's files are relative to; without it, the texts of the demo are used, which need
nothing but the package index. Runs are kept in `--out` and not repeated. `--write` puts the table between the file's
`shelf` marks.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from equipoise.artifacts import Evaluation
from equipoise.artifacts.files import write_atomic
from equipoise.lab.recipe import read_mix
from equipoise.lab.shelf import names, path
from equipoise.lab.text import domain_documents
from equipoise.models.reference import demo_texts
from equipoise.pipeline import EVALUATION, balance
from equipoise.reporting.rows import evaluation_rows

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- shelf: begin -->", "<!-- shelf: end -->"
HEAD = (
    "| model | plan | LIS over units | imbalance removed | `lis_paper` | bytes | perplexity | change | KL, nats |",
    "|---|---|---:|---:|---:|---:|---:|---|---:|",
)

Texts = Mapping[str, Sequence[str]]


def texts(data: Path | None) -> tuple[Texts, Texts]:
    """Text to plan from, and text of other documents to judge on."""
    if data is None:
        return demo_texts("calibration"), demo_texts("heldout")
    mix = read_mix(ROOT / "configs" / "mix.toml")
    return domain_documents(mix, data, "train"), domain_documents(mix, data, "heldout")


def run(name: str, planned: Texts, judged: Texts, out: Path, tokens: int, seed: int) -> Evaluation:
    """Balance one model, or read what an earlier run proved."""
    place = out / f"{name}-{tokens}-{seed}"
    if not (place / EVALUATION).is_file():
        balance(str(path(name)), planned, place, heldout=judged, tokens=tokens, heldout_tokens=tokens, seed=seed, batch_size=8)
    return Evaluation.load_file(place / EVALUATION)


def table_rows(name: str, evaluation: Evaluation) -> list[str]:
    """Lines of the table for one model: all texts together."""
    told: dict[str, Any] = evaluation_rows(evaluation)
    lines = []
    for contender in told["contenders"]:
        text = contender["texts"][-1]
        if not lines:
            lines.append(f"| `{name}` | raw | {text['lis_base']:.3f} | | | 100 % | {text['perplexity_base']:.3f} | | |")
        change = text["perplexity_change"]
        interval = f"{100 * change['value']:+.2f} % ({100 * change['low']:+.2f}..{100 * change['high']:+.2f})"
        removed = contender["excess_removed"]
        lines.append(
            f"| | `{contender['name']}` | {text['lis']:.3f} | {'' if removed is None else f'{100 * removed:.1f} %'} "
            f"| {text['lis_paper']:.3f} | {100 * contender['bytes_of_base']:.1f} % | {text['perplexity']:.3f} | {interval} "
            f"| {text['kl']['value']:.4f} |"
        )
    return lines


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path("out/shelf"))
    parser.add_argument("--tokens", type=int, default=4096, help="of each domain, to plan from and to judge on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", nargs="*", default=None)
    parser.add_argument("--write", type=Path, default=None, help="Markdown file whose marked part is replaced")
    told = parser.parse_args()
    planned, judged = texts(told.data)
    lines, figures = list(HEAD), {}
    for name in told.models or names():
        evaluation = run(name, planned, judged, told.out, told.tokens, told.seed)
        lines += table_rows(name, evaluation)
        figures[name] = evaluation_rows(evaluation)
        print("\n".join(lines[-3:]), flush=True)
    domains = f"{len(planned)} domains ({', '.join(planned)}), {told.tokens:,} tokens of each"
    page = "\n".join([*lines, "", f"{domains}; torch {torch.__version__}, {platform.machine()}; seed {told.seed}."])
    print(page)
    write_atomic(told.out / "shelf.json", json.dumps(figures, indent=1))
    if told.write:
        before, _, rest = told.write.read_text().partition(BEGIN)
        _, end, after = rest.partition(END)
        if not end:
            raise SystemExit(f"{told.write} has no '{BEGIN}' and '{END}' to write between")
        write_atomic(told.write, f"{before}{BEGIN}\n{page}\n{END}{after}")


if __name__ == "__main__":
    main()
