"""The tables of `quantization.py`: what it found, pooled over domains, as Markdown.

Shapes: G documents of all domains (the independent units of intervals), S seeds of the calibration sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.artifacts.evaluation import Interval
from equipoise.artifacts.files import write_atomic
from equipoise.evaluation import statistics

Floats = NDArray[np.float64]
PLACES = {"in-domain": "in-domain", "other-domain": "other-domain", "self": "self (EBSS)"}
"""Where calibration text may come from, seen from the judged domain -> its name on the page."""
QUESTIONS = (
    ("GPTQ, in-domain, against RTN", ("gptq", "in-domain"), ("rtn", "none")),
    ("GPTQ, self-sampled, against RTN", ("gptq", "self"), ("rtn", "none")),
    ("AGQ against GPTQ, in-domain", ("agq", "in-domain"), ("gptq", "in-domain")),
    ("AGQ against GPTQ, other-domain", ("agq", "other-domain"), ("gptq", "other-domain")),
    ("AGQ against GPTQ, self-sampled", ("agq", "self"), ("gptq", "self")),
    ("self-sampled against in-domain, GPTQ", ("gptq", "self"), ("gptq", "in-domain")),
    ("self-sampled against other-domain, GPTQ", ("gptq", "self"), ("gptq", "other-domain")),
    ("in-domain against other-domain, GPTQ", ("gptq", "in-domain"), ("gptq", "other-domain")),
)
"""Paired comparisons: title, the one that is judged, the one it is judged against."""

Variant = tuple[str, str]
"""A method and where its calibration text came from: a key of `PLACES`, or "none"."""


@dataclass(frozen=True)
class Pooled:
    """Sums per document, over all domains: tokens_G, base_G and, for each seed, nll_SG and kl_SG."""

    tokens_G: Floats
    base_G: Floats
    nll_SG: Floats
    kl_SG: Floats

    def change(self) -> Interval:
        """Change of perplexity to the original: mean over seeds, 95 % interval over documents."""
        return statistics.perplexity_change(self.base_G, self.nll_SG.mean(0), self.tokens_G)

    def changes(self) -> Floats:
        """[S] change of perplexity with each seed's calibration sample."""
        return np.expm1((self.nll_SG.sum(1) - self.base_G.sum()) / self.tokens_G.sum())

    def kl(self) -> Floats:
        """[S] nats per token, KL(original || rounded)."""
        per_token: Floats = self.kl_SG.sum(1) / self.tokens_G.sum()
        return per_token

    def against(self, other: Pooled) -> tuple[Interval, bool]:
        """Change of perplexity from another variant to this one, and whether it is beyond both kinds of chance.

        Beyond chance: the interval over documents leaves 0 out, and every seed differs in the same direction.
        """
        interval = statistics.perplexity_change(other.nll_SG.mean(0), self.nll_SG.mean(0), self.tokens_G)
        seeds = self.nll_SG.sum(1) - other.nll_SG.sum(1)  # one row against several is compared with each
        return interval, bool((interval.low > 0 and (seeds > 0).all()) or (interval.high < 0 and (seeds < 0).all()))


