"""The predictions and the table of the benchmark of coherent contexts."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from equipoise.artifacts import Profile, Source
from equipoise.models.layers import model_facts
from models.architectures import tiny


@pytest.fixture(scope="module")
def bench(script) -> ModuleType:
    return script("context_coherent")


def test_predicted_crossings_are_those_of_the_pairs(bench: ModuleType):
    facts = model_facts(tiny("mixtral", num_experts_per_tok=1), "x")
    transitions = np.zeros((1, 6, 6), np.int64)
    transitions[0, 0, 1], transitions[0, 0, 5], transitions[0, 4, 2] = 5, 2, 3  # the first stays, ranks hold 0-2 and 3-5
    counts = np.zeros((1, 2, 2, 6), np.int64)
    counts[0, 0] = [transitions[0].sum(1), transitions[0].sum(0)]
    profile = Profile(
        model=facts, source=Source(scenarios=("all",)), counts=counts, gate_mass=counts.sum(1).astype(float),
        tokens=np.array([10]), transitions=transitions, windows=counts[0, :1], window_scenario=np.zeros(1, np.int64),
    )  # fmt: skip
    plans = bench.plans_of(profile, 2)
    assert bench.predicted(profile, plans["contiguous"]) == pytest.approx(0.5)
    assert bench.predicted(profile, plans["exflow, mu = 0"]) == 0


def test_the_table_has_a_cell_for_every_head(bench: ModuleType):
    row = {
        "step_ms": 1.0, "step_ratio": [0.9, 1.0, 1.1], "cpu_ms": 1.0, "prompt_ratio": [1.0] * 3, "rows_moved": 3.0,
        "token_bytes": 2e3, "context_bytes": 0.0, "imbalance": 1.5,
    }  # fmt: skip
    rows = [row | {"contender": "own", "crossings": None}, row | {"contender": "coherent", "crossings": 0.25, "predicted": 0.5}]
    facts = {"layers": 2, "experts": 6, "width": 32, "kv_width": 16, "vocabulary": 64, "trained_top_k": 2}
    text = bench.table(
        {"rows": 8, "steps": 4, "rounds": 1, "cores": 2, "cells": {"x, 2 ranks": {"facts": facts, "rows": rows}}}
    )
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {len(bench.HEADS) + 1}
    assert "| 0.500 | 0.250 |" in lines[3]
    assert "trained with top-2" in text
