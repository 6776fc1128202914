"""An alternative to the plan in force, tried on steps that it was not chosen on: what keeping the plan in force has cost.

Shapes: L MoE layers, E logical experts of the widest layer.
"""

from __future__ import annotations

import math

import numpy as np

from equipoise.artifacts import Plan
from equipoise.planning.streaming.decision import Costs, Floats, Load, fullest, moving_cost


class Trial:
    """An alternative and the regret, in selections, of not having had it in force; or a pause without an alternative.

    Attributes:
        plan: the alternative; None when there was none to try.
        chosen_for: [L, E] load that it was chosen for, and [L] its effective selections.
        chosen_on: steps that it was chosen on.
        tried: steps since.
    """

    def __init__(self, plan: Plan | None, chosen_for: tuple[Floats, Floats], chosen_on: int) -> None:
        """Not tried yet; arguments as the attributes."""
        self.plan, self.chosen_for, self.chosen_on, self.tried = plan, chosen_for, chosen_on, 0
        self._less: list[float] = []
        self._error_of_one = 0.0

    @property
    def over(self) -> bool:
        """Whether it was tried on as many steps as it was chosen on."""
        return self.tried >= self.chosen_on

    @property
    def regret(self) -> float:
        """Selections that the fullest units would have had less, all steps together."""
        return math.fsum(self._less)

    @property
    def error(self) -> float:
        """Standard error of the regret, in selections: from how steps differ, and of a single step from how counts do."""
        tried = len(self._less)
        return float(np.std(self._less, ddof=1)) * math.sqrt(tried) if tried > 1 else self._error_of_one

    def serve(self, load_LE: Load, plan: Plan, scatter: float) -> None:
        """Count a step that was served under the plan in force.

        Args:
            load_LE: [L, E] selections.
            plan: in force.
            scatter: how much more counts of this traffic differ than independent draws would; their variance over their mean.
        """
        self.tried += 1
        if self.plan is None:
            return
        before, after = fullest(plan, load_LE), fullest(self.plan, load_LE)
        self._less.append(before - after)
        self._error_of_one = math.sqrt(scatter * (before + after))

    def pays(self, plan: Plan, costs: Costs, odds: float) -> bool:
        """Whether the regret, less its standard error, is more than `odds` times what changing from the plan in force costs."""
        if self.plan is None:
            return False
        return (self.regret - self.error) * costs.per_selection > odds * moving_cost(plan, self.plan, costs)

    def standing(self, plan: Plan, costs: Costs) -> str:
        """How the trial stands, in words."""
        if self.plan is None:
            return "no other slots would serve better"
        lost, error, cost = (
            self.regret * costs.per_selection,
            self.error * costs.per_selection,
            moving_cost(plan, self.plan, costs),
        )
        return f"{lost:.3g} +- {error:.2g} s lost in {self.tried} steps, a change costs {cost:.3g} s"
