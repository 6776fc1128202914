"""Local search for the placement of least crossings: one layer at a time, its neighbours fixed.

With the layers before and after fixed, the crossings of a layer are linear in its placement, and the best placement is a
balanced assignment, solved exactly. Co-activation and the largest load are not linear: they are lowered by swaps. Ranks of
all later layers may be renamed at any boundary, which changes nothing inside a layer and so frees a search whose halves
agree on the groups but not on their ranks.
Shapes: L MoE layers, E places of a layer (physical slots), R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from scipy.cluster.vq import kmeans2
from scipy.optimize import linear_sum_assignment
from scipy.sparse.linalg import LinearOperator, eigsh

from equipoise.planning.affinity.pairs import Floats, Ints
from equipoise.planning.affinity.resplit import resplit
from equipoise.planning.affinity.task import TINY, Placement, Task


def assign(benefit_ER: Floats, inside_E: Ints, blocks: int) -> Ints:
    """[E] ranks of the largest total benefit, as many places on every rank, each place in its block (exact)."""
    experts, ranks = benefit_ER.shape
    per_block = ranks // blocks
    rank_E = np.zeros(experts, np.int64)
    for block in range(blocks):
        mine = np.flatnonzero(inside_E == block)
        columns = np.repeat(np.arange(block * per_block, (block + 1) * per_block), len(mine) // per_block)
        row, column = linear_sum_assignment(benefit_ER[np.ix_(mine, columns)], maximize=True)
        rank_E[mine[row]] = columns[column]
    return rank_E


def sweep(task: Task, start: Placement, rounds: int = 40, only: slice = slice(None)) -> Placement:
    """Improve a placement layer by layer, forward and back, until a whole round brings nothing.

    Args:
        task: what counts.
        start: a valid placement.
        rounds: most rounds; a few do.
        only: layers to begin with; others follow when a neighbour changes.

    Returns:
        A placement that costs no more, in which no layer can be placed better by assignment or by one swap.
    """
    placement = [rank.copy() for rank in start]
    layers = len(placement)
    stale = np.zeros(layers, np.bool_)  # a layer is placed again only after it or a neighbour has changed
    stale[only] = True
    for turn in range(rounds):
        for layer in range(layers) if turn % 2 == 0 else range(layers - 1, -1, -1):
            if stale[layer]:
                after = _place_layer(task, layer, _pull(task, placement, layer), placement[layer])
                stale[layer] = False
                if (after != placement[layer]).any():
                    placement[layer] = after
                    stale[max(layer - 1, 0) : layer + 2] = True
        for boundary in range(layers - 1):
            if _rename(task, placement, boundary):
                stale[boundary : boundary + 2] = True
        if not stale.any():
            break
    return placement


def _pull(task: Task, placement: Placement, layer: int, *, ahead: bool = True) -> Floats:
    """[E, R] share of pairs with the neighbouring layers that stay on a rank when an expert is there."""
    pull = np.zeros((len(placement[layer]), task.ranks))
    if layer > 0:
        pull += task.pairs.across[layer - 1].T @ _on(placement[layer - 1], task.ranks)
    if ahead and layer < len(placement) - 1:
        pull += task.pairs.across[layer] @ _on(placement[layer + 1], task.ranks)
    return pull


def _on(rank_E: Ints, ranks: int) -> Floats:
    return np.asarray(rank_E[:, None] == np.arange(ranks), np.float64)


def _place_layer(task: Task, layer: int, pull_ER: Floats, rank_E: Ints) -> Ints:
    """The layer's placement after assignment and swaps; never worse than the one it had."""
    at = np.arange(len(rank_E))
    benefit = pull_ER
    if task.together:  # linear around the present placement; counted twice, for each pair is seen from both ends
        benefit = pull_ER + 2 * task.together * (task.pairs.together[layer] @ _on(rank_E, task.ranks))
    candidate = assign(benefit, task.inside[layer], task.blocks)
    if task.inner_cost(layer, candidate) - pull_ER[at, candidate].sum() < (
        task.inner_cost(layer, rank_E) - pull_ER[at, rank_E].sum() - TINY
    ):
        rank_E = candidate
    return _swap(task, layer, pull_ER, rank_E) if task.together or task.mu else rank_E


