"""DeepSeek's published load balancer (EPLB).

Greedy copies and longest-first packing, as published (github.com/deepseek-ai/EPLB), for all layers at once: what it
does slot by slot in a loop over layers is done here slot by slot for all of them. Loads are taken in float32, as there;
divisions and sums are in float64, as in vLLM's version, so plans may differ from the original only where two loads agree in
seven digits.
Shapes: L MoE layers, E logical experts, P physical slots, R ranks, G expert groups, X rows (layers, or layers times nodes),
N items to pack, B packs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from equipoise.artifacts import Plan, Profile
from equipoise.errors import PlanError
from equipoise.planning.moves import keep_slots
from equipoise.planning.ranks import Phase, phase_load, placement_of, rank_plan, target

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def eplb_placement(load_LE: ArrayLike, slots: int, ranks: int, nodes: int = 1, groups: int = 1) -> Ints:
    """The placement of all layers by EPLB's rules; two copies of an expert may come to lie on one rank, as published.

    Hierarchical where the nodes divide the expert groups: groups are packed onto nodes, then experts copied and slots packed
    within each node. Else global: the same with one group and one node.

    Args:
        load_LE: [L, E] load of each logical expert.
        slots: P, a multiple of ranks, from E up.
        ranks: R, a multiple of nodes.
        nodes: machines.
        groups: G, a divisor of E.

    Returns:
        [L, P] the logical expert of each physical slot, rank-major.
    """
    load = np.asarray(load_LE, np.float32)
    if groups % nodes:
        groups = nodes = 1
    n_layers, n_experts = load.shape
    size, here = n_experts // groups, n_experts // nodes
    group_load_LG = load.reshape(n_layers, groups, size).sum(-1)
    # First each node's groups, then its experts, in the order in which they were packed.
    group_LG = pack(group_load_LG, nodes)
    expert_LE = (group_LG[:, :, None] * size + np.arange(size)).reshape(n_layers, n_experts)
    node_load_XE = np.take_along_axis(load, expert_LE, 1).reshape(-1, here)
    local_XP, copies_XE = replicate(node_load_XE, slots // nodes)
    slot_load_XP = np.take_along_axis(node_load_XE / copies_XE, local_XP, 1)
    packed_XP = np.take_along_axis(local_XP, pack(slot_load_XP, ranks // nodes), 1)
    first = np.arange(nodes)[None, :, None] * here
    return np.take_along_axis(expert_LE, (packed_XP.reshape(n_layers, nodes, -1) + first).reshape(n_layers, slots), 1)


def replicate(load_XE: NDArray[np.floating], slots: int) -> tuple[Ints, Ints]:
    """Each further slot is a copy of the expert with the largest load per copy (EPLB's `replicate_experts`).

    Args:
        load_XE: [X, E] loads.
        slots: slots of each row, from E up.

    Returns:
        [X, slots] expert of each slot, every expert's first slot before all copies; [X, E] copies of each expert.
    """
    rows, n_experts = load_XE.shape
    expert = np.tile(np.arange(slots), (rows, 1))
    copies = np.ones((rows, n_experts), np.int64)
    load, each = np.asarray(load_XE, np.float64), np.arange(rows)
    per_copy = load.copy()
    for slot in range(n_experts, slots):
        most = per_copy.argmax(1)
        expert[:, slot] = most
        copies[each, most] += 1
        per_copy[each, most] = load[each, most] / copies[each, most]
    return expert, copies


def pack(load_XN: NDArray[np.floating], packs: int) -> Ints:
    """Longest first, each item to the lightest pack with room, N / B items per pack (EPLB's `balanced_packing`).

    Args:
        load_XN: [X, N] loads; of equal ones the first goes first.
        packs: B, a divisor of N; with one item per pack the items stay as they are, as published.

    Returns:
        [X, N] items in the order of packs, within a pack in the order in which they came.
    """
    rows, n_items = load_XN.shape
    per_pack = n_items // packs
    if per_pack == 1:
        return np.tile(np.arange(n_items), (rows, 1))
    order = np.argsort(-load_XN, axis=1, kind="stable")
    load = np.take_along_axis(load_XN, order, 1).astype(np.float64)
    # Columns are contiguous when items come first, and flat indices are cheaper than pairs.
    load, base = np.ascontiguousarray(load.T), np.arange(rows) * packs
    held, room = np.zeros((rows, packs)), np.full(rows * packs, per_pack, np.int64)
    flat, pack_NX = held.reshape(-1), np.empty((n_items, rows), np.int64)
    for item in range(n_items):
        best = held.argmin(1)
        pack_NX[item] = best
        best += base
        room[best] -= 1
        flat[best] += load[item]
        flat[best[room[best] == 0]] = np.inf
    return np.take_along_axis(order, np.argsort(pack_NX.T, axis=1, kind="stable"), 1)


def eplb(
    profile: Profile,
    *,
    units: int,
    seed: int,
    slots: int | Sequence[int] | None = None,
    nodes: int = 1,
    current: Plan | None = None,
    phase: Phase = "all",
) -> Plan:
    """DeepSeek's published algorithm on the sum of all scenarios: hierarchical where the nodes divide the expert groups.

    Args:
        profile: what was measured; its model says how many expert groups there are.
        units: ranks.
        seed: not used; nothing is left to chance.
        slots: physical slots of every layer, or one number per layer; as many as experts when omitted.
        nodes: machines.
        current: the plan in force; experts that stay on a rank keep their slots, and what moves is counted.
        phase: the phase to plan for.

    Raises:
        PlanError: an option is out of range, or the groups do not divide the experts.
    """
    goal = target(profile, units, slots, nodes)
    load_LE, groups = phase_load(profile, phase).sum(0), profile.model.expert_groups
    physical_L = by_shape(
        [(layer.num_experts, p) for layer, p in zip(profile.model.layers, goal.slots, strict=True)],
        lambda rows, width, p: eplb_placement(load_LE[rows, :width], p, units, nodes, _groups(groups, width)),
    )
    if current is not None:
        before_L = placement_of(current, profile, units)
        physical_L = [keep_slots(new, old, units) for new, old in zip(physical_L, before_L, strict=True)]
    return rank_plan(
        profile, physical_L, ranks=units, nodes=nodes, method="eplb", seed=seed, current=current, load_LE=load_LE,
        options={"slots": list(goal.slots), "phase": phase, "hierarchical": groups % nodes == 0},
    )  # fmt: skip


def by_shape(shapes_L: Sequence[tuple[int, int]], place: Callable[[Ints, int, int], Ints]) -> list[Ints]:
    """Placements of layers of any shape, from a function that places many layers of one shape at once.

    Args:
        shapes_L: experts and slots of each layer.
        place: f(layers, experts, slots) -> [len(layers), slots].

    Returns:
        One [P] array per layer.
    """
    placed: dict[int, Ints] = {}
    for shape in dict.fromkeys(shapes_L):
        rows = np.flatnonzero([other == shape for other in shapes_L])
        placed |= dict(zip(rows.tolist(), place(rows, *shape), strict=True))
    return [placed[layer] for layer in range(len(shapes_L))]


def _groups(groups: int, width: int) -> int:
    if width % groups:
        raise PlanError(
            f"the model says {groups} expert groups, which do not divide a layer's {width} experts; correct its config."
        )
    return groups
