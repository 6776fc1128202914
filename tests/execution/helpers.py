"""Plans made by hand and token batches for tests of execution."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from equipoise.artifacts import LayerPlan, ModelFacts, Plan


def make_plan(
    facts: ModelFacts, *, precisions: Sequence[str] | None = None, extra: int = 3, dispatch: str = "even", seed: int = 0
) -> Plan:
    """Every expert once and `extra` copies a layer, on as many units as the widest layer has experts.

    Args:
        facts: the model.
        precisions: formats drawn from at random; the model's own when omitted.
    """
    draw = random.Random(seed)
    units = max(layer.num_experts for layer in facts.layers)
    pool = list(precisions or [facts.dtype])
    layers = []
    for layer in facts.layers:
        experts = list(range(layer.num_experts))
        draw.shuffle(experts)
        spare = [expert for expert in range(layer.num_experts) for _ in range(units - 1)]  # at most a copy a unit
        experts += draw.sample(spare, extra)
        at: list[int] = []
        for i, expert in enumerate(experts):
            taken = {at[j] for j in range(i) if experts[j] == expert}
            at.append(draw.choice([u for u in range(units) if u not in taken]))
        weight = [draw.random() + 0.1 for _ in experts]
        total = {e: sum(w for w, x in zip(weight, experts, strict=True) if x == e) for e in experts}
        layers.append(
            LayerPlan(
                experts=tuple(experts),
                precisions=tuple(draw.choice(pool) for _ in experts),
                units=tuple(at),
                shares=tuple(w / total[e] for w, e in zip(weight, experts, strict=True)),
            )
        )
    mixed = any(set(layer.precisions) != {facts.dtype} for layer in layers)
    return Plan(
        method="by hand",
        model=facts,
        units=units,
        unit_bytes=1 << 40,
        dispatch=dispatch,  # type: ignore[arg-type]
        exactness="weights" if mixed else "exact",
        layers=tuple(layers),
    )


def token_batch(
    vocabulary: int, lengths: Sequence[int] = (9, 5), *, left: bool = False, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random tokens, padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (len(lengths), max(lengths)), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, slice(-length, None) if left else slice(0, length)] = 1
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
