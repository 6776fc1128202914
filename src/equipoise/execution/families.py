"""How each family of experts modules runs from slots: what lies between its matrices, what it is called with, what to free.

Families of the common call (hidden_TD, experts_TK, weights_TK) run through the experts implementation "equipoise" of
`transformers.integrations.moe`; those with a call of their own get it as their forward. What families look like
before they are balanced is told by `models.adapters`.

Shapes: T tokens, K top-k, S selections, E routed experts, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.errors import ModelError
from equipoise.execution.selections import Selections
from equipoise.execution.slot_group import Activation
from equipoise.execution.slots import ExpertSlots
from equipoise.models.adapters.base import nonzero_topk
from equipoise.models.layers import MoELayer
from equipoise.models.policy_marks import MARK

IMPLEMENTATION = "equipoise"
Forward = Callable[..., Any]


class Family:
    """The common call; also the base of the others.

    Attributes:
        partial: selections may reach no slot.
    """

    partial = False

    def bind(self, layer: MoELayer, slots: ExpertSlots) -> None:
        """Put slots in the place of a layer's weights."""
        experts = layer.experts
        if getattr(experts, "_is_expert_parallel", False) and not layer.sent.drops:
            raise ModelError("the model runs under transformers' expert parallelism; load it without `distributed_config`.")
        slots.activate = self.activation(experts)
        self.clear(experts)
        for module in (layer.ancestors[-1], *experts.modules()):
            module._is_hf_initialized = True  # or transformers looks for the weights that are gone, to initialize them
        experts.add_module("slots", slots)
        slots.family = self
        if not hasattr(experts, "_is_expert_parallel"):  # not decorated: its forward never asks for an implementation
            experts.forward = MethodType(experts_forward, experts)

    def rebind(self, layer: MoELayer, slots: ExpertSlots) -> None:
        """Put other slots in the place of those that a layer has."""
        experts: Any = layer.experts
        slots.activate, slots.family = experts.slots.activate, self
        experts.slots = slots

    def activation(self, experts: nn.Module) -> Activation:
        """What lies between up and down."""
        return Between(experts)

    def clear(self, experts: nn.Module) -> None:
        """Free the weights that the slots now hold."""
        for name in ("gate_up_proj", "up_proj", "down_proj"):
            for parameter in (name, f"{name}_bias"):
                experts._parameters.pop(parameter, None)

    def run(self, experts: Any, slots: ExpertSlots, *call: Any) -> Tensor:
        """The forward of the experts module."""
        hidden_TD, expert_TK, weight_TK = call
        after = experts.post_expert_norm if getattr(experts, "has_post_expert_norm", False) else None
        mark = getattr(experts, MARK, None)
        partial = self.partial or (mark is not None and mark.drops)
        return slots(hidden_TD, expert_TK, weight_TK, slots.activate, after, partial)


class Between:
    """The module's own gate or activation; an object, not a closure, so that a deep copy uses the copy's module."""

    def __init__(self, experts: nn.Module) -> None:
        self.experts = [experts]  # in a list, so that no module registers its own parent as a child

    def __call__(self, up: Tensor) -> Tensor:
        """[S, F] from [S, 2F or F]."""
        experts: Any = self.experts[0]
        return experts._apply_gate(up) if getattr(experts, "has_gate", True) else experts.act_fn(up)  # type: ignore[no-any-return]


class Gated:
    """act(gate) * up, for families without a gate function of their own."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        self.act = act

    def __call__(self, up: Tensor) -> Tensor:
        """[S, F] from [S, 2F]."""
        gate, up = up.chunk(2, dim=-1)
        return self.act(gate) * up


class Skip(Family):
    """Zaya: expert 0 with weight 0 stands for no expert."""

    partial = True

    def run(self, experts: Any, slots: ExpertSlots, *call: Any) -> Tensor:
        """Selections of weight 0 reach no slot."""
        hidden_TD, expert_TK, weight_TK = call
        nobody = (expert_TK == 0) & (weight_TK == 0)
        return super().run(experts, slots, hidden_TD, expert_TK.masked_fill(nobody, slots.num_experts), weight_TK)


class Identity(Family):
    """LongCat-Flash: ids from E on return their input."""

    partial = True

    def activation(self, experts: Any) -> Activation:
        """act(gate) * up."""
        return Gated(experts.act_fn)

    def run(self, experts: Any, slots: ExpertSlots, *call: Any) -> Tensor:
        """Routed experts from slots, and the input times the weight of the identity experts."""
        hidden_TD, expert_TK, weight_TK = call
        out_TD = super().run(experts, slots, *call)
        kept_T1 = weight_TK.masked_fill(expert_TK < slots.num_experts, 0).sum(1, keepdim=True)
        return out_TD + (hidden_TD * kept_T1).to(out_TD.dtype)


class Llama4(Family):
    """Called with E stretches of T rows, each scaled by the token's score for that expert, zero where not chosen."""

    def bind(self, layer: MoELayer, slots: ExpertSlots) -> None:
        """The scores are read from the router, as the experts are not given the choice."""
        block = layer.ancestors[-1]
        super().bind(layer, slots)
        slots.scores, slots.top_k = None, layer.top_k
        block.router.register_forward_hook(RememberScores(slots))

    def rebind(self, layer: MoELayer, slots: ExpertSlots) -> None:
        """The hook of the router gives its scores to the new slots."""
        super().rebind(layer, slots)
        slots.scores, slots.top_k = None, layer.top_k
        for hook in layer.ancestors[-1].router._forward_hooks.values():
            if isinstance(hook, RememberScores):
                hook.slots[0] = slots

    def activation(self, experts: Any) -> Activation:
        """The same product, the other way round."""
        return Gated(experts.act_fn)

    def run(self, experts: Any, slots: ExpertSlots, *call: Any) -> Tensor:
        """Only the chosen rows are computed; the others are zero, as an expert without biases makes of a zero row."""
        rows_D: Tensor = call[0]
        assert slots.scores is not None, "the router runs before its experts"
        experts_TK, weights_TK = nonzero_topk(slots.scores, slots.top_k)
        chosen = Selections.of(experts_TK, weights_TK, slots.num_experts)
        row_S = chosen.expert_S * chosen.tokens + chosen.token_S
        y_SD = slots.serve(rows_D[row_S], chosen, slots.activate)
        return torch.zeros_like(rows_D).index_copy_(0, row_S, y_SD.to(rows_D.dtype))


