"""What an engine can hold of a Plan: the physical slots of each layer in the order of the ranks, or the reason why not.

Shapes: L MoE layers, H transformer layers (dense ones counted), E logical experts, P physical slots of a layer, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.artifacts import ModelFacts, Plan
from equipoise.engines.model_config import read_config
from equipoise.errors import PlanError

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Written:
    """A plan in an engine's own format.

    Attributes:
        files: what was written.
        flags: what to give the engine beside the files, to be pasted; notes to the reader start with '#'.
    """

    files: tuple[Path, ...]
    flags: str


def physical_slots(plan: Plan, engine: str, *, per_layer: bool = False, duplicates: bool = True) -> list[Ints]:
    """The expert of each physical slot, rank-major, of a plan that the engine can hold.

    Args:
        plan: any plan; its units are the ranks.
        engine: named in errors.
        per_layer: the engine takes layers with different numbers of slots.
        duplicates: the engine takes two slots of one expert on one rank.

    Returns:
        L arrays [P]; slot j of P lies on rank j // (P / R).

    Raises:
        PlanError: the plan leaves out experts, is of another routing policy, has several precisions in one layer, unequal
            slots, or duplicates that the engine rejects; the message says which plan is nearest.
    """
    plan.require_all_experts(f"a placement for {engine}")
    plan.require_native_routing(engine)
    ranks, widths = plan.units, [facts.num_experts for facts in plan.model.layers]
    if len(set(widths)) > 1:
        raise PlanError(
            f"{engine} takes models whose layers have equally many experts; '{plan.model.name}' has {sorted(set(widths))}."
        )
    for index, layer in enumerate(plan.layers):
        mixed = sorted(set(layer.precisions))
        if len(mixed) > 1:
            raise PlanError(
                f"{engine} stores all experts of a layer in one format; layer {index} of this plan has {' and '.join(mixed)}. "
                + _nearest(plan, engine, [p.num_slots for p in plan.layers], "one precision for all slots")
            )
    physical: list[Ints] = []
    for index, layer in enumerate(plan.layers):
        units = np.array(layer.units)
        held = np.bincount(units, minlength=ranks)
        if held.min() != held.max():
            raise PlanError(
                f"{engine} gives every rank equally many slots of a layer; layer {index} of this plan has {held.min()} to "
                f"{held.max()}. " + _nearest(plan, engine, [p.num_slots for p in plan.layers], "equal slots on each rank")
            )
        physical.append(np.array(layer.experts, np.int64)[np.argsort(units, kind="stable")])
        if layer.duplicates and not duplicates:
            raise PlanError(
                f"{engine} rejects two slots of one expert on one rank; layer {index} of this plan has {layer.duplicates}. "
                + _nearest(plan, engine, [p.num_slots for p in plan.layers], "no duplicates (method robust makes none)")
            )
    sizes = sorted({len(p) for p in physical})
    if len(sizes) > 1 and not per_layer:
        raise PlanError(
            f"{engine} takes one number of slots for all layers; this plan has from {sizes[0]} to {sizes[-1]}. "
            + _nearest(plan, engine, [len(p) for p in physical], "the same slots in every layer")
        )
    return physical


def _nearest(plan: Plan, engine: str, slots: Sequence[int], how: str) -> str:
    """The nearest plan that can be held: as many ranks, the mean number of slots rounded down to what ranks divide."""
    ranks = plan.units
    least = -(-plan.model.max_experts // ranks) * ranks
    number = max(least, int(np.mean(slots)) // ranks * ranks)
    nodes = f" --nodes {plan.nodes}" if plan.nodes > 1 else ""
    command = f"equipoise plan PROFILE --ranks {ranks}{nodes} --slots {number}"
    return f"Nearest plan that {engine} holds: {how}; make it with `{command}`."


def transformer_layers(model: ModelFacts, engine: str, config: Path | None = None) -> tuple[list[int], int]:
    """The transformer layer of each MoE layer, and how many transformer layers there are.

    Args:
        model: facts of the plan's model.
        engine: named in errors.
        config: the model's config.json, for plans of records that number MoE layers only.

    Raises:
        PlanError: nobody tells, or the configuration is of another model.
    """
    if config is not None:
        known = read_config(Path(config))
        if len(known.moe_layers) != len(model.layers) or known.num_experts != model.max_experts:
            raise PlanError(
                f"the plan has {len(model.layers)} MoE layers of {model.max_experts} experts, '{known.name}' has "
                f"{len(known.moe_layers)} of {known.num_experts}; give the config.json of the plan's model."
            )
        return list(known.moe_layers), known.hidden_layers
    if not model.hidden_layers:
        raise PlanError(
            f"{engine} counts all transformer layers, dense ones too, and this plan knows its MoE layers only; "
            "give --config with the model's config.json, here or to `equipoise profile`."
        )
    return [layer.model_layer for layer in model.layers], model.hidden_layers


def checked_slots(rows: Sequence[Any], model: ModelFacts, ranks: int, what: str) -> list[Ints]:
    """Physical slots that were read from an engine's file, checked against the model.

    Args:
        rows: L rows of expert ids, rank-major.
        model: facts of the model that the file is for.
        ranks: R.
        what: the file, named in errors.

    Raises:
        PlanError: another number of layers, ids that are no experts, an expert without a slot, or ranks that do not divide P.
    """
    if ranks < 1:
        raise PlanError(f"ranks: {ranks} given; allowed is a whole number from 1.")
    if len(rows) != len(model.layers):
        raise PlanError(f"{what} has {len(rows)} MoE layers, the model has {len(model.layers)}; it is of another model.")
    checked = []
    for index, (row, facts) in enumerate(zip(rows, model.layers, strict=True)):
        experts = whole_numbers(row, f"{what}, layer {index}")
        if len(experts) % ranks:
            raise PlanError(f"{what}, layer {index}: {len(experts)} slots cannot be divided among {ranks} ranks.")
        if len(experts) and not 0 <= experts.min() <= experts.max() < facts.num_experts:
            raise PlanError(
                f"{what}, layer {index}: expert ids from {experts.min()} to {experts.max()} of {facts.num_experts} experts."
            )
        missing = np.flatnonzero(np.bincount(experts, minlength=facts.num_experts) == 0)
        if len(missing):
            raise PlanError(f"{what}, layer {index}: expert {missing[0]} has no slot ({len(missing)} missing).")
        checked.append(experts)
    return checked


def whole_numbers(row: Any, what: str) -> Ints:
    """[P] expert ids of one row of a file, or an error that names it."""
    if isinstance(row, np.ndarray):
        good = row.ndim == 1 and row.dtype.kind in "iu"
    else:
        good = isinstance(row, list) and all(isinstance(e, int) and not isinstance(e, bool) and abs(e) < 1 << 31 for e in row)
    if not good:
        raise PlanError(f"{what}: a list of expert ids is expected.")
    return np.asarray(row, np.int64)
