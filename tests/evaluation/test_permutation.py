from __future__ import annotations

import numpy as np
import pytest

from equipoise.evaluation.permutation import batch_order_kl
from equipoise.execution.routing.attach import routed
from equipoise.profiling.sequences import Framing, Rows
from execution.routing_cases import fitted
from models.architectures import tiny


def rows(count: int) -> Rows:
    draw = np.random.default_rng(0)
    return Rows("text", tuple(draw.integers(3, 60, 12 + i) for i in range(count)), tuple(range(count)), Framing())


@pytest.mark.parametrize("count", [2, 5])
def test_only_a_policy_that_looks_at_the_batch_feels_its_order(count: int) -> None:
    model = tiny("qwen3_moe")
    for seed in range(3):  # of two rows, every second order drawn is the first one again
        assert batch_order_kl(model, rows(count), 4, seed) < 1e-6
    for name in ("bias", "top_p"):
        with routed(model, fitted(model, name)):
            assert batch_order_kl(model, rows(count), 4) < 1e-6
    with routed(model, fitted(model, "laser_style", {"share": 1, "t": 0.0})):
        assert batch_order_kl(model, rows(count), 4) > 1e-5


def test_a_single_row_has_no_order() -> None:
    assert batch_order_kl(tiny("qwen3_moe"), rows(1), 1) == 0
