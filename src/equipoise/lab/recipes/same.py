"""Fine-tuning over a sequence of domains that leaves earlier ones alone; after SAME, for text, without its LoRA experts.

For measuring how far routing and experts drift when a compressed or grown model is tuned further. SAME (arXiv:2602.01990) is a
method for multimodal models with LoRA experts; here its three parts act on the routers and experts themselves, and no
multimodal benchmark was run:

    router      updates of a router are damped along the directions that earlier text used (`curvature.router_filter`)
    experts     updates of an expert are multiplied by a damped inverse of its past inputs' moment (`curvature.expert_filter`)
    freeze      an expert that the new text uses less than earlier text did is not updated

All act on what the optimizer has done, so that they mean the same for any optimizer. Routers and experts alone are trained.

Shapes: L MoE layers, E experts, T tokens, K top-k, I inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equipoise.lab.recipe import RecipeError
from equipoise.lab.recipes.curvature import LayerHistory, expert_filter, router_filter
from equipoise.lab.recipes.routers import routers
from equipoise.models.adapters import Handle
from equipoise.models.layers import MoELayer, expert_matrices, find_moe_layers, observe
from equipoise.profiling.sequences import IGNORED, Batch

PARTS = ("router", "experts", "freeze")


@dataclass(frozen=True)
class Settings:
    """Constants of the method.

    Attributes:
        parts: which of "router", "experts" and "freeze" act.
        mu: damping of the expert filter, relative to the mean eigenvalue (published code: 0.9).
        energy, most: used directions (0.9, 64).
        window, clamp: of the router's singular values (3; the formula's, not the published code's (0.8, 1)).
        tau: experts whose score is below it are frozen (0.1).
        ema: memory of an expert's use by the new text (0.95).
        warmup: steps before an expert may be frozen.
    """

    parts: tuple[str, ...] = PARTS
    mu: float = 0.9
    energy: float = 0.9
    most: int = 64
    window: int = 3
    clamp: tuple[float, float] = (0.0, 1.0)
    tau: float = 0.1
    ema: float = 0.95
    warmup: int = 20

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown:
            raise RecipeError(f"same: unknown part '{unknown[0]}'; known: {', '.join(PARTS)}.")
        if self.mu <= 0 or not 0 < self.energy <= 1:
            raise RecipeError(f"same: mu is {self.mu} and energy {self.energy}; mu above 0 and energy in (0, 1] are needed.")


def freeze_scores(use_E: Tensor, past_E: Tensor) -> Tensor:
    """[E] how much more the new text asks of an expert than earlier text did: both divided by their largest, subtracted.

    Args:
        use_E: mean routing weight in the new text.
        past_E: what earlier text put into the expert, sum of gate weight times |x|^2.

    Source: SAME, adaptive expert freezing, Score = U - F; to divide each by its largest value is our reading of "normalised".
    """
    return use_E / use_E.max().clamp(min=1e-12) - past_E / past_E.max().clamp(min=1e-12)


class Keeper:
    """Stands between an optimizer's step and a model's routers and experts.

    Args:
        model: to be fine-tuned.
        history: of the text so far (`curvature.gather`).
        settings: which parts act, and how.
    """

    def __init__(self, model: Any, history: Sequence[LayerHistory], settings: Settings) -> None:
        self._settings, self._history = settings, history
        self._layers = find_moe_layers(model)
        if len(history) != len(self._layers):
            raise RecipeError(f"same: the history is of {len(history)} MoE layers, the model has {len(self._layers)}.")
        self._use = [torch.zeros(layer.num_experts, dtype=torch.float64) for layer in self._layers]
        self._steps = 0
        self._model = model
        self._handles: list[Handle] = [observe(layer, self._seen(layer)) for layer in self._layers]
        self._filters = [self._filters_of(layer, past) for layer, past in zip(self._layers, history, strict=True)]
        self._kept = [self._weights(layer) for layer in self._layers]

    def close(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()

    def frozen(self) -> list[list[int]]:
        """Experts of each layer that are not updated at present."""
        if "freeze" not in self._settings.parts or self._steps < self._settings.warmup:
            return [[] for _ in self._layers]
        scores = [freeze_scores(use, past.mass_E) for use, past in zip(self._use, self._history, strict=True)]
        return [(score_E < self._settings.tau).nonzero().flatten().tolist() for score_E in scores]

    def after_step(self) -> None:
        """Replace the step that the optimizer has made by what may be made of it."""
        self._steps += 1
        with torch.no_grad():
            self._replace()

    def _replace(self) -> None:
        for place, (layer, frozen) in enumerate(zip(self._layers, self.frozen(), strict=True)):
            router_DD, experts = self._filters[place]
            kept_routers, kept_experts = self._kept[place]
            for router, old in zip(routers(layer), kept_routers, strict=True):
                _redo(router.weight, old, router_DD)
            for expert, old_matrices in enumerate(kept_experts):
                for number, (matrix, old) in enumerate(zip(expert_matrices(layer, expert), old_matrices, strict=True)):
                    if expert in frozen:
                        matrix.copy_(old)
                    else:
                        _redo(matrix, old, None if experts is None else experts[number][expert])

    def _filters_of(self, layer: MoELayer, past: LayerHistory) -> tuple[Tensor | None, list[Tensor] | None]:
        s = self._settings
        router_DD = experts = None
        if "router" in s.parts:
            router_DD = router_filter(past.router_DD, energy=s.energy, most=s.most, window=s.window, clamp=s.clamp).float()
        if "experts" in s.parts:
            experts = [
                torch.stack([expert_filter(moment, mu=s.mu, energy=s.energy, most=s.most) for moment in moments]).float()
                for moments in past.inputs_E
            ]
        return router_DD, experts

    def _weights(self, layer: MoELayer) -> tuple[list[Tensor], list[list[Tensor]]]:
        experts = [[matrix.detach().clone() for matrix in expert_matrices(layer, e)] for e in range(layer.num_experts)]
        return [router.weight.detach().clone() for router in routers(layer)], experts

    def _seen(self, layer: MoELayer) -> Callable[[Tensor, Tensor, Tensor], None]:
        """Mean routing weight of each expert, remembered with a decay."""

        def seen(hidden_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> None:
            if self._model.training:
                absent_TK = (experts_TK < 0) | (experts_TK > layer.num_experts)
                ids_S = experts_TK.masked_fill(absent_TK, layer.num_experts).reshape(-1)
                sums_E = torch.zeros(layer.num_experts + 1, dtype=torch.float64)
                sums_E.scatter_add_(0, ids_S, weights_TK.detach().reshape(-1).double())
                use_E, ema = self._use[layer.index], self._settings.ema
                use_E.mul_(ema).add_((1 - ema) * sums_E[:-1] / len(experts_TK))

        return seen


def _redo(weight: Tensor, old: Tensor, passes_II: Tensor | None) -> None:
    """Put what a filter leaves of a step in the place of the step, and remember it as the next step's start."""
    if passes_II is not None:
        weight.copy_(old + (weight - old) @ passes_II.to(weight.dtype))
    old.copy_(weight)


