"""`rq` on real routing traces, and on as many experts as the largest models have."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from equipoise.metrics import lis
from equipoise.planning.methods import make_plan

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def benchmark(name: str) -> ModuleType:
    """A benchmark script as a module, without running it."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


@pytest.fixture(scope="module", params=["deepseek-v2-lite", "gpt-oss-20b"])
def trace(request: pytest.FixtureRequest, shared_data: Path):
    traces = benchmark("planning_traces")
    try:
        return traces, traces.load_trace(request.param, shared_data)
    except FileNotFoundError as error:
        pytest.skip(f"no routing trace: {error}")


def test_in_sample_balance_in_the_same_bytes(trace):
    traces, data = trace
    profile = traces.make_profile(data, np.arange(len(data.scenario)))
    plan = make_plan(profile)
    assert lis(profile.load).mean() > 2.5
    assert plan.units == data.model.max_experts
    assert plan.predicted.lis <= 1.02
    assert plan.bytes_by_unit().max() <= plan.unit_bytes


def test_holds_on_the_other_half_better_than_other_planners(trace):
    traces, data = trace
    half, other = next(traces.halves(data, 1))
    profile, held = traces.make_profile(data, half), data.counts[other].sum(0)
    excess = {name: plan.lis(held).mean() - 1 for name, plan in traces.contenders(profile, 0.03).items()}
    raw = lis(held).mean() - 1
    assert excess["rq"] < min(excess["eplb"], excess["alias"], excess["rq-paper"])
    assert excess["rq"] < 0.12 * raw
    assert excess["rq-paper"] > 0.7 * raw


def test_plans_61_layers_of_256_experts_in_five_seconds():
    profile, _ = benchmark("planning").synthetic(layers=61, experts=256, windows=32, seed=0)
    best = np.inf
    for _ in range(2):  # the better of two, in processor time, so that other work on the machine does not count
        began = time.process_time()
        plan = make_plan(profile)
        best = min(best, time.process_time() - began)
        if best <= 5.0:
            break
    assert best <= 5.0
    assert plan.predicted.lis <= 1.02
