"""Which unit each copy lives on: equal load on what was measured, and little deviation on other text.

All aims are one sum of squares. Give each expert the vector x_e = (BALANCE * p_e, BALANCE * p_e if it has a single
copy, its deviations); a unit's vector is the sum of its slots' share * x_e. The sum over units of its squared length is
BALANCE^2 times the imbalance of the measured load, plus the same of the load that no dispatch can move elsewhere, plus
the variance of the units' loads over text. Experts that are hot together thus end up apart, and every unit has some
load that can be handed to another when text changes.
Shapes: L MoE layers, E experts, U units, N slots of all layers together, P slots of the layer with the most, K
dimensions of a vector.
"""

from __future__ import annotations

import numpy as np

from equipoise.planning.load import Floats, Ints, Outlook, Slots

BALANCE = 4.0
"""Weight of the measured load against one standard deviation of a window's load."""
LEAST_GAIN = 1e-4
"""Lowering of the sum of squares below which an exchange is not done; rounding in float32 stays below it."""


def place(look: Outlook, copies_LE: Ints, most_L: Ints) -> Slots:
    """Put every copy on a unit: slots in order of size, each where it adds least to the sum of squares.

    Longest-processing-time-first (Graham 1969) on vectors; never two copies of an expert on one unit.

    Args:
        look: scaled load and deviations.
        copies_LE: [L, E] copies of each expert.
        most_L: [L] most slots per unit; at least slots / units of the layer.

    Returns:
        Slots with even shares.
    """
    n_layers, n_experts = copies_LE.shape
    layer, expert = (np.repeat(index.ravel(), copies_LE.ravel()) for index in np.indices(copies_LE.shape))
    share = 1.0 / copies_LE[layer, expert]
    order = np.lexsort((expert, -look.load[layer, expert] * share, layer))
    layer, expert, share = layer[order], expert[order], share[order]
    x_LEK = _vectors(look, copies_LE)
    count = np.bincount(layer, minlength=n_layers)
    first = np.cumsum(count) - count
    unit = np.zeros(len(layer), np.int64)
    held_LUK = np.zeros((n_layers, look.units, x_LEK.shape[2]), np.float32)
    size_LU = np.zeros((n_layers, look.units), np.int64)
    taken_LEU = np.zeros((n_layers, n_experts, look.units), bool)
    for step in range(int(count.max())):
        rows = np.flatnonzero(count > step)
        here = slice(None) if len(rows) == n_layers else rows  # a view while all layers have slots left
        slot = first[rows] + step
        vector = x_LEK[rows, expert[slot]]
        cost = (held_LUK[here] @ vector[:, :, None])[:, :, 0]
        taken, size = taken_LEU[rows, expert[slot]], size_LU[here]
        cost[taken | (size >= most_L[rows, None])] = np.inf
        best = cost.argmin(1)
        for full in np.flatnonzero(np.isinf(cost[np.arange(len(rows)), best])):
            # Only units that hold this expert have room left: exceed the room of another.
            best[full] = np.where(taken[full], np.iinfo(np.int64).max, size[full]).argmin()
        unit[slot] = best
        taken_LEU[rows, expert[slot], best] = True
        held_LUK[rows, best] += vector * share[slot, None]
        size_LU[rows, best] += 1
    return Slots(layer, expert, unit, share)


def _vectors(look: Outlook, copies_LE: Ints) -> Floats:
    """[L, E, K] vector of each expert."""
    load = BALANCE * look.load[:, None, :]
    axes = [load, load * (copies_LE == 1)[:, None, :], look.deviations]
    return np.concatenate(axes, 1).transpose(0, 2, 1).astype(np.float32)


