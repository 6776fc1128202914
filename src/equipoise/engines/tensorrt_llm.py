"""TensorRT-LLM: its expert statistics directories, and the YAML of its MoE load balancer.

Shapes: N recorded layers, E logical experts, P physical slots.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load as parse_tensors

from equipoise.artifacts import ModelFacts, Plan
from equipoise.artifacts.files import write_atomic
from equipoise.engines.model_config import MAX_EXPERTS, MAX_LAYERS
from equipoise.engines.placement import Written, checked_slots, physical_slots, transformer_layers
from equipoise.engines.records import Ints, Recording, as_counts, merged
from equipoise.engines.untrusted import read_json, read_text, refuse, size_of
from equipoise.errors import PlanError, ProfileError, missing_package

RANK_FILE = re.compile(r"rank(\d{1,6})\.safetensors")
TENSOR_KEY = re.compile(r"(\d{1,12})_(\d{1,6})")
YAML_KEYS = {"num_slots", "initial_global_assignments", "layer_updates_per_iter"}


def read(paths: Sequence[Path]) -> list[Recording]:
    """Read directories of EXPERT_STATISTIC_PATH: `meta_info.json` and one `rank<r>.safetensors` per rank.

    Args:
        paths: directories; each is one scenario, its iterations are its windows.

    Raises:
        ProfileError: files, ranks, iterations or layers that are missing, or counts that do not fit `meta_info.json`.
    """
    return [_directory(path) for path in paths]


def _directory(path: Path) -> Recording:
    if not path.is_dir():
        raise ProfileError(f"'{path}' is not a directory; give the one that EXPERT_STATISTIC_PATH named.")
    experts, top_k = _meta(path / "meta_info.json")
    files = {int(m[1]): f for f in path.iterdir() if (m := RANK_FILE.fullmatch(f.name))}
    if sorted(files) != list(range(len(files))) or not files:
        raise ProfileError(f"'{path}' has statistics of ranks {sorted(files)}; every rank from 0 writes rank<r>.safetensors.")
    cells: dict[tuple[int, int], Ints] = {}
    for file in (files[rank] for rank in sorted(files)):
        for key, counts in _tensors(file, experts).items():
            cells[key] = cells[key] + counts if key in cells else counts
    if not cells:
        raise ProfileError(f"'{path}' holds no iterations: EXPERT_STATISTIC_ITER_RANGE was never reached.")
    iterations = sorted({i for i, _ in cells})
    layers = sorted({layer for _, layer in cells})
    missing = next(((i, layer) for i in iterations for layer in layers if (i, layer) not in cells), None)
    if missing or iterations[-1] - iterations[0] + 1 != len(iterations):
        gap = (
            f"layer {missing[1]} of iteration {missing[0]}"
            if missing
            else f"iterations between {iterations[0]} and {iterations[-1]}"
        )
        raise ProfileError(f"'{path}' is not whole: {gap} is missing; let the engine finish the range, or record again.")
    steps = np.stack([np.stack([cells[i, layer] for layer in layers]) for i in iterations])
    return Recording(
        name=path.resolve().name,
        counts=steps.sum(0),
        rows=tuple(layers),
        windows=merged(steps),
        top_k=top_k,
        files=tuple(str(files[rank]) for rank in sorted(files)),
    )


def _meta(path: Path) -> tuple[int, int]:
    """Experts and top-k."""
    meta = read_json(path)
    values = []
    for name in ("num_experts", "num_experts_per_token"):
        value = meta.get(name) if isinstance(meta, dict) else None
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_EXPERTS:
            raise ProfileError(f"'{path}': {name} is {value!r}; allowed is a whole number from 1 to {MAX_EXPERTS}.")
        values.append(value)
    return values[0], values[1]


def _tensors(file: Path, experts: int) -> dict[tuple[int, int], Ints]:
    """Counts of one rank by (iteration, layer)."""
    size_of(file)
    try:
        tensors = parse_tensors(file.read_bytes())
    except Exception as error:  # the parser raises its own kind, and others for types that numpy does not have
        refuse(file, error, "a safetensors file")
    cells = {}
    for name, tensor in tensors.items():
        match = TENSOR_KEY.fullmatch(name)
        if match is None or int(match[2]) >= MAX_LAYERS:
            raise ProfileError(f"'{file}' has a tensor '{name[:40]}'; names are <iteration>_<layer>.")
        counts = as_counts(tensor, f"'{file}': {name}", 1)
        if len(counts) != experts:
            raise ProfileError(f"'{file}': {name} counts {len(counts)} experts, meta_info.json has {experts}.")
        cells[int(match[1]), int(match[2])] = counts
    return cells


def _yaml() -> Any:
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as error:
        raise missing_package("TensorRT-LLM's configuration needs", "pyyaml") from error
    return yaml


def write(plan: Plan, out: Path, *, config: Path | None = None) -> Written:
    """Write the load balancer's YAML: `num_slots`, `initial_global_assignments` by transformer layer, and no updates.

    Args:
        plan: a plan with equally many slots everywhere.
        out: the file.
        config: the model's config.json, for a plan that does not know its dense layers.

    Raises:
        PlanError: TensorRT-LLM cannot hold the plan.
    """
    physical = physical_slots(plan, "tensorrt-llm")
    layers, _ = transformer_layers(plan.model, "tensorrt-llm", config)
    content = {
        "num_slots": len(physical[0]),
        "initial_global_assignments": {layer: row.tolist() for layer, row in zip(layers, physical, strict=True)},
        "layer_updates_per_iter": 0,
    }
    # Leaf lists on one line each: one line per layer.
    write_atomic(out, _yaml().safe_dump(content, default_flow_style=None, width=float("inf"), sort_keys=False))
    flags = (
        "# in the YAML of the LLM API; without attention data parallelism the balancer is silently ignored\n"
        f"enable_attention_dp: true\nmoe_expert_parallel_size: {plan.units}\n"
        f"moe_config:\n  backend: WIDEEP\n  load_balancer: {out}"
    )
    return Written((out,), flags)


def read_plan(path: Path, model: ModelFacts, ranks: int, *, config: Path | None = None) -> list[Ints]:
    """The physical slots of each MoE layer from a load balancer's YAML.

    Args:
        path: the file.
        model: facts of the model that it is for.
        ranks: R.
        config: the model's config.json, when the facts do not know the dense layers.

    Raises:
        PlanError: what TensorRT-LLM would refuse: other keys, a MoE layer without assignments, or of another length.
    """
    yaml = _yaml()
    try:
        content = yaml.load(read_text(path), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: dates and numbers out of range
        refuse(path, error, "a YAML file")
    what = f"'{path}'"
    if not isinstance(content, dict) or not isinstance(content.get("initial_global_assignments"), dict):
        raise PlanError(f"{what} has no initial_global_assignments by layer; it is not a plan for TensorRT-LLM.")
    unknown = sorted(map(str, set(content) - YAML_KEYS))
    if unknown:
        raise PlanError(f"{what} has fields that TensorRT-LLM's load balancer does not have: {', '.join(unknown[:4])}.")
    assignments, number = content["initial_global_assignments"], content.get("num_slots")
    layers, _ = transformer_layers(model, "tensorrt-llm", config)
    absent = [layer for layer in layers if layer not in assignments]
    if absent or len(assignments) != len(layers):
        raise PlanError(
            f"{what} has assignments of {len(assignments)} layers, the model has {len(layers)} (absent: {absent[:4]})."
        )
    rows = [assignments[layer] for layer in layers]
    for layer, row in zip(layers, rows, strict=True):
        if not isinstance(row, list) or len(row) != number:
            raise PlanError(f"{what}: layer {layer} does not have num_slots = {number!r} slots.")
    return checked_slots(rows, model, ranks, what)
