"""The adaptive streaming policy: other slots when what they save until the load changes again exceeds what they cost.

Shapes: N steps of a window, L MoE layers, E logical experts of the widest layer, P slots of a layer, Q precisions.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from equipoise.artifacts import LayerPlan, Plan, Profile
from equipoise.errors import PlanError
from equipoise.planning.budget import Budget, make_budget
from equipoise.planning.streaming.decision import Costs, Decision, Floats, Load, decision
from equipoise.planning.streaming.drift import Dwell, Window, scatter
from equipoise.planning.streaming.reassign import LayerTask, Stop, path
from equipoise.precisions import precision

FEW = 3
"""Steps of a window from which on their own scatter is taken for the error of a mean over them."""


class Adaptive:
    """Changes slots when what that saves until the load changes again is more than what it costs.

    A sliding window of steps with decay; a change of traffic empties it. New slots are looked for when the window is further
    from the load that was last planned for than chance explains, or knows twice as much of it. For each layer the best stop
    on a path of changes is chosen by `saved seconds * expected dwell - seconds of moving`; all layers together must also pay
    for the swap.
    """

    def __init__(
        self,
        *,
        window: Window | None = None,
        budget: Budget | None = None,
        profile: Profile | None = None,
        error_bound: float = float("inf"),
        drift: float = 2.0,
        most_moves: int = 64,
        doubt: float = 2.0,
        margin: float = 2.0,
        prior_dwell: float = 16.0,
    ) -> None:
        """A policy without memory yet.

        Args:
            window: of what was served.
            budget: errors of all choices, as measured on the profile; without it the error is not looked at.
            profile: that the errors are of, whose load they are scaled from.
            error_bound: most relative RMS error of the layers' routed output under the window's load. Where the plan in force
                exceeds it already, as it may after a change of traffic, new slots must not add to it.
            drift: how many times further than chance explains the window must be from the load last planned for.
            most_moves: slots of one layer that may change at once.
            doubt: standard errors over the window's steps that are deducted from what a change saves.
            margin: how many times its cost a change must save to be made, for what is saved is only expected.
            prior_dwell: steps that a change is thought to be in force before there was one.

        Raises:
            PlanError: a number out of range, or errors without the profile that they are of.
        """
        if not drift > 0 or min(most_moves, doubt, error_bound) < 0 or margin < 1:
            raise PlanError(
                f"drift {drift}, most_moves {most_moves}, doubt {doubt}, error_bound {error_bound}, margin {margin} given; "
                "allowed are a drift above 0, a margin from 1, the others from 0."
            )
        if (budget is None) != (profile is None):
            raise PlanError("errors and the profile that they are of go together; give both or neither.")
        self.window = window or Window()
        self._budget, self._profile, self._bound = budget, profile, error_bound
        self._drift, self._most, self._doubt, self._margin = drift, most_moves, doubt, margin
        self._planned: tuple[Floats, Floats] | None = None if profile is None else _own(profile)
        self._checked = self._planned
        self._proposed: Plan | None = None
        self._own = Dwell(prior_dwell)

    @property
    def dwell(self) -> float:
        """Steps that a change is expected to be in force: until traffic changes, or this policy changes the plan again."""
        return min(self.window.dwell, self._own.expected)

    def decide(self, load_LE: Load, plan: Plan, costs: Costs) -> Decision:
        """Other slots where they pay."""
        begun = time.perf_counter()
        window = self.window
        changed = window.add(np.asarray(load_LE, np.int64))
        self._own.step()
        if self._planned is None or self._checked is None:
            self._planned = self._checked = window.load, window.size
        refused = self._proposed is not None and plan.layers != self._proposed.layers
        self._proposed = None
        bits = window.drift(*self._planned)[0]
        ratio = window.drift(*self._checked)[1]
        learned = float(window.size.sum()) >= 2 * float(self._checked[1].sum())
        kept = Decision(None, "the load is as planned for", bits, changed, dwell=self.dwell)
        if not (changed or learned or refused or ratio > self._drift):
            return replace(kept, seconds=time.perf_counter() - begun)
        self._checked = window.load, window.size
        stops = self._choose(plan, costs)
        layers = tuple(
            columns.model_copy(update={"experts": tuple(s.experts.tolist()), "shares": tuple(s.shares.tolist())})
            if changes
            else columns
            for columns, (s, changes, _) in zip(plan.layers, stops, strict=True)
        )
        saved = sum(won for _, changes, won in stops if changes)
        made = decision(plan, layers, costs, f"drift {bits:.4f} bits, {ratio:.1f} x chance", begun)
        made = replace(made, drift=bits, changed=changed, saved=saved, dwell=self.dwell)
        short = self._margin * made.cost - made.saved * made.dwell
        if made.plan is None or short >= 0:
            why = "no other slots pay" if made.plan is None else f"{short:.3g} s short of paying"
            return replace(made, plan=None, reason=f"{made.reason}; {why}", seconds=time.perf_counter() - begun)
        self._planned, self._proposed = self._checked, made.plan
        self._own.change()
        return replace(made, seconds=time.perf_counter() - begun)

    def _choose(self, plan: Plan, costs: Costs) -> list[tuple[Stop, bool, float]]:
        """For each layer its stop, whether that is a change, and the seconds a step that it saves."""
        error_LEQ = self._errors(plan)
        chosen: list[tuple[Stop, bool, float]] = []
        worse: list[tuple[float, float, int, Stop, float]] = []
        total = 0.0
        for layer, columns in enumerate(plan.layers):
            task = self._task(plan, layer)
            stops = path(task, self._most)
            size_P = columns.slot_bytes(plan.model.layers[layer])
            kinds = _kinds(columns, error_LEQ, self._budget)
            here = [_error(stop, kinds, error_LEQ, layer) for stop in stops]
            total += here[0]
            saved = [self._saved(task, stops[0], stop) * costs.per_selection for stop in stops]
            net = [
                won * self.dwell - int(size_P[list(s.moved)].sum()) * costs.per_byte
                for won, s in zip(saved, stops, strict=True)
            ]
            free = max((i for i in range(len(stops)) if here[i] <= here[0] + 1e-12), key=lambda i: net[i])
            chosen.append((stops[free], free > 0 and net[free] > 0, saved[free]))
            if chosen[-1][1]:
                total += here[free] - here[0]
            best = max(range(len(stops)), key=lambda i: net[i])
            if net[best] > max(net[free], 0.0):
                added = here[best] - (here[free] if chosen[-1][1] else here[0])
                worse.append((added / (net[best] - max(net[free], 0.0)), added, layer, stops[best], saved[best]))
        # Stops that add to the error, those that add least for what they win first, while the bound allows.
        bound = self._bound**2 * len(plan.layers)
        for _, added, layer, stop, won in sorted(worse, key=lambda entry: entry[0]):
            if total + added <= bound:
                total += added
                chosen[layer] = (stop, True, won)
        return chosen

    def _task(self, plan: Plan, layer: int) -> LayerTask:
        columns = plan.layers[layer]
        names = sorted({precision(name).name for name in columns.precisions})
        return LayerTask(
            experts=np.array(columns.experts),
            shares=np.array(columns.shares),
            units_P=np.array(columns.units),
            kinds=np.array([names.index(precision(name).name) for name in columns.precisions]),
            units=plan.units,
            loads=self.window.loads[:, layer, : plan.model.layers[layer].num_experts],
            weights=self.window.weights,
            least_loaded=plan.dispatch == "least_loaded",
        )

    def _saved(self, task: LayerTask, before: Stop, after: Stop) -> float:
        """Selections that the fullest unit has less in a step: the window's weighted mean, less some standard errors."""
        less_N, weight_N = before.peaks - after.peaks, task.weights / task.weights.sum()
        mean = float(weight_N @ less_N)
        if len(less_N) < FEW:
            # Too few to see how they scatter: as counts do, times what this traffic scatters more.
            variance = self.window.scatter * float(weight_N @ (before.peaks + after.peaks))
        else:
            variance = float(weight_N @ (less_N - mean) ** 2)
        return mean - self._doubt * float(np.sqrt(variance * (weight_N @ weight_N)))

    def _errors(self, plan: Plan) -> Floats | None:
        """[L, E, Q] squared error that each choice brings under the window's load; None when errors are not looked at."""
        if self._budget is None or self._profile is None:
            return None
        plan.check_model(self._profile.model)
        now, then = self.window.load, self._profile.load.astype(np.float64)
        now = now / np.maximum(now.sum(1, keepdims=True), 1.0)
        then = np.maximum(then, 1.0) / np.maximum(then.sum(1, keepdims=True), 1.0)
        return np.asarray(self._budget.errors * (now / then)[:, :, None])