def exchange(slots: Slots, look: Outlook, most_L: Ints) -> Slots:
    """Improve a placement: for each slot in turn the best swap with another slot, or move to a unit with room.

    The half of a layer's slots that lie worst have a turn, all layers take their step together, and a step is done only
    if it lowers the sum of squares; so repeated calls end.

    Args:
        slots: a placement with shares.
        look: scaled load and deviations.
        most_L: [L] most slots per unit.
    """
    state = _Placement(slots, look, most_L)
    order_LP = np.argsort(np.where(state.exists_LP, -state.inside_LP, np.inf), axis=1, kind="stable")
    for turn in range((order_LP.shape[1] + 1) // 2):
        state.improve(order_LP[:, turn])
    return Slots(slots.layer, slots.expert, state.unit_LP[state.at], slots.share)


class _Placement:
    """The slots of all layers as rows of equal length P, with what a step needs kept up to date.

    V_i is the vector that slot i brings to its unit, Y_a that of unit a; `inside` holds V_i Y_a for each slot on its own
    unit. Swapping i on a with j on b changes half the sum of squares by (V_j - V_i) (Y_a - Y_b) + |V_j - V_i|^2, moving
    i to b by V_i (Y_b - Y_a) + |V_i|^2.
    """

    def __init__(self, slots: Slots, look: Outlook, most_L: Ints) -> None:
        (n_layers, n_experts), units = look.load.shape, look.units
        count = np.bincount(slots.layer, minlength=n_layers)
        self.at = (slots.layer, np.arange(len(slots.layer)) - (np.cumsum(count) - count)[slots.layer])
        shape = (n_layers, int(count.max()))
        self.unit_LP, self.expert_LP = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        self.exists_LP = np.zeros(shape, bool)
        self.unit_LP[self.at], self.expert_LP[self.at], self.exists_LP[self.at] = slots.unit, slots.expert, True
        copies = np.bincount(slots.layer * n_experts + slots.expert, minlength=n_layers * n_experts)
        x_LEK = _vectors(look, copies.reshape(n_layers, n_experts))
        self.v_LPK = np.zeros((*shape, x_LEK.shape[2]), np.float32)
        self.v_LPK[self.at] = x_LEK[slots.layer, slots.expert] * slots.share[:, None].astype(np.float32)
        self.y_LUK = np.zeros((n_layers, units, x_LEK.shape[2]), np.float32)
        np.add.at(self.y_LUK, (slots.layer, slots.unit), self.v_LPK[self.at])
        self.taken_LEU = np.zeros((n_layers, n_experts, units), bool)
        self.taken_LEU[slots.layer, slots.expert, slots.unit] = True
        on_unit = np.bincount(slots.layer * units + slots.unit, minlength=n_layers * units)
        self.room_LU = most_L[:, None] - on_unit.reshape(n_layers, units)
        self.length_LP = (self.v_LPK**2).sum(2)
        self.inside_LP = (np.take_along_axis(self.y_LUK, self.unit_LP[:, :, None], 1) * self.v_LPK).sum(2)
        self.rows = np.arange(n_layers)
        self.unit_base = self.rows[:, None] * units
        self.expert_base = (self.rows[:, None] * n_experts + self.expert_LP) * units

    def improve(self, slot_L: Ints) -> None:
        """Do the best swap or move of one slot in each layer where that is an improvement."""
        rows = self.rows
        a, e, v_LK = self.unit_LP[rows, slot_L], self.expert_LP[rows, slot_L], self.v_LPK[rows, slot_L]
        leave_L = self.length_LP[rows, slot_L] - self.inside_LP[rows, slot_L]
        move_LU = (self.y_LUK @ v_LK[:, :, None])[:, :, 0] + leave_L[:, None]
        holds_LU = self.taken_LEU[rows, e]  # a among them, so that no slot is swapped within its unit
        there_LP = self.unit_base + self.unit_LP
        swap_LP = (self.v_LPK @ (self.y_LUK[rows, a] - 2 * v_LK)[:, :, None])[:, :, 0]
        swap_LP += move_LU.take(there_LP) + self.length_LP - self.inside_LP
        barred_LP = holds_LU.take(there_LP) | self.taken_LEU.take(self.expert_base + a[:, None]) | ~self.exists_LP
        swap_LP[barred_LP] = np.inf
        move_LU[holds_LU | (self.room_LU <= 0)] = np.inf
        partner_L, target_L = swap_LP.argmin(1), move_LU.argmin(1)
        swap_L, move_L = swap_LP[rows, partner_L], move_LU[rows, target_L]
        better_L = (np.minimum(swap_L, move_L) < -LEAST_GAIN) & self.exists_LP[rows, slot_L]
        for layer in np.flatnonzero(better_L).tolist():
            if swap_L[layer] <= move_L[layer]:
                partner = int(partner_L[layer])
                self._relocate(layer, int(slot_L[layer]), int(self.unit_LP[layer, partner]), partner)
            else:
                self._relocate(layer, int(slot_L[layer]), int(target_L[layer]), None)

    def _relocate(self, layer: int, slot: int, there: int, partner: int | None) -> None:
        """Put a slot on another unit, and its partner, if it swaps, where it came from."""
        unit, v, y, taken = self.unit_LP[layer], self.v_LPK[layer], self.y_LUK[layer], self.taken_LEU[layer]
        here, inside = int(unit[slot]), self.inside_LP[layer]
        gained = (0.0 if partner is None else v[partner]) - v[slot]
        y[here] += gained
        y[there] -= gained
        inside += (v @ gained) * ((unit == here) * 1.0 - (unit == there))
        taken[self.expert_LP[layer, slot], [here, there]] = False, True
        unit[slot] = there
        inside[slot] = y[there] @ v[slot]
        if partner is None:
            self.room_LU[layer, [here, there]] += 1, -1
            return
        taken[self.expert_LP[layer, partner], [here, there]] = True, False
        unit[partner] = here
        inside[partner] = y[here] @ v[partner]
