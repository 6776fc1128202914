"""EPLB's placement beside the policy that vLLM runs, in an environment that has vLLM."""

from __future__ import annotations

import numpy as np
import pytest

from equipoise.planning.eplb import eplb_placement
from equipoise.planning.moves import keep_slots
from equipoise.planning.ranks import rank_load


@pytest.fixture(scope="module")
def policy():
    pytest.importorskip("vllm", reason="vLLM is not installed here")
    from vllm.distributed.eplb.policy.default import DefaultEplbPolicy

    return DefaultEplbPolicy


def by_vllm(
    policy, load: np.ndarray, slots: int, groups: int, nodes: int, ranks: int, old: np.ndarray | None = None
) -> np.ndarray:
    import torch

    before = None if old is None else torch.from_numpy(old)
    return policy.rebalance_experts(torch.from_numpy(load), slots, groups, nodes, ranks, before).numpy()


@pytest.mark.parametrize(
    ("experts", "slots", "groups", "nodes", "ranks"),
    [
        (256, 288, 8, 1, 32),
        (256, 288, 8, 4, 32),
        (256, 256, 8, 8, 32),
        (64, 80, 1, 2, 16),
        (128, 144, 4, 2, 16),
        (32, 32, 1, 1, 32),
    ],
)
def test_the_same_slots_global_and_hierarchical(policy, experts: int, slots: int, groups: int, nodes: int, ranks: int):
    load = np.random.default_rng(slots).lognormal(0.0, 1.2, (12, experts))
    ours = eplb_placement(load, slots, ranks, nodes, groups)
    np.testing.assert_array_equal(ours, by_vllm(policy, load, slots, groups, nodes, ranks))


def test_where_loads_are_equal_the_ranks_carry_the_same(policy):
    """Of equal loads vLLM's sort takes any first, so slots may differ; what a rank carries does not."""
    load = np.random.default_rng(0).integers(1, 2000, (8, 128))
    ours, theirs = eplb_placement(load, 144, 16), by_vllm(policy, load, 144, 1, 1, 16)
    for layer in range(8):
        a, b = (np.sort(rank_load(physical[layer], load[layer], 16)) for physical in (ours, theirs))
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_the_same_slots_are_kept_from_the_plan_in_force(policy):
    rng = np.random.default_rng(1)
    load = rng.lognormal(0.0, 1.2, (6, 64))
    old = eplb_placement(load, 72, 8)
    new_load = load * rng.lognormal(0.0, 0.3, load.shape)
    ours = [keep_slots(new, before, 8) for new, before in zip(eplb_placement(new_load, 72, 8), old, strict=True)]
    np.testing.assert_array_equal(np.stack(ours), by_vllm(policy, new_load, 72, 1, 1, 8, old))
