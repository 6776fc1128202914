"""`exflow`: placement that keeps a token's next expert on its rank, or at least on its node.

After ExFlow (arXiv:2401.08383), whose integer program over tokens is restated for counts of pairs and solved by local
search (`affinity_search`, `affinity_resplit`), certified on small cases by exact methods (`affinity_exact`). With top-k above
1 a token also pays for each rank that its experts of one layer lie on, so pairs chosen together count as well. Keeping tokens
in place heaps load, hence a price `mu` on the largest rank load.
Shapes: S scenarios, L MoE layers, E logical experts, P physical slots, R ranks, N nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from equipoise.artifacts import Plan, Profile
from equipoise.errors import PlanError
from equipoise.planning.affinity.pairs import (
    Affinity,
    Floats,
    Ints,
    Physical,
    affinity,
    chance_crossings,
    crossings,
    load_ratio,
    shares,
    splits,
)
from equipoise.planning.affinity.search import assign, search
from equipoise.planning.affinity.task import Placement, Task, keep_apart, make_task
from equipoise.planning.linear import contiguous_placement
from equipoise.planning.moves import keep_slots
from equipoise.planning.ranks import Phase, phase_load, placement_of, rank_plan, target

MU = 1.0
"""Default price of load: one hundredth of the mean rank load on the fullest rank is worth one crossing in a hundred."""


@dataclass(frozen=True, eq=False)
class FrontierPoint:
    """One compromise between keeping tokens in place and balance; means over boundaries or layers, in sample.

    Attributes:
        mu: price of load that it is best for, among those found.
        physical: the placement, [P] a layer, rank-major.
        crossings: share of pairs of consecutive layers on different ranks.
        node_crossings: the same for nodes.
        splits: share of co-activated pairs on different ranks.
        load_ratio: largest rank load over the mean.
    """

    mu: float
    physical: Physical
    crossings: float
    node_crossings: float
    splits: float
    load_ratio: float


def place(
    pairs: Affinity,
    *,
    ranks: int,
    nodes: int = 1,
    slots: int | Sequence[int] | None = None,
    mu: float = MU,
    coactivation: float = 1.0,
    restarts: int = 4,
    seed: int = 0,
    known: Sequence[Physical] = (),
) -> list[Ints]:
    """Placement of least `crossings + coactivation * splits + mu * max rank load`, summed over layers.

    With several nodes first the experts are divided among nodes by the same cost with nodes for ranks, then each node's
    among its ranks. Copies (slots beyond E) go, one after another, to the expert of largest load per copy; they are placed
    like experts, with even parts of the tokens, never two of one expert on a rank.

    Args:
        pairs: shares of pairs and load.
        ranks: R.
        nodes: N, a divisor of R; node n has ranks n * R / N and following.
        slots: P of every layer, or of each; a multiple of R; by default E.
        mu: price of the largest rank load over the mean.
        coactivation: price of the share of co-activated pairs on different ranks.
        restarts: starts of the search beside the fixed ones.
        seed: of the starts; the same arguments give the same placement.
        known: placements with the same copies to start from as well.

    Returns:
        [P] experts of the slots of each layer, rank-major.

    Raises:
        PlanError: ranks that do not divide slots, nodes that do not divide ranks, slots fewer than experts or more than one
            copy of each on every rank, a price that is negative or not finite, restarts below 0.
    """
    _check(ranks, nodes, mu, coactivation, restarts)
    wanted = _slots(pairs, slots, ranks)
    places = [np.repeat(np.arange(len(q)), _copies(q, p, ranks)) for q, p in zip(pairs.load, wanted, strict=True)]
    starts = [_ranks_of(physical, ranks) for physical in known if _same_copies(physical, places)]
    task = make_task(pairs, places, ranks, mu=mu, together=coactivation if any(c.any() for c in pairs.together) else 0.0)
    if nodes > 1:
        upper = keep_apart(replace(task, ranks=nodes), places, ranks // nodes)
        on_node = [[rank // (ranks // nodes) for rank in start] for start in starts]
        inside = search(upper, restarts=restarts, seed=seed, known=on_node)[0]
        task = replace(task, inside=inside, blocks=nodes)
        starts = [_into(task, start) for start in starts]
    best = search(keep_apart(task, places, 1), restarts=restarts, seed=seed, known=starts)[0]
    return [expert[np.lexsort((expert, rank))] for expert, rank in zip(places, best, strict=True)]


def _check(ranks: int, nodes: int, mu: float, coactivation: float, restarts: int) -> None:
    if ranks < 1 or nodes < 1 or ranks % nodes:
        raise PlanError(f"ranks, nodes: {ranks}, {nodes} given; allowed are whole numbers from 1, nodes a divisor of ranks.")
    for name, value in (("mu", mu), ("coactivation", coactivation)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise PlanError(f"{name}: {value!r} given; allowed is a finite number from 0.")
    if isinstance(restarts, bool) or not isinstance(restarts, int) or restarts < 0:
        raise PlanError(f"restarts: {restarts!r} given; allowed is a whole number from 0.")


def _slots(pairs: Affinity, slots: int | Sequence[int] | None, ranks: int) -> list[int]:
    """Slots of each layer, checked."""
    if slots is None or isinstance(slots, int):
        wanted = [width if slots is None else slots for width in pairs.widths]
    else:
        wanted = list(slots)
    if len(wanted) != len(pairs.load):
        raise PlanError(f"slots: {len(wanted)} numbers given for {len(pairs.load)} layers; give one number, or one per layer.")
    for p, width in zip(wanted, pairs.widths, strict=True):
        if p % ranks or not width <= p <= width * ranks:
            raise PlanError(
                f"slots: {p} for {width} experts; allowed are multiples of {ranks} ranks from {width} to {width * ranks}."
            )
    return wanted


def _copies(load_E: Floats, slots: int, ranks: int) -> Ints:
    """[E] copies of each expert: each further one to the largest load per copy, at most one a rank."""
    copies = np.ones(len(load_E), np.int64)
    for _ in range(slots - len(load_E)):
        copies[np.where(copies < ranks, load_E / copies, -1.0).argmax()] += 1
    return copies


def _same_copies(physical: Physical, places: Physical) -> bool:
    return all(len(p) == len(q) and (np.sort(p) == q).all() for p, q in zip(physical, places, strict=True))


def _ranks_of(physical: Physical, ranks: int) -> Placement:
    """Rank of each place, places sorted by expert."""
    return [np.argsort(slots, kind="stable") // (len(slots) // ranks) for slots in physical]


def _into(task: Task, start: Placement) -> Placement:
    """The placement nearest to a start among those that keep the blocks."""
    on = [np.asarray(rank[:, None] == np.arange(task.ranks), np.float64) for rank in start]
    return [assign(benefit, inside, task.blocks) for benefit, inside in zip(on, task.inside, strict=True)]


def frontier(
    pairs: Affinity,
    mus: Sequence[float],
    *,
    ranks: int,
    nodes: int = 1,
    slots: int | Sequence[int] | None = None,
    coactivation: float = 1.0,
    restarts: int = 4,
    seed: int = 0,
) -> list[FrontierPoint]:
    """The best placement for each price of load, in order of price: fewest crossings first, best balance last.

    Each price starts from the placements of the others as well, and takes the cheapest of all that were found.

    Args:
        pairs: shares of pairs and load.
        mus: prices.
        ranks: R.
        nodes: N.
        slots: P of every layer, or of each; by default E.
        coactivation: price of the share of co-activated pairs on different ranks.
        restarts: starts of each search beside the fixed ones.
        seed: of the starts.
    """
    found: list[list[Ints]] = []
    for mu in sorted(mus):
        common = {"slots": slots, "coactivation": coactivation, "restarts": restarts, "seed": seed}
        found.append(place(pairs, ranks=ranks, nodes=nodes, mu=mu, known=found, **common))  # type: ignore[arg-type]
    locality = [crossings(pairs, p, ranks).sum() + coactivation * splits(pairs, p, ranks).sum() for p in found]
    balance = [load_ratio(pairs, p, ranks).sum() for p in found]
    best = [min(range(len(found)), key=lambda i: locality[i] + mu * balance[i]) for mu in sorted(mus)]
    return [_point(pairs, mu, found[i], ranks, nodes) for mu, i in zip(sorted(mus), best, strict=True)]


def _point(pairs: Affinity, mu: float, physical: Physical, ranks: int, nodes: int) -> FrontierPoint:
    return FrontierPoint(
        mu=mu,
        physical=physical,
        crossings=_mean(crossings(pairs, physical, ranks)),
        node_crossings=_mean(crossings(pairs, physical, nodes)),
        splits=_mean(splits(pairs, physical, ranks)),
        load_ratio=_mean(load_ratio(pairs, physical, ranks)),
    )


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else 0.0


def exflow(
    profile: Profile,
    *,
    units: int,
    seed: int,
    slots: int | Sequence[int] | None = None,
    nodes: int = 1,
    current: Plan | None = None,
    phase: Phase = "all",
    mu: float = MU,
    coactivation: float = 1.0,
    restarts: int = 4,
) -> Plan:
    """Plan that keeps a token's next expert on its rank or node, at a price on the largest rank load.

    Args:
        profile: loads and transitions; co-activation too where top-k is above 1.
        units: ranks R.
        seed: of the search's starts.
        slots: physical slots of every layer, or of each; by default its experts.
        nodes: machines that the ranks are divided among; tokens are kept on their node first, then on their rank.
        current: plan in force; ranks are named after it, so that the fewest experts move for the same crossings.
        phase: whose load is to be balanced; transitions are recorded over both phases together.
        mu: price of the largest rank load over the mean, against 1 for the share of pairs that cross.
        coactivation: price of the share of co-activated pairs on different ranks; 0 looks at the next layer alone.
        restarts: starts of the search beside the fixed ones.

    Raises:
        PlanError: the profile has no transitions (or no co-activation where it is needed), or an option is out of range.

    Source: ExFlow (arXiv:2401.08383), objective and two levels; the search and the price of load are ours.
    """
    aim = target(profile, units, slots, nodes)
    load = phase_load(profile, phase).sum(0)
    pairs = profile_affinity(profile, load, coactivation)
    before = None if current is None else placement_of(current, profile, units)
    physical = place(
        pairs,
        ranks=units,
        nodes=nodes,
        slots=aim.slots,
        mu=mu,
        coactivation=coactivation,
        restarts=restarts,
        seed=seed,
        known=() if before is None else (before,),
    )
    if before is not None:
        physical = rename_alike(physical, before, pairs.widths, units, nodes)
    options: dict[str, Any] = {"nodes": nodes, "phase": phase, "mu": mu, "coactivation": coactivation, "restarts": restarts}
    if slots is not None:
        options["slots"] = slots if isinstance(slots, int) else list(slots)
    return rank_plan(
        profile,
        physical,
        ranks=units,
        nodes=nodes,
        method="exflow",
        options=options,
        seed=seed,
        current=current,
        note=_note(pairs, physical, units, nodes),
        load_LE=load,
    )


def profile_affinity(profile: Profile, load_LE: NDArray[np.generic], coactivation: float = 1.0) -> Affinity:
    """The pairs of a profile.

    Args:
        profile: with transitions.
        load_LE: [L, E] load to balance.
        coactivation: its price; when 0, co-activation need not be recorded.

    Raises:
        PlanError: transitions are missing, or co-activation where top-k is above 1 and its price above 0.
    """
    layers, experts = len(profile.model.layers), profile.model.max_experts
    advice = (
        "these come from records of single tokens: profile the model here, or read records that keep each token's experts "
        "(vLLM routed experts, SGLang per_token). To place by load alone use method 'robust' or 'eplb'."
    )
    if layers < 2:
        raise PlanError("exflow: the model has one MoE layer, so no token has a next expert; use method 'robust' or 'eplb'.")
    if profile.transitions.size == 0 or not profile.transitions.any():
        raise PlanError(f"exflow: this profile has no transitions (pairs of experts in consecutive layers); {advice}")
    both = profile.coactivation if profile.coactivation.size and coactivation else None
    if both is None and coactivation and max(layer.top_k for layer in profile.model.layers) > 1:
        raise PlanError(
            f"exflow: top-k is above 1 and this profile has no co-activation; set coactivation=0 to do without, or: {advice}"
        )
    assert profile.transitions.shape == (layers - 1, experts, experts), "checked by Profile"
    return affinity(profile.transitions, both, load_LE, profile.widths.tolist())


def rename_alike(physical: Physical, current: Physical, widths: Sequence[int], ranks: int, nodes: int = 1) -> list[Ints]:
    """The same placement with ranks renamed, nodes as a whole, so that most experts stay where they are.

    Renamed alike in all layers, for only then do crossings stay as they are (`moves.rename_ranks` names each layer anew).

    Args:
        physical: [P] a layer, rank-major.
        current: the placement in force, P may differ.
        widths: [L] experts.
        ranks: R.
        nodes: N.
    """
    kept = np.zeros((ranks, ranks))  # experts that a rank of the new placement shares with a rank of the current one
    for new, old, width in zip(physical, current, widths, strict=True):
        kept += (shares(new, width, ranks) > 0).T.astype(float) @ (shares(old, width, ranks) > 0)
    each = ranks // nodes
    inner = np.zeros((nodes, nodes))
    name = np.zeros((nodes, nodes, each), np.int64)
    for a in range(nodes):
        for b in range(nodes):
            part = kept[a * each : (a + 1) * each, b * each : (b + 1) * each]
            row, column = linear_sum_assignment(part, maximize=True)
            inner[a, b], name[a, b, row] = part[row, column].sum(), b * each + column
    of_node, to_node = linear_sum_assignment(inner, maximize=True)
    new_name = np.concatenate([name[a, b] for a, b in zip(of_node, to_node, strict=True)])
    renamed = [np.asarray(row).reshape(ranks, -1)[np.argsort(new_name)].reshape(-1) for row in physical]
    return [keep_slots(new, np.asarray(old), ranks) for new, old in zip(renamed, current, strict=True)]


def _note(pairs: Affinity, physical: Physical, ranks: int, nodes: int) -> str:
    plain = [contiguous_placement(width, len(p), ranks) for p, width in zip(physical, pairs.widths, strict=True)]
    text = (
        f"in sample {_mean(crossings(pairs, physical, ranks)):.1%} of (expert, next expert) pairs cross ranks; without a plan "
        f"{_mean(crossings(pairs, plain, ranks)):.1%}; independent routing on this placement "
        f"{_mean(chance_crossings(pairs, physical, ranks)):.1%}"
    )
    if nodes > 1:
        between = [_mean(crossings(pairs, p, nodes)) for p in (physical, plain)]
        text += f"; nodes {between[0]:.1%}, without a plan {between[1]:.1%}"
    return text
