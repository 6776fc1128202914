"""Placement on ranks that stays balanced on other traffic: least risk among the placements that are balanced on this one.

1. Level: from EPLB's copies and packing, without duplicates, swap slots until the largest rank load is least.
2. Cap: no worse than EPLB, and within 1 % of the proven lower bound where the slots allow that.
3. Spread: swap slots to lower the risk (see `robust_risk`), first freely, then with a growing price on ranks above the cap.
   Among the placements within the cap the one of least risk is taken; the levelled one is among them.
Shapes: S scenarios, W windows, L MoE layers, E logical experts, P physical slots of a layer, R ranks, N nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from equipoise.planning.eplb import eplb_placement, pack, replicate
from equipoise.planning.local_search import Limits, exchange
from equipoise.planning.moves import keep_slots, rename_ranks
from equipoise.planning.placement_bound import placement_bound
from equipoise.planning.robust.risk import grains, risk, scaled_load

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SLACK = 0.01
"""How far, by default, the largest rank load in sample may be above the lower bound, or the best found; never above EPLB's."""
PRICES = (0.0, 1e2, 1e3, 1e4, 1e6)
"""Price of the square of what a rank's load exceeds the cap by, in the order in which the spread is made to obey it."""
RESTARTS = 6
"""How many more starts a layer gets whose levelled placement is not within the cap wanted."""
WORK, MOST_STARTS = 5_000_000, 4
"""Layers x slots^2 that one start of the spread may cost in all, and the most starts."""


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """Two placements of the same slots.

    Attributes:
        spread: [L, P] least risk within the cap.
        level: [L, P] least largest rank load found.
    """

    spread: Ints
    level: Ints


def robust_placement(
    load_SLE: ArrayLike,
    *,
    weights_S: ArrayLike | None = None,
    ranks: int,
    slots: int,
    nodes: int = 1,
    groups: int = 1,
    seed: int = 0,
    start: ArrayLike | None = None,
    keep: int | None = None,
    windows_WLE: ArrayLike | None = None,
    coactivation_LEE: ArrayLike | None = None,
    slack: float = SLACK,
) -> Ints:
    """The placement of all layers of one shape; never two copies of an expert on one rank.

    Args:
        load_SLE: [S, L, E] selections of each scenario.
        weights_S: [S] weight of each scenario in the risk and in the sum that is balanced; 1 when omitted.
        ranks: R, a divisor of P.
        slots: P, from E to E R.
        nodes: machines; copies of one expert are put on different ones where possible.
        groups: expert groups that have to stay on one node each (nodes must divide them); 1 for no such constraint.
        seed: of the order in which swaps are tried.
        start: [L, P] placement in force; ranks and slots are named so that little moves.
        keep: most slots per layer that may move from `start`; no bound when omitted.
        windows_WLE: [W, L, E] selections in documents or stretches of time, the shorter the better; only for the risk.
        coactivation_LEE: [L, E, E] tokens that chose both of two experts; only for the risk.
        slack: how far the largest rank load in sample may be above the lower bound; not used with `keep`.

    Returns:
        [L, P] expert of each slot, rank-major.

    Raises:
        ValueError: sizes that no placement has, or `keep` without `start` (mistakes of the programmer).
    """
    load = np.asarray(load_SLE, np.float64)
    n_experts = load.shape[2]
    if slots % ranks or ranks % nodes or groups % nodes * (groups > 1) or not n_experts <= slots <= n_experts * ranks:
        raise ValueError(f"{slots} slots cannot hold {n_experts} experts on {ranks} ranks of {nodes} nodes")
    if keep is not None and start is None:
        raise ValueError("keep bounds what moves from a start; give one")
    weights = np.ones(len(load)) if weights_S is None else np.asarray(weights_S, np.float64)
    total_LE = np.tensordot(weights, load, 1)
    moments_LEE = risk(scaled_load(total_LE), grains(load, weights, windows_WLE, coactivation_LEE))
    if start is not None and keep is not None:
        return _from(np.asarray(start, np.int64), moments_LEE, total_LE, ranks, nodes, groups, seed, keep)
    found = place(total_LE, moments_LEE, ranks, slots, nodes, groups, seed, slack=slack)
    return found.spread if start is None else named(found.spread, np.asarray(start, np.int64), ranks, nodes)


def named(physical_LP: Ints, start_LP: Ints, ranks: int, nodes: int) -> Ints:
    """[L, P] the same placement with ranks and slots named so that little moves from the one in force."""
    return np.stack([rename_ranks(new, old, ranks, nodes) for new, old in zip(physical_LP, start_LP, strict=True)])


