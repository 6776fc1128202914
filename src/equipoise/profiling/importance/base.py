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
from equipoise.profiling.sequences import Batch
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
    """

    model: Any
    layers: Sequence[MoELayer]
    batches: Sequence[Batch]
    precisions: tuple[str, ...] = ()
    seed: int = 0

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
    """

    step: int
    layer: MoELayer
    hidden: Any
    experts: Any
    weights: Any


@dataclass(frozen=True, eq=False)
class Measured:
    """What an estimator adds to a profile: [L, E] scores, [L, E] errors by precision, [L] energy and sensitivity, remarks."""

    importance: Floats | None = None
    output_error: Mapping[str, Floats] = field(default_factory=dict)
    output_energy: Floats | None = None
    sensitivity: Floats | None = None
    remarks: Mapping[str, Any] = field(default_factory=dict)


class Estimator:
    """Base of all estimators: keyword arguments of `__init__` are its options; public arrays live in `sums`."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.sums: dict[str, Floats] = {}

    def observe(self, seen: Observation) -> None:
        """Take in one layer's tokens of one forward pass."""

    def finish(self, load_LE: Ints, checkpoint: Callable[[], None], advance: Callable[[int, int], None]) -> Measured:
        """Scores from what was observed.

        Args:
            load_LE: [L, E] selections of the whole run; where calibration text was watched, those of the traffic, scaled to
                as many tokens.
            checkpoint: to be called where the state is consistent, if this takes long.
            advance: takes (done, total) units of work, if this takes long.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Everything that must outlive an interruption."""
        return dict(self.sums)

    def load_state_dict(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from `state_dict`."""
        self.sums = {name: np.array(array) for name, array in state.items()}


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
