"""DeepSeek's load balancer once more, one slot at a time in plain Python, to test and time the vectorised one against.

Written from its rules: experts in groups, groups packed onto nodes, copies within each node, slots packed onto ranks.
"""

from __future__ import annotations

from collections.abc import Sequence


def pack(loads: Sequence[float], packs: int) -> list[list[int]]:
    """Items of each pack: heaviest first, each to the lightest pack with room; one item each stays in place."""
    per_pack = len(loads) // packs
    if per_pack == 1:
        return [[item] for item in range(packs)]
    held, items = [0.0] * packs, [[] for _ in range(packs)]
    for item in sorted(range(len(loads)), key=lambda i: -loads[i]):
        best = min((p for p in range(packs) if len(items[p]) < per_pack), key=lambda p: held[p])
        items[best].append(item)
        held[best] += loads[item]
    return items


def replicate(loads: Sequence[float], slots: int) -> tuple[list[int], list[int]]:
    """Expert of each slot and copies of each expert: every further slot to the largest load per copy."""
    copies, expert = [1] * len(loads), list(range(len(loads)))
    for _ in range(slots - len(loads)):
        most = max(range(len(loads)), key=lambda e: loads[e] / copies[e])
        expert.append(most)
        copies[most] += 1
    return expert, copies


def place_layer(loads: Sequence[float], slots: int, ranks: int, nodes: int = 1, groups: int = 1) -> list[int]:
    """Logical expert of each physical slot of one layer, rank-major."""
    if groups % nodes:
        groups = nodes = 1
    size = len(loads) // groups
    group_loads = [float(sum(loads[g * size : (g + 1) * size])) for g in range(groups)]
    placed = []
    for node in pack(group_loads, nodes):
        here = [g * size + e for g in node for e in range(size)]
        expert, copies = replicate([loads[e] for e in here], slots // nodes)
        for rank in pack([loads[here[e]] / copies[e] for e in expert], ranks // nodes):
            placed += [here[expert[slot]] for slot in rank]
    return placed


def place(loads: Sequence[Sequence[float]], slots: int, ranks: int, nodes: int = 1, groups: int = 1) -> list[list[int]]:
    """All layers."""
    return [place_layer(layer, slots, ranks, nodes, groups) for layer in loads]
