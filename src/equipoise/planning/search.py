"""The optimal form of Replicate-and-Quantize: copies, bits and units chosen together.

More copies balance better, hold better on other text, and leave fewer bits for each. The search walks that trade in
three steps. (1) A curve per layer: the LIS expected on other text for each number of extra copies. (2) Copies go to the
layers where they buy most, as many as leave an error within its bound. (3) Those copies are placed with care, their
shares balanced, their bits chosen by knapsack within every unit's bytes.
Shapes: L MoE layers, E logical experts of the widest layer, U units, M numbers of copies that are tried.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from equipoise.planning.budget import Budget, UnreachableError
from equipoise.planning.dispatched import dispatched_lis, improve
from equipoise.planning.knapsack import Choice, choose
from equipoise.planning.load import Floats, Ints, Outlook, Slots, contiguous, expected_lis
from equipoise.planning.precision import assign_bits, pooled_bits
from equipoise.planning.replicate import balance_shares, copies, copy_order, drop_idle, level
from equipoise.planning.spread import exchange, place

STEPS = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)
"""Parts of the most extra copies that the curve is computed for; one copy per unit is always among them."""
LEVEL = 0.01
"""Imbalance of the measured load that is worth another copy."""
RESERVE = 1.04
"""Copies that the error bound has to bear for each that is placed; leveling adds about as many."""
IDLE = 0.002
"""Part of a unit's load below which a copy is not worth its bytes."""
STEPS_TO_COMPARE, STEPS_TO_KEEP = 6, 80
"""Steps of the search for slots that least-loaded dispatch can do much with: for a point of the curve, and for the plan."""
MOST_FLOWS = 120_000
"""Slots times windows of all layers together beyond which that search would take minutes and is left out."""
RETRIES = 8
"""How often a plan that missed its error is made again with fewer copies, before it is made without."""
SWEEPS = 2
"""Rounds of exchanging slots and balancing shares; a third moves little."""


@dataclass(frozen=True, eq=False)
class Solution:
    """Slots, the precision of each, and what they come to.

    Attributes:
        slots: copies, units and shares.
        options: [N] precision of each slot.
        error: relative RMS error of the layers' routed output; nan when a unit does not hold its slots in any format.
        least_error: proven: no precisions of these copies that fit the same bytes have a smaller error.
    """

    slots: Slots
    options: Ints
    error: float
    least_error: float


def solve(
    look: Outlook,
    budget: Budget,
    error_bound: float,
    tolerance: float,
    seed: int,
    *,
    alike: bool = True,
    least_loaded: bool = False,
) -> Solution:
    """Copies, units, shares and bits with the least imbalance expected on other text.

    Args:
        look: load and its deviations.
        budget: bytes and errors.
        error_bound: most relative RMS error of the layers' routed output.
        tolerance: part of the imbalance without copies that is given away for fewer of them, and so less error.
        seed: of the random deviations that expected LIS is a mean over.
        alike: one precision for all copies of an expert.
        least_loaded: each batch's tokens are split anew, instead of by the plan's shares.

    Raises:
        UnreachableError: even without copies the error exceeds the bound.
    """
    search = _Search(look, budget, seed, alike, least_loaded)
    extra_L = search.allocate(error_bound, tolerance)
    for _ in range(RETRIES):
        solution = search.carry_out(extra_L)
        if solution.error <= error_bound or not extra_L.any():
            break
        # Shares came out less even, or bytes less divisible, than the search reckoned: fewer copies.
        factor = 0.9 if np.isnan(solution.error) else min(0.97, max(0.8, error_bound / solution.error))
        extra_L = (extra_L * factor).astype(np.int64)
    else:
        solution = search.carry_out(np.zeros_like(extra_L))
    if not solution.error <= error_bound:
        least = "no choice of formats fits" if np.isnan(solution.error) else f"the least is {solution.error:.3g}"
        raise UnreachableError(
            f"error_bound: {error_bound} given, but in {budget.unit_bytes} bytes per unit {least}; "
            "allow more error or more bytes."
        )
    return solution


