"""How many copies each expert has, and what share of its tokens each copy serves.

Loads are scaled so that the mean unit carries 1 (see `load`).
Shapes: L MoE layers, E logical experts of the widest layer, U units, N slots of all layers together, X extra copies.
"""

from __future__ import annotations

from heapq import heapify, heapreplace

import numpy as np

from equipoise.planning.load import Floats, Ints, Outlook, Slots

STRIDE = 10
"""Rounds of proportional fitting between two looks at how far it has come."""


def copy_order(look: Outlook, most: int) -> Ints:
    """In which order experts are given further copies, best first.

    First the expert with the largest load per copy, as long as that is more than a whole unit (fewer than ceil(p_e)
    copies cannot be balanced); then the one where a copy lowers sum_e v_e / d_e most, the variance that units get from
    the experts' loads. v_e is the variance that the windows show, shrunk halfway towards counting noise (the load
    itself), because a few windows show it badly. Never more copies than units. The first x entries are the choice for
    x copies, for every x.

    Args:
        look: scaled load and its variance.
        most: X, copies per layer to order.

    Returns:
        [L, X] experts; -1 where every expert of a layer has a copy on every unit already.
    """
    order = np.full((len(look.load), most), -1, np.int64)
    size = look.load.sum(1, keepdims=True) / np.maximum(look.variance.sum(1, keepdims=True), 1e-300)
    noise_LE = np.where(look.variance.sum(1, keepdims=True) > 0, (look.load + size * look.variance) / 2, look.load)
    for layer, width in enumerate(look.widths.tolist()):
        load = look.load[layer, :width].tolist()
        noise = noise_LE[layer, :width].tolist()
        heap = [(*_urgency(load[e], noise[e], 1, look.units), e, 1) for e in range(width)]
        heapify(heap)
        for x in range(min(most, width * (look.units - 1))):
            _, _, expert, d = heap[0]
            order[layer, x] = expert
            heapreplace(heap, (*_urgency(load[expert], noise[expert], d + 1, look.units), expert, d + 1))
    return order


def _urgency(p: float, v: float, d: int, units: int) -> tuple[int, float]:
    """Sort key of giving an expert of load p, variance v and d copies one more; smaller is sooner."""
    if d >= units:
        return 2, 0.0
    if p > d:
        return 0, -p / d
    return 1, -v / (d * (d + 1))


def copies(order_LX: Ints, extra_L: Ints, widths_L: Ints, n_experts: int) -> Ints:
    """[L, E] copies of each expert when a layer has `extra_L` slots beyond one per expert; 0 for absent experts."""
    n_layers, most = order_LX.shape
    taken = (np.arange(most) < extra_L[:, None]) & (order_LX >= 0)
    layer = np.broadcast_to(np.arange(n_layers)[:, None], order_LX.shape)[taken]
    further = np.bincount(layer * n_experts + order_LX[taken], minlength=n_layers * n_experts)
    return np.asarray((np.arange(n_experts) < widths_L[:, None]) + further.reshape(n_layers, n_experts), np.int64)


def balance_shares(slots: Slots, look: Outlook, rounds: int = 200, tolerance: float = 1e-3) -> Slots:
    """Shares that balance the units of every layer and stay as close to the given ones as that allows.

    Iterative proportional fitting on the flows p_e * share: scale units to load 1, then experts to their own load, in
    turn. Its limit is the balanced flow closest to the start in relative entropy; where these slots allow none, it
    narrows towards the least unbalanced. Even shares as a start thus end as even as balance permits.

    Args:
        slots: where the copies are; their shares are the start.
        look: scaled load.
        rounds: most rounds.
        tolerance: a layer is done when no unit is further than this from 1, or a tenth of it is no longer gained in
            `STRIDE` rounds.
    """
    n_layers = len(look.load)
    share = slots.share.copy()
    rest = np.arange(len(share))  # slots of layers that are not done
    best_L = np.full(n_layers, np.inf)
    for _ in range(0, rounds, STRIDE):
        share[rest], far_L = _fit(slots, rest, share[rest], look)
        open_L = (far_L > tolerance) & (far_L < best_L - tolerance / 10)
        best_L = np.minimum(best_L, far_L)
        rest = rest[open_L[slots.layer[rest]]]
        if len(rest) == 0:
            break
    return Slots(slots.layer, slots.expert, slots.unit, share)


