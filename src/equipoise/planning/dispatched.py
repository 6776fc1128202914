"""Slots for a dispatch that splits each batch anew: what it makes of them, and a search for those it can do most with.

With fixed shares a copy is there to divide an expert's load. With least-loaded dispatch it is a way out: load that one unit
has too much of in this batch moves from copy to copy until all are level, so what counts is which experts share units.
A placement is judged by the windows of the profile, each taken as a batch: the mean over them of the largest unit load
after dispatch. Slots then move to where that falls.
Shapes: L MoE layers, E logical experts, U units, W windows, N slots of one layer, C candidates that are judged together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from equipoise.planning.load import Floats, Ints, Outlook, Slots

ROUNDS = 40
"""Rounds of proportional fitting for a figure that is reported."""
QUICK = 6
"""Rounds for comparing candidates, which start from the flows of the placement that they change."""
FINALISTS = 6
"""Candidates, the best after those, that are fitted with care."""
WORK = 60_000
"""Flows, slots times windows, that the candidates of one step have together."""
LEAST_GAIN = 1e-5


def dispatched_lis(slots: Slots, look: Outlook) -> Floats:
    """[L] mean over windows of LIS over units when each window's tokens are split so that units are as level as can be.

    Proportional fitting of the flows, which approaches the least-loaded split from above.

    Args:
        slots: where copies are; their shares are not used.
        look: the windows' loads.
    """
    scores = np.ones(len(look.load))
    for layer, (expert_N, unit_N) in enumerate(_by_layer(slots, len(look.load))):
        p_WE = _windows(look, layer)
        if len(p_WE):
            flow = even_flows(expert_N[None], p_WE)
            scores[layer] = fit_flows(expert_N[None], unit_N[None], p_WE, look.units, flow, ROUNDS)[1].max(-1).mean()
    return scores


def improve(slots: Slots, look: Outlook, most_L: Ints, steps: int, seed: int) -> Slots:
    """Move, swap and reassign slots where that lowers the mean over windows of the largest unit load after dispatch.

    In every step random changes, most of them at units that are often the fullest, are judged together; the best is done
    if it is an improvement. Experts keep at least one slot, units at most as many as they may have.

    Args:
        slots: a placement.
        look: the windows' loads.
        most_L: [L] most slots per unit.
        steps: of each layer at most; a layer ends after a quarter of them without improvement.
        seed: of the changes that are tried.

    Returns:
        As many slots, with even shares.
    """
    columns = []
    for layer, (expert_N, unit_N) in enumerate(_by_layer(slots, len(look.load))):
        p_WE = _windows(look, layer)
        if steps and len(p_WE):
            rng = np.random.default_rng([seed, layer])
            expert_N, unit_N = _improve_layer(_Layer(p_WE, look.units, int(most_L[layer])), expert_N, unit_N, steps, rng)
        order = np.lexsort((unit_N, expert_N))
        expert_N, unit_N = expert_N[order], unit_N[order]
        columns.append((np.full(len(expert_N), layer), expert_N, unit_N, 1.0 / np.bincount(expert_N)[expert_N]))
    layer_N, expert_N, unit_N, share_N = (np.concatenate(column) for column in zip(*columns, strict=True))
    return Slots(layer_N, expert_N, unit_N, share_N)


@dataclass(frozen=True, eq=False)
class _Layer:
    """One layer: the windows' loads [W, E], its units, and the slots that a unit may have."""

    p_WE: Floats
    units: int
    most: int


