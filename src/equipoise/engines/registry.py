"""The engines by name: who reads whose records, who writes whose plan file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import equipoise.engines.deepseek as deepseek
import equipoise.engines.lmdeploy as lmdeploy
import equipoise.engines.omni as omni
import equipoise.engines.permuted as permuted
import equipoise.engines.sglang as sglang
import equipoise.engines.table as table
import equipoise.engines.tensorrt_llm as tensorrt_llm
import equipoise.engines.vllm as vllm
import equipoise.engines.vllm_ascend as vllm_ascend
from equipoise.artifacts import ModelFacts, Plan, Profile
from equipoise.engines.model_config import ModelConfig, read_config
from equipoise.engines.placement import Written
from equipoise.engines.records import Recording, to_profile
from equipoise.errors import EquipoiseError, ProfileError
from equipoise.registry import Registry

READERS: Registry[Callable[..., list[Recording]]] = Registry("engine to read from")
"""Readers of recorded loads: f(paths, **options) -> one recording per scenario."""

WRITERS: Registry[Callable[..., Written]] = Registry("engine to write for")
"""Writers of plan files: f(plan, out, **options) -> what was written, and the flags to give beside it."""

PLAN_READERS: Registry[Callable[..., list[NDArray[np.int64]]]] = Registry("engine to read a plan of")
"""Readers of plan files: f(path, model facts, ranks, **options) -> physical slots of each MoE layer."""


@READERS.register("vllm", summary="routed_experts of outputs and responses; load statistics", source="vLLM 0.32")
def _read_vllm(paths: Sequence[Path], *, config: ModelConfig | None = None, experts: int | None = None) -> list[Recording]:
    """One recording per file; vLLM's records need to be told how many experts there are."""
    return [replace(vllm.read_vllm(p, p.stem, config=config, experts=experts), files=(str(p),)) for p in paths]


READERS.register("table", summary="counts in a .npz, .csv or .parquet", source="Equipoise")(table.read)
READERS.register("sglang", summary="recorder files: stat, per_pass, per_token", source="SGLang 0.5.23")(sglang.read)
READERS.register("tensorrt-llm", summary="EXPERT_STATISTIC_PATH directories", source="TensorRT-LLM")(tensorrt_llm.read)
READERS.register("omni", summary="CSV of activation counts", source="omni-infer")(omni.read)
READERS.register("lmdeploy", summary="JSON table of loads", source="lmdeploy")(lmdeploy.read)

WRITERS.register("vllm", summary="mapping .jsonl of its proposed option; our plug-in", source="vLLM 41141")(vllm.write_mapping)
WRITERS.register("vllm-permuted", summary="the plan as a checkpoint with experts in another order", source="Equipoise")(
    permuted.write_permuted
)
WRITERS.register("sglang", summary="--init-expert-location .json or .pt", source="SGLang 0.5.23")(sglang.write)
WRITERS.register("tensorrt-llm", summary="YAML of moe_config.load_balancer", source="TensorRT-LLM")(tensorrt_llm.write)
WRITERS.register("vllm-ascend", summary="expert map .json", source="vllm-ascend")(vllm_ascend.write)
WRITERS.register("omni", summary="placement pattern .npy; slots may differ by layer", source="omni-infer")(omni.write)
WRITERS.register("lmdeploy", summary="loads that lead its planner to the plan", source="lmdeploy")(lmdeploy.write)
WRITERS.register("deepseek", summary="phy2log, log2phy, logcnt in a .npz", source="DeepSeek EPLB")(deepseek.write)

PLAN_READERS.register("vllm", summary="mapping .jsonl", source="vLLM pull request 41141")(vllm.read_mapping)
PLAN_READERS.register("sglang", summary="--init-expert-location .json or .pt", source="SGLang 0.5.23")(sglang.read_plan)
PLAN_READERS.register("tensorrt-llm", summary="YAML of moe_config.load_balancer", source="TensorRT-LLM")(tensorrt_llm.read_plan)
PLAN_READERS.register("vllm-ascend", summary="expert map .json", source="vllm-ascend")(vllm_ascend.read_plan)
PLAN_READERS.register("omni", summary="placement pattern .npy", source="omni-infer")(omni.read_plan)
PLAN_READERS.register("lmdeploy", summary="the placement its planner makes of loads", source="lmdeploy")(lmdeploy.read_plan)
PLAN_READERS.register("deepseek", summary="phy2log, log2phy, logcnt in a .npz", source="DeepSeek EPLB")(deepseek.read_plan)


