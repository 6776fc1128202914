"""The best split of one batch's tokens among the standing copies of their experts, as a linear program.

minimise M  subject to  sum over copies of x = load of the expert,  sum of x on a rank <= M,  x >= 0.
This is what LPLB and SGLang's `lp` dispatch solve (approximately) on the GPU in every layer of every batch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_array

from equipoise.dispatch.placement import Floats, Ints, LayerMap


def least_split(layer: LayerMap, load_E: NDArray[np.generic]) -> tuple[Floats, float]:
    """Tokens of each slot that make the largest rank load smallest.

    Args:
        layer: where copies are.
        load_E: [E] tokens of each expert in the batch.

    Returns:
        [P] tokens (fractional) that add up to each expert's load, and the largest rank load. Proven least (HiGHS).
    """
    load = np.asarray(load_E, np.float64)
    split = np.where(layer.copies_E[layer.expert_P] == 1, load[layer.expert_P], 0.0)
    fixed_R = np.bincount(layer.rank_P, split, layer.ranks)
    shared = np.flatnonzero((layer.copies_E[layer.expert_P] > 1) & (load[layer.expert_P] > 0))
    if not len(shared):
        return split, float(fixed_R.max())
    experts, row = np.unique(layer.expert_P[shared], return_inverse=True)
    n = len(shared)
    on_rank = coo_array(
        (
            np.concatenate([np.ones(n), -np.ones(layer.ranks)]),
            (np.concatenate([layer.rank_P[shared], np.arange(layer.ranks)]), np.r_[np.arange(n), np.full(layer.ranks, n)]),
        ),
        (layer.ranks, n + 1),
    )
    whole = coo_array((np.ones(n), (row, np.arange(n))), (len(experts), n + 1))
    objective = np.zeros(n + 1)
    objective[n] = 1.0
    solved = linprog(objective, on_rank, -fixed_R, whole, load[experts], method="highs")
    assert solved.success, f"a split of {n} slots on {layer.ranks} ranks always exists: {solved.message}"
    split[shared] = np.maximum(solved.x[:n], 0.0)
    return split, float(np.bincount(layer.rank_P, split, layer.ranks).max())


def probabilities(layer: LayerMap, split_P: Floats) -> Floats:
    """[E, C] probability of each copy of an expert, in the order of `slots_EC`; even where an expert has no tokens."""
    exists = layer.slots_EC >= 0
    part = np.where(exists, split_P[layer.slots_EC], 0.0)
    total = part.sum(1, keepdims=True)
    even = exists / layer.copies_E[:, None]
    return np.asarray(np.where(total > 0, part / np.maximum(total, 1e-300), even))


def order_in_expert(ids_BT: Ints, experts: int) -> Ints:
    """[B, ...] how many earlier tokens of the same batch chose the same expert, in the order of the batch.

    Args:
        ids_BT: [B, ...] chosen experts.
        experts: E.
    """
    batches = len(ids_BT)
    key = (ids_BT.reshape(batches, -1) + np.arange(batches)[:, None] * experts).ravel()
    order = np.argsort(key, kind="stable")
    sizes = np.bincount(key, minlength=batches * experts)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(key)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return rank.reshape(ids_BT.shape)
