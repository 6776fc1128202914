"""Values of one small model to report on: two layers of different width, two scenarios, plans of both kinds, an evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np

from equipoise.artifacts import Evaluation, LayerFacts, LayerForecast, LayerPlan, ModelFacts, Plan, Predicted, Profile, Source
from equipoise.artifacts.evaluation import Contender, Interval, TaskResult, TextResult
from equipoise.metrics import lis
from equipoise.reporting.frontier_points import FrontierPoint, frontier_points

WIDE, NARROW = 8, 6
NAME = "some/[odd] <model>"


def facts(
    *, layers: int = 2, experts: int = WIDE, narrow: int = NARROW, sized: bool = True, stacks: bool = False
) -> ModelFacts:
    """A model; its second layer is narrow, and its layers may lie in an encoder and a decoder."""
    matrices = ((64, 32), (32, 32)) if sized else ()
    made = tuple(
        LayerFacts(
            path=f"layers.{i}.experts", model_layer=i if stacks else i + 3, num_experts=narrow if i == 1 else experts, top_k=2,
            matrices=matrices, stack="encoder" if stacks and i == 0 else "decoder",
        )
        for i in range(layers)
    )  # fmt: skip
    return ModelFacts(name=NAME, model_type="olmoe", dtype="bf16", fingerprint="f" * 64, layers=made)


def profile(model: ModelFacts | None = None, *, scenarios: int = 2, importance: bool = True, hot: int = 9000) -> Profile:
    """Loads in which expert 1 is hot everywhere, and each scenario has a favourite of its own."""
    model = model or facts()
    rng = np.random.default_rng(0)
    n_layers, n_experts = len(model.layers), model.max_experts
    windows = rng.integers(400, 600, (4 * scenarios, n_layers, n_experts))
    windows[:, :, 1] += hot
    for s in range(scenarios):
        windows[4 * s : 4 * s + 4, :, 2 + s] += hot // 2
    for i, layer in enumerate(model.layers):
        windows[:, i, layer.num_experts :] = 0
    scenario = np.repeat(np.arange(scenarios), 4)
    counts = np.zeros((scenarios, 2, n_layers, n_experts), np.int64)
    for s in range(scenarios):
        counts[s, 0] = windows[scenario == s].sum(0)
    load = counts.sum((0, 1)).astype(np.float64)
    scores = {"wanda": -load, "frequency": load, "gate_norm": rng.random(load.shape)} if importance else {}
    return Profile(
        model=model, source=Source(scenarios=tuple("cd<e"[s] for s in range(scenarios)), text_sha256="t"), counts=counts,
        gate_mass=counts.sum(1) / 2, tokens=counts[:, 0, 0].sum(1) // 2, windows=windows, window_scenario=scenario,
        importance=scores,
    )  # fmt: skip


def rq_plan(of: Profile, *, overrun: int = 0, error: float | None = 0.02, exact: bool = False) -> Plan:
    """Expert 1 of every layer on two units more, in int8; an idle expert in int4."""
    layers = []
    for layer in of.model.layers:
        e = layer.num_experts
        low = ("bf16",) * 3 if exact else ("int8", "int8", "int4-g32")
        precisions = ["bf16"] * e
        precisions[1], precisions[5] = low[0], low[2]
        third = 1 / 3
        shares = [1.0] * e
        shares[1] = third
        layers.append(
            LayerPlan(
                experts=(*range(e), 1, 1), precisions=(*precisions, low[1], low[1]), units=(*range(e), 4, 0),
                shares=(*shares, third, third),
            )
        )  # fmt: skip
    load = of.load
    plan = Plan(
        method="rq", model=of.model, units=of.model.max_experts, unit_bytes=20_000, exactness="exact" if exact else "weights",
        layers=tuple(layers), profile_sha256="t",
    )  # fmt: skip
    score = plan.lis(load)
    predicted = Predicted(
        lis_raw=float(lis(load, of.widths).mean()), lis=float(score.mean()), lis_max=float(score.max()),
        lis_paper=float(plan.lis_paper(load).mean()), lower_bound=1.0, output_error=error,
        bytes=int(plan.bytes_by_unit().sum()) if of.model.sized else 0, budget_bytes=plan.units * plan.unit_bytes,
        overrun_bytes=overrun,
    )  # fmt: skip
    return plan.model_copy(update={"predicted": predicted})


def rank_plan(of: Profile, *, ranks: int = 2, held_out: float | None = 1.4) -> Plan:
    """Experts dealt to ranks in turn, expert 1 on two of them."""
    layers, forecasts = [], []
    for layer in of.model.layers:
        e = layer.num_experts
        shares = [1.0] * e
        shares[1] = 0.5
        units = [i % ranks for i in range(e)]
        layers.append(
            LayerPlan(experts=(*range(e), 1), precisions=("bf16",) * (e + 1), units=(*units, 0), shares=(*shares, 0.5))
        )
        forecasts.append(LayerForecast(in_sample=1.2, out_of_sample=held_out, lower_bound=1.1, moved=3))
    plan = Plan(method="robust", model=of.model, units=ranks, unit_bytes=1, exactness="exact", layers=tuple(layers))
    score = plan.lis(of.load)
    predicted = Predicted(
        lis_raw=2.0, lis=float(score.mean()), lis_max=float(score.max()), lis_paper=1.0, lower_bound=1.1, output_error=None,
        bytes=0, budget_bytes=1, overrun_bytes=0, layers=tuple(forecasts),
    )  # fmt: skip
    return plan.model_copy(update={"predicted": predicted})


def evaluation(
    *,
    change: tuple[float, float, float] = (0.001, -0.002, 0.004),
    difference: tuple[float, float, float] = (-0.1, -0.15, -0.05),
    kept: bool | None = None,
) -> Evaluation:
    """One contender, named rq, on two texts and a task."""
    interval = Interval(value=change[0], low=change[1], high=change[2])
    score: dict[str, Any] = {"lis_base": 4.0, "lis": 1.1, "lis_paper": 0.9}
    texts = tuple(
        TextResult(
            name=name, tokens=1000, perplexity_base=20.0, perplexity=20.0 * (1 + change[0]), perplexity_change=interval,
            kl=Interval(value=0.003, low=0.002, high=0.004), top1_agreement=Interval(value=0.97, low=0.96, high=0.98), **score,
        )
        for name in ("c", "all texts")
    )  # fmt: skip
    task = TaskResult(
        name="hellaswag", metric="acc_norm,none", items=100, score_base=0.5, score=0.5 + difference[0],
        difference=Interval(value=difference[0], low=difference[1], high=difference[2]), **score,
    )  # fmt: skip
    contender = Contender(
        name="rq", plan_method="rq", exactness="weights", promise_kept=kept, expert_bytes=120_000, texts=texts, tasks=(task,)
    )
    return Evaluation(base=NAME, base_fingerprint="f" * 64, base_expert_bytes=126_000, units=WIDE, contenders=(contender,))


def frontier() -> list[FrontierPoint]:
    """Two fractions of the bytes by two error bounds, one of which cannot be met."""
    rows = [
        {"bytes_fraction": b, "error_bound": e, "lis": None if b + e < 0.51 else 3 - b - e, "lower_bound": 1.0,
         "output_error": e / 2, "bytes": None if b + e < 0.51 else int(b * 1e5), "efficient": True}
        for b in (0.5, 1.0) for e in (0.0, 0.05)
    ]  # fmt: skip
    points = frontier_points({"points": rows})
    assert points is not None, "the rows are those that the command prints"
    return points
