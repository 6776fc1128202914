"""What a new placement costs to reach from the one in force: ranks renamed and slots kept so that little moves, and bytes.

Ranks of one node, and nodes, are alike: naming them anew changes no load, but what has to be sent.
Shapes: P physical slots of a layer, R ranks, N nodes, E logical experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from equipoise.artifacts import Plan
from equipoise.errors import PlanError
from equipoise.precisions import precision

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def keep_slots(physical_P: Ints, current_P: Ints, ranks: int) -> Ints:
    """The same placement with experts that stay on their rank in the slot they had; newcomers fill the rest in order.

    Args:
        physical_P: [P] new placement.
        current_P: [P] placement in force; where it has another number of slots, nothing is kept.
        ranks: R.
    """
    if len(physical_P) != len(current_P):
        return physical_P
    result = np.full_like(physical_P, -1).reshape(ranks, -1)
    for row, new, old in zip(result, physical_P.reshape(ranks, -1), current_P.reshape(ranks, -1), strict=True):
        rest = new.tolist()
        for slot, expert in enumerate(old.tolist()):
            if expert in rest:
                rest.remove(expert)
                row[slot] = expert
        row[row < 0] = rest
    return result.reshape(-1)


def rename_ranks(physical_P: Ints, current_P: Ints, ranks: int, nodes: int = 1) -> Ints:
    """The same placement with ranks within nodes, and nodes, named so that fewest slots move; staying experts keep slots.

    An assignment problem per pair of nodes, then one over nodes: the optimum over all such names.

    Args:
        physical_P: [P] new placement.
        current_P: [P'] placement in force; P' may differ.
        ranks: R.
        nodes: N.
    """
    experts = int(max(physical_P.max(), current_P.max())) + 1
    new_RK, old_RK = physical_P.reshape(ranks, -1), current_P.reshape(ranks, -1)
    holds_new, holds_old = np.zeros((ranks, experts)), np.zeros((ranks, experts))
    holds_new[np.arange(ranks)[:, None], new_RK] = 1
    holds_old[np.arange(ranks)[:, None], old_RK] = 1
    stays = (holds_new @ holds_old.T).reshape(nodes, ranks // nodes, nodes, ranks // nodes)
    kept_NN, names = np.zeros((nodes, nodes)), {}
    for a in range(nodes):
        for b in range(nodes):
            row, column = linear_sum_assignment(stays[a, :, b], maximize=True)
            kept_NN[a, b], names[a, b] = stays[a, row, b, column].sum(), column
    result = np.empty_like(new_RK)
    for a, b in zip(*linear_sum_assignment(kept_NN, maximize=True), strict=True):
        result[b * (ranks // nodes) + names[a, b]] = new_RK.reshape(nodes, ranks // nodes, -1)[a]
    return keep_slots(result.reshape(-1), current_P, ranks)


def traffic(before: Plan, after: Plan) -> tuple[Ints, Ints]:
    """Bytes of expert weights that every rank receives and sends to get from one plan to another.

    A rank fetches an expert that it did not hold from one of the ranks that held it, the one that has sent least so far.

    Args:
        before: the plan in force.
        after: the new plan, of the same model on as many ranks.

    Returns:
        [R] bytes received and [R] bytes sent.

    Raises:
        PlanError: plans of different models or ranks, or the sizes of experts are not known.
    """
    before.check_model(after.model)
    if before.units != after.units:
        raise PlanError(f"plans for {before.units} and {after.units} ranks cannot be compared; plan for as many.")
    if not after.model.sized:
        raise PlanError(
            "the sizes of the experts are not known, so bytes cannot be counted; give the model's config.json (--config)."
        )
    received, sent = np.zeros(after.units, np.int64), np.zeros(after.units, np.int64)
    for old, new, facts in zip(before.layers, after.layers, after.model.layers, strict=True):
        held = list(dict.fromkeys(zip(old.experts, old.units, old.precisions, strict=True)))
        here = set(held)
        hosts: dict[int, list[int]] = {}
        for expert, unit, _ in held:
            hosts.setdefault(expert, []).append(unit)
        for expert, unit, form in dict.fromkeys(zip(new.experts, new.units, new.precisions, strict=True)):
            if (expert, unit, form) in here:
                continue
            size = facts.expert_bytes(precision(form))
            source = min(hosts[expert], key=lambda rank: int(sent[rank]))
            received[unit] += size
            sent[source] += size
    return received, sent


@dataclass(frozen=True, slots=True)
class PayBack:
    """Whether changing plans is worth its transfer. Computed from what the caller stated, not measured.

    Attributes:
        steps: until the next change of plan.
        seconds_saved: per step.
        bytes_moved: over all ranks.
        bytes_busiest: received or sent by the rank that has most to do; ranks transfer at the same time.
        seconds_to_move: of that rank over the link, all other work standing still.
    """

    steps: int
    seconds_saved: float
    bytes_moved: int
    bytes_busiest: int
    seconds_to_move: float

    @property
    def net_seconds(self) -> float:
        """Seconds won until the next change, the transfer deducted."""
        return self.steps * self.seconds_saved - self.seconds_to_move

    @property
    def pays(self) -> bool:
        """Whether anything is won."""
        return self.net_seconds > 0

    @property
    def break_even_steps(self) -> float:
        """Steps after which the transfer is paid back; infinite when a step is no shorter."""
        if self.seconds_to_move == 0:
            return 0.0
        return self.seconds_to_move / self.seconds_saved if self.seconds_saved > 0 else math.inf

    def __str__(self) -> str:
        """One sentence for people."""
        verdict = "pays" if self.pays else "does not pay"
        return (
            f"changing {verdict}: {self.seconds_saved * 1e3:.3g} ms saved per step x {self.steps} steps against "
            f"{self.bytes_busiest} bytes at the busiest rank ({self.seconds_to_move:.3g} s); even after "
            f"{self.break_even_steps:.0f} steps"
        )


def pay_back(
    before: Plan, after: Plan, *, seconds_before: float, seconds_after: float, steps: int, bytes_per_second: float
) -> PayBack:
    """Gain per step times steps until the next plan, against the bytes moved over a link.

    Args:
        before: the plan in force.
        after: the new plan.
        seconds_before: time of one step under the plan in force: measured, simulated, or from `step_seconds`.
        seconds_after: time of one step under the new plan, by the same means.
        steps: until the plan is next changed.
        bytes_per_second: of the link of one rank, in each direction.

    Raises:
        PlanError: a number out of range, plans that do not go together, or unknown sizes of experts.
    """
    if steps < 0 or not bytes_per_second > 0:
        raise PlanError(
            f"steps {steps}, bytes_per_second {bytes_per_second} given; allowed are steps from 0 and a link above 0."
        )
    received, sent = traffic(before, after)
    busiest = int(max(received.max(), sent.max()))
    return PayBack(steps, seconds_before - seconds_after, int(received.sum()), busiest, busiest / bytes_per_second)


def step_seconds(plan: Plan, load_SLE: NDArray[np.generic], balanced_seconds: float) -> float:
    """Time of the expert layers in one step, if it follows the slowest rank's tokens; the mean over scenarios.

    Args:
        plan: where the slots are.
        load_SLE: [S, L, E] load of each scenario; better of traffic that the plan was not made from.
        balanced_seconds: time of the expert layers in one step if all ranks had the same load.
    """
    ratio_SL = np.stack([plan.lis(load_LE) for load_LE in load_SLE])
    return balanced_seconds * float(np.where(np.isnan(ratio_SL), 1.0, ratio_SL).mean())
