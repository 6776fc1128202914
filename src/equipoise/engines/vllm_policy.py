"""Our placements behind vLLM's policy interface: a fixed plan, or a plan made anew from the loads that vLLM reports.

vLLM calls `rebalance_experts` on every rank with the same loads and takes the map it returns. All ranks must return the same
one; planning online is done on the first rank alone, and the others receive its map.

Shapes: S stretches of traffic, L MoE layers, E logical experts, P physical slots, R ranks.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.artifacts import LayerFacts, ModelFacts, Plan, Profile, Source
from equipoise.engines.placement import physical_slots
from equipoise.errors import EquipoiseError, PlanError
from equipoise.planning.methods import METHODS, make_plan, rank_methods
from equipoise.planning.ranks import rank_load, rank_plan, slots_of

Ints = NDArray[np.int64]
HISTORY = 32
"""Stretches of traffic between two plans that planning online remembers."""

LEAST_GAIN = 0.01
"""Relative gain in expected maximum rank load below which a layer keeps its placement: moving weights is not free."""

logger = logging.getLogger("vllm.equipoise")


def check_placement(plan: Plan, *, layers: int, experts: int, slots: int, ranks: int, model: str) -> None:
    """Compare what vLLM is about to balance with what the plan is for.

    Args:
        plan: the fixed plan.
        layers: MoE layers of vLLM's model.
        experts: logical experts of each.
        slots: physical slots of each.
        ranks: expert-parallel ranks.
        model: named in the error.

    Raises:
        PlanError: the plan is for another model, or for other ranks or slots.
    """
    mine = len(plan.layers), plan.model.max_experts, plan.layers[0].num_slots, plan.units
    if mine != (layers, experts, slots, ranks):
        raise PlanError(
            f"the plan is for {mine[0]} MoE layers of {mine[1]} experts in {mine[2]} slots on {mine[3]} ranks, vLLM balances "
            f"'{model}' with {layers} of {experts} in {slots} on {ranks}; plan for this model, and give vLLM the plan's ranks "
            "and num_redundant_experts in --eplb-config. A drafter of speculative decoding has experts of its own, in no plan."
        )


def static_policy(plan: Plan, base: type) -> Any:
    """A policy class that returns one plan, whatever the load.

    Args:
        plan: of one number of slots for all layers and one precision.
        base: vLLM's default policy class, whose interface it has.

    Raises:
        PlanError: vLLM cannot hold the plan.
    """
    physical_LP = np.stack(physical_slots(plan, "vllm"))

    class EquipoisePlan(base):  # type: ignore[misc, valid-type]
        """vLLM's policy interface over a fixed plan."""

        @classmethod
        def rebalance_experts(
            cls,
            weight: Any,
            num_replicas: int,
            num_groups: int,
            num_nodes: int,
            num_ranks: int,
            old_global_expert_indices: Any | None = None,
        ) -> Any:
            import torch

            layers, experts = weight.shape
            check_placement(
                plan, layers=layers, experts=experts, slots=num_replicas, ranks=num_ranks, model="the running model"
            )
            if plan.nodes > 1 and plan.nodes != num_nodes:
                logger.warning("Equipoise: the plan is for %d nodes, vLLM runs on %d.", plan.nodes, num_nodes)
            return torch.from_numpy(physical_LP.copy())

    return EquipoisePlan


