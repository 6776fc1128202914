"""Knapsacks whose items lie in several groups at once: one option per item, each group within its capacity.

An expert stored alike in all its copies takes bytes of every unit that holds one. The Lagrangian relaxation, a price per
byte of each unit, falls apart into one choice per item (Everett 1963; Fisher 1981); any prices prove a lower bound, and
a subgradient method finds good ones. The choice at the best prices is then made to fit, and what is left over is spent.
Shapes: X items, Q options from largest to smallest, N places (an item in a group), U groups.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix

from equipoise.planning.knapsack import Choice, Floats, Ints, choose

ROUNDS = 120
"""Most steps of the subgradient method."""
PATIENCE = 8
"""Steps without a better bound after which steps are halved."""
CLOSE = 1e-4
"""Gap, relative to the cost, at which the method ends."""
TRIES = 4
"""How many of the choices met on the way, those of the best bounds, are made to fit."""


def choose_coupled(size_XQ: Ints, cost_XQ: Floats, item_N: Ints, group_N: Ints, capacity: int, groups: int) -> Choice:
    """The cheapest option of every item such that each group fits.

    Args:
        size_XQ: [X, Q] size of each option in each group that the item lies in, decreasing along Q.
        cost_XQ: [X, Q] cost of each option, not negative.
        item_N: [N] item of each place.
        group_N: [N] group of each place; an item lies in a group at most once.
        capacity: size that each group may have.
        groups: number of groups.

    Returns:
        A choice that fits, its cost and a proven bound on any; where nothing fits, the smallest options and how much the
        fullest group then exceeds its capacity.
    """
    n_items = len(size_XQ)
    place_XU = csr_matrix((np.ones(len(item_N)), (item_N, group_N)), shape=(n_items, groups))
    smallest = size_XQ.argmin(1)
    least = place_XU.T @ size_XQ[np.arange(n_items), smallest]
    if (least > capacity).any():
        cost = float(cost_XQ[np.arange(n_items), smallest].sum())
        return Choice(smallest, cost, cost, int(least.max()) - capacity)
    copies_X = np.asarray(place_XU.sum(1)).ravel().astype(np.int64)
    pool = choose(size_XQ * copies_X[:, None], cost_XQ, np.zeros(n_items, np.int64), capacity * groups, 1)
    # Made to fit, the choice of all groups as one pool is nearly always good; it tells the method how far it can have to go.
    best_X = _fit(pool.option, size_XQ, cost_XQ, place_XU, capacity)
    best = float(cost_XQ[np.arange(n_items), best_X].sum())
    price = _pool_price(pool.option, size_XQ, cost_XQ, copies_X)
    starts, bound = _relax(size_XQ, cost_XQ, place_XU, capacity, price, best)
    for option_X in starts:
        fitted_X = _fit(option_X, size_XQ, cost_XQ, place_XU, capacity)
        cost = float(cost_XQ[np.arange(n_items), fitted_X].sum())
        if cost < best:
            best, best_X = cost, fitted_X
    return Choice(best_X, best, min(max(bound, pool.lower_bound), best), 0)


def _relax(
    size_XQ: Ints, cost_XQ: Floats, place_XU: csr_matrix, capacity: int, price: float, upper: float
) -> tuple[list[Ints], float]:
    """Choices met at the best prices, and the best bound; Polyak's steps (1969), halved when they stop to help.

    Args:
        size_XQ: size of each option.
        cost_XQ: cost of each option.
        place_XU: 1 where an item lies in a group.
        capacity: size that each group may have.
        price: where all groups start.
        upper: cost of a choice that fits.
    """
    rows = np.arange(len(size_XQ))
    price_U = best_price_U = np.full(place_XU.shape[1], price)
    met: list[tuple[float, Ints]] = []
    best, stale, step = -np.inf, 0, 1.0
    for _ in range(ROUNDS):
        option_X = (cost_XQ + size_XQ * (place_XU @ price_U)[:, None]).argmin(1)
        over_U = place_XU.T @ size_XQ[rows, option_X] - capacity
        value = float(cost_XQ[rows, option_X].sum() + price_U @ over_U)
        met.append((value, option_X))
        if value > best:
            best, best_price_U, stale = value, price_U, 0
        else:
            stale += 1
        if stale >= PATIENCE:
            step, stale, price_U = step / 2, 0, best_price_U
        norm = float(over_U @ over_U)
        if norm == 0.0 or upper - best <= CLOSE * upper:
            break
        price_U = np.maximum(price_U + step * (upper - value) / norm * over_U, 0.0)
    met.sort(key=lambda pair: -pair[0])
    return [option for _, option in met[:TRIES]], best


def _pool_price(option_X: Ints, size_XQ: Ints, cost_XQ: Floats, copies_X: Ints) -> float:
    """Cost per size at which the pooled choice stops: the steepest step down that it did not take."""
    rows = np.arange(len(option_X))
    saved = (size_XQ[rows, option_X][:, None] - size_XQ) * copies_X[:, None]
    cost = cost_XQ - cost_XQ[rows, option_X][:, None]
    slope = np.where(saved > 0, cost / np.maximum(saved, 1), np.inf)
    return float(max(slope.min(initial=np.inf), 0.0)) if np.isfinite(slope).any() else 0.0


def _fit(option_X: Ints, size_XQ: Ints, cost_XQ: Floats, place_XU: csr_matrix, capacity: int) -> Ints:
    """Make a choice fit, by the smaller options that cost least per size that overfull groups lose; then spend the rest."""
    option_X, rows = option_X.copy(), np.arange(len(option_X))
    held_U = place_XU.T @ size_XQ[rows, option_X].astype(np.float64)
    while (held_U > capacity).any():
        full_U = held_U > capacity
        touching = np.flatnonzero(place_XU @ full_U)
        at = option_X[touching]
        saved = size_XQ[touching, at][:, None] - size_XQ[touching]
        # What counts of a saving in a group is at most what the group is over.
        often = np.asarray(place_XU[touching] @ full_U)
        cost = cost_XQ[touching] - cost_XQ[touching, at][:, None]
        slope = np.where(saved > 0, cost / np.maximum(saved * often[:, None], 1e-300), np.inf)
        best = np.unravel_index(slope.argmin(), slope.shape)
        assert np.isfinite(slope[best]), "the smallest options fit"
        item, option = int(touching[best[0]]), int(best[1])
        groups = place_XU.indices[place_XU.indptr[item] : place_XU.indptr[item + 1]]
        held_U[groups] -= size_XQ[item, option_X[item]] - size_XQ[item, option]
        option_X[item] = option
    return _spend(option_X, size_XQ, cost_XQ, place_XU, capacity)


def _spend(option_X: Ints, size_XQ: Ints, cost_XQ: Floats, place_XU: csr_matrix, capacity: int) -> Ints:
    """Use what is left over: again and again the larger option that saves most cost per size among those that fit."""
    option_X, rows = option_X.copy(), np.arange(len(option_X))
    spare_U = capacity - place_XU.T @ size_XQ[rows, option_X].astype(np.float64)
    copies_X = np.diff(place_XU.indptr)
    open_X = rows
    while len(open_X):
        at = option_X[open_X]
        more = size_XQ[open_X] - size_XQ[open_X, at][:, None]
        gain = cost_XQ[open_X, at][:, None] - cost_XQ[open_X]
        room_X = np.minimum.reduceat(spare_U[place_XU.indices], place_XU.indptr[:-1])[open_X]
        fits = (gain > 0) & (more <= room_X[:, None])
        score = np.where(fits, gain / np.maximum(more * copies_X[open_X][:, None], 1), -np.inf)
        usable = np.isfinite(score).any(1)
        if not usable.any():
            break
        open_X, score = open_X[usable], score[usable]
        best = np.unravel_index(score.argmax(), score.shape)
        item, option = int(open_X[best[0]]), int(best[1])
        groups = place_XU.indices[place_XU.indptr[item] : place_XU.indptr[item + 1]]
        spare_U[groups] -= size_XQ[item, option] - size_XQ[item, option_X[item]]
        option_X[item] = option
    return option_X
