"""lmdeploy: its table of expert loads, from which it plans itself.

lmdeploy takes no placement. A plan without copies is handed over all the same: as loads from which its planner, DeepSeek's,
arrives at exactly that placement. Shapes: L MoE layers, H transformer layers, E logical experts, P slots, R ranks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from equipoise.artifacts import ModelFacts, Plan, Profile
from equipoise.artifacts.files import write_atomic
from equipoise.engines.placement import Written, checked_slots, physical_slots, transformer_layers
from equipoise.engines.records import Ints, Recording, as_counts
from equipoise.engines.untrusted import read_json
from equipoise.errors import PlanError


def read(paths: Sequence[Path]) -> list[Recording]:
    """Read tables of loads: JSON lists [layers][experts], a row for each transformer layer or each MoE layer.

    Args:
        paths: files; each is one scenario.

    Raises:
        ProfileError: not such a table.
    """
    return [
        Recording(name=path.stem, counts=as_counts(read_json(path), f"'{path}'", 2), rows="either", files=(str(path),))
        for path in paths
    ]


def packed(load_E: Ints, ranks: int) -> Ints:
    """[E] slots, rank-major, that DeepSeek's planner makes of one layer's loads without copies: longest first, lightest rank.

    With one slot per rank it does not sort: expert e stays on rank e.

    Args:
        load_E: loads, all different.
        ranks: R, a divisor of E.

    Source: `balanced_packing` of DeepSeek's EPLB.
    """
    per_rank = len(load_E) // ranks
    if per_rank == 1:
        return np.arange(len(load_E))
    held: list[list[int]] = [[] for _ in range(ranks)]
    carried = [0] * ranks
    for expert in np.argsort(-load_E, kind="stable").tolist():
        rank = min((r for r in range(ranks) if len(held[r]) < per_rank), key=carried.__getitem__)
        held[rank].append(expert)
        carried[rank] += int(load_E[expert])
    return np.array(held, np.int64).ravel()


def loads_for(slots_P: Ints, ranks: int) -> Ints:
    """[E] loads of which `packed` makes this placement: the expert whose rank has its turn gets the next smaller load.

    Args:
        slots_P: [E] experts, rank-major, each once.
        ranks: R.
    """
    per_rank = len(slots_P) // ranks
    waiting = [part.tolist() for part in slots_P.reshape(ranks, per_rank)]
    load, carried = np.zeros(len(slots_P), np.int64), [0] * ranks
    for value in range(len(slots_P), 0, -1):
        rank = min((r for r in range(ranks) if waiting[r]), key=carried.__getitem__)
        load[waiting[rank].pop(0)] = value
        carried[rank] += value
    return load


def write(plan: Plan, out: Path, *, config: Path | None = None, profile: Profile | str | Path | None = None) -> Written:
    """Write a table of loads [H][E] from which lmdeploy arrives at the plan.

    Args:
        plan: a plan without copies.
        out: the file.
        config: the model's config.json, for a plan that does not know its dense layers.
        profile: write its measured loads instead (a profile, or its file), and leave copies and placement to lmdeploy's own
            planner.

    Raises:
        PlanError: the plan has copies, or one slot per rank in another order than lmdeploy's, which loads cannot express.
    """
    physical = physical_slots(plan, "lmdeploy")
    layers, hidden = transformer_layers(plan.model, "lmdeploy", config)
    experts, redundant = plan.model.max_experts, len(physical[0]) - plan.model.max_experts
    table = np.ones((hidden, experts), np.int64)
    if profile is not None:
        profile = profile if isinstance(profile, Profile) else Profile.load_file(profile)
        plan.check_model(profile.model)
        table[layers] = profile.load
        note = "# measured loads: lmdeploy plans from them itself"
    else:
        if redundant:
            raise PlanError(
                f"lmdeploy takes loads and copies experts by its own rule; this plan has {redundant} copies per layer. Nearest "
                f"plan that lmdeploy holds: the one without, `equipoise plan PROFILE --ranks {plan.units} --slots {experts}`; "
                "or give the profile (--profile FILE), to hand over its measured loads."
            )
        for layer, slots in zip(layers, physical, strict=True):
            table[layer] = loads_for(slots, plan.units)
            if (packed(table[layer], plan.units) != slots).any():
                raise PlanError("lmdeploy keeps expert e on rank e when each rank has one slot; no loads lead it to this plan.")
        note = "# not measured loads: numbers from which lmdeploy's planner arrives at this plan"
    write_atomic(out, "[\n" + ",\n".join(json.dumps(row) for row in table.tolist()) + "\n]\n")
    flags = (
        f"LMDEPLOY_EPLB_EXPERTS_STATISTIC_FILE={out} LMDEPLOY_EPLB_NUM_REDUNDANT_EXPERTS={redundant} "
        f"LMDEPLOY_EPLB_NUM_GROUPS=1 LMDEPLOY_EPLB_RANKS_PER_NODE={plan.units + 1}\n"
        f"# environment of PytorchEngineConfig(ep={plan.units}, enable_eplb=True)\n{note}"
    )
    return Written((out,), flags)


def read_plan(path: Path, model: ModelFacts, ranks: int, *, config: Path | None = None) -> list[Ints]:
    """The physical slots of each MoE layer at which lmdeploy's planner arrives without copies.

    Args:
        path: a table of loads.
        model: facts of the model that it is for.
        ranks: R.
        config: the model's config.json, when the facts do not know the dense layers.

    Raises:
        PlanError: not a table of this model's loads, equal loads (their order is left to chance), or ranks that do not divide
            the experts.
    """
    table, what = as_counts(read_json(path), f"'{path}'", 2), f"'{path}'"
    layers, hidden = transformer_layers(model, "lmdeploy", config)
    if table.shape != (hidden, model.max_experts):
        raise PlanError(
            f"{what} has shape {table.shape}, the model has {hidden} transformer layers and {model.max_experts} experts."
        )
    if ranks < 1 or model.max_experts % ranks:
        raise PlanError(f"ranks: {ranks} given, which does not divide {model.max_experts} experts.")
    for layer in layers:
        if len(np.unique(table[layer])) != table.shape[1]:
            raise PlanError(f"{what}: layer {layer} has equal loads, whose order lmdeploy's planner leaves to chance.")
    return checked_slots([packed(table[layer], ranks) for layer in layers], model, ranks, what)