class _Search:
    """One profile and budget; the curve is shared by all that is asked of them."""

    def __init__(self, look: Outlook, budget: Budget, seed: int, alike: bool, least_loaded: bool) -> None:
        self.look, self.budget, self.seed = look, budget, seed
        self.alike, self.least_loaded = alike, least_loaded
        self.fewest_L = budget.sizes.min(1)
        spare = budget.total_bytes - int((look.widths * self.fewest_L).sum())
        self.most = int(min(spare // int(self.fewest_L.sum()), int(look.widths.max()) * (look.units - 1)))
        self.order_LX = copy_order(look, self.most)

    def copies(self, extra_L: Ints) -> Ints:
        """[L, E] copies of each expert with so many extra ones per layer."""
        return copies(self.order_LX, extra_L, self.look.widths, self.look.load.shape[1])

    def error(self, extra_L: Ints) -> float:
        """Relative RMS error with so many extra copies and the reserve, shares even and bytes pooled; nan if none fit."""
        d_LE = self.copies(np.ceil(RESERVE * extra_L).astype(np.int64))
        layer, expert = (np.repeat(index.ravel(), d_LE.ravel()) for index in np.indices(d_LE.shape))
        bits = pooled_bits(Slots(layer, expert, expert, 1.0 / d_LE[layer, expert]), self.budget, self.alike)
        return float("nan") if bits.excess else float(np.sqrt(bits.cost / len(d_LE)))

    def most_copies(self, error_bound: float) -> int:
        """Extra copies per layer, the same in all, that keep the error within its bound."""
        return _largest(self.most, lambda extra: self.error(np.full(len(self.fewest_L), extra)) <= error_bound)

    def allocate(self, error_bound: float, tolerance: float) -> Ints:
        """[L] extra copies that the error bound allows, spent on the layers where expected LIS falls most.

        For any number of bytes a knapsack over layers on the curve says which layers get copies. The most bytes are
        sought that keep the error within its bound; then the fewest that lose no more than the tolerance.
        """
        # With copies only where they pay, some layers take more of them than an equal number for all would be.
        top = min(self.most, 2 * self.most_copies(error_bound) + 2)
        menu = {int(np.ceil(part * top)) for part in STEPS} | {min(self.look.units, top)}
        menu_M = np.array(sorted(menu, reverse=True))
        score_LM = np.stack([self._expected(int(extra)) for extra in menu_M], 1)
        # A larger number of copies can always be used as a smaller one, so the curve never rises with copies.
        score_LM = np.minimum.accumulate(score_LM[:, ::-1], 1)[:, ::-1]
        size_LM = menu_M * self.fewest_L[:, None]
        pool = np.zeros(len(score_LM), np.int64)
        step = int(self.fewest_L.min())  # bytes of one copy

        def spend(copies: int) -> Choice:
            return choose(size_LM, score_LM, pool, copies * step, 1)

        most = _largest(int(size_LM[:, 0].sum()) // step, lambda n: self.error(menu_M[spend(n).option]) <= error_bound)
        worst = spend(most).cost + tolerance * float((score_LM[:, -1] - 1.0).sum())
        fewest = most - _largest(most, lambda less: spend(most - less).cost <= worst)
        return np.asarray(menu_M[spend(fewest).option])

    def _expected(self, extra: int) -> Floats:
        """[L] expected LIS with the same number of extra copies in all layers, placed quickly."""
        look = self.look
        d_LE = self.copies(np.full(len(look.load), extra))
        room_L = _room(d_LE, look.units)
        slots = place(look, d_LE, room_L)
        if self.least_loaded:
            return dispatched_lis(improve(slots, look, room_L, self._steps(slots, STEPS_TO_COMPARE), self.seed), look)
        return expected_lis(balance_shares(slots, look, rounds=20), look, self.seed)

    def _steps(self, slots: Slots, wanted: int) -> int:
        """Steps of the search for dispatched slots that the size of the problem allows."""
        return wanted if len(slots.unit) * len(self.look.samples) <= MOST_FLOWS else 0

    def carry_out(self, extra_L: Ints) -> Solution:
        """Slots with so many extra copies, placed with care, and their bits."""
        look = self.look
        d_LE = self.copies(extra_L)
        room_L = _room(d_LE, look.units)
        slots = balance_shares(place(look, d_LE, room_L), look)
        if extra_L.any() or look.units < look.load.shape[1]:
            for _ in range(SWEEPS):
                slots = balance_shares(exchange(slots, look, room_L), look)
        if self.least_loaded:
            slots = improve(slots, look, room_L, self._steps(slots, STEPS_TO_KEEP), self.seed)
            return self._finish(balance_shares(slots, look))
        slots = drop_idle(level(slots, look, LEVEL, -(-extra_L // 4)), look, IDLE)
        return self._finish(_no_worse(balance_shares(slots, look), look))

    def _finish(self, slots: Slots) -> Solution:
        """The bits of these slots, with units named so that bytes come out even."""
        named, bits = assign_bits(slots, self.budget, self.alike)
        error = float("nan") if bits.excess else float(np.sqrt(bits.cost / len(self.fewest_L)))
        return Solution(named, bits.option, error, float(np.sqrt(bits.lower_bound / len(self.fewest_L))))


def _largest(most: int, holds: Callable[[int], bool]) -> int:
    """The largest number up to `most` for which something holds that holds for all smaller ones; 0 if for none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _room(d_LE: Ints, units: int) -> Ints:
    """[L] slots per unit, all units alike: units of equal bytes then hold slots of equal bits."""
    return np.asarray(-(-d_LE.sum(1) // units))


def _no_worse(slots: Slots, look: Outlook) -> Slots:
    """Keep the model as it is in layers where the placement is not better than that."""
    raw = contiguous(look.widths, look.units)
    worse_L = slots.unit_load(look.load, look.units).max(1) >= raw.unit_load(look.load, look.units).max(1)
    columns = [
        np.concatenate([ours[~worse_L[slots.layer]], theirs[worse_L[raw.layer]]])
        for ours, theirs in zip(
            (slots.layer, slots.expert, slots.unit, slots.share), (raw.layer, raw.expert, raw.unit, raw.share), strict=True
        )
    ]
    order = np.argsort(columns[0], kind="stable")
    return Slots(columns[0][order], columns[1][order], columns[2][order], columns[3][order])
