"""Exchange of slots between ranks that lowers a quadratic risk, for all layers at once.

What each rank risks is a quadratic form of what lies on it: risk_r = sum over its slots i, j of G_ij, where G holds for each
pair of slots what their experts' loads have in common (second moments, divided by their numbers of copies). The sum of the
ranks' risks to a power is lowered by the best swap of one slot after the other, with a penalty for every rank whose mean load
is above a cap. A slot moves, its expert stays: copies per expert are settled before.
Shapes: L MoE layers, E logical experts, P physical slots, R ranks, N nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

LEAST_GAIN = 1e-6
"""Relative lowering below which a swap is not done; rounding in float32 stays below it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a search may not do.

    Attributes:
        cap_L: [L] most load of a rank, in units of the mean rank load.
        penalty: weight of the square of what a rank's load exceeds its cap by; a large one forbids it in effect.
        same_node: slots may only be swapped within their node.
        nodes: N; ranks n * R / N and following are of node n.
        home_LER: which rank held which expert in the placement in force; None when there is none.
        keep: most slots per layer whose expert was not on their rank there.
    """

    cap_L: Floats
    penalty: float = 1e6
    same_node: bool = False
    nodes: int = 1
    home_LER: Bools | None = None
    keep: int = 0


def exchange(
    physical_LP: Ints, pair_LEE: Floats, mean_LE: Floats, ranks: int, limits: Limits, *, power: float = 1.0,
    sweeps: int = 6, seed: int = 0,
) -> tuple[Ints, Floats]:  # fmt: skip
    """Swap slots between ranks while that lowers sum_r risk_r^power plus the penalty; never two copies of an expert on a rank.

    Args:
        physical_LP: [L, P] expert of each slot, rank-major, no expert twice on a rank.
        pair_LEE: [L, E, E] second moments of the experts' loads.
        mean_LE: [L, E] mean loads, scaled to a mean rank load of 1; what the cap is for.
        ranks: R.
        limits: what may not be done.
        power: 1 for the sum of risks, more to weigh the worst ranks.
        sweeps: most turns of every slot.
        seed: of the order in which slots have their turn.

    Returns:
        [L, P] the placement and [L] its objective.
    """
    state = _Slots(physical_LP, pair_LEE, mean_LE, ranks, limits, power)
    rng = np.random.default_rng(seed)
    for _ in range(sweeps):
        if not sum([state.turn(int(slot)) for slot in rng.permutation(physical_LP.shape[1])]):
            break
    return state.placement(), state.objective()


class _Slots:
    """Slots of all layers with the rank each is on, and what a swap needs kept up to date.

    `with_LPR` holds for each slot the sum of G over the slots of each rank, `here_LP` that of its own rank.
    """

    def __init__(self, physical_LP: Ints, pair_LEE: Floats, mean_LE: Floats, ranks: int, limits: Limits, power: float) -> None:
        n_layers, n_slots = physical_LP.shape
        n_experts = mean_LE.shape[1]
        self.rows = np.arange(n_layers)
        self.expert, self.ranks, self.limits, self.power = physical_LP, ranks, limits, power
        row = self.rows[:, None]
        copies_LE = np.zeros((n_layers, n_experts), np.int64)
        np.add.at(copies_LE, (row, physical_LP), 1)
        part = (1.0 / copies_LE[row, physical_LP]).astype(np.float32)
        self.rank = np.tile(np.arange(n_slots) // (n_slots // ranks), (n_layers, 1))
        pairs = pair_LEE.astype(np.float32)
        self.g = pairs[row[:, :, None], physical_LP[:, :, None], physical_LP[:, None, :]]
        self.g *= part[:, :, None] * part[:, None, :]
        self.with_LPR = self.g.reshape(n_layers, n_slots, ranks, -1).sum(3)
        self.own = self.g[:, np.arange(n_slots), np.arange(n_slots)].copy()
        self.here_LP = np.take_along_axis(self.with_LPR, self.rank[:, :, None], 2)[:, :, 0]
        self.load = (mean_LE[row, physical_LP] * part).astype(np.float32)
        self.load_LR = self.load.reshape(n_layers, ranks, -1).sum(2)
        self.risk_LR = self.here_LP.reshape(n_layers, ranks, -1).sum(2)
        self.cap = limits.cap_L.astype(np.float32)[:, None]
        self.holds_LER = np.zeros((n_layers, n_experts, ranks), bool)
        self.holds_LER[row, physical_LP, self.rank] = True
        self.copied = n_slots > n_experts
        # Flat indices: of rank 0 of a layer in [L, R], and of a slot's expert on rank 0 in [L, E, R].
        self.first_rank = row * ranks
        self.first_slot = (row * n_experts + physical_LP) * ranks
        self.node = np.arange(ranks) * limits.nodes // ranks
        if limits.home_LER is not None:
            self.moved_L = (~limits.home_LER[row, physical_LP, self.rank]).sum(1)

    def placement(self) -> Ints:
        """[L, P] experts in order of ranks."""
        return np.take_along_axis(self.expert, np.argsort(self.rank, axis=1, kind="stable"), 1)

    def objective(self) -> Floats:
        """[L] the sum of the ranks' risks to the power, penalty included."""
        return np.asarray((self._raised(self.risk_LR) + self.limits.penalty * self._excess(self.load_LR)).sum(1))

    def turn(self, slot: int) -> int:
        """The best swap of one slot in every layer, done where it is an improvement; how many were done."""
        rows, a_L = self.rows, self.rank[:, slot]
        gain_LP, after = self._change(slot, a_L)
        gain_LP[self._barred(slot, a_L)] = np.inf
        partner_L = gain_LP.argmin(1)
        q = np.flatnonzero(gain_LP[rows, partner_L] < -LEAST_GAIN * self.ranks)
        if len(q):
            j = partner_L[q]
            self._swap(q, slot, j, a_L[q], self.rank[q, j], [value[q, j] for value in after])
        return len(q)

    def _change(self, slot: int, a_L: Ints) -> tuple[Floats, list[Floats]]:
        """[L, P] change of the objective by a swap with each other slot; risks and loads of both ranks after it."""
        rows, there_LP = self.rows, self.first_rank + self.rank
        risk_a, load_a = self.risk_LR[rows, a_L][:, None], self.load_LR[rows, a_L][:, None]
        # What (x - y)^T G (x - y) adds to the risk of both ranks when slots x and y change places.
        both = self.own + (self.own[:, [slot]] - 2 * self.g[:, slot])
        more_a = 2 * (self.with_LPR[rows, :, a_L] - self.here_LP[:, [slot]]) + both
        more_b = 2 * (self.with_LPR[:, slot].take(there_LP) - self.here_LP) + both
        shift = self.load - self.load[:, [slot]]
        new_a, mean_a, mean_b = risk_a + more_a, load_a + shift, self.load_LR.take(there_LP) - shift
        new_b = self.risk_LR.take(there_LP) + more_b
        if self.power == 1.0:
            change = more_a + more_b
        else:
            before_LR = self._raised(self.risk_LR)
            change = self._raised(new_a) + self._raised(new_b) - before_LR[rows, a_L][:, None] - before_LR.take(there_LP)
        if self.limits.penalty:
            before_LR = self._excess(self.load_LR)
            excess = self._excess(mean_a) + self._excess(mean_b) - before_LR[rows, a_L][:, None] - before_LR.take(there_LP)
            change += self.limits.penalty * excess
        return change, [new_a, new_b, mean_a, mean_b]

    def _raised(self, risk: Floats) -> Floats:
        return np.asarray(np.maximum(risk, 0.0) ** self.power)

    def _excess(self, load: Floats) -> Floats:
        """Square of what loads exceed the cap by."""
        over = np.maximum(load - self.cap, 0.0)
        return np.asarray(over * over)

    def _barred(self, slot: int, a_L: Ints) -> Bools:
        """[L, P] partners on the same rank, or whose swap would break a limit."""
        limits = self.limits
        barred = self.rank == a_L[:, None]
        if self.copied:
            barred |= self.holds_LER.take(self.first_slot + a_L[:, None])
            barred |= self.holds_LER.take(self.first_slot[:, [slot]] + self.rank)
        if limits.same_node:
            barred |= self.node[self.rank] != self.node[a_L][:, None]
        if limits.home_LER is not None:
            moved = self.moved_L[:, None] + self._away(slot, a_L)
            barred |= moved > np.maximum(limits.keep, self.moved_L)[:, None]
        return np.asarray(barred)

    def _away(self, slot: int, a_L: Ints) -> Ints:
        """[L, P] how many more slots a swap with each other slot leaves away from where their expert was."""
        home, row = self.limits.home_LER, self.rows[:, None]
        assert home is not None, "called only with a placement in force"
        e, i = self.expert, self.expert[:, slot]
        before = 0 + ~home[row, e, self.rank] + ~home[self.rows, i, a_L][:, None]
        after = 0 + ~home[row, e, a_L[:, None]] + ~home[row, i[:, None], self.rank]
        return np.asarray(after - before)

    def _swap(self, q: Ints, slot: int, j: Ints, a: Ints, b: Ints, after: list[Floats]) -> None:
        """Swap a slot of layers q with slots j: it goes from ranks a to b."""
        if self.limits.home_LER is not None:
            self.moved_L[q] += self._away(slot, self.rank[:, slot])[q, j]
        change = self.g[q, j] - self.g[q, slot]
        self.with_LPR[q, :, a] += change
        self.with_LPR[q, :, b] -= change
        self.rank[q, slot], self.rank[q, j] = b, a
        i_expert, j_expert = self.expert[q, slot], self.expert[q, j]
        self.holds_LER[q, i_expert, a], self.holds_LER[q, i_expert, b] = False, True
        self.holds_LER[q, j_expert, b], self.holds_LER[q, j_expert, a] = False, True
        here = self.rank[q]
        n_slots = here.shape[1]
        flat = (q[:, None] * n_slots + np.arange(n_slots)) * self.ranks + here
        self.here_LP[q] = self.with_LPR.take(flat)
        self.risk_LR[q, a], self.risk_LR[q, b], self.load_LR[q, a], self.load_LR[q, b] = after