def _improve_layer(here: _Layer, expert_N: Ints, unit_N: Ints, steps: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    n_slots, n_experts = len(expert_N), here.p_WE.shape[1]
    candidates = max(8, WORK // (n_slots * len(here.p_WE)))
    flow_WN = fit_flows(expert_N[None], unit_N[None], here.p_WE, here.units, even_flows(expert_N[None], here.p_WE), ROUNDS)[0][
        0
    ]
    stale = 0
    for _ in range(steps):
        load_WU = _load(unit_N[None], flow_WN[None], here.units)[0]
        now = float(load_WU.max(-1).mean())
        expert_CN, unit_CN = _changes(here, expert_N, unit_N, load_WU, flow_WN, candidates, rng)
        held = np.zeros((len(unit_CN), n_experts, here.units), np.int8)
        np.add.at(held, (np.arange(len(unit_CN))[:, None], expert_CN, unit_CN), 1)
        sound = (held.max((1, 2)) <= 1) & (held.sum(1).max(1) <= max(here.most, int(np.bincount(unit_N).max())))
        expert_CN, unit_CN = expert_CN[sound], unit_CN[sound]
        if len(unit_CN):
            moved = (expert_CN != expert_N) | (unit_CN != unit_N)
            # A changed slot starts with an even part of its expert's load, all others with what they serve now.
            start = np.where(moved[:, None], even_flows(expert_CN, here.p_WE), flow_WN)
            flow_CWN, load_CWU = fit_flows(expert_CN, unit_CN, here.p_WE, here.units, np.maximum(start, 1e-6), QUICK)
            top = np.argsort(load_CWU.max(-1).mean(-1), kind="stable")[:FINALISTS]
            flow_CWN, load_CWU = fit_flows(expert_CN[top], unit_CN[top], here.p_WE, here.units, flow_CWN[top], ROUNDS)
            score_C = load_CWU.max(-1).mean(-1)
            winner = int(score_C.argmin())
            if score_C[winner] < now - LEAST_GAIN:
                expert_N, unit_N, flow_WN, stale = expert_CN[top[winner]], unit_CN[top[winner]], flow_CWN[winner], 0
                continue
        stale += 1
        if stale > max(4, steps // 4):
            break
        # What is not improved is fitted on, so that candidates are compared with what the placement can do.
        flow_WN = fit_flows(expert_N[None], unit_N[None], here.p_WE, here.units, flow_WN[None], QUICK)[0][0]
    return expert_N, unit_N


def _changes(
    here: _Layer, expert_N: Ints, unit_N: Ints, load_WU: Floats, flow_WN: Floats, candidates: int, rng: np.random.Generator
) -> tuple[Ints, Ints]:
    """[C, N] experts and units after one random change each; some may break rules and are left out by the caller."""
    n_slots = len(expert_N)
    over_U = np.maximum(load_WU - load_WU.mean(-1, keepdims=True), 0.0).mean(0)
    under_U = np.maximum(load_WU.mean(-1, keepdims=True) - load_WU, 0.0).mean(0)
    from_N = over_U[unit_N] + 0.1 * over_U.mean() + 1e-9
    source_C = rng.choice(n_slots, candidates, p=from_N / from_N.sum())
    to_U = under_U + 0.1 * under_U.mean() + 1e-9
    target_C = rng.choice(here.units, candidates, p=to_U / to_U.sum())
    rows = np.arange(candidates)
    expert_CN, unit_CN = np.repeat(expert_N[None], candidates, 0), np.repeat(unit_N[None], candidates, 0)
    # A slot of the target unit changes places with the source, where the target is full or by chance.
    key_CN = rng.random((candidates, n_slots)) + 2.0 * (unit_N != target_C[:, None])
    partner_C = key_CN.argmin(1)
    full_U = np.bincount(unit_N, minlength=here.units) >= here.most
    swap_C = (full_U[target_C] | (rng.random(candidates) < 0.5)) & (unit_N[partner_C] == target_C)
    # Or a copy that serves little becomes one of the source's expert.
    copies_E = np.bincount(expert_N)
    spare_N = np.where(copies_E[expert_N] > 1, 1.0 / (flow_WN.max(0) + 0.1), 0.0)
    turn_C = (rng.random(candidates) < 0.3) & bool(spare_N.any())
    unit_CN[rows, source_C] = np.where(turn_C, unit_N[source_C], target_C)
    exchanged = rows[swap_C & ~turn_C]
    unit_CN[exchanged, partner_C[exchanged]] = unit_N[source_C[exchanged]]
    if turn_C.any():
        given_C = rng.choice(n_slots, candidates, p=spare_N / spare_N.sum())
        expert_CN[rows[turn_C], given_C[turn_C]] = expert_N[source_C[turn_C]]
    return expert_CN, unit_CN


def even_flows(expert_CN: Ints, p_WE: Floats) -> Floats:
    """Flows when each expert's load is split evenly among its copies.

    Args:
        expert_CN: expert of each slot of each candidate.
        p_WE: scaled load of each window.

    Returns:
        [C, W, N] load that each slot serves.
    """
    n_experts = p_WE.shape[1]
    rows = np.arange(len(expert_CN))[:, None]
    copies_CE = np.bincount((rows * n_experts + expert_CN).ravel(), minlength=len(expert_CN) * n_experts)
    share_CN = 1.0 / copies_CE.reshape(-1, n_experts)[rows, expert_CN]
    return np.asarray(p_WE[:, expert_CN].transpose(1, 0, 2) * share_CN[:, None])


def fit_flows(expert_CN: Ints, unit_CN: Ints, p_WE: Floats, units: int, flow_CWN: Floats, rounds: int) -> tuple[Floats, Floats]:
    """Flows fitted towards level units: some rounds of scaling units to load 1 and experts to their own load, in turn.

    Args:
        expert_CN: expert of each slot of each candidate.
        unit_CN: unit of each slot.
        p_WE: scaled load of each window.
        units: U.
        flow_CWN: to start from; what is zero stays so.
        rounds: how many.

    Returns:
        [C, W, N] flows and [C, W, U] loads of the units.
    """
    c, w, _ = flow_CWN.shape
    n_experts = p_WE.shape[1]
    rows = (np.arange(c)[:, None] * w + np.arange(w))[:, :, None]
    at_unit, at_expert = rows * units + unit_CN[:, None], rows * n_experts + expert_CN[:, None]
    flat_unit, flat_expert = at_unit.ravel(), at_expert.ravel()
    own = np.broadcast_to(p_WE, (c, w, n_experts)).ravel()
    flow = flow_CWN.ravel()
    for _ in range(rounds):
        load = np.bincount(flat_unit, flow, c * w * units)
        flow = flow / np.maximum(load, 1e-9)[flat_unit]
        total = np.bincount(flat_expert, flow, c * w * n_experts)
        flow = flow * (own / np.maximum(total, 1e-300))[flat_expert]
    load_CWU = np.asarray(np.bincount(flat_unit, flow, c * w * units), np.float64).reshape(c, w, units)
    return np.asarray(flow).reshape(flow_CWN.shape), load_CWU


def _load(unit_CN: Ints, flow_CWN: Floats, units: int) -> Floats:
    """[C, W, U] load of each unit."""
    c, w, _ = flow_CWN.shape
    rows = (np.arange(c)[:, None] * w + np.arange(w))[:, :, None]
    load = np.bincount((rows * units + unit_CN[:, None]).ravel(), flow_CWN.ravel(), c * w * units)
    return np.asarray(load, np.float64).reshape(c, w, units)


def _windows(look: Outlook, layer: int) -> Floats:
    """[W, E] scaled load of the windows in which a layer served something."""
    p_WE = look.samples[:, layer, : int(look.widths[layer])]
    return np.asarray(p_WE[p_WE.sum(1) > 0])


def _by_layer(slots: Slots, n_layers: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    starts = np.searchsorted(slots.layer, np.arange(1, n_layers))
    return list(zip(np.split(slots.expert, starts), np.split(slots.unit, starts), strict=True))
