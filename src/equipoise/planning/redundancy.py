"""Which layer deserves how many redundant slots, none included: a knapsack with bytes as weight and held-out time as value.

After CRAFT (arXiv:2603.28768): place each layer with 0, 1, 2, 4, ... more slots per rank, replay loads that the placement was
not made from, and spend the memory where it wins most. Two things differ. The value is the time of the slowest rank under a
cost model, not mean / max: times of layers add up to the time of a step, ratios do not; with the cost of tokens it is the max
over mean rank load. And one more slot per rank, for which every rank has less KV cache, must win `least_gain` of its layer's
time. The optimum over layers is exact.
Shapes: S scenarios, F folds, L MoE layers, E logical experts of the widest layer, P physical slots, R ranks, M rows to choose
from (a row = one more slot of a layer on every rank).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from equipoise.artifacts import Profile
from equipoise.errors import PlanError
from equipoise.planning.cost import CostModel, PairCost, expected_activated
from equipoise.planning.eplb import by_shape, eplb_placement
from equipoise.planning.knapsack import choose_exactly
from equipoise.planning.ranks import Ints, Phase, phase_load, target
from equipoise.precisions import precision

Floats = NDArray[np.float64]
Place = Callable[[Ints, int, int, int, int], Ints]
"""f(load_SLE, slots, ranks, nodes, groups) -> [L, P]: placements of layers of one shape from the loads of some scenarios."""
FOLDS = 5


@dataclass(frozen=True, eq=False)
class Redundancy:
    """How many redundant slots each layer gets, and what each number of them is worth.

    Attributes:
        slots: P of each layer: what to give a method as `slots`.
        rows: redundant slots per rank of each layer, beyond what is needed to hold every expert once.
        menu: [M] numbers of rows that were tried.
        time_LM: [L, M] held-out time of the slowest rank with each of them, as a multiple of the mean rank's without copies.
        bytes_per_rank: memory that the chosen rows take on every rank, and that its KV cache loses; None for unknown sizes.
        held_out: False when there was only one stretch of traffic, so that times are in sample and too good.
        cost: name of the cost model.
    """

    slots: tuple[int, ...]
    rows: tuple[int, ...]
    menu: tuple[int, ...]
    time_LM: Floats
    bytes_per_rank: int | None
    held_out: bool
    cost: str

    @property
    def chosen_time_L(self) -> Floats:
        """[L] held-out time with the chosen rows."""
        return np.asarray(self.time_LM[np.arange(len(self.rows)), [self.menu.index(r) for r in self.rows]])

    def kv_tokens(self, kv_bytes_per_token: int) -> int:
        """Tokens of KV cache per rank that the chosen slots displace, rounded up.

        Args:
            kv_bytes_per_token: bytes that one token of context takes on one rank.

        Raises:
            PlanError: the sizes of experts are not known.
        """
        if self.bytes_per_rank is None:
            raise PlanError("the sizes of the experts are not known; give the model's config.json (--config) to price slots.")
        return -(-self.bytes_per_rank // kv_bytes_per_token)

    @property
    def note(self) -> str:
        """What was chosen and why, in one sentence for people."""
        size = "" if self.bytes_per_rank is None else f", {self.bytes_per_rank} bytes of KV cache on every rank,"
        kind = "held-out" if self.held_out else "in-sample"
        return (
            f"{sum(self.rows)} redundant slots per rank over {len(self.rows)} layers (0 in {self.rows.count(0)}){size} for a "
            f"mean {kind} time of the slowest rank of {self.chosen_time_L.mean():.3f} instead of "
            f"{self.time_LM[:, 0].mean():.3f} times the mean rank's (cost: {self.cost})"
        )


def choose_redundancy(
    profile: Profile,
    *,
    ranks: int,
    nodes: int = 1,
    menu: Sequence[int] = (0, 1, 2, 4),
    most_bytes: int | None = None,
    most_rows: int | None = None,
    least_gain: float = 0.005,
    per_layer: bool = True,
    cost: CostModel | None = None,
    batch: int = 4096,
    phase: Phase = "all",
    place: Place | None = None,
) -> Redundancy:
    """The redundant slots of every layer that make a step shortest on traffic not planned for, within the memory given.

    Args:
        profile: loads of several scenarios, or at least several windows, to hold some of them out.
        ranks: R.
        nodes: machines.
        menu: redundant slots per rank that a layer may have; 0 is always tried.
        most_bytes: memory that redundant slots may take on each rank, over all layers; not limited when omitted.
        most_rows: redundant slots per rank, summed over layers; the same limit where sizes are not known.
        least_gain: part of the mean rank's time that a further slot per rank must win in its layer to be worth its memory.
        per_layer: False for engines that take one number of slots for all layers.
        cost: what a rank's load costs in time; tokens when omitted.
        batch: tokens of a batch, which matters for costs other than tokens.
        phase: the phase to plan for.
        place: how slots would be placed; EPLB's rules on the sum of the scenarios when omitted.

    Raises:
        PlanError: an option is out of range, or bytes are given where sizes are not known.
    """
    widths = profile.widths.tolist()
    base = np.array(target(profile, ranks, [-(-n // ranks) * ranks for n in widths], nodes).slots)
    rows_M = _rows(menu, min(n - p // ranks for n, p in zip(widths, base.tolist(), strict=True)))
    size_L, capacity = _limit(profile, most_bytes, most_rows)
    if batch < 1 or least_gain < 0:
        raise PlanError(f"batch {batch}, least_gain {least_gain} given; allowed are a batch from 1 and a gain from 0.")
    model, groups = cost or PairCost(), profile.model.expert_groups
    folds, held_out = _folds(profile, phase)
    slowest_LM, mean_LM = np.zeros((2, len(widths), len(rows_M)))
    for train_SLE, test_SLE in folds:
        for column, rows in enumerate(rows_M.tolist()):
            place_here = partial(_place, place or _greedy, train_SLE, ranks, nodes, groups)
            for layer, physical in enumerate(
                by_shape(list(zip(widths, (base + rows * ranks).tolist(), strict=True)), place_here)
            ):
                times = _times(physical, test_SLE[:, layer], ranks, batch, profile.model.layers[layer].top_k, model)
                slowest_LM[layer, column] += times.max(1).mean() / len(folds)
                mean_LM[layer, column] += times.mean() / len(folds)
    time_LM = slowest_LM / np.where(mean_LM[:, :1] > 0, mean_LM[:, :1], 1.0)
    value_LM = time_LM + least_gain * rows_M
    weight_LM = size_L[:, None] * rows_M
    if per_layer:
        chosen_L = choose_exactly(weight_LM, value_LM, capacity)
    else:
        fits = weight_LM.sum(0) <= capacity
        chosen_L = np.full(len(widths), np.where(fits, value_LM.sum(0), np.inf).argmin())
    rows_L = rows_M[chosen_L]
    return Redundancy(
        slots=tuple((base + rows_L * ranks).tolist()),
        rows=tuple(rows_L.tolist()),
        menu=tuple(rows_M.tolist()),
        time_LM=time_LM,
        bytes_per_rank=int((rows_L * _expert_bytes(profile)).sum()) if profile.model.sized else None,
        held_out=held_out,
        cost=model.name,
    )


def _rows(menu: Sequence[int], most: int) -> Ints:
    """[M] the numbers of rows to try, ascending, 0 first, none beyond one copy of every expert on every rank."""
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in menu):
        raise PlanError(f"menu: {list(menu)} given; allowed are whole numbers from 0, such as 0 1 2 4.")
    return np.array(sorted({0} | {n for n in menu if n <= most}), np.int64)


def _limit(profile: Profile, most_bytes: int | None, most_rows: int | None) -> tuple[Ints, int]:
    """[L] weight of one row of each layer, and the weight that all rows may have."""
    layers, no_limit = profile.model.layers, 2**62
    if most_bytes is not None and most_rows is not None:
        raise PlanError("most_bytes and most_rows: both given; they are one limit in two measures, so give one.")
    for name, value in (("most_bytes", most_bytes), ("most_rows", most_rows)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise PlanError(f"{name}: {value!r} given; allowed is a whole number from 0; leave it out for no limit.")
    if most_bytes is not None and not profile.model.sized:
        raise PlanError(
            "most_bytes: the sizes of the experts are not known; give the model's config.json (--config) or most_rows."
        )
    if most_rows is not None or not profile.model.sized:
        return np.ones(len(layers), np.int64), no_limit if most_rows is None else most_rows
    return _expert_bytes(profile), no_limit if most_bytes is None else most_bytes


def _expert_bytes(profile: Profile) -> Ints:
    """[L] bytes of one expert: what one row takes on each rank."""
    form = precision(profile.model.dtype)
    return np.array([layer.expert_bytes(form) for layer in profile.model.layers], np.int64)


def _folds(profile: Profile, phase: Phase) -> tuple[list[tuple[Ints, Ints]], bool]:
    """Pairs of loads [S, L, E] to plan on and to judge on, and whether the second are held out.

    Scenarios are dealt to the folds in turn; windows, where there is one scenario, are held out in stretches of time.
    """
    load_SLE = phase_load(profile, phase)
    load_SLE = load_SLE[load_SLE.any((1, 2))]
    fold = np.arange(len(load_SLE)) % FOLDS
    if len(load_SLE) < 2 and phase == "all":
        load_SLE = profile.windows[profile.windows.any((1, 2))]
        fold = np.arange(len(load_SLE)) * FOLDS // max(len(load_SLE), 1)
    if len(load_SLE) < 2:
        load_SLE = phase_load(profile, phase)
        return [(load_SLE, load_SLE)], False
    return [(load_SLE[fold != f], load_SLE[fold == f]) for f in np.unique(fold)], True


def _greedy(load_SLE: Ints, slots: int, ranks: int, nodes: int, groups: int) -> Ints:
    return eplb_placement(load_SLE.sum(0), slots, ranks, nodes, groups)


def _place(rule: Place, load_SLE: Ints, ranks: int, nodes: int, groups: int, layers: Ints, experts: int, slots: int) -> Ints:
    return rule(load_SLE[:, layers, :experts], slots, ranks, nodes, groups)


def _times(physical_P: Ints, load_SE: Ints, ranks: int, batch: int, top_k: int, cost: CostModel) -> Floats:
    """[S, R] time of each rank in a batch of each scenario that served something; [1, R] zeros when none did."""
    total_S = load_SE.sum(1).astype(np.float64)
    served = total_S > 0
    if not served.any():
        return np.zeros((1, ranks))
    rate_SE = load_SE[served] * top_k / total_S[served, None]  # copies of a token's choices: sums to top_k
    copies = np.bincount(physical_P, minlength=load_SE.shape[1])
    rate_SP = rate_SE[:, physical_P] / copies[physical_P]
    pairs, activated = (
        slot.reshape(len(slot), ranks, -1).sum(-1) for slot in (batch * rate_SP, expected_activated(rate_SP, batch))
    )
    return np.asarray(cost(pairs, activated))
