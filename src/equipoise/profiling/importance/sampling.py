"""Bounded samples of the tokens that each expert serves, drawn while the model runs, so that no token has to be kept.

A sample is stratified: some forward passes, spread over the run, are measured, and in each of them an expert's tokens are
drawn at random up to a quota. What is summed over a sample is weighted by (tokens served / tokens drawn), so it stands
for all tokens of the measured passes; the ratio to the whole run is applied when the run is over.

Shapes: L MoE layers, E logical experts, T tokens, K top-k, N drawn tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from equipoise.errors import EquipoiseError
from equipoise.profiling.importance.base import Context, Estimator, Floats, Ints, Observation
from equipoise.profiling.sequences import Batch

MEASURED_PASSES = 16
"""Forward passes that are measured at most: each one costs rounding every expert's weights once per precision."""


@dataclass(frozen=True, eq=False)
class Draw:
    """Tokens drawn for one expert: row and top-k column [N] of each, and how many served tokens one of them stands for."""

    expert: int
    tokens: NDArray[np.intp]
    columns: NDArray[np.intp]
    weight: float


def draw(experts_TK: NDArray[np.integer], num_experts: int, quota: int | None, rng: np.random.Generator) -> Iterator[Draw]:
    """Draw up to `quota` selections of each expert, without replacement; experts that serve nothing are skipped.

    Args:
        experts_TK: [T, K] chosen experts; ids outside 0..num_experts-1 serve nothing.
        num_experts: experts of the layer.
        quota: selections to draw of each expert; None takes them all.
        rng: source of randomness.
    """
    flat = experts_TK.reshape(-1)
    served = np.flatnonzero((flat >= 0) & (flat < num_experts))
    # Sorting by (expert, random key) puts a random subset of every expert's selections first among its own.
    order = served[np.lexsort((rng.random(served.size), flat[served]))]
    counts = np.bincount(flat[served].astype(np.int64), minlength=num_experts)
    for expert, end in enumerate(np.cumsum(counts)):
        count = int(counts[expert])
        if count:
            start = int(end) - count
            picked = np.sort(order[start : start + (count if quota is None else min(quota, count))])
            yield Draw(expert, picked // experts_TK.shape[1], picked % experts_TK.shape[1], count / picked.size)


def spread_budget(batches: Sequence[Batch], tokens: int) -> list[int]:
    """Indices of batches, one of each scenario in turn, until they hold the budget."""
    by_scenario: dict[str, list[int]] = {}
    for step, batch in enumerate(batches):
        by_scenario.setdefault(batch.scenario, []).append(step)
    chosen: list[int] = []
    held = 0
    for turn in range(max(map(len, by_scenario.values()), default=0)):
        if turn and held >= tokens:
            break
        for steps in by_scenario.values():
            if turn < len(steps):
                chosen.append(steps[turn])
                held += batches[steps[turn]].tokens
    return sorted(chosen)


class SampledEstimator(Estimator):
    """Base of estimators that run experts again on a sample of their tokens."""

    def __init__(self, context: Context, max_tokens_per_expert: int | None) -> None:
        super().__init__(context)
        if max_tokens_per_expert is not None and max_tokens_per_expert < 1:
            raise EquipoiseError(
                f"max_tokens_per_expert is {max_tokens_per_expert}; it must be at least 1, or None for all tokens."
            )
        rng = np.random.default_rng([context.seed, 1])
        total = len(context.batches)
        parts = total if max_tokens_per_expert is None else min(total, MEASURED_PASSES)
        edges = np.linspace(0, total, parts + 1).astype(int)
        self.steps = tuple(int(rng.integers(low, high)) for low, high in pairwise(edges))
        self.quota = None if max_tokens_per_expert is None else -(-max_tokens_per_expert // max(parts, 1))
        self._row: dict[str, Floats] = {}

    def observe(self, seen: Observation) -> None:
        """Draw and measure, in the passes chosen for it."""
        if seen.step not in self.steps:
            return
        rng = np.random.default_rng([self.context.seed, 2, seen.step, seen.layer.index])
        self._row = {}
        for drawn in draw(seen.experts.cpu().numpy(), seen.layer.num_experts, self.quota, rng):
            self.put("served", drawn.expert, drawn.weight * drawn.tokens.size)
            self.put("drawn", drawn.expert, drawn.tokens.size)
            rows = torch.from_numpy(drawn.tokens).to(seen.hidden.device)
            columns = torch.from_numpy(drawn.columns).to(seen.hidden.device)
            self.measure(seen, drawn, seen.hidden[rows], seen.weights[rows, columns].double())
        for name, row_E in self._row.items():
            self.passes.add(f"{name}.{seen.layer.index}", self.steps.index(seen.step), row_E)

    def measure(self, seen: Observation, drawn: Draw, hidden_ND: torch.Tensor, gates_N: torch.Tensor) -> None:
        """`put` what one expert's drawn tokens say, weighted by `drawn.weight`."""
        raise NotImplementedError

    def put(self, name: str, expert: int, value: float) -> None:
        """What an expert adds to the [L, E] sum of a name, in the layer and pass that are being measured."""
        self._row.setdefault(name, np.zeros(self.context.shape[1]))[expert] = value

    def sum(self, name: str) -> Floats:
        """[L, E] sum of a name over the measured passes; zero where nothing was put."""
        rows = [self.passes.total(f"{name}.{layer.index}") for layer in self.context.layers]
        return np.stack([np.zeros(self.context.shape[1]) if row_E is None else row_E for row_E in rows])

    def scale(self, load_LE: Ints) -> Floats:
        """[L, E] tokens of the whole run for each token of the measured passes; zero for an expert seen in none."""
        served = self.sum("served")
        return np.divide(load_LE, served, out=np.zeros_like(served), where=served > 0)