def online_policy(method: str, base: type) -> Any:
    """A policy class that plans by a method of ours from the last stretches of traffic.

    A layer whose expected maximum rank load would fall by less than `LEAST_GAIN` keeps its placement.

    Args:
        method: a placement method.
        base: vLLM's default policy class, whose interface and slot keeping it has.

    Raises:
        EquipoiseError: no such method, or one that does not place slots on ranks.
    """
    METHODS.get(method)
    if method not in rank_methods():
        raise EquipoiseError(
            f"EQUIPOISE_POLICY: '{method}' does not place experts on ranks; give one of {', '.join(rank_methods())}."
        )
    try:
        rehearsal = np.arange(1, 17).reshape(2, 1, 8)
        plan_online(method, rehearsal, 8, 1, 1, 2, np.arange(8)[None])
    except PlanError as error:
        raise EquipoiseError(f"EQUIPOISE_POLICY: '{method}' cannot plan from loads alone: {error}") from error

    class EquipoiseOnline(base):  # type: ignore[misc, valid-type]
        """vLLM's policy interface over an online planner; its history is kept per shape of load."""

        history: dict[tuple[int, ...], deque[Ints]] = {}  # noqa: RUF012  shared by all calls in this process on purpose

        @classmethod
        def rebalance_experts(
            cls,
            weight: Any,
            num_replicas: int,
            num_groups: int,
            num_nodes: int,
            num_ranks: int,
            old_global_expert_indices: Any | None = None,
        ) -> Any:
            import torch

            load_LE = weight.cpu().numpy().astype(np.int64)
            old = old_global_expert_indices
            if not load_LE.any():  # vLLM's rehearsal before it serves
                if old is not None:
                    return old.cpu().clone()
                return super().rebalance_experts(weight, num_replicas, num_groups, num_nodes, num_ranks)
            group = _planning_group()
            answer = torch.full((load_LE.shape[0], num_replicas), -1, dtype=torch.int64)
            problem: Exception | None = None
            if group is None or group.rank() == 0:
                try:
                    seen = cls.history.setdefault(load_LE.shape, deque(maxlen=HISTORY))
                    seen.append(load_LE)
                    current_LP = None if old is None else old.cpu().numpy()
                    physical_LP = plan_online(
                        method, np.stack(seen), num_replicas, num_groups, num_nodes, num_ranks, current_LP
                    )
                    if current_LP is not None:
                        physical_LP = cls.preserve_intragpu_slots(physical_LP, num_ranks, current_LP)
                    answer = torch.from_numpy(np.ascontiguousarray(physical_LP, np.int64))
                except Exception as error:  # the other ranks wait for an answer: tell them first, then raise
                    problem = error
            if group is not None:
                torch.distributed.broadcast(answer, group=group, group_src=0)
            if problem is not None:
                raise problem
            if bool((answer < 0).any()):
                raise EquipoiseError("planning failed on the first rank; its log has the reason. The placement stays as it is.")
            return answer

    return EquipoiseOnline


def plan_online(
    method: str,
    load_SLE: Ints,
    slots: int,
    groups: int,
    nodes: int,
    ranks: int,
    current_LP: Ints | None = None,
) -> Ints:
    """A placement for the traffic of the last stretches.

    Args:
        method: a placement method.
        load_SLE: [S, L, E] tokens that each expert served in each stretch, oldest first.
        slots: P.
        groups: expert groups of the router.
        nodes: machines.
        ranks: R.
        current_LP: [L, P] the placement in force.

    Returns:
        [L, P] the expert of each physical slot, rank-major.
    """
    profile = _profile(load_SLE, groups)
    options: dict[str, Any] = {"slots": slots, "nodes": nodes}
    if current_LP is not None:
        options["current"] = rank_plan(profile, list(current_LP), ranks=ranks, nodes=nodes, method="vllm", options={})
    planned = slots_of(make_plan(profile, method, units=ranks, **options))
    if current_LP is None:
        return np.stack(planned)
    return np.stack(
        [_better(new, old, load_SLE[:, i], ranks) for i, (new, old) in enumerate(zip(planned, current_LP, strict=True))]
    )


def _better(new_P: Ints, old_P: Ints, load_SE: Ints, ranks: int) -> Ints:
    """The new placement of a layer if it is worth moving for, else the old one."""
    new, old = (float(rank_load(p, load_SE, ranks).max(-1).sum()) for p in (new_P, old_P))
    return new_P if new < (1 - LEAST_GAIN) * old else old_P


def _profile(load_SLE: Ints, groups: int) -> Profile:
    """The Profile of the last stretches, one scenario each."""
    stretches, layers, experts = load_SLE.shape
    counts = np.zeros((stretches, 2, layers, experts), np.int64)
    counts[:, 1] = load_SLE
    names: Sequence[str] = [f"stretch {i + 1}" for i in range(stretches)]
    facts = [LayerFacts(path=f"moe.{i}", model_layer=i, num_experts=experts, top_k=1, matrices=()) for i in range(layers)]
    return Profile(
        model=ModelFacts(
            name="vllm", model_type="unknown", dtype="bf16", fingerprint="online", layers=tuple(facts), expert_groups=groups
        ),
        source=Source(origin="vllm", scenarios=tuple(names)),
        counts=counts,
        gate_mass=np.zeros((stretches, layers, experts)),
        tokens=load_SLE[:, 0].sum(1),
        windows=np.zeros((0, layers, experts), np.int64),
        window_scenario=np.zeros(0, np.int64),
    )


def _planning_group() -> Any | None:
    """The process group of the ranks that must agree, or None when there is one rank."""
    import torch

    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    from vllm.distributed.parallel_state import get_eplb_group

    group = get_eplb_group().cpu_group
    return group if group.size() > 1 else None
