"""The parts of `bench.py`: which script each runs, how small and how large, and how its JSON becomes figures with a spread."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a part.

    Attributes:
        name: what it is of.
        value: the middle.
        low, high: its spread, of the kind that the part names; equal to the value where there is one measurement.
        unit: "x" for ratios, "s" for seconds, "%" for changes, "" for others.
        column: of the part's table, where it has several.
    """

    name: str
    value: float
    low: float
    high: float
    unit: str = "x"
    column: str = ""


@dataclass(frozen=True, slots=True)
class Part:
    """One script, run as a process of its own.

    Attributes:
        name: of the part and of its file.
        title: heading on the page.
        words: script and options; FILE, DIR and DATA are replaced by the part's file, its directory and --data.
        small: options that make a run of seconds of it, to try out the frame.
        seconds: limit of the run.
        read: the script's JSON to figures.
        spread: what low and high are.
        threads: of numpy and torch.
        result: file in DIR that holds the JSON, for scripts that are given a directory; else FILE, or what is printed.
        text: "needed" where there is nothing to run without --data; "taken" where other text is found without it.
    """

    name: str
    title: str
    words: tuple[str, ...]
    small: tuple[str, ...]
    seconds: int
    read: Callable[[Any], list[Figure]]
    spread: str
    threads: int = 1
    result: str | None = None
    text: str | None = None


