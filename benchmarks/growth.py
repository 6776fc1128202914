"""How cost grows with experts, layers, scenarios, ranks and tokens, up to 512 experts on 1,024 ranks, beside simple baselines.

    OMP_NUM_THREADS=1 python benchmarks/growth.py --json growth.json

One axis at a time, the others at their base. Within a turn every contender runs once at every size; a figure is the median over
the turns of processor seconds, with the least and the greatest, and a ratio is to the axis's baseline within the same turn.
`power` is the slope of seconds over size, both as logarithms: 1 is linear. A contender that took longer than --limit is not
run at larger sizes, and the table says so. Loads are synthetic (log-normal experts, Poisson counts); the model of the axis
`tokens` is random.
Shapes: S scenarios, L layers, E experts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from placement_speed import loads, place, profile_of

from equipoise.artifacts import Profile
from equipoise.artifacts.files import write_atomic
from equipoise.planning.methods import make_plan
from equipoise.simulation import simulate
from planning import synthetic

PLACED = {"layers": 4, "experts": 128, "scenarios": 8, "ranks": 16}
"""Base of placements on ranks."""
JOINT = {"layers": 8, "experts": 64, "windows": 16}
"""Base of joint plans (`rq`)."""
PLAIN = "EPLB, plain Python"
Run = Callable[[], object]
Contenders = Mapping[str, Run]


@dataclass(frozen=True, slots=True)
class Point:
    """What one contender took at one size of an axis: processor seconds over the turns, and its ratio to the baseline's."""

    axis: str
    contender: str
    size: int
    seconds: float
    least: float
    greatest: float
    ratio: float | None
    ratio_least: float | None
    ratio_greatest: float | None


