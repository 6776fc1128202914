from __future__ import annotations

import numpy as np
import pytest

from equipoise.artifacts import LayerFacts, LayerPlan, ModelFacts, Plan, Profile, Source


@pytest.fixture
def facts() -> ModelFacts:
    layer = {"model_layer": 0, "num_experts": 4, "top_k": 2, "matrices": ((64, 32), (32, 32))}
    narrow = {"model_layer": 1, "num_experts": 3, "top_k": 2, "matrices": ((64, 32), (32, 32))}
    return ModelFacts(
        name="toy",
        model_type="toy",
        dtype="bf16",
        fingerprint="f" * 64,
        layers=(LayerFacts(path="a", **layer), LayerFacts(path="b", **narrow)),
    )


@pytest.fixture
def profile(facts) -> Profile:
    counts = np.zeros((2, 2, 2, 4), np.int64)
    counts[0, 0] = [[4, 3, 2, 1], [5, 5, 0, 0]]
    counts[1, 1] = [[0, 10, 0, 0], [1, 2, 7, 0]]
    return Profile(
        model=facts,
        source=Source(scenarios=("prose", "code")),
        counts=counts,
        gate_mass=counts.sum(1) * 0.5,
        tokens=np.array([5, 5]),
        windows=counts.sum(1),
        window_scenario=np.array([0, 1]),
        importance={"wanda": np.ones((2, 4))},
        output_error={"int8": np.full((2, 4), 0.1)},
        output_energy=np.array([10.0, 20.0]),
    )


@pytest.fixture
def plan(facts) -> Plan:
    return Plan(
        method="rq",
        model=facts,
        units=4,
        unit_bytes=10_000,
        exactness="weights",
        layers=(
            LayerPlan(
                experts=(0, 1, 2, 3, 1),
                precisions=("bf16", "int8", "bf16", "int8", "int8"),
                units=(0, 1, 2, 3, 3),
                shares=(1, 0.5, 1, 1, 0.5),
            ),
            LayerPlan(experts=(0, 1, 2), precisions=("bf16",) * 3, units=(0, 1, 2), shares=(1, 1, 1)),
        ),
    )