def adaptive(profile: Profile | None = None, plan: Plan | None = None, *, error_bound: float | None = None) -> Adaptive:
    """The adaptive policy with what a profile knows: how the load scatters, and what each precision of an expert does.

    Args:
        profile: that the plan was made from.
        plan: its precisions are those that errors are looked up for.
        error_bound: as `Adaptive`; that of the plan's method when omitted, none if it had none.

    Raises:
        PlanError: the plan is of another model than the profile.
    """
    if profile is None or plan is None:
        return Adaptive()
    plan.check_profile(profile)
    window = Window(prior_scatter=scatter(profile.windows, profile.window_scenario))
    names = sorted({precision(name).name for layer in plan.layers for name in layer.precisions})
    bound = plan.options.get("error_bound", float("inf")) if error_bound is None else error_bound
    return Adaptive(
        window=window, budget=make_budget(profile, plan.units, names, 64.0), profile=profile, error_bound=float(bound)
    )  # fmt: skip


def _own(profile: Profile) -> tuple[Floats, Floats]:
    load = profile.load.astype(np.float64)
    return load, load.sum(1)


def _kinds(columns: LayerPlan, error_LEQ: Floats | None, budget: Budget | None) -> NDArray[np.int64]:
    """[P] index of each slot's precision among the budget's."""
    if error_LEQ is None or budget is None:
        return np.zeros(columns.num_slots, np.int64)
    index = {form.name: q for q, form in enumerate(budget.precisions)}
    return np.array([index[precision(name).name] for name in columns.precisions])


def _error(stop: Stop, kind_P: NDArray[np.int64], error_LEQ: Floats | None, layer: int) -> float:
    """Squared relative error of the layer's routed output."""
    return 0.0 if error_LEQ is None else float((stop.shares * error_LEQ[layer, stop.experts, kind_P]).sum())
