"""Leave one out: the true loss when one expert is removed; exact, and one forward pass for each expert.

Shapes: L MoE layers, E logical experts, N scored batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from equipoise.errors import EquipoiseError, ModelError
from equipoise.models.layers import MoELayer, expert_matrices, expert_vectors
from equipoise.models.streamed import streamed_of
from equipoise.profiling.forward import negative_log_likelihood
from equipoise.profiling.importance.base import IMPORTANCE, Context, Estimator, Ints, Measured, Observation
from equipoise.profiling.importance.from_block import Start
from equipoise.profiling.importance.sampling import spread_budget


@IMPORTANCE.register(
    "leave_one_out",
    summary="increase of the loss per token when one expert's contribution is zero (L x E forward passes)",
    source="R&Q (arXiv:2602.19938), the expert-removal study",
)
class LeaveOneOut(Estimator):
    """Mean negative log-likelihood without the expert minus with it, in nats per predicted token.

    One expert is removed at a time: its contribution is zero for the tokens that chose it, while its layer's selections
    and the other experts' gate weights stay as they are. Passes in which an expert served nothing are not run again,
    since their loss cannot change, and the others begin at the expert's block where the model bears it (see `from_block`).

    Args:
        tokens: budget of tokens to score on, taken from all scenarios in turn; at least one batch of each.
    """

    def __init__(self, context: Context, *, tokens: int = 2048) -> None:
        super().__init__(context)
        if tokens < 1:
            raise EquipoiseError(f"leave_one_out: tokens is {tokens}; it must be at least 1.")
        if streamed_of(context.model) is not None:
            raise EquipoiseError("leave_one_out changes weights, which a model that is read from its files does not allow.")
        self.steps = spread_budget(context.batches, tokens)
        self.sums["served"] = np.zeros((len(self.steps), *context.shape))

    def observe(self, seen: Observation) -> None:
        """Count the tokens of each expert in the passes that are scored."""
        if seen.step in self.steps:
            e = seen.layer.num_experts
            experts = seen.experts[(seen.experts >= 0) & (seen.experts < e)]
            counts = torch.bincount(experts.flatten().long(), minlength=e).cpu().numpy()
            self.sums["served"][self.steps.index(seen.step), seen.layer.index, :e] += counts

    def finish(self, load_LE: Ints, checkpoint: Callable[[], None], advance: Callable[[int, int], None]) -> Measured:
        """[L, E] increase of the loss; negative where the model is better off without the expert."""
        model, layers = self.context.model, self.context.layers
        batches = [self.context.batches[step] for step in self.steps]
        if "base" not in self.results:
            scored = [negative_log_likelihood(model, batch) for batch in batches]
            self.results["base"] = np.array(scored, np.float64)
            self.results["increase"] = np.full(self.context.shape, np.nan)
        base_N, labels_N = self.results["base"].T
        if not labels_N.sum():
            raise EquipoiseError("leave_one_out: the text has no second token to predict; give more text.")
        increase_LE = self.results["increase"]
        todo = self.context.team.mine([(layer, expert) for layer in layers for expert in range(layer.num_experts)])
        start: Start | None = None
        for done, (layer, expert) in enumerate(todo, start=1):
            if np.isnan(increase_LE[layer.index, expert]):
                if start is None or start.layer is not layer:
                    start = Start.at(layer, batches, lambda batch: negative_log_likelihood(model, batch)[0], base_N, start)
                used = np.flatnonzero(self.sums["served"][:, layer.index, expert])
                with removed(layer, expert):
                    change = sum(start.loss(int(n)) - base_N[n] for n in used)
                increase_LE[layer.index, expert] = change / labels_N.sum()
                checkpoint()
            advance(done, len(todo))
        remarks = {"scored_tokens": int(labels_N.sum()), "loss": float(base_N.sum() / labels_N.sum())}
        return Measured(importance=np.nan_to_num(self.context.team.join(increase_LE)), remarks=remarks)


@contextmanager
def removed(layer: MoELayer, expert: int) -> Iterator[None]:
    """Zero an expert's parameters for a while: an expert without weights and biases puts out zero.

    Raises:
        ModelError: the architecture does not give its experts' weights as views that can be changed.
    """
    parts = [*expert_matrices(layer, expert), *expert_vectors(layer, expert)]
    kept = [part.detach().clone() for part in parts]
    with torch.no_grad():
        try:
            for part in parts:
                part.zero_()
            if any(bool(matrix.any()) for matrix in expert_matrices(layer, expert)):
                raise ModelError(
                    f"leave_one_out cannot remove an expert of {layer.path}: its weights are not views; use gate_norm."
                )
            yield
        finally:
            for part, original in zip(parts, kept, strict=True):
                part.copy_(original)
