"""Plain planners to compare with: small, obvious, no precision and no look at other text.

Shapes: E logical experts, P slots, U units.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def eplb(load_E: NDArray[np.float64], slots: int, units: int) -> tuple[Ints, Ints]:
    """One layer by the rule of EPLB (DeepSeek's redundant experts), in plain numpy, with even shares.

    Each further copy goes to the expert with the largest load per copy; then slots in order of size, each to the
    unit with the least load among those with room for one more (slots / units each).

    Returns:
        [P] experts and [P] units.
    """
    count = np.ones(len(load_E), np.int64)
    for _ in range(slots - len(load_E)):
        count[(load_E / count).argmax()] += 1
    expert = np.repeat(np.arange(len(load_E)), count)
    size = load_E[expert] / count[expert]
    held, room = np.zeros(units), np.full(units, -(-slots // units))
    unit = np.zeros(len(expert), np.int64)
    for slot in np.argsort(-size, kind="stable"):
        unit[slot] = np.where(room > 0, held, np.inf).argmin()
        held[unit[slot]] += size[slot]
        room[unit[slot]] -= 1
    return expert, unit


def alias(load_E: NDArray[np.float64]) -> tuple[Ints, Ints, NDArray[np.float64]]:
    """One layer with as many units as experts by the alias construction (Walker 1977, Vose 1991): exact in sample.

    Every unit holds its own expert and at most one part of a heavier one.

    Returns:
        [P] experts, [P] units and [P] shares.
    """
    n = len(load_E)
    rest = n * load_E / load_E.sum()
    expert, unit, flow = list(range(n)), list(range(n)), rest.copy().tolist()
    small, large = [e for e in range(n) if rest[e] < 1], [e for e in range(n) if rest[e] >= 1]
    while small and large:
        light, heavy = small.pop(), large.pop()
        given = 1.0 - rest[light]
        expert.append(heavy), unit.append(light), flow.append(given)
        flow[heavy] -= given
        rest[heavy] -= given
        (small if rest[heavy] < 1 else large).append(heavy)
    experts, flows = np.array(expert), np.maximum(np.array(flow), 0.0)
    return experts, np.array(unit), flows / np.bincount(experts, flows, n)[experts]
