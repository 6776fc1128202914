"""Counts and pairs of single tokens' choices, from the ids that an engine recorded.

Shapes: T tokens, L MoE layers, K top-k, E logical experts. An id of -1 marks a choice that was not made.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from equipoise.errors import ProfileError

Ints = NDArray[np.int64]

CHUNK = 1 << 21
"""Pairs that are counted at once, so that a long record needs no large temporary."""


def choices(ids_TLK: NDArray[np.integer], experts: int, what: str) -> NDArray[np.integer]:
    """The ids themselves, checked to be logical experts or -1.

    Raises:
        ProfileError: not [T, L, K] whole numbers, or ids that are no logical experts.
    """
    if ids_TLK.ndim != 3 or ids_TLK.dtype.kind not in "iu":
        raise ProfileError(
            f"{what}: ids have shape {ids_TLK.shape} and dtype {ids_TLK.dtype}; whole numbers [tokens, layers, k] are expected."
        )
    if ids_TLK.size and (int(ids_TLK.max()) >= experts or int(ids_TLK.min()) < -1):
        raise ProfileError(
            f"{what}: ids from {ids_TLK.min()} to {ids_TLK.max()}, the model has {experts} logical experts. If these are "
            "physical slots, the physical_to_logical map is needed."
        )
    return ids_TLK


def count_choices(ids_TLK: NDArray[np.integer], experts: int) -> Ints:
    """[L, E] how often each expert was chosen."""
    size_l = ids_TLK.shape[1]
    counts = np.zeros((size_l, experts), np.int64)
    for layer in range(size_l):
        chosen = ids_TLK[:, layer].ravel()
        counts[layer] = np.bincount(chosen[chosen >= 0], minlength=experts)
    return counts


def count_pairs(ids_TLK: NDArray[np.integer], experts: int) -> tuple[Ints, Ints]:
    """Transitions [L-1, E, E] (expert in a layer, expert in the next) and co-activation [L, E, E] (both in one layer).

    Each token counts all its K x K pairs, as the recorder of models does; on the diagonal of the co-activation stand the
    choices themselves.
    """
    size_t, size_l, size_k = ids_TLK.shape
    transitions = np.zeros((max(size_l - 1, 0), experts, experts), np.int64)
    together = np.zeros((size_l, experts, experts), np.int64)
    step = max(1, CHUNK // max(1, size_k * size_k))
    for start in range(0, size_t, step):
        part = ids_TLK[start : start + step].astype(np.int64)
        for layer in range(size_l):
            together[layer] += _pairs(part[:, layer], part[:, layer], experts)
            if layer + 1 < size_l:
                transitions[layer] += _pairs(part[:, layer], part[:, layer + 1], experts)
    return transitions, together


def _pairs(first_TK: Ints, second_TK: Ints, experts: int) -> Ints:
    both = (first_TK[:, :, None] >= 0) & (second_TK[:, None, :] >= 0)
    flat = (first_TK[:, :, None] * experts + second_TK[:, None, :])[both]
    return np.bincount(flat, minlength=experts * experts).reshape(experts, experts)
