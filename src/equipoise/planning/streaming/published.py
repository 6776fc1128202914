"""The streaming forms of Replicate-and-Quantize as published: the copy follows the heaviest expert.

Shapes: L MoE layers, E logical experts of a layer.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from equipoise.artifacts import LayerPlan, Plan
from equipoise.errors import PlanError
from equipoise.planning.streaming.decision import Costs, Decision, Load, decision
from equipoise.precisions import precision


class Published:
    """The paper's streaming form (R&Q, arXiv:2602.19938, section on streaming and Figure 8).

    At each step the one copy of a layer becomes that of its heaviest expert; the quantized experts stay as they were chosen
    beforehand. Where the heaviest expert is the one that the copy shares its unit with, the next takes its place: a copy there
    would relieve nothing. The paper weighs no cost.
    """

    def __init__(self, *, history: bool, copy_share: float = 0.5) -> None:
        """A policy without memory yet.

        Args:
            history: count all steps so far ("Option 1"); else the last step alone ("Option 2").
            copy_share: of the heaviest expert's tokens that the copy serves; the paper does not say, 0.5 is even.
        """
        self._history, self._share = history, copy_share
        self._load: NDArray[np.int64] | None = None

    def decide(self, load_LE: Load, plan: Plan, costs: Costs) -> Decision:
        """The heaviest expert of every layer gets the copy.

        Raises:
            PlanError: the plan is not of the published form, one copy a layer.
        """
        begun = time.perf_counter()
        seen = np.asarray(load_LE, np.int64)
        self._load = seen if self._load is None or not self._history else self._load + seen
        layers = tuple(
            self._layer(columns, self._load[i, : facts.num_experts], i)
            for i, (columns, facts) in enumerate(zip(plan.layers, plan.model.layers, strict=True))
        )
        return decision(plan, layers, costs, "the heaviest experts have changed", begun)

    def _layer(self, columns: LayerPlan, load_E: NDArray[np.int64], layer: int) -> LayerPlan:
        copies = columns.num_slots - len(set(columns.experts))
        if copies == 0 or not load_E.any():
            return columns
        if copies > 1:
            raise PlanError(
                f"layer {layer} of the plan has {copies} copies; the published streaming form has one a layer: plan with "
                "'rq-paper', or stream with the policy 'adaptive'."
            )
        often = np.bincount(columns.experts, minlength=len(load_E))
        # Of the two slots, the copy is that of fewer bits, the later of equals.
        pair = [slot for slot, expert in enumerate(columns.experts) if often[expert] > 1]
        copy = min(pair, key=lambda slot: (precision(columns.precisions[slot]).bits, -slot))
        beside = {e for slot, e in enumerate(columns.experts) if columns.units[slot] == columns.units[copy] and slot != copy}
        heaviest = next((int(e) for e in np.argsort(-load_E, kind="stable") if e not in beside), columns.experts[copy])
        experts = tuple(heaviest if slot == copy else e for slot, e in enumerate(columns.experts))
        if experts == columns.experts:
            return columns
        shares = tuple(
            self._share if slot == copy else 1.0 - self._share if e == heaviest else 1.0 for slot, e in enumerate(experts)
        )
        return columns.model_copy(update={"experts": experts, "shares": shares})