def slots_of(experts: int, ranks: int) -> int:
    """Slots of a layer: all experts and one redundant slot a rank; one slot a rank where ranks outnumber experts."""
    return ranks * (-(-experts // ranks) + (ranks <= experts))


def placements(size: Mapping[str, int]) -> Contenders:
    """Whole plans, validated and with forecasts, beside the published algorithm one slot at a time, without any of that."""
    load_SLE = loads(size["layers"], size["experts"], size["scenarios"], seed=0)
    profile, slots = profile_of(load_SLE), slots_of(size["experts"], size["ranks"])
    whole = {
        method: partial(make_plan, profile, method, units=size["ranks"], slots=slots)
        for method in ("contiguous", "eplb", "robust")
    }
    return {PLAIN: lambda: place(load_SLE.sum(0).tolist(), slots, size["ranks"]), **whole}


def joint(size: Mapping[str, int]) -> Contenders:
    """Bits, copies and units together, beside every expert once in one precision, with the same forecasts."""
    profile, _ = synthetic(size["layers"], size["experts"], size["windows"], seed=0)
    return {"uniform": partial(make_plan, profile, "uniform"), "rq": partial(make_plan, profile, "rq")}


def recording(tokens: int) -> Contenders:
    """A forward pass of so many tokens, without and with the recorder."""
    import torch
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    from equipoise.models.recorder import record

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, moe_intermediate_size=64, shared_expert_intermediate_size=64,
        num_experts=64, num_experts_per_tok=4, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    model = Qwen2MoeForCausalLM(config).eval()
    ids = torch.randint(0, 256, (max(1, tokens // 256), min(tokens, 256)))

    def forward(recorded: bool) -> None:
        with torch.inference_mode(), record(model) if recorded else nullcontext():
            model(ids, attention_mask=torch.ones_like(ids))

    return {"forward pass": partial(forward, False), "forward pass, recorded": partial(forward, True)}


def dispatching(tokens: int, profile: Profile) -> Contenders:
    """Two batches of so many tokens sent through a plan, by an even split and by rules that look at the batch."""
    plan = make_plan(profile, "eplb", units=16, slots=slots_of(profile.model.max_experts, 16))
    return {
        rule: partial(simulate, profile, {"eplb": plan}, batch=tokens, batches=2, rule=rule)
        for rule in ("even", "least_loaded", "llep")
    }


def axes(small: bool) -> dict[str, tuple[tuple[int, ...], Callable[[int], Contenders]]]:
    """Axis -> its sizes and the contenders at a size; the first of them is the baseline."""
    cut = 3 if small else None
    drawn = profile_of(loads(4, 128, 8, seed=0))
    return {
        "experts": ((64, 128, 256, 512)[:cut], lambda n: placements(PLACED | {"experts": n})),
        "layers": ((4, 8, 16, 32, 64)[:cut], lambda n: placements(PLACED | {"layers": n})),
        "scenarios": ((2, 8, 32, 128)[:cut], lambda n: placements(PLACED | {"scenarios": n})),
        "ranks, 512 experts": (
            (16, 64, 256, 1024)[:cut],
            lambda n: placements(PLACED | {"experts": 512, "layers": 2, "ranks": n}),
        ),
        "experts, joint plan": ((32, 64, 128, 256, 512)[:cut], lambda n: joint(JOINT | {"experts": n})),
        "layers, joint plan": ((4, 8, 16, 32, 64)[:cut], lambda n: joint(JOINT | {"layers": n})),
        "windows, joint plan": ((4, 16, 64)[:cut], lambda n: joint(JOINT | {"windows": n})),
        "tokens, recorder": ((256, 1024, 4096)[:cut], recording),
        "tokens of a batch, dispatch": ((256, 1024, 4096, 16384)[:cut], lambda n: dispatching(n, drawn)),
    }


def measure(axis: str, sizes: tuple[int, ...], make: Callable[[int], Contenders], turns: int, limit: float) -> list[Point]:
    """All points of an axis; turn by turn, so that what else the machine does hits all sizes and contenders alike."""
    at = {size: make(size) for size in sizes}
    taken: dict[tuple[str, int], list[float]] = {}
    too_long: dict[str, int] = {}
    for _ in range(turns):
        for size, contenders in at.items():
            for name, run in contenders.items():
                if size > too_long.get(name, size):
                    continue
                began = time.process_time()
                run()
                taken.setdefault((name, size), []).append(time.process_time() - began)
                if taken[name, size][-1] > limit:
                    too_long[name] = min(size, too_long.get(name, size))
    points = []
    for (name, size), seconds in taken.items():
        base = taken.get((next(iter(at[size])), size))
        ratios = sorted(mine / other for mine, other in zip(seconds, base, strict=False)) if base else []
        points.append(
            Point(
                axis, name, size, statistics.median(seconds), min(seconds), max(seconds),
                *((statistics.median(ratios), ratios[0], ratios[-1]) if ratios else (None, None, None)),
            )
        )  # fmt: skip
    return points


def power(points: list[Point]) -> float:
    """Slope of log seconds over log size; nan with fewer than two sizes."""
    if len(points) < 2:
        return float("nan")
    return float(np.polyfit(np.log([p.size for p in points]), np.log([max(p.seconds, 1e-9) for p in points]), 1)[0])


def table(axis: str, sizes: tuple[int, ...], points: list[Point]) -> list[str]:
    """One Markdown table: a row for each contender."""
    lines = [f"| {axis} | " + " | ".join(f"{size:,}" for size in sizes) + " | power |", "|---|" + "---:|" * (len(sizes) + 1)]
    for name in dict.fromkeys(point.contender for point in points):
        mine = {point.size: point for point in points if point.contender == name}
        cells = [cell(mine.get(size)) for size in sizes]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {power(list(mine.values())):.2f} |")
    return lines


def cell(point: Point | None) -> str:
    """Seconds with their spread, and the ratio to the baseline."""
    if point is None:
        return "left out"
    ratio = "" if point.ratio is None or point.ratio == 1 else f", x{point.ratio:.3g}"
    return f"{point.seconds:.3g} s ({point.least:.3g}..{point.greatest:.3g}){ratio}"


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--limit", type=float, default=20.0, help="seconds after which a contender is not run at larger sizes")
    parser.add_argument("--only", nargs="*", default=None, help="axes whose name has one of these words in it")
    parser.add_argument("--small", action="store_true", help="the three smallest sizes of every axis")
    parser.add_argument("--json", type=Path, default=None, help="file for the figures")
    given = parser.parse_args()
    found: list[Point] = []
    lines: list[str] = []
    for axis, (sizes, make) in axes(given.small).items():
        if given.only and not any(word in axis for word in given.only):
            continue
        print(axis, file=sys.stderr, flush=True)
        points = measure(axis, sizes, make, given.turns, given.limit)
        found += points
        lines += [*table(axis, sizes, points), ""]
    print("\n".join(lines))
    if given.json:
        content: dict[str, Any] = {"points": [asdict(point) for point in found], "page": "\n".join(lines)}
        write_atomic(given.json, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
