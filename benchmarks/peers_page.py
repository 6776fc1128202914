"""The tables of `quantization_peers.py`: what each tool made, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantization_page import Pooled, percent

NAMES = {
    "equipoise": "Equipoise",
    "llmcompressor": "llm-compressor",
    "gptqmodel": "GPTQModel",
    "torchao": "torchao",
    "hqq": "HQQ",
}
SAME = 0.05
"""Relative distance of logits up to which a fresh process counts as having loaded the weights; see `quantization_peers`."""


@dataclass(frozen=True)
class Entry:
    """One tool and method on one model at one width.

    Attributes:
        results: of each seed, what the jobs "quantize" and "read" wrote.
        judged: its quality; None where there is nothing to judge.
        distances: of each seed, the fresh process's logits from those expected; None where it gave none.
    """

    model: str
    width: str
    tool: str
    method: str
    results: Sequence[Mapping[str, Any]]
    judged: Pooled | None
    distances: Sequence[float | None]

    @property
    def title(self) -> str:
        """Tool and method."""
        return f"{NAMES[self.tool]} {self.method}"

    @property
    def error(self) -> str | None:
        """Why nothing was made, in the tool's own words."""
        return next((result["quantize"]["error"] for result in self.results if "error" in result["quantize"]), None)

    def reload(self) -> str:
        """What a fresh process made of the checkpoint."""
        reads = [result.get("read", {}) for result in self.results]
        told = next((read["error"] for read in reads if "error" in read), None)
        if told is not None:
            return f"**fails**: {told[:80]}"
        if any("matrices" in read for read in reads):
            return "no checkpoint: rounded matrix by matrix"
        missing, unexpected = (max(read.get(name, 0) for read in reads) for name in ("missing", "unexpected"))
        known = [distance for distance in self.distances if distance is not None]
        if missing or unexpected or any(distance > SAME for distance in known):
            return f"**no**: {missing} tensors missing, {unexpected} unexpected" + (
                f", logits {max(known):.1f} away" if known else ""
            )
        only = next((f" with `{read['only']}` alone" for read in reads if "only" in read), "")
        return f"yes{only}, logits {max(known):.3f} away" if known else f"yes{only}"


def page(entries: Sequence[Entry], tokens: int, seeds: int) -> str:
    """All models: quality and reloading, then cost."""
    versions = sorted({
        f"{name} {version}"
        for entry in entries
        for result in entry.results
        for name, version in result["quantize"].get("versions", {}).items()
    })  # fmt: skip
    return "\n".join(
        [
            "| model | width | tool, method | perplexity, % | KL, nats | our `gptq` beside it, % | fresh process loads it |",
            "|---|---|---|---:|---:|---:|---|",
            *(line for entry in entries if entry.judged or entry.error for line in _quality(entry, entries)),
            "",
            "| model | width | tool, method | expert bytes, MB | of Equipoise's | processor s | wall s | peak memory, MB |",
            "|---|---|---|---:|---:|---:|---:|---:|",
            *(line for entry in entries if not entry.error for line in _cost(entry, entries)),
            "",
            f"{tokens:,} calibration tokens, {seeds} seeds; times are medians (low..high), loading not counted.",
            "Perplexity: change to the original, mean over seeds (95 % interval over documents). Beside it: change of",
            "perplexity from that row to Equipoise's `gptq`, paired: negative where Equipoise is better, bold where the",
            "interval leaves 0 out and all seeds agree.",
            f"Versions: {', '.join(versions)}.",
        ]
    )


def _quality(entry: Entry, entries: Sequence[Entry]) -> Iterator[str]:
    start = f"| `{entry.model}` | {entry.width} | {entry.title} |"
    if entry.judged is None:
        yield f"{start} {(entry.error or '')[:100]} | | | |"
        return
    ours = _of(entries, entry, "equipoise", "gptq").judged
    beside = ""
    if entry.title != "Equipoise gptq" and ours is not None:
        interval, sure = ours.against(entry.judged)
        beside = f"**{percent(interval)}**" if sure else percent(interval)
    yield f"{start} {percent(entry.judged.change())} | {entry.judged.kl().mean():.2g} | {beside} | {entry.reload()} |"


def _cost(entry: Entry, entries: Sequence[Entry]) -> Iterator[str]:
    made = [result["quantize"] for result in entry.results]
    sizes = [result["read"]["expert_bytes"] for result in entry.results if "expert_bytes" in result.get("read", {})]
    ours = [
        r["read"]["expert_bytes"]
        for r in _of(entries, entry, "equipoise", "rtn").results
        if "expert_bytes" in r.get("read", {})
    ]
    size = f"{max(sizes) / 1e6:.3f} | {max(sizes) / max(ours):.3f}" if sizes and ours else " | "
    times = []
    for clock in ("processor", "wall"):
        seconds = [sum(one[clock][part] for part in one[clock] if part != "load") for one in made]
        spread = f" ({min(seconds):.1f}..{max(seconds):.1f})" if len(seconds) > 1 else ""
        times.append(f"{statistics.median(seconds):.1f}{spread}")
    peaks = [one["peak_memory_mb"] for one in made if "peak_memory_mb" in one]
    peak = f"{statistics.median(peaks):.0f}" if peaks else ""
    yield f"| `{entry.model}` | {entry.width} | {entry.title} | {size} | {' | '.join(times)} | {peak} |"


def _of(entries: Sequence[Entry], beside: Entry, tool: str, method: str) -> Entry:
    place = (beside.model, beside.width, tool, method)
    return next(entry for entry in entries if (entry.model, entry.width, entry.tool, entry.method) == place)
