"""Decoder layers in two halves, attention and experts, between which a token may change ranks: which models have such layers.

Shapes: N rows, S columns, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from equipoise.errors import ModelError
from equipoise.execution.expert_parallel.context import check_cache
from equipoise.execution.routing.policies import make_policy
from equipoise.models.layers import MoELayer, observe
from equipoise.models.policy_marks import policy_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm")
"""What a Llama-style decoder layer calls its parts, beside its block of experts."""
LAYOUTS = ("fused", "llama4")
"""Families of experts modules whose every token has an expert (see `families.FAMILIES`)."""


@dataclass(frozen=True, eq=False)
class Halves:
    """A Llama-style decoder layer: h = x + attention(norm(x)), then h + block(norm(h)).

    Attributes:
        layer: the decoder layer.
        block: its experts with their router and shared experts.
    """

    layer: nn.Module
    block: nn.Module

    def first(self, hidden_NSD: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """[N, S, D] after attention.

        Args:
            hidden_NSD: the layer's input.
            arguments: what else it is given.
        """
        layer: Any = self.layer
        found = layer.self_attn(hidden_states=layer.input_layernorm(hidden_NSD), **arguments)
        return hidden_NSD + (found[0] if isinstance(found, tuple) else found)

    def second(self, hidden_NSD: Tensor) -> Tensor:
        """[N, S, D] the layer's output, from what `first` gave."""
        layer: Any = self.layer
        found = self.block(layer.post_attention_layernorm(hidden_NSD))
        return hidden_NSD + (found[0] if isinstance(found, tuple) else found).view(hidden_NSD.shape)


def find_halves(model: PreTrainedModel, layers: Sequence[MoELayer]) -> list[Halves]:
    """The two halves of every MoE layer, tried on a few tokens.

    Args:
        model: a model whose experts are all here.
        layers: its MoE layers.

    Raises:
        ModelError: a model whose tokens cannot stay with their expert; the message says why.
    """
    stacks = {layer.stack_path for layer in layers}
    if getattr(model.config, "is_encoder_decoder", False) or len(stacks) > 1:
        _refuse(f"{type(model).__name__} has several stacks of layers, of which one reads what another has made of all tokens")
    policy = policy_of(model)
    if policy is not None and make_policy(policy.name, policy.options).needs_tokens:
        _refuse(f"its routing policy '{policy.name}' looks at all tokens of a batch, of which a rank has a part")
    for layer in layers:
        _require_one(layer, layer.sent.columns)  # of all routing events together
        if layer.layout not in LAYOUTS or layer.sent.drops:
            _refuse(f"the experts of {type(layer.experts).__name__} (layout '{layer.layout}') may be given none of a token")
    stack = model.get_submodule(stacks.pop())
    found = [_halves_of(stack, layer) for layer in layers]
    check_cache(DynamicCache(config=model.config))
    _try_out(model, layers, found)
    return found


def _require_one(layer: MoELayer, experts: int) -> None:
    if experts > 1:
        _refuse(
            f"{layer.path} sends a token to {experts} experts, which may lie on as many ranks: their outputs must meet again, "
            "so there is no one place for the token to stay. It takes top-k 1"
        )


def _halves_of(stack: nn.Module, layer: MoELayer) -> Halves:
    name = type(stack).__name__
    if not isinstance(getattr(stack, "layers", None), nn.ModuleList):
        _refuse(f"{name} does not keep its decoder layers as `layers`")
    block, decoder = layer.ancestors[-1], layer.ancestors[-2]
    if not any(decoder is each for each in stack.layers):
        _refuse(f"the experts of {name} are not in a block of a decoder layer")
    if missing := [part for part in PARTS if not isinstance(getattr(decoder, part, None), nn.Module)]:
        _refuse(f"{type(decoder).__name__} has no {' and no '.join(missing)}")
    return Halves(decoder, block)


def _try_out(model: PreTrainedModel, layers: Sequence[MoELayer], halves: Sequence[Halves]) -> None:
    """Compare each layer's own forward with its halves, and what its experts are sent with what it says."""

    def compare(half: Halves) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = dict(kwargs)
            hidden = args[0] if args else given.pop("hidden_states")
            if isinstance(output, Tensor) and len(args) < 2:
                mine = half.second(half.first(hidden, given))
                if float((mine - output).abs().max()) <= 32 * torch.finfo(output.dtype).eps * float(output.abs().max()):
                    return
            _refuse(f"{type(module).__name__} is not x + attention(norm(x)) followed by h + experts(norm(h))")

        return hook

    def count(layer: MoELayer) -> Any:
        return lambda hidden_TD, expert_TK, weight_TK: _require_one(layer, expert_TK.shape[1])

    handles: list[Any] = [half.layer.register_forward_hook(compare(half), with_kwargs=True) for half in halves]
    handles += [observe(layer, count(layer)) for layer in layers]
    ids = torch.arange(8, device=next(model.parameters()).device).view(2, 4) + 3
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def _refuse(reason: str) -> None:
    raise ModelError(f"context='coherent' does not fit this model: {reason}. Use context='own'.")
