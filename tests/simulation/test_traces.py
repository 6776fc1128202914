"""On real routing traces: METRO against the exact solution, redundancy in decode and prefill, and vLLM's choice of copies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dispatch.cases import make_model, make_plan
from equipoise.artifacts import Plan
from equipoise.dispatch.metro import exact_hosts, greedy_hosts
from equipoise.dispatch.placement import layer_maps
from equipoise.planning.eplb import eplb_placement
from equipoise.simulation import Trace, load_trace, simulate
from equipoise.simulation.trace import batches_of

RANKS = 8


@pytest.fixture(scope="module", params=["gpt-oss-20b", "deepseek-v2-lite"])
def trace(request: pytest.FixtureRequest, shared_data: Path) -> Trace:
    """Real tokens, cut to a size that is quick."""
    file, layers, experts, top_k = {
        "gpt-oss-20b": ("gptoss20b_fingerprint/decode_topk_ids.npz", 24, 32, 4),
        "deepseek-v2-lite": ("dsv2lite_esft/summary.npz", 26, 64, 6),
    }[request.param]
    path = shared_data / "routing" / file
    if not path.is_file():
        pytest.skip(f"no routing trace at {path}")
    whole = load_trace(path, make_model(layers, experts, top_k))
    return whole.select(whole.document_T % max(1, whole.tokens // 8_000) == 0)


def plan_of(trace: Trace, slots: int) -> Plan:
    layers, _, top_k = trace.ids_LTK.shape
    experts = 32 if layers == 24 else 64
    load_LE = np.stack([np.bincount(ids.ravel(), minlength=experts) for ids in trace.ids_LTK])
    return make_plan(make_model(layers, experts, top_k), list(eplb_placement(load_LE, slots, RANKS)), RANKS)


def experts_of(trace: Trace) -> int:
    return 32 if len(trace.ids_LTK) == 24 else 64


def test_fewest_copies_first_comes_closest_to_the_exact_hosts(trace: Trace):
    plan = plan_of(trace, experts_of(trace) * 3 // 2)
    ids = batches_of(trace, 64, "decode", 6, 0)
    found: dict[str, list[int]] = {"id": [], "copies": [], "expected": [], "exact": [], "least": []}
    for layer, ids_BTK in zip(layer_maps(plan), ids, strict=True):
        for batch in ids_BTK:
            active = np.unique(batch).tolist()
            hosts = {
                "id": greedy_hosts(active, layer.hosts, RANKS, "id"),
                "copies": greedy_hosts(active, layer.hosts, RANKS),
                "expected": greedy_hosts(active, layer.hosts, RANKS, "expected"),
                "exact": exact_hosts(active, layer.hosts, RANKS),
            }
            for name, chosen in hosts.items():
                found[name].append(int(np.bincount(chosen, minlength=RANKS).max()))
            found["least"].append(-(-len(active) // RANKS))
    by_id, copies, expected, exact, least = (np.array(values) for values in found.values())
    assert (copies >= exact).all()
    assert (exact >= least).all()
    assert (copies / exact).mean() < 1.08
    assert (expected / exact).mean() < (copies / exact).mean()
    assert (copies / exact).mean() - 1 < 0.5 * ((by_id / exact).mean() - 1)


def test_copies_pay_in_prefill_and_cost_in_decode(trace: Trace):
    """The same copies level the tokens of a large batch and make ranks read more weights in a small one."""
    copied = plan_of(trace, experts_of(trace) * 3 // 2)
    plans = {"none": plan_of(trace, experts_of(trace)), "copied": copied}
    prefill = simulate(trace, plans, batch=1024, rule="even", batches=4).parts[0].results
    assert prefill[2].max_tokens.mean < prefill[1].max_tokens.mean < prefill[0].max_tokens.mean
    decode = simulate(trace, plans, batch=32, rule="even", phase="decode", cost="activated", batches=6).parts[0].results
    assert decode[2].step.mean > 1.1 * decode[1].step.mean
    metro = simulate(trace, plans, batch=32, rule="metro", phase="decode", cost="activated", batches=6).parts[0].results
    assert metro[2].step.mean < 0.85 * decode[2].step.mean
    report = simulate(trace, plans, batch=32, rule="even", phase="decode", cost="activated", batches=6)
    line = next(text for text in report.parts[0].findings if text.startswith("copied"))
    better, _, worse = line.partition("WORSE")
    assert "tokens of the fullest rank -" in better
    assert "activated replicas of the fullest rank +" in worse


def test_choosing_copies_by_position_is_uneven_when_column_and_expert_go_together(trace: Trace):
    """Columns are ordered by probability, so an expert's place in them is not random, and two copies get unequal parts."""
    plan = plan_of(trace, experts_of(trace) * 5 // 4)
    ratios = {}
    for rule in ("even", "vllm", "vllm-hash", "lp"):
        ratios[rule] = simulate(trace, {"p": plan}, batch=1024, rule=rule, batches=4).parts[0].results[1].imbalance.mean
    assert ratios["lp"] < ratios["even"] < ratios["vllm"]
    assert ratios["vllm-hash"] < ratios["vllm"]
