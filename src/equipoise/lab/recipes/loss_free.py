"""Loss-Free balancing: a bias on the scores that experts are *selected* by follows the load; no gradient is disturbed.

For making models that are balanced without a balance loss. Wang et al. (arXiv:2408.15664), Algorithm 1: select by s_i + b_i,
weight by s_i; after each batch, with c_i the tokens of expert i and e_i = mean(c) - c_i,

    sign:           b_i += rate * sign(e_i)               (for sigmoid scores; rate 0.001)
    proportional:   b_i += rate * e_i / mean(c)           (for softmax scores; rate 0.001)

The paper does not say in which unit e_i is; here it is a share of the mean, so that a rate means the same for any batch. The
counts are those of the whole optimizer step, however many forward passes it takes. The bias is the router's own
`e_score_correction_bias`, which transformers adds for the selection alone.

Shapes: E experts.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from equipoise.lab.extensions import EXTENSIONS, Extension, Step
from equipoise.lab.recipe import RecipeError
from equipoise.lab.recipes.routers import RouterTap, routers, selections
from equipoise.models.layers import MoELayer, find_moe_layers

Rule = Literal["sign", "proportional"]
RULES = ("sign", "proportional")
BIAS = "e_score_correction_bias"


def bias_step(counts_E: Tensor, rate: float, rule: Rule) -> Tensor:
    """[E] what is added to the selection bias after a batch.

    Args:
        counts_E: [E] tokens that each expert got.
        rate: u of the paper.
        rule: "sign" or "proportional".
    """
    mean = counts_E.double().mean()
    if not mean:
        return torch.zeros_like(mean - counts_E)
    short_E = mean - counts_E
    return rate * (short_E.sign() if rule == "sign" else short_E / mean)


def selection_bias(router: nn.Module) -> Tensor | None:
    """A router's bias on selection [..., E], or None if it has none."""
    named = [*router.named_buffers(), *router.named_parameters()]
    return next((tensor for name, tensor in named if name.rpartition(".")[2] == BIAS), None)


@EXTENSIONS.register(
    "loss-free",
    summary="selection bias that follows the load: level load without a loss term",
    source="Loss-Free Balancing (arXiv:2408.15664) Algorithm 1",
)
class LossFree(Extension):
    """Moves the selection bias of every router after each optimizer step.

    Args:
        rate: u.
        rule: "sign" or "proportional".
    """

    def __init__(self, rate: float = 1e-3, rule: Rule = "sign") -> None:
        if rule not in RULES:
            raise RecipeError(f"loss-free: unknown rule '{rule}'; known: {', '.join(RULES)}.")
        self.rate, self.rule = rate, rule

    def attach(self, model: Any) -> None:
        """Find the biases and listen to the routers.

        Raises:
            RecipeError: the routers have no selection bias.
        """
        layers = find_moe_layers(model)
        self._biases = [_bias(layer, router) for layer in layers for router in routers(layer)]
        self._counts = [torch.zeros(bias.shape[-1], dtype=torch.int64, device=bias.device) for bias in self._biases]
        self._tap = RouterTap(model)

    def loss(self, step: Step) -> Tensor | None:
        """No term; the batch is counted."""
        for counts_E, event in zip(self._counts, self._tap.take(), strict=True):
            counts_E += selections(event.experts_TK, len(counts_E))
        return None

    def after_step(self, step: Step) -> None:
        """Move each bias by what the step's tokens say."""
        with torch.no_grad():
            for bias, counts_E in zip(self._biases, self._counts, strict=True):
                bias += bias_step(counts_E, self.rate, self.rule).to(bias.dtype)
                counts_E.zero_()


def _bias(layer: MoELayer, router: nn.Module) -> Tensor:
    bias = selection_bias(router)
    if bias is None:
        raise RecipeError(
            f"the router beside {layer.path} has no bias on selection ({BIAS}); use an architecture that has one, such as "
            "deepseek_v3 (sigmoid scores) or ernie4_5_moe (softmax)."
        )
    return bias