class RememberScores:
    """Hook of a Llama 4 router: keeps its scores [T, E] for the experts call that follows."""

    def __init__(self, slots: ExpertSlots) -> None:
        self.slots = [slots]

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep the first output."""
        self.slots[0].scores = output[0]


class Switch(Family):
    """Switch Transformers: a dictionary of experts, called with a one-hot mask [T, 1, E] that is zero over capacity."""

    partial = True

    def activation(self, experts: Any) -> Activation:
        """The activation of an expert; all have the same."""
        return experts["expert_0"].act  # type: ignore[no-any-return]

    def clear(self, experts: Any) -> None:
        """Drop all entries."""
        experts.clear()

    def run(self, experts: Any, slots: ExpertSlots, *call: Any) -> Tensor:
        """The mask as ids; a token over capacity has none."""
        hidden_TD, mask_T1E, weight_T1 = call
        served_T1, expert_T1 = mask_T1E.max(dim=-1)
        return super().run(experts, slots, hidden_TD, expert_T1.masked_fill(served_T1 == 0, slots.num_experts), weight_T1)


class Dbrx(Family):
    """DBRX: weights in `mlp` as w1, v1, w2."""

    def activation(self, experts: Any) -> Activation:
        """act(gate) * up."""
        return Gated(experts.mlp.activation_fn)

    def clear(self, experts: Any) -> None:
        """Drop the three parameters."""
        for name in ("w1", "v1", "w2"):
            experts.mlp._parameters.pop(name)

    def run(self, experts: Any, slots: ExpertSlots, *call: Any) -> Tensor:
        """As the common call, with sequences not flattened."""
        hidden, expert_TK, weight_TK = call
        flat = super().run(experts, slots, hidden.reshape(-1, hidden.shape[-1]), expert_TK, weight_TK)
        return flat.view(hidden.shape)


class JetMoe(Family):
    """JetMoE: the block is the experts module; its router returns selections sorted by expert."""

    def activation(self, experts: Any) -> Activation:
        """act(gate) * up."""
        return Gated(experts.activation)

    def clear(self, experts: Any) -> None:
        """Drop both stacks; the layer's bias stays."""
        for linear in (experts.input_linear, experts.output_linear):
            linear._parameters.pop("weight")

    def run(self, experts: Any, slots: ExpertSlots, *call: Any) -> Tensor:
        """Route, serve, and sum with the layer's bias."""
        hidden = call[0]
        x_TD = hidden.reshape(-1, hidden.shape[-1])
        _, token_S, weight_S, sizes, _ = experts.router(x_TD)
        ids = torch.arange(slots.num_experts, device=x_TD.device)
        chosen = Selections(len(x_TD), token_S, ids.repeat_interleave(torch.tensor(sizes, device=x_TD.device)), weight_S)
        y_SD = slots.serve(x_TD[token_S], chosen, slots.activate)
        out_TD = torch.zeros_like(x_TD).index_add(0, token_S, (y_SD * weight_S[:, None]).to(x_TD.dtype))
        return out_TD.view(hidden.shape) + experts.bias


FAMILIES: dict[str, Family] = {
    "fused": Family(),
    "fused-skip": Skip(),
    "fused-identity": Identity(),
    "llama4": Llama4(),
    "switch": Switch(),
    "dbrx": Dbrx(),
    "jetmoe": JetMoe(),
}
"""Families that can be balanced, by the layout that `models.adapters` names."""


def family_of(layer: MoELayer) -> Family:
    """The family of a layer.

    Raises:
        ModelError: its experts can be recorded but not run from slots; the message says why.
    """
    kind = type(layer.experts).__name__
    if layer.adapter.defect:
        raise ModelError(f"{kind} cannot be balanced: {layer.adapter.defect}.")
    if layer.layout not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ModelError(f"{kind} (layout '{layer.layout}') can be profiled but not balanced; supported: {known}.")
    return FAMILIES[layer.layout]


def experts_forward(module: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Experts implementation "equipoise": a balanced layer runs from its slots, any other as it always did."""
    call = (*args, *kwargs.values())
    slots = module._modules.get("slots")
    if slots is None:
        from transformers.integrations.moe import grouped_mm_experts_forward

        return grouped_mm_experts_forward(module, *call)  # type: ignore[no-any-return]
    return slots.family.run(module, slots, *call)  # type: ignore[no-any-return]
