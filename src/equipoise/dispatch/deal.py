"""How many of each expert's tokens each rank serves in a batch: rules that need nothing but the batch's counts.

A *deal* is what a dispatcher decides before tokens move: quotas, and the copies that are sent for this batch only. Ranks that
hold different tokens come to the same deal from the same counts, and each then takes its own part of it (`own_parts`).
Shapes: E experts, P slots, R ranks that serve, H ranks that tokens come from, C copies of the most copied expert.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from equipoise.dispatch.flow import spread_evenly
from equipoise.dispatch.llep import least_loaded as llep_assignment
from equipoise.dispatch.metro import exact_hosts, greedy_hosts
from equipoise.dispatch.placement import Ints, LayerMap
from equipoise.dispatch.quota import exact_load_quotas
from equipoise.errors import EquipoiseError
from equipoise.registry import Registry


@dataclass(frozen=True, eq=False)
class Deal:
    """Who serves how many tokens of whom.

    Attributes:
        quota_ER: [E, R] tokens; rows add up to the experts' counts.
        transfers: (expert, from, to) copies that are sent for this batch, in an order that is the same on all ranks.
    """

    quota_ER: Ints
    transfers: tuple[tuple[int, int, int], ...] = ()


DealRule = Callable[..., Deal]
DEALS: Registry[DealRule] = Registry("rule for batches")
"""f(layer, count_E, **options) -> Deal."""


def deal(rule: str, layer: LayerMap, count_E: Ints, options: Mapping[str, Any] | None = None) -> Deal:
    """What a rule decides for a batch.

    Args:
        rule: a name in `DEALS`.
        layer: where copies are.
        count_E: [E] tokens of each expert in the whole batch.
        options: of the rule.

    Raises:
        EquipoiseError: unknown rule or option.
    """
    check_deal(rule, options or {})
    return DEALS.get(rule)(layer, count_E, **(options or {}))


def check_deal(rule: str, options: Mapping[str, Any]) -> None:
    """Raise `EquipoiseError` when a rule does not exist or does not take these options."""
    allowed = list(inspect.signature(DEALS.get(rule)).parameters)[2:]
    for name in options:
        if name not in allowed:
            raise EquipoiseError(f"rule '{rule}' has no option '{name}'; it has: {', '.join(allowed) or 'none'}.")


def own_parts(quota_ER: Ints, count_HE: Ints, rank: int) -> tuple[Ints, Ints]:
    """Which tokens fill which quotas, as one rank sees it: a rank's own stay as far as its quota goes, the others in order.

    Staying at home is UltraEP's locality rule; it changes neither loads nor outputs, only what is sent.

    Args:
        quota_ER: [E, R] tokens that each rank serves.
        count_HE: [H, E] tokens of each expert on each rank that they come from; H = R.
        rank: whose view.

    Returns:
        [E, R] where the rank's own tokens go, and [H, E] what comes to it.
    """
    stays_HE = np.minimum(count_HE, quota_ER.T)
    rest_HE, room_ER = count_HE - stays_HE, quota_ER - stays_HE.T
    # Tokens and room are both laid out on a line per expert; a pair of ranks gets what overlaps.
    token_end_HE, room_end_ER = np.cumsum(rest_HE, 0), np.cumsum(room_ER, 1)
    token_begin_HE, room_begin_ER = token_end_HE - rest_HE, room_end_ER - room_ER
    goes_ER = _overlap(token_begin_HE[rank, :, None], token_end_HE[rank, :, None], room_begin_ER, room_end_ER)
    comes_HE = _overlap(token_begin_HE, token_end_HE, room_begin_ER[:, rank], room_end_ER[:, rank])
    goes_ER[:, rank] += stays_HE[rank]
    comes_HE[rank] += stays_HE[rank]
    return goes_ER, comes_HE


def _overlap(begin: Ints, end: Ints, other_begin: Ints, other_end: Ints) -> Ints:
    return np.asarray(np.maximum(np.minimum(end, other_end) - np.maximum(begin, other_begin), 0))


@DEALS.register(
    "least_loaded", summary="the split over standing copies whose largest rank load is least, others level", source="Equipoise"
)
def least_loaded(layer: LayerMap, count_E: Ints) -> Deal:
    """Whole tokens by maximum flow (`flow.spread_evenly`); nothing is sent but tokens."""
    width = max(len(hosts) for hosts in layer.hosts)
    host_EC = np.array([[*hosts, *hosts[-1:] * (width - len(hosts))] for hosts in layer.hosts])
    number_E = np.array([len(hosts) for hosts in layer.hosts])
    split_EC = spread_evenly(np.asarray(count_E, np.int64), host_EC, number_E, layer.ranks)
    quota_ER = np.zeros((layer.experts, layer.ranks), np.int64)
    np.add.at(quota_ER, (np.arange(layer.experts)[:, None], host_EC), split_EC)
    return Deal(quota_ER)


@DEALS.register(
    "metro",
    summary="one host per active expert, fewest copies first, by the bytes that a rank must read (decode)",
    source="METRO, Algorithm 1; order and bytes: Equipoise",
)
def metro(layer: LayerMap, count_E: Ints) -> Deal:
    """All tokens of an expert to one copy, so that ranks read the weights of few replicas."""
    return _one_host(layer, count_E, lambda active: greedy_hosts(active, layer.hosts, layer.ranks, cost_ER=layer.cost_ER))


@DEALS.register(
    "metro-expected",
    summary="as metro, counting experts still to come as parts on their hosts (decode)",
    source="METRO, Algorithm 1; order: Equipoise",
)
def metro_expected(layer: LayerMap, count_E: Ints) -> Deal:
    """As `metro`, with an eye on the experts that are still to come; counts replicas, not bytes."""
    return _one_host(layer, count_E, lambda active: greedy_hosts(active, layer.hosts, layer.ranks, "expected"))


@DEALS.register("metro-id-order", summary="one host per active expert, by expert number (decode)", source="METRO, Algorithm 1")
def metro_id_order(layer: LayerMap, count_E: Ints) -> Deal:
    """As published, visiting experts by number; counts replicas, not bytes."""
    return _one_host(layer, count_E, lambda active: greedy_hosts(active, layer.hosts, layer.ranks, "id"))


@DEALS.register(
    "metro-exact", summary="one host per active expert, fewest possible on a rank (decode)", source="METRO, section 4"
)
def metro_exact(layer: LayerMap, count_E: Ints) -> Deal:
    """As `metro`, by flow: the largest number of activated replicas on a rank is proven smallest."""
    return _one_host(layer, count_E, lambda active: exact_hosts(active, layer.hosts, layer.ranks))


@DEALS.register("quota", summary="exact-load quotas with copies in a few spare slots (prefill)", source="UltraEP")
def quota(
    layer: LayerMap, count_E: Ints, *, spare: int = 2, threshold: float = 1.0, slack: float = 0.01, least: int = 1
) -> Deal:
    """Quotas close to the mean under a hard limit of spare slots (`quota.exact_load_quotas`)."""
    found = exact_load_quotas(
        count_E.tolist(), layer.hosts, layer.ranks, spare=spare, threshold=threshold, slack=slack, least=least
    )
    used = found.quota_ER > 0
    return Deal(found.quota_ER, tuple(sent for sent in found.added if used[sent[0], sent[2]]))


@DEALS.register("llep", summary="least-loaded assignment: what a rank cannot take is spilled, with the weights", source="LLEP")
def llep(layer: LayerMap, count_E: Ints, *, alpha: float = 1.0, least: int = 1024, gate: float = 1.3) -> Deal:
    """Standing copies up to a capacity, then other ranks, weights sent along (`llep.least_loaded`).

    Nothing is sent where the best split over standing copies keeps within the capacity or the gate: with one copy of each
    expert that is the published gate, and where the capacity holds there is nothing to spill.
    """
    standing = least_loaded(layer, count_E)
    total, largest = int(count_E.sum()), int(standing.quota_ER.sum(0).max(initial=0))
    if largest * layer.ranks < gate * total or largest <= np.ceil(alpha * total / layer.ranks - 1e-9):
        return standing
    found = llep_assignment(count_E.tolist(), layer.hosts, layer.ranks, alpha=alpha, least=least, gate=gate)
    quota_ER = np.zeros((layer.experts, layer.ranks), np.int64)
    for chunk in found.chunks:
        quota_ER[chunk.expert, chunk.rank] += chunk.stop - chunk.start
    return Deal(quota_ER, found.transfers)


def _one_host(layer: LayerMap, count_E: Ints, pick: Callable[[list[int]], Ints]) -> Deal:
    quota_ER = np.zeros((layer.experts, layer.ranks), np.int64)
    active = np.flatnonzero(count_E)
    quota_ER[active, pick(active.tolist())] = count_E[active]
    return Deal(quota_ER)