def place(
    total_LE: Floats, moments_LEE: Floats, ranks: int, slots: int, nodes: int = 1, groups: int = 1, seed: int = 0,
    quick: bool = False, slack: float = SLACK,
) -> Found:  # fmt: skip
    """Placements of all layers from what is to be balanced and what is to be risked.

    Args:
        total_LE: [L, E] loads whose balance is capped.
        moments_LEE: [L, E, E] second moments of the loads.
        ranks: R.
        slots: P.
        nodes: N.
        groups: expert groups that have to stay on one node each; 1 for no such constraint.
        seed: of the order of swaps and of random starts.
        quick: search less, for cross-validation.
        slack: how far the largest rank load may be above the lower bound where the slots allow it; never above EPLB's.
    """
    by_node = nodes > 1 and groups > 1
    prices, sweeps = ((0.0, 1e3, PRICES[-1]), 1) if quick else (PRICES, 3)
    mean_LE = scaled_load(total_LE, ranks / total_LE.shape[1])
    published = [eplb_placement(total_LE, slots, ranks)]
    if by_node:
        published = [eplb_placement(total_LE, slots, ranks, nodes, groups)]
    level_LP, cap_L = _level(mean_LE, published, slots, ranks, nodes, by_node, seed, quick, slack)
    moments = moments_LEE * (ranks / total_LE.shape[1])

    def limits(price: float) -> Limits:
        # A little below the cap, so that rounding in float32 does not end above it.
        return Limits(cap_L * (1 - 1e-5 * (price > 0)), price, same_node=by_node, nodes=nodes)

    best_LP, least_L = exchange(level_LP, moments, mean_LE, ranks, limits(PRICES[-1]), sweeps=sweeps, seed=seed)
    best_LP = _within(best_LP, level_LP, mean_LE, ranks, cap_L)
    for attempt in range(1 if quick else starts(*level_LP.shape)):
        free_LP = _start(attempt, published[0], moments, mean_LE, ranks, nodes, by_node, seed)
        for step, price in enumerate(prices):
            free_LP, risk_L = exchange(free_LP, moments, mean_LE, ranks, limits(price), sweeps=sweeps, seed=seed + step)
        better_L = (_peak(free_LP, mean_LE, ranks) <= cap_L) & (risk_L < least_L)
        best_LP, least_L = np.where(better_L[:, None], free_LP, best_LP), np.where(better_L, risk_L, least_L)
    spread_LP = best_LP
    if nodes > 1 and not by_node:
        spread_LP, level_LP = _over_nodes(spread_LP, ranks, nodes), _over_nodes(level_LP, ranks, nodes)
    return Found(spread_LP, level_LP)


