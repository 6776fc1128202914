"""What a report is about: one model's profile, plans, evaluation and frontier, whichever there are, checked to belong together.

Shapes: S scenarios, L MoE layers, E logical experts of the widest layer, U units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from equipoise.artifacts import Evaluation, ModelFacts, Plan, Profile
from equipoise.errors import EquipoiseError
from equipoise.metrics import lis
from equipoise.reporting.frontier_points import FrontierPoint

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Evidence:
    """The values of one report.

    Attributes:
        profile: what was measured, or None.
        plans: name -> plan, in the order in which they are compared.
        evaluation: what was proved, or None.
        frontier: the points of `equipoise frontier --json`; empty when there are none.
        files: name of a plan, or "profile", "evaluation", "frontier" -> file, for commands to run next.
        models: name of an evaluated model -> directory that holds it, for those that are known to be there.
    """

    profile: Profile | None = None
    plans: Mapping[str, Plan] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    frontier: Sequence[FrontierPoint] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.profile is None and not self.plans and self.evaluation is None:
            raise EquipoiseError("nothing to report; give a profile, plans or an evaluation.")
        model = self.model
        for plan in self.plans.values():
            plan.require_all_experts("reported beside the whole model's traffic")
            if self.profile is not None:
                plan.check_profile(self.profile)
            elif model is not None:
                plan.check_model(model)
        if model is not None and self.evaluation is not None and self.evaluation.base_fingerprint != model.fingerprint:
            raise EquipoiseError(
                f"the evaluation is of '{self.evaluation.base}' ({self.evaluation.base_fingerprint[:12]}), the profile or plan "
                f"of '{model.name}' ({model.fingerprint[:12]}); give values of one model."
            )

    @property
    def model(self) -> ModelFacts | None:
        """The model, as the profile or the first plan knows it; None when an evaluation is all there is."""
        if self.profile is not None:
            return self.profile.model
        return next((plan.model for plan in self.plans.values()), None)

    @property
    def name(self) -> str:
        """The model as the user named it."""
        if self.model is not None:
            return self.model.name
        assert self.evaluation is not None, "a report has at least one value"
        return self.evaluation.base

    @cached_property
    def layer_labels(self) -> tuple[str, ...]:
        """[L] the model's own number of each MoE layer, with its stack where there are two."""
        assert self.model is not None, "labels need a profile or a plan"
        layers = self.model.layers
        both = len({layer.stack for layer in layers}) > 1
        return tuple((f"{layer.stack[:3]} " if both else "") + str(layer.model_layer) for layer in layers)

    @property
    def widths(self) -> NDArray[np.int64]:
        """[L] routed experts of each layer."""
        assert self.model is not None, "widths need a profile or a plan"
        return np.array([layer.num_experts for layer in self.model.layers], np.int64)

    def best_plan(self) -> tuple[str, Plan] | None:
        """The plan that leaves the least of the imbalance among those that fit their units; None without plans.

        Where none fits, it is chosen among all.
        """
        if not self.plans:
            return None
        fitting = [item for item in self.plans.items() if item[1].predicted is None or item[1].predicted.overrun_bytes == 0]
        return min(fitting or list(self.plans.items()), key=lambda item: self._score(item[1]))

    def _score(self, plan: Plan) -> float:
        """Part of the imbalance that a plan leaves, since plans may be for different numbers of units."""
        if self.profile is not None:
            before = mean(raw_lis(self.profile.load, self.widths, plan.units))
            return (mean(plan.lis(self.profile.load)) - 1) / max(before - 1, 1e-12)
        return plan.predicted.lis if plan.predicted is not None else float("inf")

    def plan_of(self, contender: str, method: str) -> Plan | None:
        """The plan of an evaluated model: of the same name, else the only one of its method.

        Names agree as the commands make them: method "rq:even" has the file "rq-even.plan.json", and plan "rq" the directory
        "rq-model".
        """
        name = Path(contender).name.replace(":", "-")
        for candidate in (contender, name, name.removesuffix("-model")):
            if candidate in self.plans:
                return self.plans[candidate]
        same = [plan for plan in self.plans.values() if plan.method == method]
        return same[0] if len(same) == 1 else None


def is_placement(plan: Plan) -> bool:
    """Whether a plan places experts on ranks, with a forecast for every layer."""
    return plan.predicted is not None and bool(plan.predicted.layers)


def as_it_is(load_LE: ArrayLike, widths_L: ArrayLike, units: int) -> Floats:
    """[..., L, U] load of each unit without a plan: expert e of a layer of E on unit e * U // E."""
    load, widths = np.asarray(load_LE, np.float64), np.asarray(widths_L, np.int64)
    out = np.zeros((*load.shape[:-1], units))
    for layer, width in enumerate(widths):
        on_unit_EU = np.arange(width)[:, None] * units // width == np.arange(units)
        out[..., layer, :] = load[..., layer, :width] @ on_unit_EU
    return out


def raw_lis(load_LE: ArrayLike, widths_L: ArrayLike, units: int) -> Floats:
    """[..., L] LIS over units of the model as it is."""
    return lis(as_it_is(load_LE, widths_L, units))


def heaviest_slot(plan: Plan, load_LE: ArrayLike) -> Floats:
    """[L, E] tokens that the busiest slot of each expert serves under a plan; zero in experts that do not exist."""
    load = np.asarray(load_LE, np.float64)
    out = np.zeros(load.shape)
    for i, layer in enumerate(plan.layers):
        np.maximum.at(out[i], list(layer.experts), layer.slot_load(load[i]))
    return out


def mean(values: ArrayLike) -> float:
    """Mean of what is known; nan when nothing is."""
    known = np.asarray(values, np.float64)
    known = known[np.isfinite(known)]
    return float(known.mean()) if known.size else float("nan")