def _swap(task: Task, layer: int, pull_ER: Floats, rank_E: Ints) -> Ints:
    """Swap pairs of experts while that lowers the layer's cost, several at once where they do not touch."""
    both, load, at = task.pairs.together[layer], task.pairs.load[layer], np.arange(len(rank_E))
    allowed = task.inside[layer][:, None] == task.inside[layer][None, :]

    def cost(rank: Ints) -> float:
        return task.inner_cost(layer, rank) - float(pull_ER[at, rank].sum())

    now = cost(rank_E)
    for _ in range(4 * len(rank_E)):  # each turn lowers the cost; the limit only guards against endless small change
        value = pull_ER + 2 * task.together * (both @ _on(rank_E, task.ranks)) if task.together else pull_ER
        moved = (value - value[at, rank_E][:, None])[:, rank_E]
        gain = moved + moved.T
        if task.together:
            gain -= 4 * task.together * both
        if task.mu:
            gain += task.mu * task.ranks * _relief(load, rank_E, task.ranks)
        gain[~allowed | (rank_E[:, None] == rank_E[None, :])] = 0.0
        chosen = _disjoint(gain)
        while len(chosen):  # together they may gain less than each alone: then fewer
            candidate = rank_E.copy()
            candidate[chosen[:, 0]], candidate[chosen[:, 1]] = rank_E[chosen[:, 1]], rank_E[chosen[:, 0]]
            after = cost(candidate)
            if after < now - TINY:
                break
            chosen = chosen[: len(chosen) // 4 if len(chosen) > 3 else len(chosen) - 1]
        else:
            return rank_E
        rank_E, now = candidate, after
    return rank_E


def _relief(load_E: Floats, rank_E: Ints, ranks: int) -> Floats:
    """[E, E] by how much the largest rank load falls when two experts swap."""
    held = np.bincount(rank_E, load_E, ranks)
    top = np.argsort(-held, kind="stable")[:3]
    # The largest load of all other ranks: the first of the top three that is neither of the two.
    others = np.zeros((ranks, ranks))
    for rank in top[::-1]:
        free = np.ones(ranks, np.bool_)
        free[rank] = False
        others[np.ix_(free, free)] = held[rank]
    after = held[rank_E][:, None] - load_E[:, None] + load_E[None, :]
    return np.asarray(held.max() - np.maximum(np.maximum(after, after.T), others[rank_E[:, None], rank_E[None, :]]))


def _disjoint(gain_EE: Floats) -> Ints:
    """[X, 2] swaps that gain, best first, no expert in two of them."""
    best = gain_EE.argmax(1)
    size = gain_EE[np.arange(len(best)), best]
    free, chosen = np.ones(len(best), np.bool_), []
    for e in np.argsort(-size, kind="stable"):
        if size[e] <= TINY:
            break
        f = int(best[e])
        if free[e] and free[f]:
            free[e] = free[f] = False
            chosen.append((int(e), f))
    return np.array(chosen, np.int64).reshape(-1, 2)


def _rename(task: Task, placement: Placement, boundary: int) -> bool:
    """Rename the ranks of all layers after a boundary, within their blocks, so that most pairs stay; whether it helped."""
    flow = _on(placement[boundary], task.ranks).T @ task.pairs.across[boundary] @ _on(placement[boundary + 1], task.ranks)
    block_R = np.arange(task.ranks) // (task.ranks // task.blocks)
    new = np.zeros(task.ranks, np.int64)
    for block in range(task.blocks):
        mine = np.flatnonzero(block_R == block)
        row, column = linear_sum_assignment(flow[np.ix_(mine, mine)], maximize=True)
        new[mine[column]] = mine[row]
    if flow[new, np.arange(task.ranks)].sum() <= np.trace(flow) + TINY:
        return False
    for layer in range(boundary + 1, len(placement)):
        placement[layer] = new[placement[layer]]
    return True


def contiguous(task: Task) -> Placement:
    """Places in order, block by block."""
    result = []
    for inside in task.inside:
        rank = np.zeros(len(inside), np.int64)
        rank[np.argsort(inside, kind="stable")] = np.arange(len(inside)) // (len(inside) // task.ranks)
        result.append(rank)
    return result


def dealt(task: Task) -> Placement:
    """Places dealt out in turn, block by block: copies of an expert, which are neighbours, land on different ranks."""
    result = []
    for inside in task.inside:
        rank, per_block = np.zeros(len(inside), np.int64), task.ranks // task.blocks
        order = np.argsort(inside, kind="stable")
        rank[order] = inside[order] * per_block + np.arange(len(inside)) % (len(inside) // task.blocks) % per_block
        result.append(rank)
    return result


def balanced(task: Task) -> Placement:
    """Heaviest expert first onto the least loaded rank of its block that has room (Graham 1969), without regard to pairs."""
    per_block, result = task.ranks // task.blocks, []
    for load, inside in zip(task.pairs.load, task.inside, strict=True):
        held, room = np.zeros(task.ranks), np.full(task.ranks, len(load) // task.ranks)
        rank, block_R = np.zeros(len(load), np.int64), np.arange(task.ranks) // per_block
        for e in np.argsort(-load, kind="stable"):
            rank[e] = np.where((room > 0) & (block_R == inside[e]), held, np.inf).argmin()
            held[rank[e]] += load[e]
            room[rank[e]] -= 1
        result.append(rank)
    return result


def random(task: Task, rng: np.random.Generator) -> Placement:
    """Every layer at random."""
    return [assign(rng.random((len(inside), task.ranks)), inside, task.blocks) for inside in task.inside]


def nearly_balanced(task: Task, rng: np.random.Generator) -> Placement:
    """Balanced for loads that are off by about a tenth: about as level, but elsewhere."""
    load = tuple(q * np.exp(0.1 * rng.standard_normal(len(q))) for q in task.pairs.load)
    return balanced(replace(task, pairs=replace(task.pairs, load=load)))


def greedy_forward(task: Task, rng: np.random.Generator) -> Placement:
    """The first layer at random, or by co-activation and load; each next one best for the one before."""
    placement = random(task, rng)
    for layer in range(len(placement)):
        placement[layer] = _place_layer(task, layer, _pull(task, placement, layer, ahead=False), placement[layer])
    return placement


def spectral(task: Task, rng: np.random.Generator) -> Placement:
    """Clusters of all experts of all layers in the leading eigenvectors of the pair graph, one cluster a rank.

    Source: Ng, Jordan, Weiss (2001), spectral clustering; clusters made equal per layer by balanced assignment.
    """
    per_block = task.ranks // task.blocks
    benefit = [np.zeros((len(inside), task.ranks)) for inside in task.inside]
    for block in range(task.blocks):
        mine = [np.flatnonzero(inside == block) for inside in task.inside]
        point_ND = _embed(task, mine, per_block, rng)
        centre_RD = point_ND[:1] if per_block == 1 else kmeans2(point_ND, per_block, minit="++", seed=rng)[0]
        near_NR = -((point_ND[:, None] - centre_RD[None]) ** 2).sum(2)
        ends = np.cumsum([len(m) for m in mine])[:-1]
        for layer, rows in enumerate(np.split(near_NR, ends)):
            benefit[layer][mine[layer][:, None], np.arange(block * per_block, (block + 1) * per_block)] = rows
    return [assign(b, inside, task.blocks) for b, inside in zip(benefit, task.inside, strict=True)]


def _embed(task: Task, mine: Sequence[Ints], dimensions: int, rng: np.random.Generator) -> Floats:
    """[N, D] one point of length 1 per place of a block over all layers, near where many pairs join them."""
    across = [p[np.ix_(mine[i], mine[i + 1])] for i, p in enumerate(task.pairs.across)]
    both = [task.together * c[np.ix_(m, m)] for c, m in zip(task.pairs.together, mine, strict=True)]
    start = np.concatenate([[0], np.cumsum([len(m) for m in mine])])
    n = int(start[-1])

    def times(x: Floats) -> Floats:
        x = x.reshape(n, -1)
        y = np.zeros_like(x)
        for i, c in enumerate(both):
            y[start[i] : start[i + 1]] += 2 * (c @ x[start[i] : start[i + 1]])
        for i, p in enumerate(across):
            y[start[i] : start[i + 1]] += p @ x[start[i + 1] : start[i + 2]]
            y[start[i + 1] : start[i + 2]] += p.T @ x[start[i] : start[i + 1]]
        return y

    degree = times(np.ones(n)).reshape(-1)
    scale = (1.0 / np.sqrt(np.maximum(degree, 1e-9)))[:, None]
    if n <= 400 or dimensions >= n - 1:
        _, vectors = np.linalg.eigh(times(scale * np.eye(n)) * scale)
        vectors = vectors[:, -dimensions:]
    else:
        graph = LinearOperator((n, n), matvec=lambda x: (scale * times(scale * x.reshape(n, 1))).reshape(-1), dtype=np.float64)
        _, vectors = eigsh(graph, k=dimensions, which="LA", v0=rng.random(n), tol=1e-3, maxiter=20 * n)
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))


RESPLITS = 3000
"""Layers times pairs of ranks that `resplit` goes through in one round over the best local optima; at least one is improved."""

KICKS = 48
"""Times that the best placement is disturbed and swept again."""
SMALL = 3000
"""Over the places of all layers: times that the placement of a small task is disturbed; a 20th of that, how many are."""

STARTS: tuple[Callable[[Task, np.random.Generator], Placement], ...] = (nearly_balanced, spectral, greedy_forward, random)
"""What restarts begin with, in turn."""


def search(task: Task, *, restarts: int, seed: int, known: Sequence[Placement] = ()) -> list[Placement]:
    """Local optima from several starts, best first; never worse than contiguous, balanced or known placements.

    Args:
        task: what counts.
        restarts: starts beside those: nearly balanced, spectral, greedy forward and random, in turn.
        seed: of the starts.
        known: placements to start from as well.
    """
    rng = np.random.default_rng(seed)
    starts = [*known, contiguous(task), dealt(task), balanced(task)]
    starts += [STARTS[i % len(STARTS)](task, rng) for i in range(restarts)]
    found = sorted((sweep(task, start) for start in starts), key=task.cost)
    pairs_of_ranks = task.ranks * (task.ranks // task.blocks - 1) // 2
    few = max(1, RESPLITS // max(1, len(task.inside) * pairs_of_ranks))
    found = sorted([*(resplit(task, placement) for placement in found[:few]), *found[few:]], key=task.cost)
    if restarts:
        several = max(1, SMALL // 20 // sum(map(len, task.inside)))
        found = sorted([*(_kicked(task, placement, rng) for placement in found[:several]), *found], key=task.cost)
    return found


def _kicked(task: Task, placement: Placement, rng: np.random.Generator) -> Placement:
    """Iterated local search: shuffle a part of the places of up to four consecutive layers, sweep, keep what is no worse."""
    cost, layers = task.cost(placement), len(placement)
    for _ in range(max(KICKS, SMALL // sum(map(len, placement)))):
        first = int(rng.integers(layers))
        some = slice(first, min(layers, first + int(rng.integers(1, 5))))
        start = list(placement)
        for layer in range(layers)[some]:
            start[layer] = placement[layer].copy()
            at = rng.permutation(len(start[layer]))[: max(2, len(start[layer]) // int(rng.integers(2, 6)))]
            at = at[task.inside[layer][at] == task.inside[layer][at[0]]]
            start[layer][at] = start[layer][rng.permutation(at)]
        after = sweep(task, start, only=some)
        if (value := task.cost(after)) <= cost:  # as good but elsewhere is welcome too
            placement, cost = after, value
    return resplit(task, placement)
