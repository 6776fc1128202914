"""What the routers of a model in training said: logits with their graph, and the selections that came of them.

Shapes: T tokens of a forward pass, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from equipoise.lab.recipe import RecipeError
from equipoise.models.layers import MoELayer, find_moe_layers, observe

Scores = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, eq=False)
class Routed:
    """One routing event: one router, asked once.

    Attributes:
        logits_TE: of the router, with their graph.
        experts_TK: what it chose; E where it chose none.
    """

    logits_TE: Tensor
    experts_TK: Tensor

    def probabilities(self, scores: Scores) -> Tensor:
        """[T, E] routing probabilities; sigmoid scores are divided by their sum, as DeepSeek-V3's balance loss does."""
        if scores == "softmax":
            return self.logits_TE.float().softmax(-1)
        score_TE = self.logits_TE.float().sigmoid()
        return score_TE / score_TE.sum(-1, keepdim=True)


def routers(layer: MoELayer) -> list[nn.Module]:
    """The routers of a layer, in the order of its routing events.

    Raises:
        RecipeError: the layer's router is no module of its block.
    """
    if layer.router_path is None:
        raise RecipeError(f"{layer.path} has no router module of its own; balance recipes need one (Qwen3-MoE, Mixtral, ...).")
    router = layer.ancestors[0].get_submodule(layer.router_path)
    return list(router) if isinstance(router, nn.ModuleList) else [router]


class RouterTap:
    """Keeps the routing events of a model's training forward passes until they are taken; evaluation leaves no trace.

    Args:
        model: freshly built.

    Raises:
        RecipeError: a layer without a router module.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._logits: list[Tensor] = []
        self._events: list[Routed] = []
        for layer in find_moe_layers(model):
            for router in routers(layer):
                router.register_forward_hook(self._heard)
            observe(layer, self._chosen(layer))

    def take(self) -> list[Routed]:
        """The events since the last call, layer by layer; they are forgotten."""
        events, self._events = self._events, []
        return events

    @property
    def _training(self) -> bool:
        return bool(self._model.training) and torch.is_grad_enabled()

    def _heard(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._training:
            self._logits.append(output[0] if isinstance(output, tuple) else output)

    def _chosen(self, layer: MoELayer) -> Callable[[Tensor, Tensor, Tensor], None]:
        def chosen(hidden_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> None:
            if not self._training:
                return
            logits = self._logits.pop().reshape(len(experts_TK), -1)
            if logits.shape[1] != layer.num_experts:
                raise RecipeError(f"the router beside {layer.path} does not give logits of {layer.num_experts} experts.")
            self._events.append(Routed(logits, experts_TK.detach()))

        return chosen


def selections(experts_TK: Tensor, num_experts: int) -> Tensor:
    """[E] how often each expert was chosen; an id of E is no expert."""
    return torch.bincount(experts_TK.reshape(-1), minlength=num_experts + 1)[:num_experts]