def read_records(
    engine: str,
    paths: Sequence[str | Path],
    *,
    scenarios: Sequence[str] | None = None,
    config: str | Path | None = None,
    experts: int | None = None,
    top_k: int | None = None,
    phase: str = "prefill",
    model: str | None = None,
    **options: Any,
) -> Profile:
    """A Profile of the loads that a serving engine recorded; no model is loaded.

    Args:
        engine: a name in `READERS`.
        paths: files or directories, as the engine wrote them; several become several scenarios.
        scenarios: names of the scenarios, in the order of the paths; by default file names.
        config: the model's config.json or directory: it fills in top-k, sizes and dense layers, and refuses another model's
            records.
        experts: routed experts per layer, to refuse records of physical slots when there is no configuration.
        top_k: experts per token, where neither records nor configuration tell.
        phase: "prefill" or "decode", where the records do not tell.
        model: the model's name, for people.
        **options: of the reader; see its function.

    Raises:
        EquipoiseError: unknown engine or option.
        ProfileError: records that are empty, damaged, or of another model; the message says what to do.
    """
    reader = READERS.get(engine)
    _check_options(engine, reader, options, ("paths", "config", "experts"))
    known = None if config is None else read_config(Path(config))
    recordings = reader([Path(path) for path in paths], **options, **_asked(reader, config=known, experts=experts))
    if scenarios is not None:
        if len(scenarios) != len(recordings):
            have = ", ".join(r.name for r in recordings[:6])
            raise ProfileError(f"{len(scenarios)} scenarios are named, {len(recordings)} are recorded ({have}).")
        recordings = [replace(r, name=name) for r, name in zip(recordings, scenarios, strict=True)]
    return to_profile(
        recordings,
        engine=engine,
        config=known,
        experts=experts,
        top_k=top_k,
        phase=phase,
        model=model,
        options=options,
    )


def write_plan(plan: Plan, engine: str, out: str | Path, *, config: str | Path | None = None, **options: Any) -> Written:
    """Write a plan as the file that an engine loads.

    Args:
        plan: any plan; its units are the ranks.
        engine: a name in `WRITERS`.
        out: the file; written whole or not at all.
        config: the model's config.json or directory, for a plan of records that number MoE layers only; engines that do so
            themselves do not look at it.
        **options: of the writer; see its function.

    Raises:
        EquipoiseError: unknown engine or option.
        PlanError: the engine cannot hold the plan; the message says why, and which plan is nearest.
    """
    writer = WRITERS.get(engine)
    _check_options(engine, writer, options, ("plan", "out", "config"))
    return writer(plan, Path(out), **options, **_asked(writer, config=None if config is None else Path(config)))


def read_plan(
    engine: str,
    path: str | Path,
    model: ModelFacts | Profile | Plan,
    ranks: int,
    *,
    config: str | Path | None = None,
    **options: Any,
) -> list[NDArray[np.int64]]:
    """The physical slots of each MoE layer from an engine's plan file, checked by the engine's own rules.

    Args:
        engine: a name in `PLAN_READERS`.
        path: the file.
        model: facts of the model that it is for, or a profile or plan that has them.
        ranks: R.
        config: as for `write_plan`.
        **options: of the reader; see its function.

    Returns:
        L arrays [P]: the expert of each slot, rank-major.

    Raises:
        EquipoiseError: unknown engine or option.
        PlanError: what the engine would refuse, or a plan of another model.
    """
    reader = PLAN_READERS.get(engine)
    _check_options(engine, reader, options, ("path", "model", "ranks", "config"))
    asked = _asked(reader, config=None if config is None else Path(config))
    return reader(Path(path), model if isinstance(model, ModelFacts) else model.model, ranks, **options, **asked)


def _asked(function: Callable[..., object], **shared: Any) -> dict[str, Any]:
    """Those of the shared arguments that a function asks for."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in shared.items() if name in parameters}


def _check_options(engine: str, function: Callable[..., object], options: dict[str, Any], positional: tuple[str, ...]) -> None:
    allowed = [name for name in inspect.signature(function).parameters if name not in positional]
    for name in options:
        if name not in allowed:
            near = get_close_matches(name, allowed, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise EquipoiseError(
                f"engine '{engine}' has no option '{name}' here; it has: {', '.join(allowed) or 'none'}.{hint}"
            )