def starts(layers: int, slots: int) -> int:
    """How many starts the spread is made from: as many as a few seconds allow."""
    return int(np.clip(WORK // (layers * slots**2), 1, MOST_STARTS))


def _start(
    attempt: int, published_LP: Ints, moments_LEE: Floats, mean_LE: Floats, ranks: int, nodes: int, by_node: bool, seed: int
) -> Ints:
    """A placement to start from: EPLB's, then in turn EPLB's copies and copies of what is risky, in random order."""
    rng = np.random.default_rng([seed, attempt])
    if by_node:
        return without_duplicates(published_LP if attempt == 0 else _shuffled(published_LP, nodes, rng), ranks, nodes)
    if attempt == 0:
        return without_duplicates(published_LP, ranks)
    slots_LP = published_LP
    if attempt % 2:
        # A slot of load x / c adds x^2 / c^2 to a rank's risk; copies of volatile experts halve what cannot be foreseen.
        slots_LP = replicate(np.sqrt(np.diagonal(moments_LEE, axis1=1, axis2=2)), published_LP.shape[1])[0]
    return without_duplicates(rng.permuted(slots_LP, axis=1), ranks)


def _level(
    mean_LE: Floats,
    published: list[Ints],
    slots: int,
    ranks: int,
    nodes: int,
    by_node: bool,
    seed: int,
    quick: bool,
    slack: float,
) -> tuple[Ints, Floats]:
    """[L, P] placements whose largest rank load is small, and [L] the cap."""
    bound_L = np.ones(len(mean_LE)) if quick else np.array([placement_bound(row, slots, ranks) for row in mean_LE])
    theirs_L = np.min([_peak(physical, mean_LE, ranks) for physical in published], axis=0)
    aim_L = np.minimum(theirs_L, (1 + slack) * bound_L)
    inside = nodes if by_node else 1
    best_LP = without_duplicates(published[0], ranks, inside)
    best_LP = _lowered(best_LP, mean_LE, ranks, nodes, by_node, seed, 1 if quick else 4)
    best_L = _peak(best_LP, mean_LE, ranks)
    rng = np.random.default_rng(seed)
    for attempt in range(0 if quick else RESTARTS):
        short = np.flatnonzero(best_L > aim_L)
        if not len(short):
            break
        if by_node or slots == mean_LE.shape[1]:
            other_LP = without_duplicates(_shuffled(published[0][short], inside, rng), ranks, inside)
        else:
            other_LP = without_duplicates(_other_start(mean_LE[short], slots, ranks, attempt), ranks)
        other_LP = _lowered(other_LP, mean_LE[short], ranks, nodes, by_node, seed + attempt + 1)
        other_L = _peak(other_LP, mean_LE[short], ranks)
        won = other_L < best_L[short]
        best_LP[short[won]], best_L[short[won]] = other_LP[won], other_L[won]
    for physical in published:
        # EPLB itself where nothing better was found and it has no duplicates.
        rows = (_peak(physical, mean_LE, ranks) < best_L) & (_duplicates(physical, ranks) == 0)
        best_LP[rows], best_L[rows] = physical[rows], _peak(physical, mean_LE, ranks)[rows]
    reached = best_L <= aim_L
    return best_LP, np.where(reached, aim_L, np.maximum(best_L, np.minimum(theirs_L, (1 + slack) * best_L)))


def _lowered(physical_LP: Ints, mean_LE: Floats, ranks: int, nodes: int, by_node: bool, seed: int, sweeps: int = 4) -> Ints:
    """Swaps that lower a high power of the rank loads, which is close to their largest."""
    square = mean_LE[:, :, None] * mean_LE[:, None, :]
    limits = Limits(np.full(len(mean_LE), np.inf), 0.0, same_node=by_node, nodes=nodes)
    for power in (1.0, 6.0, 24.0):
        scale_L = np.maximum(_peak(physical_LP, mean_LE, ranks), 1.0)  # keeps the power within float32
        physical_LP, _ = exchange(
            physical_LP, square / scale_L[:, None, None] ** 2, mean_LE, ranks, limits, power=power, sweeps=sweeps, seed=seed
        )
    return physical_LP


def _other_start(mean_LE: Floats, slots: int, ranks: int, attempt: int) -> Ints:
    """Other numbers of copies, packed longest first: loads flattened or sharpened before they are copied."""
    expert_LP, copies_LE = replicate(mean_LE ** (0.9, 1.1, 0.8, 1.2, 0.6, 1.5)[attempt], slots)
    share = np.take_along_axis(mean_LE / copies_LE, expert_LP, 1)
    return np.take_along_axis(expert_LP, pack(share, ranks), 1)


def _shuffled(physical_LP: Ints, nodes: int, rng: np.random.Generator) -> Ints:
    """Slots in random order within their node."""
    by_node = physical_LP.reshape(len(physical_LP), nodes, -1)
    return rng.permuted(by_node, axis=2).reshape(physical_LP.shape)


def _from(
    start_LP: Ints, moments_LEE: Floats, total_LE: Floats, ranks: int, nodes: int, groups: int, seed: int, keep: int
) -> Ints:
    """The placement in force with at most so many slots of a layer moved, by swaps that lower risk and excess over the cap."""
    n_experts = total_LE.shape[1]
    mean_LE = scaled_load(total_LE, ranks / n_experts)
    before_LP = without_duplicates(start_LP, ranks)
    home_LER = np.zeros((*mean_LE.shape, ranks), bool)
    rank_P = np.arange(start_LP.shape[1]) * ranks // start_LP.shape[1]
    home_LER[np.arange(len(start_LP))[:, None], start_LP, rank_P] = True
    bound_L = np.array([placement_bound(row, start_LP.shape[1], ranks) for row in mean_LE])
    limits = Limits((1 + SLACK) * bound_L, 1e3, nodes > 1 and groups > 1, nodes, home_LER, keep)
    after_LP, _ = exchange(
        before_LP, moments_LEE * (ranks / n_experts), mean_LE, ranks, limits, sweeps=3, seed=seed
    )  # fmt: skip
    return np.stack([keep_slots(new, old, ranks) for new, old in zip(after_LP, start_LP, strict=True)])


def _within(physical_LP: Ints, other_LP: Ints, mean_LE: Floats, ranks: int, cap_L: Floats) -> Ints:
    return np.where((_peak(physical_LP, mean_LE, ranks) <= cap_L)[:, None], physical_LP, other_LP)


def without_duplicates(physical_LP: Ints, ranks: int, nodes: int = 1) -> Ints:
    """[L, P] the same copies with no expert twice on a rank: a second copy is swapped with a slot of another rank.

    Args:
        physical_LP: [L, P] expert of each slot, rank-major; no expert has more copies than (its node's) ranks.
        ranks: R.
        nodes: swap only within nodes, where there are several.
    """
    result = physical_LP.copy()
    for layer in np.flatnonzero(_duplicates(physical_LP, ranks)):
        result[layer] = _apart(result[layer], ranks, nodes)
    return result


def _apart(physical_P: Ints, ranks: int, nodes: int) -> Ints:
    """One layer of `without_duplicates`; copies beyond the ranks become copies of the expert with fewest."""
    slots = physical_P.reshape(ranks, -1).copy()
    per_node = ranks // nodes
    for node in range(nodes):
        here = slots[node * per_node : (node + 1) * per_node]
        copies = np.bincount(here.ravel(), minlength=int(physical_P.max()) + 1)
        for expert in np.flatnonzero(copies > per_node):
            for flat in np.flatnonzero(here.ravel() == expert)[per_node:]:
                fewest = np.where(copies > 0, copies, np.iinfo(np.int64).max).argmin()
                here.reshape(-1)[flat] = fewest
                copies[fewest] += 1
        for rank in range(per_node):
            for slot in range(here.shape[1]):
                expert = here[rank, slot]
                if (here[rank] == expert).sum() < 2:
                    continue
                free = ~(here == expert).any(1)  # ranks without this expert ...
                spare = free[:, None] & ~np.isin(here, here[rank])  # ... and what they hold that this rank does not
                if not spare.any():
                    here[:] = _dealt(here)
                    break
                there, other = np.argwhere(spare)[0]
                here[rank, slot], here[there, other] = here[there, other], expert
    return slots.reshape(-1)


def _dealt(slots_RK: Ints) -> Ints:
    """The same copies dealt anew: the most copied expert first, each copy to another of the ranks with most room.

    Room then differs by one slot at most, so there are always enough ranks for an expert with no more copies than ranks.
    """
    ranks, per_rank = slots_RK.shape
    held: list[list[int]] = [[] for _ in range(ranks)]
    expert_C, copies_C = np.unique(slots_RK, return_counts=True)
    for which in np.argsort(-copies_C, kind="stable"):
        fullness = np.array([len(rank) for rank in held])
        for rank in np.argsort(fullness, kind="stable")[: copies_C[which]]:
            held[rank].append(int(expert_C[which]))
    return np.array(held, np.int64).reshape(ranks, per_rank)


def _duplicates(physical_LP: Ints, ranks: int) -> Ints:
    """[L] slots beyond the first of an expert on a rank."""
    held = np.sort(physical_LP.reshape(len(physical_LP), ranks, -1), axis=2)
    return np.asarray((held[:, :, 1:] == held[:, :, :-1]).sum((1, 2)))


def _peak(physical_LP: Ints, mean_LE: Floats, ranks: int) -> Floats:
    """[L] largest rank load."""
    return np.asarray(rank_loads(physical_LP, mean_LE[None], ranks)[0].max(1))


def rank_loads(physical_LP: Ints, load_SLE: Floats, ranks: int) -> Floats:
    """[S, L, R] load of each rank with an even split over copies; a second copy on one rank counts as a slot.

    Args:
        physical_LP: [L, P] expert of each slot, rank-major.
        load_SLE: [S, L, E] loads.
        ranks: R.
    """
    n_layers, n_experts = len(physical_LP), load_SLE.shape[2]
    row = np.arange(n_layers)[:, None]
    copies_LE = np.zeros((n_layers, n_experts), np.int64)
    np.add.at(copies_LE, (row, physical_LP), 1)
    slot = load_SLE[:, row, physical_LP] / copies_LE[row, physical_LP]
    return np.asarray(slot.reshape(len(load_SLE), n_layers, ranks, -1).sum(3))


def _over_nodes(physical_LP: Ints, ranks: int, nodes: int) -> Ints:
    """Ranks named so that fewest copies of an expert share a node: the same search, with ranks in the place of slots."""
    n_layers, n_slots = physical_LP.shape
    holds_LRE = np.zeros((n_layers, ranks, int(physical_LP.max()) + 1), np.float32)
    holds_LRE[np.arange(n_layers)[:, None], np.arange(n_slots) * ranks // n_slots, physical_LP] = 1.0
    shared_LRR = holds_LRE @ holds_LRE.transpose(0, 2, 1)
    start = np.tile(np.arange(ranks), (n_layers, 1))
    no_cap = Limits(np.full(n_layers, np.inf), 0.0)
    order_LR, _ = exchange(start, shared_LRR, np.zeros((n_layers, ranks)), nodes, no_cap)
    by_rank = physical_LP.reshape(n_layers, ranks, -1)
    return np.take_along_axis(by_rank, order_LR[:, :, None], 1).reshape(n_layers, n_slots)
