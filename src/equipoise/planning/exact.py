"""The joint problem solved to its proven optimum, for small models and as the yardstick of the search.

A mixed-integer program (HiGHS): choose every expert's precision, the units that hold a copy, and the flow of each
expert's load over its copies, to minimise the mean over layers of the fullest unit's load within the units' bytes and the
error bound; then, of all that balance as well, the plan of least error. It balances the measured load exactly, and so
has nothing to say of other text, for which the search of `rq` plans.
Shapes: L MoE layers, E logical experts, U units, Q precisions, X experts of all layers together, V variables.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix, vstack

from equipoise.artifacts import Plan, Profile
from equipoise.errors import PlanError
from equipoise.planning.assemble import assemble
from equipoise.planning.budget import Budget, UnreachableError, default_precisions, make_budget
from equipoise.planning.load import Floats, Ints, Slots, scaled
from equipoise.planning.replicate_quantize import ERROR_BOUND

LARGEST = 4000
"""Whole variables that HiGHS is given at most; at that size it may need minutes to prove an optimum."""
SAME = 1e-6
"""LIS given up for less error: what the solver cannot tell apart."""


@dataclass(frozen=True, eq=False)
class Optimum:
    """A solution and what is proven of it.

    Attributes:
        slots: copies, units and shares.
        option: [N] precision of each slot.
        lis: mean over layers of the fullest unit's load.
        lower_bound: proven: no plan within these bytes and this error has a lower mean.
    """

    slots: Slots
    option: Ints
    lis: float
    lower_bound: float


def rq_exact(
    profile: Profile,
    *,
    units: int,
    seed: int,
    dispatch: str = "even",
    error_bound: float = ERROR_BOUND,
    bytes_fraction: float = 1.0,
    precisions: tuple[str, ...] | None = None,
    seconds: float = 60.0,
) -> Plan:
    """The joint problem of bits, copies and units for the measured load, by integer programming; for small models.

    All copies of an expert have one precision.

    Args:
        profile: what was measured.
        units: U.
        seed: not used; nothing is left to chance.
        dispatch: "even", "least_loaded" or "gate_aware".
        error_bound: most relative root-mean-square error of the layers' routed output that is predicted.
        bytes_fraction: of the original experts' bytes, in at most 16 bits, that the units have together.
        precisions: formats that slots may have; as for `rq`.
        seconds: after which the best plan found so far is taken; its proven bound tells how good it is.

    Raises:
        PlanError: the model is too large for this method, or bytes and error cannot both be met.
    """
    budget = make_budget(profile, units, precisions or default_precisions(profile), bytes_fraction)
    found = optimum(scaled(profile.load, units), profile.widths, budget, error_bound, seconds)
    options = {
        "error_bound": error_bound,
        "bytes_fraction": bytes_fraction,
        "precisions": [p.name for p in budget.precisions],
        "errors": "measured" if all(budget.measured) else "assumed",
    }
    return assemble(
        profile, budget, found.slots, found.option,
        method="rq-exact", options=options, seed=seed, dispatch=dispatch, error_bound=error_bound, proven_lis=found.lower_bound,
    )  # fmt: skip


def optimum(p_LE: Floats, widths_L: Ints, budget: Budget, error_bound: float, seconds: float = 60.0) -> Optimum:
    """Least mean of the fullest unit's load, and of all plans with it the one of least error.

    Args:
        p_LE: [L, E] load scaled to 1 per unit.
        widths_L: [L] experts of each layer.
        budget: bytes and errors of all choices.
        error_bound: allowed relative RMS error of the layers' routed output.
        seconds: for each of the two programs.

    Raises:
        PlanError: more than `LARGEST` whole variables.
        UnreachableError: bytes and error cannot both be met, or not within the time.
    """
    program = _Program(p_LE, widths_L, budget, error_bound)
    if program.whole > LARGEST:
        raise PlanError(
            f"rq-exact: this model has {program.whole} choices of formats and copies; allowed are {LARGEST}. Use rq, whose "
            "plans state how far from the optimum they can be at most."
        )
    first = milp(program.lis_V, **program.arguments(), options={"time_limit": seconds})
    if first.x is None:
        raise UnreachableError(
            f"error_bound: {error_bound} given, but {budget.unit_bytes} bytes per unit: no plan meets both"
            f"{'' if first.status == 2 else f', or none was found in {seconds:g} seconds'}; allow more error or more bytes."
        )
    kept = LinearConstraint(csr_matrix(program.lis_V[None]), -np.inf, first.fun + SAME)
    second = milp(program.error_V, **program.arguments(kept), options={"time_limit": seconds})
    x_V = first.x if second.x is None else second.x
    slots, option = program.read(x_V)
    return Optimum(slots, option, float(program.lis_V @ x_V), float(first.mip_dual_bound))


class _Program:
    """The rows and columns of the integer program; variables lie as precision, slot, stored, flow, fullest.

    precision [X, Q] and slot [X, U] are whole; stored [X, U, Q] is at least their product and counts bytes; flow [X, U] is
    load; fullest [L] is the largest unit load of each layer.
    """

    def __init__(self, p_LE: Floats, widths_L: Ints, budget: Budget, error_bound: float) -> None:
        self.layer_X = np.repeat(np.arange(len(widths_L)), widths_L)
        self.expert_X = np.concatenate([np.arange(width) for width in widths_L])
        self.load_X = p_LE[self.layer_X, self.expert_X]
        x, q, u, n_layers = len(self.layer_X), len(budget.precisions), budget.units, len(widths_L)
        sizes = (x * q, x * u, x * u * q, x * u, n_layers)
        ends = np.cumsum(sizes)
        shapes = ((x, q), (x, u), (x, u, q), (x, u), (n_layers,))
        columns = [np.arange(end - size, end).reshape(shape) for end, size, shape in zip(ends, sizes, shapes, strict=True)]
        self.precision, self.slot, self.stored, self.flow, self.fullest = columns
        self.size, self.units, self.whole = int(ends[-1]), u, x * q + x * u
        self.lis_V, self.error_V = np.zeros(self.size), np.zeros(self.size)
        served_L = p_LE.sum(1) > 0
        self.lis_V[self.fullest[served_L]] = 1.0 / max(int(served_L.sum()), 1)
        error_XQ = budget.errors[self.layer_X, self.expert_X]
        self.error_V[self.precision.ravel()] = error_XQ.ravel()
        self.constraints = self._constraints(budget, n_layers * error_bound**2)

    def _constraints(self, budget: Budget, allowance: float) -> list[LinearConstraint]:
        one_X = np.ones(len(self.layer_X))
        size_XQ = budget.sizes[self.layer_X]
        rules = [
            self._rows(self.precision, one_X, one_X),
            self._rows(self.slot, one_X, np.full(len(one_X), np.inf)),
            self._rows(self.flow, self.load_X, self.load_X),
        ]
        # Bytes in parts of a unit's, so that all numbers are of one order.
        part_XUQ = np.broadcast_to((size_XQ / budget.unit_bytes)[:, None, :], self.stored.shape)
        unit_XUQ = np.broadcast_to(np.arange(self.units)[None, :, None], self.stored.shape)
        shape = (self.units, self.size)
        held_UV = csr_matrix((part_XUQ.ravel(), (unit_XUQ.ravel(), self.stored.ravel())), shape=shape)
        rules.append(LinearConstraint(held_UV, -np.inf, 1.0))
        if np.isfinite(allowance):
            # In parts of the allowance, for the solver's tolerance is absolute.
            unit = allowance or float(self.error_V.max()) or 1.0
            rules.append(LinearConstraint(csr_matrix(self.error_V[None] / unit), -np.inf, allowance / unit))
        # stored >= slot + precision - 1; flow <= load * slot; every unit's flow <= its layer's fullest.
        slot_XUQ = np.broadcast_to(self.slot[:, :, None], self.stored.shape)
        precision_XUQ = np.broadcast_to(self.precision[:, None, :], self.stored.shape)
        rules.append(self._triples([(self.stored, 1.0), (slot_XUQ, -1.0), (precision_XUQ, -1.0)], low=-1.0))
        load_XU = np.broadcast_to(self.load_X[:, None], self.flow.shape)
        rules.append(self._triples([(self.flow, -1.0), (self.slot, load_XU)], low=0.0))
        row_XU = self.layer_X[:, None] * self.units + np.arange(self.units)
        shape = (len(self.fullest) * self.units, self.size)
        load_RV = csr_matrix((np.ones(self.flow.size), (row_XU.ravel(), self.flow.ravel())), shape=shape)
        top_RV = csr_matrix((np.ones(shape[0]), (np.arange(shape[0]), np.repeat(self.fullest, self.units))), shape=shape)
        rules.append(LinearConstraint(top_RV - load_RV, 0.0, np.inf))
        merged = vstack([csr_matrix(rule.A) for rule in rules], format="csr")
        low = np.concatenate([np.broadcast_to(rule.lb, rule.A.shape[0]) for rule in rules])
        high = np.concatenate([np.broadcast_to(rule.ub, rule.A.shape[0]) for rule in rules])
        return [LinearConstraint(merged, low, high)]

    def _rows(self, columns: Ints, low: Floats, high: Floats) -> LinearConstraint:
        """One row for each row of columns: their sum."""
        rows = np.repeat(np.arange(len(columns)), columns.shape[1])
        matrix = csr_matrix((np.ones(columns.size), (rows, columns.ravel())), shape=(len(columns), self.size))
        return LinearConstraint(matrix, low, high)

    def _triples(self, parts: list[tuple[Ints, float | Floats]], low: float) -> LinearConstraint:
        """One row for each entry of arrays of columns of one shape: their weighted sum is at least `low`."""
        count = parts[0][0].size
        rows = np.tile(np.arange(count), len(parts))
        columns = np.concatenate([column.ravel() for column, _ in parts])
        values = np.concatenate([np.broadcast_to(value, column.shape).ravel() for column, value in parts])
        return LinearConstraint(csr_matrix((values, (rows, columns)), shape=(count, self.size)), low, np.inf)

    def arguments(self, *more: LinearConstraint) -> dict[str, object]:
        """What HiGHS is called with beside the objective."""
        whole = np.zeros(self.size)
        whole[np.concatenate([self.precision.ravel(), self.slot.ravel()])] = 1
        upper = np.ones(self.size)
        upper[self.flow.ravel()] = np.inf
        upper[self.fullest] = np.inf
        return {"integrality": whole, "bounds": Bounds(0, upper), "constraints": [*self.constraints, *more]}

    def read(self, x_V: Floats) -> tuple[Slots, Ints]:
        """The slots of a solution; copies that serve nothing are left out, an expert without load keeps its first."""
        held_XU: NDArray[np.bool_] = np.greater(x_V[self.slot], 0.5)
        flow_XU = np.maximum(x_V[self.flow], 0.0)
        serving_XU = held_XU & (flow_XU > 1e-9)
        idle_X: NDArray[np.bool_] = np.logical_not(serving_XU.any(1))
        serving_XU[idle_X, held_XU[idle_X].argmax(1)] = True
        item_N, unit_N = np.nonzero(serving_XU)
        flow_N = np.where(idle_X[item_N], 1.0, flow_XU[item_N, unit_N])
        share_N = flow_N / np.bincount(item_N, flow_N)[item_N]
        option_N = x_V[self.precision].argmax(1)[item_N]
        return Slots(self.layer_X[item_N], self.expert_X[item_N], unit_N, share_N), option_N.astype(np.int64)
