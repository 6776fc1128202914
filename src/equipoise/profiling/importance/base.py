"""What an importance estimator is, and the registry of them.

An estimator watches the tokens that reach each MoE layer during the one pass that counts the load (`observe`), may run
the model itself afterwards (`finish`), and hands its state over as arrays, so that an interrupted run can go on.

Shapes: L MoE layers, E logical experts of the widest layer, T real tokens of one forward pass, K top-k, D model width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.errors import EquipoiseError
from equipoise.models.layers import MoELayer
from equipoise.profiling.pass_sums import PassSums
from equipoise.profiling.resume import with_prefix, without_prefix
from equipoise.profiling.sequences import Batch
from equipoise.profiling.team import Team
from equipoise.registry import Registry

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Context:
    """What every estimator may know before the first token.

    Attributes:
        model: the model in evaluation mode.
        layers: its MoE layers.
        batches: the forward passes of the run, in order.
        precisions: storage formats to measure the error of.
        seed: of every random choice.
        team: the processes of the run; each observes other passes, and `finish` may divide its work among them.
    """

    model: Any
    layers: Sequence[MoELayer]
    batches: Sequence[Batch]
    precisions: tuple[str, ...] = ()
    seed: int = 0
    team: Team = field(default_factory=Team)

    @property
    def shape(self) -> tuple[int, int]:
        """(L, E): one score for each expert; layers with fewer than E experts leave the rest zero."""
        return len(self.layers), max(layer.num_experts for layer in self.layers)


@dataclass(frozen=True, eq=False)
class Observation:
    """The real tokens that reached one MoE layer in one forward pass.

    Attributes:
        step: index of the forward pass in the run.
        layer: where the tokens are.
        hidden: [T, D] input of the layer's experts.
        experts: [T, K] chosen experts; a value outside 0..num_experts-1 serves nothing (dropped, identity, absent).
        weights: [T, K] gate weights.
        residual: [T, D] the residual stream that enters the layer's block, before its norm; None unless an estimator asks
            for it (`needs_residual`).
    """

    step: int
    layer: MoELayer
    hidden: Any
    experts: Any
    weights: Any
    residual: Any = None


@dataclass(frozen=True, eq=False)
class Measured:
    """What an estimator adds to a profile: [L, E] scores, errors by precision and sensitivity, [L] energy, remarks.

    `by_scenario` holds the scores of each scenario alone, scenario -> [L, E], where the estimator keeps them apart.
    """

    importance: Floats | None = None
    output_error: Mapping[str, Floats] = field(default_factory=dict)
    output_energy: Floats | None = None
    sensitivity: Floats | None = None
    remarks: Mapping[str, Any] = field(default_factory=dict)
    by_scenario: Mapping[str, Floats] = field(default_factory=dict)


class Estimator:
    """Base of all estimators: keyword arguments of `__init__` are its options.

    What it must remember is kept in three places, so that a run can be interrupted, and divided among processes.

    Attributes:
        sums: arrays that are added up over processes: whole numbers, or entries that one pass alone fills.
        passes: sums of floating-point numbers over passes, in an order that does not depend on who ran which.
        results: what `finish` has done so far; NaN where it has not.
        needs_residual: whether observations must hold the residual stream.
    """

    needs_residual = False

    def __init__(self, context: Context) -> None:
        self.context = context
        self.sums: dict[str, NDArray[Any]] = {}
        self.passes = PassSums()
        self.results: dict[str, Floats] = {}

    def observe(self, seen: Observation) -> None:
        """Take in one layer's tokens of one forward pass."""

    def finish(self, load_LE: Ints, checkpoint: Callable[[], None], advance: Callable[[int, int], None]) -> Measured:
        """Scores from what was observed, by all processes: each calls it, with the same sums, and returns the same.

        Args:
            load_LE: [L, E] selections of the whole run; where calibration text was watched, those of the traffic, scaled to
                as many tokens.
            checkpoint: to be called where the state is consistent, if this takes long.
            advance: takes (done, total) units of work, if this takes long.
        """
        raise NotImplementedError

    def observed(self) -> dict[str, NDArray[Any]]:
        """What was observed, for `absorb`."""
        return with_prefix("sums/", self.sums) | with_prefix("passes/", self.passes.state_dict())

    def absorb(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Add what this process observed before an interruption, or what another did in other passes."""
        for name, array in without_prefix("sums/", state).items():
            self.sums[name] = self.sums[name] + array if name in self.sums else np.array(array)
        self.passes.absorb(without_prefix("passes/", state))

    def forget(self) -> None:
        """Begin anew, as if nothing had been observed; results stay."""
        self.sums, self.passes = {}, PassSums()


IMPORTANCE: Registry[type[Estimator]] = Registry("importance estimator")


def make_estimators(
    names: Sequence[str], context: Context, options: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Estimator]:
    """Estimators by name, each with its own options.

    Args:
        names: registered names; a repeated one counts once.
        context: what is measured.
        options: name -> keyword arguments of that estimator.

    Raises:
        EquipoiseError: unknown estimator, unknown option, or an option out of range.
    """
    options = options or {}
    idle = sorted(set(options) - set(names))
    if idle:
        raise EquipoiseError(
            f"options for '{idle[0]}', which is not among the estimators asked for: {', '.join(names) or 'none'}."
        )
    made: dict[str, Estimator] = {}
    for name in dict.fromkeys(names):
        estimator, given = IMPORTANCE.get(name), dict(options.get(name, {}))
        allowed = [p for p in inspect.signature(estimator).parameters if p != "context"]
        unknown = sorted(set(given) - set(allowed))
        if unknown:
            raise EquipoiseError(f"'{name}' has no option '{unknown[0]}'; it has: {', '.join(allowed) or 'none'}.")
        made[name] = estimator(context, **given)
    return made


def check_choice(estimator: str, option: str, given: object, allowed: Sequence[str]) -> None:
    """Raise `EquipoiseError` when an option is not one of the allowed words."""
    if given not in allowed:
        raise EquipoiseError(f"{estimator}: {option} is '{given}'; allowed: {', '.join(allowed)}.")
