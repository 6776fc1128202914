"""Placements of least cost, proven, for small cases: a mixed-integer program and a dynamic program over layers.

Both minimise what the search of `affinity_search` lowers, and share no code with it beyond the definition of the cost; they
certify it where they finish.
Shapes: L MoE layers, E places of a layer, R ranks, A admissible placements of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import factorial

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from equipoise.errors import PlanError
from equipoise.planning.affinity.pairs import Floats, Ints
from equipoise.planning.affinity.task import Placement, Task

MOST_STATES = 4000
"""Most placements of one layer that the dynamic program goes through; its time grows with their square."""


@dataclass(frozen=True, eq=False)
class Exact:
    """What an exact method found.

    Attributes:
        placement: the best placement found; None when there was no time to find any.
        cost: its cost; infinite when there is none.
        bound: proven: no placement costs less.
        proven: the placement is optimal, up to numerical tolerance.
    """

    placement: Placement | None
    cost: float
    bound: float
    proven: bool


def by_program(task: Task, *, seconds: float = 60.0) -> Exact:
    """Mixed-integer program, solved by HiGHS.

    x[l,e,r] places expert e of layer l on rank r; z[p,r] is 1 where both experts of a pair p (across a boundary, or
    co-activated in a layer) are on rank r; t[l] is the largest load. Beside z <= x the sums of z over partners equal
    (places per rank) * x, products of the balance constraint with x (Sherali and Adams 1990), without which the
    relaxation is worthless: x = 1/R everywhere would cross nothing.

    Args:
        task: what counts; blocks are kept.
        seconds: time limit.

    Source: ExFlow (arXiv:2401.08383), integer program, stated for pairs instead of tokens.
    """
    model = _Model(task)
    options = {"time_limit": seconds, "mip_rel_gap": 0.0}
    result = milp(
        model.cost,
        integrality=model.integral,
        bounds=Bounds(0.0, model.upper),
        constraints=LinearConstraint(model.matrix(), model.low, model.high),
        options=options,
    )
    bound = -np.inf if result.mip_dual_bound is None else float(result.mip_dual_bound) + model.constant
    if result.x is None:
        return Exact(None, np.inf, bound, False)
    placement = [result.x[index].argmax(1) for index in model.x]
    cost = task.cost(placement)
    return Exact(placement, cost, bound, bool(result.status == 0))


class _Model:
    """The program's columns and rows while they are put together."""

    def __init__(self, task: Task) -> None:
        self.task, self.columns, self.rows = task, 0, 0
        self._cost: list[Floats] = []
        self._integral: list[Ints] = []
        self._upper: list[Floats] = []
        self._entries: list[tuple[Ints, Ints, Floats]] = []
        self._low: list[Floats] = []
        self._high: list[Floats] = []
        self.constant = 0.0
        self.x = [self._place(layer) for layer in range(len(task.inside))]
        for layer, pairs in enumerate(task.pairs.across):
            self._reward(pairs, self.x[layer], self.x[layer + 1], 0)
        for layer, pairs in enumerate(task.pairs.together):
            if task.together and pairs.any():
                self._reward(task.together * pairs, self.x[layer], self.x[layer], 1)
            if task.mu:
                self._largest(layer)
        self.cost, self.integral, self.upper = (np.concatenate(part) for part in (self._cost, self._integral, self._upper))
        self.low, self.high = np.concatenate(self._low), np.concatenate(self._high)

    def matrix(self) -> coo_array:
        row, column, value = (np.concatenate(part) for part in zip(*self._entries, strict=True))
        return coo_array((value, (row, column)), (self.rows, self.columns)).tocsc()

    def _new(self, shape: tuple[int, ...], cost: float | Floats, integral: int, upper: float | Floats) -> Ints:
        index = self.columns + np.arange(int(np.prod(shape))).reshape(shape)
        self.columns += index.size
        self._cost.append(np.broadcast_to(cost, shape).ravel().astype(np.float64))
        self._integral.append(np.full(index.size, integral))
        self._upper.append(np.broadcast_to(upper, shape).ravel().astype(np.float64))
        return index

    def _rows(self, terms: list[tuple[Ints, float | Floats]], low: float, high: float) -> None:
        """One row per first index of the terms; each term is [rows, entries] columns and their coefficients."""
        n = len(terms[0][0])
        for column, value in terms:
            row = np.broadcast_to(self.rows + np.arange(n)[:, None], column.shape)
            self._entries.append((row.ravel(), column.ravel(), np.broadcast_to(value, column.shape).ravel().astype(float)))
        self._low.append(np.full(n, low))
        self._high.append(np.full(n, high))
        self.rows += n

    def _place(self, layer: int) -> Ints:
        task, inside = self.task, self.task.inside[layer]
        block = np.arange(task.ranks) // (task.ranks // task.blocks)
        may = inside[:, None] == block[None, :]
        if layer == 0:  # ranks of a block are alike: its n-th expert goes to one of its first n + 1 ranks
            nth = np.array([(inside[:e] == inside[e]).sum() for e in range(len(inside))])
            may &= (np.arange(task.ranks) % (task.ranks // task.blocks))[None, :] <= nth[:, None]
        x = self._new(may.shape, 0.0, 1, may.astype(np.float64))
        self._rows([(x, 1.0)], 1.0, 1.0)
        each = len(inside) // task.ranks
        self._rows([(x.T, 1.0)], each, each)
        return x

    def _reward(self, pairs: Floats, first: Ints, second: Ints, alone: int) -> None:
        """Columns z [I, J, R] <= both experts' x; `alone` is 1 when both are of one layer, where none pairs with itself."""
        experts, others, ranks = *pairs.shape, self.task.ranks
        self.constant += float(pairs.sum())
        apart = 1.0 - np.eye(experts) if alone else np.ones((experts, others))
        z = self._new((experts, others, ranks), -pairs[:, :, None], 0, apart[:, :, None])
        a = np.broadcast_to(first[:, None, :], z.shape).reshape(-1, 1)
        b = np.broadcast_to(second[None, :, :], z.shape).reshape(-1, 1)
        self._rows([(z.reshape(-1, 1), 1.0), (a, -1.0)], -np.inf, 0.0)
        self._rows([(z.reshape(-1, 1), 1.0), (b, -1.0)], -np.inf, 0.0)
        for partners, own in ((z.transpose(0, 2, 1), first), (z.transpose(1, 2, 0), second)):
            each = partners.shape[2] // ranks - alone
            self._rows([(partners.reshape(-1, partners.shape[2]), 1.0), (own.reshape(-1, 1), -float(each))], 0.0, 0.0)

    def _largest(self, layer: int) -> None:
        load, ranks = self.task.pairs.load[layer], self.task.ranks
        t = self._new((1,), self.task.mu * ranks, 0, 1.0)
        x = self.x[layer].T
        self._rows([(x, np.broadcast_to(load, x.shape)), (np.broadcast_to(t, (ranks, 1)), -1.0)], -np.inf, 0.0)


def by_layers(task: Task) -> Exact:
    """Dynamic program over layers, exact for any number of them: layers are coupled only to their neighbours.

    Every admissible placement of a layer is a state; its own cost is co-activation and load, and the step between two
    states costs the crossings between them.

    Raises:
        PlanError: a layer has more than `MOST_STATES` placements.
    """
    states = [_states(task, layer) for layer in range(len(task.inside))]
    best, back = _inner(task, 0, states[0]), []
    for layer in range(1, len(states)):
        across = task.pairs.across[layer - 1]
        stay = _one_hot(states[layer - 1], task.ranks) @ np.kron(across, np.eye(task.ranks))
        step = best[:, None] + across.sum() - stay @ _one_hot(states[layer], task.ranks).T
        back.append(step.argmin(0))
        best = step.min(0) + _inner(task, layer, states[layer])
    at = [int(best.argmin())]
    for choice in reversed(back):
        at.append(int(choice[at[-1]]))
    placement = [state[i] for state, i in zip(states, reversed(at), strict=True)]
    return Exact(placement, task.cost(placement), float(best.min()), True)


def _one_hot(states_AE: Ints, ranks: int) -> Floats:
    return np.asarray((states_AE[:, :, None] == np.arange(ranks)).reshape(len(states_AE), -1), np.float64)


def _inner(task: Task, layer: int, states_AE: Ints) -> Floats:
    return np.array([task.inner_cost(layer, state) for state in states_AE])


def _states(task: Task, layer: int) -> Ints:
    """[A, E] all placements of a layer, as many places on every rank, blocks kept."""
    inside = task.inside[layer]
    each = len(inside) // task.ranks
    per_block = task.ranks // task.blocks
    count = (factorial(each * per_block) // factorial(each) ** per_block) ** task.blocks
    if count > MOST_STATES:
        raise PlanError(
            f"layer {layer} has {count} placements of {len(inside)} experts on {task.ranks} ranks; "
            f"the exact method goes through at most {MOST_STATES}. Use the search for layers of this size."
        )
    result = np.zeros((1, 0), np.int64)
    for block in inside:
        ranks = np.arange(block * per_block, (block + 1) * per_block)
        grown: NDArray[np.int64] = np.concatenate(
            [np.repeat(result, per_block, 0), np.tile(ranks, len(result))[:, None]], axis=1
        )
        result = grown[(grown == grown[:, -1:]).sum(1) <= each]
    return result