def _over(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and greatest."""
    return statistics.median(values), min(values), max(values)


def recorder(found: Any) -> list[Figure]:
    """Time with the recorder over time without."""
    figures = []
    for clock in ("processor", "wall"):
        low, high = found[clock]["overhead_quartiles"]
        figures.append(Figure(f"recorded / not, {clock} time", 1 + found[clock]["overhead"], 1 + low, 1 + high))
    return figures


def placement(found: Any) -> list[Figure]:
    """Other implementations of the published algorithm over ours, and whole plans."""
    rows = [row for row in found if row["clock"] == "processor"]
    figures = [
        Figure(f"{row['contender']} / ours", *_over(row["ratios"]))
        for row in rows
        if "ratios" in row and row["contender"] != "equipoise"
    ]
    whole = [row for row in rows if "ratios" not in row]
    return figures + [Figure(row["contender"], row["seconds"], row["seconds"], row["seconds"], "s") for row in whole]


def planning(found: Any) -> list[Figure]:
    """Time over the plain greedy rule's, and the balance that it bought."""
    figures = []
    for row in found["rows"]:
        if row["planner"] != "eplb (plain numpy)":
            figures.append(Figure(f"{row['planner']} / EPLB's rule, time", *_over(row["ratios"])))
        figures.append(Figure(f"{row['planner']}, LIS held out", row["held_out"], row["held_out"], row["held_out"], ""))
    return figures


def execution(found: Any) -> list[Figure]:
    """Speed of one layer's experts over transformers' grouped_mm in the same dtype."""
    return [
        Figure(
            f"{row['contender']}, {row['dtype']}", row["speed"], row["speed_low"], row["speed_high"],
            column=f"{row['tokens']} tokens",
        )
        for row in found["figures"]
    ]  # fmt: skip


def expert_parallel(found: Any) -> list[Figure]:
    """Time of a layer over ranks, over that of contiguous placement."""
    return [
        Figure(
            f"{row['contender']} / contiguous", row["ratio"], row["ratio_q1"], row["ratio_q3"],
            column=f"{row['ranks']} ranks, {row['case']}, {row['phase']}",
        )
        for row in found["rows"]
        if row["contender"] != "contiguous"
    ]  # fmt: skip


def out_of_sample(found: Any) -> list[Figure]:
    """Balancedness on held-out traffic, `robust` over `eplb`, and over no plan."""
    figures = []
    for name, other in (("eplb", "eplb"), ("contiguous", "contiguous")):
        ratios = [list(row["robust"].values())[-1] / row[other] for row in found["rows"]]
        figures.append(Figure(f"balancedness of robust / {name}, {len(ratios)} settings", *_over(ratios)))
    return figures


def quantization(found: Any) -> list[Figure]:
    """Change of perplexity with its interval, and the KL of rounding on text over that of rounding to nearest."""
    figures = []
    for model, by_width in found.items():
        for width, variants in by_width.items():
            nearest = statistics.mean(variants["rtn/none"]["kl_by_seed"])
            for variant, row in variants.items():
                change = row["change"]
                percent = [100 * change[key] for key in ("value", "low", "high")]
                name = f"{model}, {width}, {variant}"
                figures.append(Figure(name, *percent, "%", "perplexity"))
                if variant != "rtn/none":
                    ratios = [kl / nearest for kl in row["kl_by_seed"]]
                    figures.append(Figure(name, *_over(ratios), column="KL / rtn's"))
    return figures


def formats(found: Any) -> list[Figure]:
    """Time to read one stored matrix over that of int8."""
    return [
        Figure(f"{name} / int8", row["ratio"], *row["middle_half"]) for name, row in found["rows"].items() if name != "int8"
    ]


def peers(found: Any) -> list[Figure]:
    """The script's own page has them."""
    return []


def balance(found: Any) -> list[Figure]:
    """LIS without and with each plan, and the change of perplexity."""
    figures = []
    for model, told in found.items():
        for contender in told["contenders"]:
            text = contender["texts"][-1]
            name = f"{model}, {contender['name']}"
            figures.append(Figure(name, *[text["lis"] / text["lis_base"]] * 3, column="LIS / raw"))
            change = [100 * text["perplexity_change"][key] for key in ("value", "low", "high")]
            figures.append(Figure(name, *change, "%", "perplexity"))
    return figures


def growth(found: Any) -> list[Figure]:
    """Seconds at the largest size of every axis that a contender reached, over its baseline's."""
    largest: dict[tuple[str, str], Any] = {}
    for point in found["points"]:
        key = (point["axis"], point["contender"])
        if key not in largest or point["size"] > largest[key]["size"]:
            largest[key] = point
    return [
        Figure(f"{axis} {point['size']:,}: {name}", point["seconds"], point["least"], point["greatest"], "s")
        for (axis, name), point in largest.items()
    ]


TINY_LAYER = ("--width", "64", "--inner", "128", "--experts", "8", "--top-k", "2", "--rounds", "2", "--tokens", "4")
TINY_RANKS = ("--layers", "4", "--experts", "32", "--slots", "40", "--ranks", "8", "--scenarios", "4", "--turns", "3")
QUARTILES, LIMITS, RANGE = "middle half of the rounds", "least..greatest", "95 % interval, or least..greatest over seeds"

PARTS: tuple[Part, ...] = (
    Part(
        "recorder", "Recording", ("recorder_overhead.py", "--json"),
        ("--rounds", "3", "--tokens", "32"), 180, recorder, QUARTILES,
    ),
    Part(
        "placement", "Placement: the published algorithm", ("placement_speed.py", "--json", "FILE"),
        TINY_RANKS, 180, placement, LIMITS,
    ),
    Part(
        "planning", "Joint plans", ("planning.py", "--json", "FILE"),
        ("--layers", "4", "--experts", "32", "--windows", "8"), 120, planning, LIMITS,
    ),
    Part(
        "execution", "Experts of one layer, speed over transformers' grouped_mm",
        ("execution.py", "--tokens", "1", "16", "256", "--rounds", "7", "--json", "FILE"),
        TINY_LAYER, 300, execution, QUARTILES,
    ),
    Part(
        "formats", "Reading stored experts", ("formats.py", "--json"),
        ("--rows", "64", "--columns", "128", "--turns", "5"), 90, formats, QUARTILES,
    ),
    Part(
        "expert-parallel", "One layer over ranks", (
            "expert_parallel.py", "--cases", "natural", "0.5:4", "--rounds", "15", "--out", "FILE", "--data", "DATA",
        ),
        ("--rounds", "2", "--ranks", "2", "--prefill", "256", "--decode", "16", "--cases", "0:0", "0.8:4"),
        300, expert_parallel, QUARTILES, text="taken",
    ),
    Part(
        "out-of-sample", "Placement on traffic that was not planned from",
        (
            "placement_out_of_sample.py", "--traces", "gpt-oss", "--kinds", "collection", "--ranks", "8",
            "--json", "FILE", "--data", "DATA",
        ),
        ("--redundant", "0", "--inputs", "domains"), 240, out_of_sample, LIMITS, text="needed",
    ),
    Part(
        "quantization", "Rounding",
        (
            "quantization.py", "--models", "mixtral-8", "--methods", "rtn", "gptq", "--widths", "int4", "int2", "--seeds", "3",
            "--tokens", "4096", "--heldout-tokens", "512", "--out", "DIR", "--data", "DATA",
        ),
        ("--seeds", "1", "--tokens", "1024", "--widths", "int2"),
        300, quantization, RANGE, 2, "quantization.json", "taken",
    ),
    Part(
        "peers", "Rounding beside other tools, those whose environments `make peers` has made",
        (
            "quantization_peers.py", "--models", "mixtral-8", "--widths", "int4-g32", "int3-g32", "--seeds", "1",
            "--out", "DIR", "--data", "DATA",
        ),
        ("--widths", "int4-g32", "--tokens", "2048", "--heldout-tokens", "512"), 600, peers, RANGE, 1, "peers.json", "taken",
    ),
    Part(
        "balance", "The main job, end to end",
        ("shelf.py", "--models", "mixtral-8", "qwen3-32", "--tokens", "1024", "--out", "DIR", "--data", "DATA"),
        ("--models", "mixtral-8", "--tokens", "256"), 420, balance, RANGE, 2, "shelf.json", "taken",
    ),
    Part("growth", "How cost grows", ("growth.py", "--json", "FILE"), ("--small", "--turns", "1"), 420, growth, LIMITS),
)  # fmt: skip
"""All parts, in the order in which they run."""


def parsed(part: Part, file: Path, directory: Path, printed: str) -> Any:
    """The JSON that a script left: in its file, in its directory, or on its standard output."""
    if part.result is not None:
        return json.loads((directory / part.result).read_text())
    return json.loads(file.read_text() if "FILE" in part.words else printed)
