"""The adaptive streaming policy: other slots once keeping those in force has cost more than changing them would.

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
from equipoise.planning.streaming.decision import Costs, Decision, Floats, Load, decision, with_layers
from equipoise.planning.streaming.drift import Window, scatter
from equipoise.planning.streaming.reassign import LayerTask, Stop, path
from equipoise.planning.streaming.trial import Trial
from equipoise.precisions import precision


class Adaptive:
    """Changes slots when not having changed them has cost more than the change costs.

    A sliding window of steps with decay; a change of traffic empties it. For each layer the best stop on a path of changes is
    chosen on the window, by `seconds saved in as many steps again - seconds of moving`. The alternative that they make is then
    tried on steps that it was not chosen on: what the plan in force takes longer in them is its regret. When the regret, less
    one standard error, exceeds `odds` times the cost of moving and of the swap, the alternative is put in force. An alternative
    that was tried on as many steps as it was chosen on, and has not come so far, gives way to another, chosen on all of them.

    To wait until what was lost equals the price is the rule of ski rental (Karlin, Manasse, Rudolph and Sleator, "Competitive
    snoopy caching", Algorithmica 3, 1988): but for the standard error, one change between two plans costs at most 1 + `odds`
    times what foreknowledge would. That the steps of the trial are others than those of the choice keeps the best of many
    candidates from being judged by the luck that made it look best.
    """

    def __init__(
        self,
        *,
        window: Window | None = None,
        budget: Budget | None = None,
        profile: Profile | None = None,
        error_bound: float = float("inf"),
        most_moves: int = 64,
        odds: float = 2.0,
    ) -> None:
        """A policy without memory yet.

        Args:
            window: of what was served.
            budget: errors of all choices, as measured on the profile; without it the error is not looked at.
            profile: that the errors are of, whose load they are scaled from.
            error_bound: most relative RMS error of the layers' routed output under the window's load. Where the plan in force
                exceeds it already, as it may after a change of traffic, new slots must not add to it.
            most_moves: slots of one layer that may change at once.
            odds: how many times its cost the regret must exceed. What has lasted for some steps, at a moment like any other,
                lasts for x times as many again with probability 1 / (1 + x); a change then earns its cost back with odds of
                at least `odds` to 1.

        Raises:
            PlanError: a number out of range, or errors without the profile that they are of.
        """
        if min(most_moves, error_bound) < 0 or not odds > 0:
            raise PlanError(
                f"most_moves {most_moves}, error_bound {error_bound}, odds {odds} given; allowed are odds above 0, the others "
                "from 0."
            )
        if (budget is None) != (profile is None):
            raise PlanError("errors and the profile that they are of go together; give both or neither.")
        self.window = window or Window()
        self._budget, self._profile, self._bound = budget, profile, error_bound
        self._most, self._odds = most_moves, odds
        self._planned: tuple[Floats, Floats] | None = None if profile is None else _own(profile)
        self._trial: Trial | None = None

    def decide(self, load_LE: Load, plan: Plan, costs: Costs) -> Decision:
        """Other slots where keeping those in force has cost more."""
        begun = time.perf_counter()
        window = self.window
        changed = window.add(np.asarray(load_LE, np.int64))
        if self._planned is None:
            self._planned = window.load, window.size
        bits, ratio = window.drift(*self._planned)
        trial = self._advance(plan, costs, changed)
        reason = f"drift {bits:.4f} bits, {ratio:.1f} x chance; {trial.standing(plan, costs)}"
        if trial.plan is None or not trial.pays(plan, costs, self._odds):
            return Decision(None, reason, bits, changed, seconds=time.perf_counter() - begun)
        made = decision(plan, trial.plan.layers, costs, reason, begun)
        saved = trial.regret / trial.tried * costs.per_selection
        return replace(made, drift=bits, changed=changed, saved=saved, dwell=float(trial.tried))

    def _advance(self, plan: Plan, costs: Costs, changed: bool) -> Trial:
        """The trial after the latest step: the one that was under way, or another where it is over."""
        window, trial = self.window, self._trial
        load_LE = window.loads[-1]
        if trial is not None and trial.plan is not None and trial.plan.layers == plan.layers:
            # It came into force, and is left alone for as many steps as it was chosen and tried on.
            self._planned = trial.chosen_for
            trial = Trial(None, trial.chosen_for, len(window.loads) - 1)
        if changed:
            trial = None
        elif trial is not None:
            trial.serve(load_LE, plan, window.scatter)
        if trial is None or (trial.over and not trial.pays(plan, costs, self._odds)):
            trial = Trial(self._alternative(plan, costs), (window.load, window.size), len(window.loads))
            if changed:
                # The step that showed the change was itself served worse than it could have been.
                trial.serve(load_LE, plan, window.scatter)
        self._trial = trial
        return trial

    def _alternative(self, plan: Plan, costs: Costs) -> Plan | None:
        """What the window says would be better; None when nothing would."""
        layers = tuple(
            columns
            if stop is None
            else columns.model_copy(update={"experts": tuple(stop.experts.tolist()), "shares": tuple(stop.shares.tolist())})
            for columns, stop in zip(plan.layers, self._choose(plan, costs), strict=True)
        )
        return None if layers == plan.layers else with_layers(plan, layers)

    def _choose(self, plan: Plan, costs: Costs) -> list[Stop | None]:
        """For each layer what its slots should hold; None where they stay."""
        error_LEQ = self._errors(plan)
        chosen: list[Stop | None] = []
        worse: list[tuple[float, float, int, Stop]] = []
        total, horizon = 0.0, len(self.window.loads)
        for layer, columns in enumerate(plan.layers):
            task = self._task(plan, layer)
            stops = path(task, self._most)
            size_P = columns.slot_bytes(plan.model.layers[layer])
            kinds = _kinds(columns, error_LEQ, self._budget)
            here = [_error(stop, kinds, error_LEQ, layer) for stop in stops]
            less = [float(task.weights @ (stops[0].peaks - stop.peaks)) / float(task.weights.sum()) for stop in stops]
            # What lasted so long is expected to last as long again.
            net = [
                won * costs.per_selection * horizon - int(size_P[list(stop.moved)].sum()) * costs.per_byte
                for won, stop in zip(less, stops, strict=True)
            ]
            free = max((i for i in range(len(stops)) if here[i] <= here[0] + 1e-12), key=lambda i: net[i])
            best = max(range(len(stops)), key=lambda i: net[i])
            chosen.append(stops[free] if net[free] > 0 else None)
            total += here[free]
            if net[best] > net[free]:
                added = here[best] - here[free]
                worse.append((added / (net[best] - net[free]), added, layer, stops[best]))
        # Stops that add to the error, those that add least for what they win first, while the bound allows.
        bound = self._bound**2 * len(plan.layers)
        for _, added, layer, stop in sorted(worse, key=lambda entry: entry[0]):
            if total + added <= bound:
                total += added
                chosen[layer] = stop
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