def _fit(slots: Slots, rows: Ints, share: Floats, look: Outlook) -> tuple[Floats, Floats]:
    """`STRIDE` rounds of fitting on some slots: their shares, and how far units are from 1 at worst per layer."""
    n_layers, n_experts = look.load.shape
    present, layer = np.unique(slots.layer[rows], return_inverse=True)
    on_unit = layer * look.units + slots.unit[rows]
    of_expert = layer * n_experts + slots.expert[rows]
    flow = look.load[slots.layer[rows], slots.expert[rows]]
    n_units = len(present) * look.units
    for _ in range(STRIDE):
        load = np.bincount(on_unit, flow * share, n_units)
        share = share / np.where(load > 0, load, 1.0)[on_unit]
        share = share / np.bincount(of_expert, share)[of_expert]
    load = np.bincount(on_unit, flow * share, n_units).reshape(-1, look.units)
    far_L = np.zeros(n_layers)
    far_L[present] = load.max(1) - np.where(load.max(1) > 0, 1.0, 0.0)
    return share, far_L


def drop_idle(slots: Slots, look: Outlook, least: float) -> Slots:
    """Leave out copies that serve less than `least` of a unit's load; an expert's largest copy always stays."""
    n_layers, n_experts = look.load.shape
    of_expert = slots.layer * n_experts + slots.expert
    largest = np.zeros(n_layers * n_experts)
    np.maximum.at(largest, of_expert, slots.share)
    # With equal largest shares the first slot is the one that stays.
    first = np.full(n_layers * n_experts, len(of_expert))
    candidates = np.flatnonzero(slots.share == largest[of_expert])
    np.minimum.at(first, of_expert[candidates], candidates)
    keep = look.load[slots.layer, slots.expert] * slots.share >= least
    keep[first[first < len(of_expert)]] = True
    total = np.bincount(of_expert[keep], slots.share[keep], n_layers * n_experts)
    share = slots.share[keep] / total[of_expert[keep]]
    return Slots(slots.layer[keep], slots.expert[keep], slots.unit[keep], share)


def level(slots: Slots, look: Outlook, tolerance: float, most_L: Ints) -> Slots:
    """Add copies to layers that placement left out of balance.

    In each round the fullest unit of a layer hands the excess of its largest expert to the emptiest unit, as a new
    copy there, and the shares are balanced again: McNaughton's wrap-around rule (1959) on what placement left over.

    Args:
        slots: where the copies are.
        look: scaled load.
        tolerance: allowed excess of the fullest unit over the mean.
        most_L: [L] most copies added to each layer.
    """
    slots = balance_shares(slots, look)
    for done in range(int(most_L.max(initial=0))):
        added = _hand_over(slots, look, tolerance, np.flatnonzero(most_L > done))
        if added is None:
            break
        slots = balance_shares(added, look)
    return slots


def _hand_over(slots: Slots, look: Outlook, tolerance: float, layers: Ints) -> Slots | None:
    """One copy more in each of these layers that is out of balance; None when none is or none can be added."""
    load_LU = slots.unit_load(look.load, look.units)
    share, new = slots.share.copy(), []
    start = np.searchsorted(slots.layer, np.arange(len(load_LU) + 1))
    for layer in layers[load_LU[layers].max(1) > 1.0 + tolerance].tolist():
        fullest, emptiest = int(load_LU[layer].argmax()), int(load_LU[layer].argmin())
        rows = np.arange(start[layer], start[layer + 1])
        there = slots.expert[rows[slots.unit[rows] == emptiest]]
        giver = rows[(slots.unit[rows] == fullest) & ~np.isin(slots.expert[rows], there)]
        served = look.load[layer, slots.expert[giver]] * share[giver]
        if len(giver) == 0 or served.max() <= 0:
            continue
        slot, most = giver[served.argmax()], served.max()
        moved = min(load_LU[layer, fullest] - 1.0, 1.0 - load_LU[layer, emptiest], 0.999 * most) / most * share[slot]
        share[slot] -= moved
        new.append((layer, slots.expert[slot], emptiest, moved))
    if not new:
        return None
    columns = [
        np.concatenate([old, np.array(column)])
        for old, column in zip((slots.layer, slots.expert, slots.unit, share), zip(*new, strict=True), strict=True)
    ]
    order = np.argsort(columns[0], kind="stable")
    return Slots(columns[0][order], columns[1][order], columns[2][order], columns[3][order])