def fine_tune(
    model: Any,
    batches: Iterable[Batch],
    *,
    learning_rate: float,
    keeper: Keeper | None = None,
    clip: float = 1.0,
    done: Callable[[int], bool] = lambda step: False,
) -> int:
    """Train a model's routers and experts on a text, all else frozen: AdamW without decay, at one learning rate.

    Args:
        model: changed in place; in evaluation mode afterwards.
        batches: one for each step.
        learning_rate: of every step.
        keeper: what becomes of each step; None for plain fine-tuning.
        clip: largest norm of the gradient.
        done: asked after each step (from 1); True ends the tuning.

    Returns:
        The steps made.
    """
    weights = _trained(model)
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    step = 0
    for step, batch in enumerate(batches, start=1):
        model.train()
        inputs = {name: torch.from_numpy(array) for name, array in batch.inputs().items()}
        logits = model(**inputs, use_cache=False).logits.float()
        labels = torch.from_numpy(batch.labels).flatten()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORED)
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        torch.nn.utils.clip_grad_norm_(weights, clip)
        optimizer.step()
        if keeper is not None:
            keeper.after_step()
        model.eval()
        if done(step):
            break
    for weight in weights:
        weight.grad = None
    return step


def _trained(model: Any) -> list[Tensor]:
    layers = find_moe_layers(model)
    own = [parameter for layer in layers for parameter in layer.experts.parameters() if parameter.requires_grad]
    return own + [router.weight for layer in layers for router in routers(layer)]
