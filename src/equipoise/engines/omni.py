"""omni-infer: its CSV of activation counts, and its placement pattern.

Shapes: R ranks, L MoE layers, E logical experts, P physical slots of a layer.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from equipoise.artifacts import ModelFacts, Plan
from equipoise.artifacts.files import write_atomic
from equipoise.artifacts.profile import PHASES
from equipoise.engines.model_config import MAX_EXPERTS, MAX_LAYERS
from equipoise.engines.placement import Written, checked_slots, physical_slots
from equipoise.engines.records import Ints, Recording, as_counts
from equipoise.engines.untrusted import npy_bytes, read_npy, refuse, size_of
from equipoise.errors import PlanError, ProfileError


def read(paths: Sequence[Path]) -> list[Recording]:
    """Read CSV files of counts: a header `layer, ep_0 ... ep_{E-1}` and one line `layer_<i>, counts` per MoE layer.

    A name that ends in `_prefill` or `_decode`, as omni-infer gives them, tells the phase. The counts are of 128 selections
    each, rounded up, so light experts look heavier than they are.

    Args:
        paths: files; each is one scenario.

    Raises:
        ProfileError: damaged, lines of different length, or layers out of order.
    """
    return [_csv(path) for path in paths]


def _csv(path: Path) -> Recording:
    size_of(path, 8 * MAX_LAYERS * MAX_EXPERTS)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file) if line]
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        refuse(path, error, "a CSV table")
    if lines and not lines[0][-1].strip().isdigit():
        lines = lines[1:]  # the header
    if not lines or len(lines) > MAX_LAYERS:
        raise ProfileError(f"'{path}' has {len(lines)} layers; from 1 to {MAX_LAYERS} are read.")
    rows: list[list[int]] = []
    for index, line in enumerate(lines):
        if line[0].strip() != f"layer_{index}":
            raise ProfileError(
                f"'{path}': line {index + 1} is of {line[0][:20]!r}, layer_{index} is expected; the file is not whole."
            )
        if (
            len(line) != len(lines[0])
            or len(line) > MAX_EXPERTS
            or not all(c.strip().isdigit() and len(c) < 20 for c in line[1:])
        ):
            raise ProfileError(f"'{path}': layer {index} does not have {len(lines[0]) - 1} whole numbers, as layer 0 has.")
        rows.append([int(c) for c in line[1:]])
    counts = as_counts(rows, f"'{path}'", 2)
    phase = path.stem.rpartition("_")[2]
    if phase in PHASES:
        both = np.zeros((2, *counts.shape), np.int64)
        both[PHASES.index(phase)] = counts
        counts = both
    return Recording(name=path.stem, counts=counts, rows="moe", files=(str(path),))


def write(plan: Plan, out: Path) -> Written:
    """Write the placement pattern: int32 [ranks, MoE layers, experts], 1 where a rank holds the expert.

    Layers may differ in their slots. Within a rank, omni-infer orders slots by expert.

    Args:
        plan: a plan without duplicates, with equally many slots on each rank of a layer.
        out: the file; its name must end in .npy.

    Raises:
        PlanError: omni-infer cannot hold the plan, or the ending is another.
    """
    if out.suffix != ".npy":
        raise PlanError(f"'{out}': omni-infer takes a placement pattern whose name ends in .npy.")
    physical = physical_slots(plan, "omni", per_layer=True, duplicates=False)
    pattern = np.zeros((plan.units, len(physical), plan.model.max_experts), np.int32)
    for layer, slots in enumerate(physical):
        pattern[np.repeat(np.arange(plan.units), len(slots) // plan.units), layer, slots] = 1
    write_atomic(out, npy_bytes(pattern))
    settings = {"pattern_path": str(out), "max_moe_layer_num": len(physical), "enable_dynamic": False}
    most, fewest = max(map(len, physical)), min(map(len, physical))
    return Written(
        (out,),
        f"--enable-eplb --additional-config '{json.dumps({'omni_placement_config': settings})}'\n"
        f"# {fewest} to {most} slots per layer, {fewest // plan.units} to {most // plan.units} on a rank",
    )


def read_plan(path: Path, model: ModelFacts, ranks: int) -> list[Ints]:
    """The physical slots of each MoE layer from a placement pattern, by expert within a rank.

    Args:
        path: the file.
        model: facts of the model that it is for.
        ranks: R.

    Raises:
        PlanError: what omni-infer would refuse: values that are not 0 or 1, an expert nowhere, or ranks with different numbers
            of experts in a layer.
    """
    pattern, what = read_npy(path), f"'{path}'"
    if pattern.ndim != 3 or pattern.dtype.kind not in "biu":
        raise PlanError(
            f"{what} has shape {pattern.shape} and dtype {pattern.dtype}; whole numbers [ranks, layers, experts] are expected."
        )
    if pattern.shape != (ranks, len(model.layers), model.max_experts):
        raise PlanError(
            f"{what} is for [ranks, MoE layers, experts] = {pattern.shape}; "
            f"{(ranks, len(model.layers), model.max_experts)} is expected."
        )
    if not np.isin(pattern, (0, 1)).all():
        raise PlanError(f"{what} holds other values than 0 and 1.")
    held = pattern.astype(np.int64).sum(2)  # [R, L]
    uneven = np.flatnonzero((held != held[0]).any(0))
    if len(uneven):
        raise PlanError(
            f"{what}: layer {uneven[0]} gives its ranks {held[:, uneven[0]].min()} to {held[:, uneven[0]].max()} experts."
        )
    return checked_slots([np.nonzero(pattern[:, layer])[1] for layer in range(pattern.shape[1])], model, ranks, what)
