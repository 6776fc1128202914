"""Fine-tuning a compressed model over two more domains: what earlier domains lose, at equal loss on the new one.

The model of the arm `none` has its experts rounded to 4 bits and is tuned first on German, then on chat. Plain fine-tuning says
how far: every other arm is stopped as soon as its held-out loss on the new domain is as low, and then compared on the old ones.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch

from equipoise.evaluation.drift import crossed_loss, routing_drift
from equipoise.lab.recipes.curvature import gather
from equipoise.lab.recipes.same import PARTS, Keeper, Settings, fine_tune
from equipoise.lab.rows import RowOrder, heldout_rows
from equipoise.lab.text import Stream
from equipoise.models.layers import expert_matrices, find_moe_layers
from equipoise.profiling.forward import evaluation_mode, negative_log_likelihood
from equipoise.profiling.sequences import Batch, Framing, Rows, make_batches
from equipoise.quantization.formats import round_trip

SEQUENCE = ("german", "chat")
STEPS, MOST = 60, 300
"""Steps of plain fine-tuning on a domain, and steps after which an arm gives up on the loss that it reached."""
LEARNING_RATE, ROWS_A_STEP = 2e-3, 4
ARMS: dict[str, tuple[float, Settings | None]] = {
    "plain": (1.0, None),
    "plain, a third of the rate": (1 / 3, None),
    "router": (1.0, Settings(parts=("router",))),
    "experts": (1.0, Settings(parts=("experts",))),
    "freeze": (1.0, Settings(parts=("freeze",))),
    "all": (1.0, Settings(parts=PARTS)),
    "all, router within 0.8 and 1": (1.0, Settings(parts=PARTS, clamp=(0.8, 1.0))),
}
"""Arm -> factor of the learning rate, and what stands between optimizer and weights."""


class Sequel:
    """The text of the domains to come, and the probe of those that were."""

    def __init__(
        self,
        trained: Mapping[str, Stream],
        other: Mapping[str, Stream],
        held: Mapping[str, Rows],
        framing: Framing,
        seq_len: int,
    ) -> None:
        self.framing, self.seq_len = framing, seq_len
        self.trained, self.other = trained, other
        self.held = held

    def training(self, name: str, seed: int) -> RowOrder:
        """Rows of one domain, step by step."""
        stream = self.other.get(name, self.trained.get(name))
        assert stream is not None, "a domain of one of the mixes"
        return RowOrder(
            {name: stream}, {name: 1.0}, self.framing, seq_len=self.seq_len, batch_size=ROWS_A_STEP, seed=seed
        )  # fmt: skip

    def probe(self, names: Sequence[str]) -> list[Batch]:
        """Held-out rows of some domains."""
        return [batch for name in names for batch in make_batches(self.held[name], 8)]

    @classmethod
    def of(cls, judge: Any, other: Mapping[str, Stream], heldout: Mapping[str, Stream]) -> Sequel:
        """From what the judge of `recipes.py` has prepared."""
        held = dict(judge.inside) | heldout_rows(heldout, judge.framing, seq_len=judge.seq_len, rows=16)
        return cls(judge.train, other, held, judge.framing, judge.seq_len)


def compressed(model: Any, form: str = "int4-g32") -> Any:
    """The model with every expert matrix rounded to a format and back."""
    with torch.no_grad():
        for layer in find_moe_layers(model):
            for expert in range(layer.num_experts):
                for matrix in expert_matrices(layer, expert):
                    matrix.copy_(round_trip(matrix, form))
    return model


def run_sequence(start: Any, old: Sequence[str], sequel: Sequel, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Every arm over the sequence of domains.

    Args:
        start: the compressed model; left as it is.
        old: domains that it was trained on.
        sequel: the text.
        seed: order of the new text.

    Returns:
        Arm -> what was found after each domain.
    """
    text = [sequel.training(name, seed).batch(step) for name in old for step in range(8)]
    first = gather(start, text)
    found: dict[str, list[dict[str, Any]]] = {}
    for arm, (factor, settings) in ARMS.items():
        model, history, found[arm] = copy.deepcopy(start), first, []
        for stage, name in enumerate(SEQUENCE):
            known = [*old, *SEQUENCE[:stage]]
            target = None if arm == "plain" else found["plain"][stage]["new_loss"]
            before = copy.deepcopy(model)
            keeper = None if settings is None else Keeper(model, history, settings)
            steps, new_loss = _tuned(model, name, sequel, seed, LEARNING_RATE * factor, keeper, target)
            if keeper is not None:
                keeper.close()
            probe = sequel.probe(known)
            drift, crossed = routing_drift(before, model, probe), crossed_loss(before, model, probe)
            found[arm].append(
                {
                    "steps": steps,
                    "reached": target is None or new_loss <= target,
                    "new_loss": new_loss,
                    "old_loss_before": crossed.before,
                    "old_loss": crossed.after,
                    "old_routers": crossed.old_routers_new_experts,
                    "new_routers": crossed.new_routers_old_experts,
                    "overlap": float(drift.overlap_L.mean()),
                    "divergence": float(drift.divergence_L.mean()),
                    "first_loss": _loss(model, sequel.probe(old)),
                }
            )
            order = sequel.training(name, seed)
            history = [
                past + more for past, more in zip(history, gather(model, [order.batch(s) for s in range(8)]), strict=True)
            ]
    return found


def _tuned(
    model: Any, name: str, sequel: Sequel, seed: int, rate: float, keeper: Keeper | None, target: float | None
) -> tuple[int, float]:
    """Tune on a domain for the steps of plain fine-tuning, or until its held-out loss is as low; steps and that loss."""
    order, probe = sequel.training(name, seed), sequel.probe([name])
    last = STEPS if target is None else MOST
    seen = float("inf")

    def done(step: int) -> bool:
        nonlocal seen
        if target is not None and step % 3 and step < last:
            return False
        if target is not None or step == last:
            seen = _loss(model, probe)
        return step == last or (target is not None and seen <= target)

    batches = (order.batch(step) for step in count())
    return fine_tune(model, batches, learning_rate=rate, keeper=keeper, done=done), seen


def _loss(model: Any, batches: Sequence[Batch]) -> float:
    with evaluation_mode(model):
        sums = np.array([negative_log_likelihood(model, batch) for batch in batches])
    return float(sums[:, 0].sum() / sums[:, 1].sum())