@dataclass
class Page:
    """What was found so far, model by model."""

    methods: Sequence[str]
    widths: Sequence[str]
    found: dict[str, dict[str, dict[Variant, Pooled]]] = field(default_factory=dict)

    def add(self, model: str, cells: Mapping[Any, Mapping[str, Any]], half_of: Callable[[str], str]) -> Iterator[str]:
        """Take in a model's cells, and tell its rows.

        Args:
            model: its name.
            cells: what `quantization.run` returned.
            half_of: the half of the domains that a domain belongs to.
        """
        self.found[model] = {width: pool(cells, width, half_of) for width in self.widths}
        yield from (self._row(model, width, self._change) for width in self.widths)

    @property
    def variants(self) -> list[Variant]:
        """Columns, in order."""
        measured = next(iter(next(iter(self.found.values())).values()))
        return [(method, place) for method in self.methods for place in ("none", *PLACES) if (method, place) in measured]

    @property
    def figures(self) -> dict[str, Any]:
        """Everything on the page, by model, width and variant, for a machine to read."""
        return {
            model: {
                width: {
                    f"{method}/{place}": {
                        "change": pooled.change().model_dump(),
                        "change_by_seed": pooled.changes().tolist(),
                        "kl_by_seed": pooled.kl().tolist(),
                    }
                    for (method, place), pooled in variants.items()
                }
                for width, variants in by_width.items()
            }
            for model, by_width in self.found.items()
        }

    def text(self, foot: str) -> str:
        """The page: perplexity, KL, and the paired comparisons."""
        columns = [method if place == "none" else f"{method}, {PLACES[place]}" for method, place in self.variants]
        head = [f"| model | width | {' | '.join(columns)} |", f"|---|---|{'---:|' * len(columns)}"]
        rows = [(model, width) for model in self.found for width in self.widths]
        return "\n".join(
            [
                "Change of perplexity in %, mean over seeds (95 % interval over documents):",
                "",
                *head,
                *(self._row(*row, self._change) for row in rows),
                "",
                "KL to the original, nats per token, mean over seeds ± their standard deviation:",
                "",
                *head,
                *(self._row(*row, self._kl) for row in rows),
                "",
                "Paired on the same documents: change of perplexity in % (95 % interval), and ratio of the KLs. Bold where the",
                "interval leaves 0 out and all seeds agree in sign; negative, and a ratio below 1, where the first is better:",
                "",
                f"| model | {' | '.join(self.widths)} |",
                f"|---|{'---:|' * len(self.widths)}",
                *(line for question in QUESTIONS for line in self._question(*question)),
                "",
                foot,
            ]
        )

    def _row(self, model: str, width: str, told: Callable[[Pooled], str]) -> str:
        variants = self.found[model][width]
        return f"| `{model}` | {width} | {' | '.join(told(variants[variant]) for variant in self.variants)} |"

    @staticmethod
    def _change(pooled: Pooled) -> str:
        return percent(pooled.change())

    @staticmethod
    def _kl(pooled: Pooled) -> str:
        kl = pooled.kl()
        spread = f" ± {kl.std(ddof=1):.1g}" if len(kl) > 1 else ""
        return f"{kl.mean():.2g}{spread}" if kl.mean() < 0.1 else f"{kl.mean():.3f}{spread}"

    def _question(self, title: str, judged: Variant, other: Variant) -> Iterator[str]:
        if judged not in self.variants or other not in self.variants:
            return
        better = worse = 0
        lines = []
        for model, by_width in self.found.items():
            told = []
            for width in self.widths:
                interval, sure = by_width[width][judged].against(by_width[width][other])
                ratio = by_width[width][judged].kl().mean() / by_width[width][other].kl().mean()
                change = f"**{percent(interval)}**" if sure else percent(interval)
                told.append(f"{change}, {ratio:.2f}")
                better, worse = better + (sure and interval.value < 0), worse + (sure and interval.value > 0)
            lines.append(f"| `{model}` | {' | '.join(told)} |")
        total = len(self.found) * len(self.widths)
        empty = " |" * len(self.widths)
        yield f"| **{title}**: better {better}, worse {worse}, not told apart {total - better - worse} of {total} |{empty}"
        yield from lines


def pool(cells: Mapping[Any, Mapping[str, Any]], width: str, half_of: Callable[[str], str]) -> dict[Variant, Pooled]:
    """Join the domains of one width: each under the calibration that stands where the variant says."""
    parts: dict[Variant, dict[int, dict[str, Floats]]] = {}
    for cell, kept in cells.items():
        for domain, sums in kept["sums"][width].items():
            place = cell.text
            if place not in ("none", "self"):
                place = "in-domain" if place == half_of(domain) else "other-domain"
            by_seed = parts.setdefault((cell.method, place), {})
            by_seed.setdefault(cell.seed, {})[domain] = by_document(sums, kept["documents"][domain])
    pooled = {}
    for variant, by_seed in parts.items():
        # Variants meet their domains in different orders; pairing needs the same.
        seeds = [np.concatenate([domains[name] for name in sorted(domains)], axis=1) for domains in by_seed.values()]
        pooled[variant] = Pooled(
            seeds[0][0], seeds[0][1], np.stack([seed[2] for seed in seeds]), np.stack([seed[3] for seed in seeds])
        )
    return pooled


def by_document(sums: Mapping[str, Sequence[float]], documents: Sequence[int]) -> Floats:
    """One text's sums over rows as [4, G] tokens, loss of the base, loss and KL of each document."""
    used = np.asarray(sums["tokens"]) > 0
    cluster = statistics.clusters(np.asarray(documents)[used])
    columns = [np.asarray(sums[name])[used] for name in ("tokens", "nll_base", "nll", "kl")]
    return np.stack([np.bincount(cluster, column) for column in columns])


def write_between(path: Path, mark: str, text: str) -> None:
    """Replace what stands between a file's `<!-- MARK: begin -->` and `<!-- MARK: end -->`."""
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{path} has no '{begin}' and '{end}' to write between")
    write_atomic(path, f"{before}{begin}\n{text}\n{end}{after}")


def percent(interval: Interval) -> str:
    """An interval of relative changes, in percent."""
    digits = 2 if abs(interval.value) < 0.1 else 1 if abs(interval.value) < 1 else 0
    value, low, high = (f"{100 * x:+.{digits}f}" for x in (interval.value, interval.low, interval.high))
    return f"{value} ({low}..{high})"
