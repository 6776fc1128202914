"""The one call by which a router picks its experts: seen, and answered otherwise.

Routers differ in scores, bias, groups, renormalisation and scaling, but each ends in `topk` over the scores of all experts
(`argmax` where it picks one). A `ChoiceTap` sees the arguments of that call while the router runs and may answer it with
other experts; what follows is the model's own code, so that gate weights come about as the model makes them, and nothing
about the family is derived again.

Shapes: T rows, W classes that the router ranks (E experts, and what some families have beyond them: skip, identity), K top-k,
C experts that are picked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from equipoise.errors import ModelError
from equipoise.models.layers import MoELayer


@dataclass(frozen=True, eq=False)
class Choice:
    """What a router is about to pick from.

    Attributes:
        ranked_TW: what it ranks by, its own bias added; classes of groups that it has ruled out are -inf or 0.
        experts_TK: what it picks.
        score_TW: its last softmax or sigmoid over the classes; None when there was none before the choice.
        kind: "softmax" or "sigmoid", of the scores; "" when there are none.
    """

    ranked_TW: Tensor
    experts_TK: Tensor
    score_TW: Tensor | None
    kind: str


Picker = Callable[[Choice], Tensor | None]
"""Returns the experts to pick [T, C], or None for the router's own."""

_TOPK = (torch.topk, torch.Tensor.topk)
_MAX = (torch.max, torch.Tensor.max)
_ARGMAX = (torch.argmax, torch.Tensor.argmax)
_SCORES = {
    torch.softmax: "softmax",
    torch.Tensor.softmax: "softmax",
    nn.functional.softmax: "softmax",
    torch.sigmoid: "sigmoid",
    torch.Tensor.sigmoid: "sigmoid",
    nn.functional.sigmoid: "sigmoid",
}


class ChoiceTap:
    """Sees every choice of one layer's router and lets a picker answer it.

    Args:
        layer: the layer.
        picker: asked at each choice.
        required: the router must make such a choice.

    Raises:
        ModelError: while the model runs, when the router makes no such choice (experts by token id, a sampler of its own).
    """

    def __init__(self, layer: MoELayer, picker: Picker, *, required: bool = True) -> None:
        self.path, self.num_experts, self.top_k, self.picker = layer.path, layer.num_experts, layer.top_k, picker
        self._required = required
        self._mode: _Watch | None = None
        module = chooser(layer)
        self._handles = (
            module.register_forward_pre_hook(self._begin),
            module.register_forward_hook(self._end, always_call=True),
        )

    def remove(self) -> None:
        """Let the router be."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._mode = _Watch(self)
        self._mode.__enter__()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        mode, self._mode = self._mode, None
        if mode is None:
            return
        mode.__exit__(None, None, None)
        if self._required and output is not None and not mode.chosen:
            raise ModelError(
                f"the router beside {self.path} does not rank its experts by scores in a call of topk (it may go by token ids, "
                "or sample), so its choice cannot be changed; use another policy or model."
            )


def chooser(layer: MoELayer) -> nn.Module:
    """The module whose forward holds the choice: the router, or the block where that chooses itself.

    Raises:
        ModelError: there is none.
    """
    if layer.events > 1:
        raise ModelError(f"{layer.path} has {layer.events} routers, one a pass; routing policies are for layers of one router.")
    if layer.layout == "dbrx":  # its router returns logits alone
        return layer.ancestors[-1]
    name = layer.adapter.router_name(layer.ancestors)
    module = getattr(layer.ancestors[-1], name) if name else getattr(layer.experts, "router", None)
    if not isinstance(module, nn.Module):
        raise ModelError(f"{layer.path} has no router module, so its choice cannot be changed.")
    return module


class _Watch(TorchFunctionMode):  # type: ignore[misc]
    """Active while a router runs: remembers its scores, and answers its choice."""

    def __init__(self, tap: ChoiceTap) -> None:
        super().__init__()
        self.tap, self.chosen = tap, False
        self._score: Tensor | None = None
        self._kind = ""
        self._answer: tuple[Tensor, Tensor | None] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SCORES:
            out = func(*args, **kwargs)
            if out.shape[-1] >= self.tap.num_experts and not self.chosen:
                self._score, self._kind = out, _SCORES[func]
            return out
        if func in _TOPK:
            return self._topk(func, args, kwargs)
        if self.tap.top_k == 1 and (func in _MAX or func in _ARGMAX):
            return self._largest(func, args, kwargs)
        return func(*args, **kwargs)

    def _topk(self, func: Any, args: Any, kwargs: Any) -> Any:
        found = func(*args, **kwargs)
        scores = _argument(args, kwargs, 0, "input", None)
        k, dim = _argument(args, kwargs, 1, "k", None), _argument(args, kwargs, 2, "dim", -1)
        over_all = scores.dim() > 1 and dim in (-1, scores.dim() - 1) and scores.shape[-1] >= self.tap.num_experts
        grouped = self._score is not None and self._score.dim() != scores.dim()
        if k != self.tap.top_k or not over_all or grouped:
            return found  # a step before the choice: the best of each group, or of the groups
        picked = self._ask(scores, found[1])
        return found if picked is None else torch.return_types.topk((scores.gather(-1, picked), picked))

    def _largest(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Top-1 as argmax, and as max for the score of the same."""
        found = func(*args, **kwargs)
        scores, dim = _argument(args, kwargs, 0, "input", None), _argument(args, kwargs, 1, "dim", None)
        if dim is None or dim not in (-1, scores.dim() - 1) or scores.shape[-1] < self.tap.num_experts:
            return found
        keep = bool(_argument(args, kwargs, 2, "keepdim", False))
        ids = found if func in _ARGMAX else found[1]
        picked = self._ask(scores, ids if keep else ids.unsqueeze(-1))
        if picked is None:
            return found
        values = scores.gather(-1, picked)
        if not keep:
            values, picked = values.squeeze(-1), picked.squeeze(-1)
        return picked if func in _ARGMAX else torch.return_types.max((values, picked))

    def _ask(self, scores: Tensor, ids: Tensor) -> Tensor | None:
        """The picker's answer in the shape of the call; asked once for the same scores."""
        if self._answer is not None and self._answer[0] is scores:
            return self._answer[1]
        self.chosen = True
        width, k = scores.shape[-1], ids.shape[-1]
        score = self._score if self._score is not None and self._score.shape == scores.shape else None
        choice = Choice(
            scores.reshape(-1, width),
            ids.reshape(-1, k),
            None if score is None else score.reshape(-1, width),
            self._kind if score is not None else "",
        )
        picked = self.tap.picker(choice)
        if picked is not None:
            picked = picked.view(*scores.shape[:-1], picked.shape[-1])
        self._answer = (scores, picked)
        return picked


def _argument(args: Any, kwargs: Any, place: int, name: str, default: Any) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)
