"""Finding (iii), how much calibration text is enough: the experts that a sample names, and the balance that its plan reaches.

    python benchmarks/paper/findings_calibration.py --data DIRECTORY --write docs/paper.md --plot docs/paper-calibration.svg

All the text of a domain is as many tokens as `--tokens` says, in excerpts. A sample is a part of it, drawn anew by every seed.
Of each sample, measured for itself by the pipeline's own recorder, is told:

- which experts it names: the heaviest of each layer (the paper takes one), the heaviest quarter, and by Wanda as published and
  by gate norm the less-important one and quarter; as the part of them that all the text names too;
- `seen`: part of all selections that go to experts that the sample was sent to at all;
- the LIS that plans made on it reach on held-out text: `rq-paper`, in the paper's reading and over units, and `rq` over units.

In domain, sample, all the text and held-out text are of one domain; out of domain, the sample is of another one. LIS is of the
model's routing on held-out text under the plan's shares, mean over layers.
Shapes: L MoE layers, E experts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from common import Cells, Subject, arguments, digest, excerpts, machine, publish, subjects, texts
from figures import save_figure
from numpy.typing import NDArray

from equipoise.artifacts import Profile
from equipoise.metrics import lis
from equipoise.models.recorder import record
from equipoise.planning.methods import make_plan
from equipoise.profiling.calibrate import profile
from equipoise.profiling.forward import run_batch
from equipoise.profiling.sequences import text_batches

Floats = NDArray[np.float64]
PREFERRED = ("prose", "python", "code", "math")
DOMAINS = 3
ROW, BATCH = 256, 16
TOKENS_OF_EXCERPT = 200
"""Fewer than an excerpt has in most text, so that there are enough of them."""
PERCENTS = (0.1, 1.0, 10.0, 100.0)
FORMATS = ("int8", "int4-g32")
LESS_IMPORTANT = {"wanda, as published": ("wanda", -1.0), "gate-norm": ("gate_norm", 1.0)}
"""Name -> estimate, and by what it is multiplied so that larger means more important."""
NAMED = {
    "heaviest": "the heaviest expert",
    "heaviest quarter": "the heaviest quarter",
    "wanda, as published": "less important by Wanda as published",
    "wanda, as published quarter": "least important quarter by it",
    "gate-norm": "less important by gate norm",
    "gate-norm quarter": "least important quarter by it",
    "seen": "`seen`",
}
REACHED = {
    "raw": "no plan",
    "lis_paper": "`rq-paper`, `lis_paper`",
    "rq-paper": "`rq-paper`, over units",
    "rq": "`rq`, over units",
}


def measured(subject: Subject, documents: Sequence[str], tokens: int, seed: int) -> Profile:
    """The profile of a sample of a text."""
    return profile(
        subject.model, subject.tokenizer, {"text": documents}, tokens=tokens, seq_len=ROW, batch_size=BATCH, seed=seed,
        importance=("frequency", "wanda", "gate_norm"), precisions=FORMATS, progress=False,
    )  # fmt: skip


def held_out_load(subject: Subject, documents: Sequence[str], tokens: int) -> NDArray[np.int64]:
    """[L, E] selections of each expert on held-out text."""
    batches = text_batches(
        {"text": documents}, subject.tokenizer, subject.framing, tokens=tokens, seq_len=ROW, batch_size=BATCH
    )
    with record(subject.model, transitions=False, coactivation=False) as recorder:
        for batch in batches:
            run_batch(subject.model, batch, all_logits=False)
    return np.asarray(recorder.counts.sum((0, 1)))


def shared(mine_LE: Floats, all_LE: Floats, widths: Sequence[int], count: Callable[[int], int]) -> float:
    """Part of the largest entries of each layer that two scores have in common, mean over layers; the first of equal ones.

    With A and B of one size, this is |A & B| / |A|; Jaccard's index follows from it as x / (2 - x).
    """
    parts = []
    for mine_E, all_E, width in zip(mine_LE, all_LE, widths, strict=True):
        size = count(width)
        first, second = (set(np.argsort(-scores[:width], kind="stable")[:size].tolist()) for scores in (mine_E, all_E))
        parts.append(len(first & second) / size)
    return float(np.mean(parts))


def overlaps(sample: Mapping[str, Any], whole: Mapping[str, Any], widths: Sequence[int]) -> dict[str, float]:
    """How much of what all the text names, a sample names too."""
    one, quarter = (lambda width: 1), (lambda width: max(width // 4, 1))
    scores = {"heaviest": 1.0} | dict.fromkeys(LESS_IMPORTANT, -1.0)
    found = {}
    for name, sign in scores.items():
        mine_LE, all_LE = (sign * np.asarray(part[name]) for part in (sample, whole))
        found[name] = shared(mine_LE, all_LE, widths, one)
        found[f"{name} quarter"] = shared(mine_LE, all_LE, widths, quarter)
    seen_LE, load_LE = np.asarray(sample["heaviest"]) > 0, np.asarray(whole["heaviest"])
    found["seen"] = float(np.mean((load_LE * seen_LE).sum(1) / load_LE.sum(1)))
    return found


def told_by(made: Profile, held_out: Mapping[str, NDArray[np.int64]]) -> dict[str, Any]:
    """What the tables need of one profile: its scores, and the balance of its plans on held-out text of each domain."""
    published, ours = make_plan(made, "rq-paper"), make_plan(made, "rq", dispatch="even")
    return {
        "tokens": int(made.tokens.sum()),
        "widths": made.widths.tolist(),
        "heaviest": made.load.tolist(),
        **{name: (sign * made.importance[key]).tolist() for name, (key, sign) in LESS_IMPORTANT.items()},
        "reached": {
            domain: {
                "raw": float(np.nanmean(lis(load_LE, made.widths))),
                "lis_paper": float(np.nanmean(published.lis_paper(load_LE))),
                "rq-paper": float(np.nanmean(published.lis(load_LE))),
                "rq": float(np.nanmean(ours.lis(load_LE))),
            }
            for domain, load_LE in held_out.items()
        },
    }


def of_model(
    subject: Subject,
    planned: Mapping[str, Sequence[str]],
    judged: Mapping[str, Sequence[str]],
    told: argparse.Namespace,
    cells: Cells,
) -> list[dict[str, Any]]:
    """Rows of one model: domain of the sample, part of the text, seed, domain that is judged."""
    count = -(-told.tokens // TOKENS_OF_EXCERPT)
    whole = {name: excerpts({name: documents}, count, told.seed) for name, documents in planned.items()}
    text = digest({**whole, **{f"{name}, judged": documents for name, documents in judged.items()}})

    @cache
    def loads() -> dict[str, NDArray[np.int64]]:
        return {name: held_out_load(subject, documents, told.held_out_tokens) for name, documents in judged.items()}

    def sample(source: str, percent: float, seed: int) -> Any:
        tokens = max(int(told.tokens * percent / 100), subject.framing.overhead + 2)
        return told_by(measured(subject, whole[source], tokens, seed), loads())

    found = {}
    for source in planned:
        for percent in PERCENTS:
            for seed in range(told.seed, told.seed + (told.seeds if percent < 100 else 1)):
                key = {"source": source, "percent": percent, "seed": seed, "tokens": told.tokens}
                key |= {"held_out": told.held_out_tokens, "text": text}
                found[source, percent, seed] = cells.get(subject, key, partial(sample, source, percent, seed))
    return list(rows(subject.name, found, told.seed))


def rows(model: str, found: Mapping[tuple[str, float, int], Any], first: int) -> Iterator[dict[str, Any]]:
    """Every sample beside all the text of every domain.

    Args:
        model: its name.
        found: (domain of the sample, percent, seed) -> figures of it.
        first: seed under which all the text was measured.
    """
    for (source, percent, seed), one in found.items():
        for target in one["reached"]:
            whole = found[target, 100.0, first]
            yield {
                "model": model, "source": source, "target": target, "percent": percent, "seed": seed, "tokens": one["tokens"],
                **overlaps(one, whole, whole["widths"]), **one["reached"][target],
            }  # fmt: skip


def cell(found: Sequence[Mapping[str, Any]], name: str, inside: bool, part: bool) -> str:
    """Mean over draws and domains with the least and the greatest."""
    values = [row[name] for row in found if (row["source"] == row["target"]) == inside]
    if not values:
        return ""
    scale, digits = (100, 0) if part else (1, 2)
    mean, least, most = (f"{scale * value:.{digits}f}" for value in (np.mean(values), min(values), max(values)))
    return mean if least == most else f"{mean} ({least}..{most})"


def pages(found: Sequence[Mapping[str, Any]], domains: Sequence[str], told: argparse.Namespace) -> str:
    """The tables as Markdown."""
    lines = []
    for inside, place in ((True, "in domain"), (False, "out of domain")):
        for names, title, part in (
            (NAMED, "what a sample names as all the text does, %", True), (REACHED, "LIS on held-out text", False),
        ):  # fmt: skip
            lines += [f"**{title[0].upper()}{title[1:]}, {place}**: mean (least..greatest) over domains and draws", ""]
            lines += ["| model | part of the text | tokens | " + " | ".join(names.values()) + " |"]
            lines += ["|---|---:|---:|" + "---:|" * len(names)]
            for model in dict.fromkeys(row["model"] for row in found):
                for percent in PERCENTS:
                    mine = [row for row in found if (row["model"], row["percent"]) == (model, percent)]
                    values = " | ".join(cell(mine, name, inside, part) for name in names)
                    head = f"`{model}`" if percent == PERCENTS[0] else ""
                    lines.append(f"| {head} | {percent:g} % | {np.mean([r['tokens'] for r in mine]):,.0f} | {values} |")
            lines.append("")
    lines.append(
        f"Domains: {', '.join(domains)}; {told.tokens:,} tokens of each are all the text, {told.held_out_tokens:,} of other "
        f"documents are held out; {told.seeds} draws; Wanda over all tokens of a layer; tokens of an encoder-decoder model are "
        "its decoder's. The paper, without a curve: 10 % is enough, and the heavy hitters so found cover over 99 % of all "
        "selections (quoted). "
        f"{machine()}."
    )
    return "\n".join(lines)


def draw(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """LIS on held-out text by part of the text: a panel for each model, in and out of domain."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["model"] for row in found))
    figure = Figure(figsize=(2.9 * len(names), 2.9), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for i, kind in enumerate(REACHED):
            for inside, style in ((True, "o-"), (False, "s--")):
                by_percent = [
                    [
                        r[kind]
                        for r in found
                        if (r["model"], r["percent"], r["source"] == r["target"]) == (name, percent, inside)
                    ]
                    for percent in PERCENTS
                ]
                if not all(by_percent) or (kind == "raw" and not inside):
                    continue
                label = REACHED[kind].replace("`", "") + ("" if kind == "raw" else f", {'in' if inside else 'out of'} domain")
                means = [float(np.mean(values)) for values in by_percent]
                spread = [[m - min(v) for m, v in zip(means, by_percent, strict=True)]]
                spread += [[max(v) - m for m, v in zip(means, by_percent, strict=True)]]
                axis.errorbar(
                    PERCENTS, means, spread, fmt=style, color=f"C{i}", markersize=3, linewidth=1.1, elinewidth=0.6, label=label
                )
        axis.set_xscale("log")
        axis.set_title(name, fontsize="small")
        axis.set_xlabel("part of the text, %", fontsize="x-small")
        axis.tick_params(labelsize="x-small")
    figure.axes[0].set_ylabel("LIS on held-out text", fontsize="x-small")
    save_figure(figure, path, columns=4)


def main() -> None:
    """Run, print, keep."""
    parser = arguments(__doc__, "out/paper")
    parser.add_argument("--domains", nargs="*", default=None, help=f"[default: {DOMAINS} of {', '.join(PREFERRED)}]")
    parser.add_argument("--tokens", type=int, default=32_768, help="of each domain: all the text")
    parser.add_argument("--held-out-tokens", type=int, default=16_384, help="of each domain")
    parser.add_argument("--seeds", type=int, default=3, help="draws of each sample")
    parser.add_argument("--plot", type=Path, default=None)
    told = parser.parse_args()
    planned, judged = texts(told.data)
    domains = told.domains or [name for name in PREFERRED if name in planned][:DOMAINS]
    cells = Cells(told.out, "calibration")
    found = [
        row
        for subject in subjects(told)
        for row in of_model(subject, {d: planned[d] for d in domains}, {d: judged[d] for d in domains}, told, cells)
    ]
    cells.keep(f"findings{told.mark}", found)
    publish({f"paper-calibration{told.mark}": pages(found, domains, told)}, told.write)
    if told.plot:
        draw(found, told.plot)


if __name__ == "__main__":
    main()
