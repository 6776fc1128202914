"""What `equipoise export` does for models instead of engines: checkpoints that any tool loads. No weights are loaded whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.errors import EquipoiseError

if TYPE_CHECKING:
    from equipoise.artifacts import Plan
    from equipoise.planning.per_layer import PerLayer

CHECKPOINTS = ("compressed-tensors", "checkpoint")
"""Values of `--to` that stand for a model instead of an engine's plan."""


def export_model(
    plan: Path,
    kind: str,
    out: Path,
    *,
    model: Path | None,
    profile: Path | None,
    round_layers: bool,
    options: Mapping[str, Any],
    quiet: bool,
) -> tuple[dict[str, Any], list[str]]:
    """Write a model as a stock checkpoint.

    Args:
        plan: a plan, or the directory of a balanced model.
        kind: "compressed-tensors" or "checkpoint".
        out: a new or empty directory.
        model: the balanced model, or the original one that the plan is put on; the directory given as the plan when omitted.
        profile: of the plan, for the error of rounding it.
        round_layers: round the plan to one precision per layer first.
        options: "by_layer" of compressed-tensors.
        quiet: without a progress bar.

    Returns:
        Figures for programs, and lines for people.

    Raises:
        EquipoiseError: no model, an option that the kind of export does not take, or what the export itself raises.
    """
    from equipoise.artifacts import Plan
    from equipoise.execution.export_checkpoint import export_checkpoint
    from equipoise.execution.stock_source import Source
    from equipoise.profiling.progress import ProgressBar

    if not plan.exists():
        raise EquipoiseError(f"'{plan}' does not exist; give a plan, or the directory of a balanced model.")
    directory = model or (plan if plan.is_dir() else None)
    if directory is None:
        raise EquipoiseError(f"--to {kind} writes a model: give --model DIR (a balanced model, or the plan's original).")
    by_layer = _only_option(options, kind)
    decided = None if plan.is_dir() else Plan.load_file(plan)
    rounded = _round(decided, directory, profile) if round_layers else None
    source = Source(directory, rounded.plan if rounded else decided)
    with ProgressBar(not quiet) as bar:
        bar.stage(f"writing {kind}", len(source.layers), "layers")
        if kind == "checkpoint":
            done = export_checkpoint(source, out, progress=bar.set)
        else:
            from equipoise.execution.compressed_tensors import export_compressed

            done = export_compressed(source, out, by_layer=by_layer, progress=bar.set)
    notes = [*([str(rounded)] if rounded else []), *done.notes]
    rows = {
        "to": kind, "directory": str(out), "bytes": done.bytes, "expert_bytes": done.expert_bytes, **done.facts,
        "rounded": _figures(rounded) if rounded else None, "notes": notes,
    }  # fmt: skip
    return rows, [*notes, f"experts: {done.expert_bytes:,} bytes; all tensors: {done.bytes:,} bytes"]


def _only_option(options: Mapping[str, Any], kind: str) -> bool:
    allowed = {"by_layer"} if kind == "compressed-tensors" else set()
    unknown = sorted(set(options) - allowed)
    if unknown:
        takes = f"takes {', '.join(sorted(allowed))}" if allowed else "takes no options"
        raise EquipoiseError(f"--to {kind} has no option '{unknown[0]}'; it {takes}.")
    by_layer = options.get("by_layer", False)
    if not isinstance(by_layer, bool):
        raise EquipoiseError(f"by_layer is {by_layer!r}; it must be true or false.")
    return by_layer


def _round(plan: Plan | None, directory: Path, profile: Path | None) -> PerLayer:
    from equipoise.artifacts import Profile
    from equipoise.planning.per_layer import round_per_layer

    if plan is None:
        raise EquipoiseError(
            f"--round-per-layer rounds a plan before it is put on a model, and '{directory}' carries one already; "
            "give the plan and, with --model, the original model."
        )
    return round_per_layer(plan, None if profile is None else Profile.load_file(profile))


def _figures(rounded: PerLayer) -> dict[str, Any]:
    names = ("rounded", "bytes_before", "bytes_after", "error_before", "error_after", "measured")
    return {"layers" if name == "rounded" else name: getattr(rounded, name) for name in names}
