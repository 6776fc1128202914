"""Families whose experts have a storage or a call of their own: Llama 4, Switch, NLLB-MoE, JetMoE, DBRX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.models.adapters.base import (
    Callback,
    ExpertsAdapter,
    Handle,
    Layer,
    affine,
    call_arguments,
    expert_of,
    nonzero_topk,
)
from equipoise.models.adapters.fused import Fused, _is_stacked


class Llama4(Fused):
    """Every expert is called with every token times its score, zero where not chosen; the router's scores say which."""

    layout = "llama4"
    gate_on_input = True

    def matches(self, experts: nn.Module, ancestors: Sequence[nn.Module]) -> bool:
        """Stacked weights and a call with hidden states alone."""
        return _is_stacked(experts, "gate_up_proj") and hasattr(experts, "expert_dim") and not hasattr(experts, "_apply_gate")

    def expert_matrices(self, experts: nn.Module, expert: int) -> list[Tensor]:
        """Stored (in, out)."""
        return [expert_of(experts.gate_up_proj, expert).T, expert_of(experts.down_proj, expert).T]

    def observe(self, layer: Layer, callback: Callback) -> Handle:
        """Hook the router, whose scores are sigmoid(logit) for the chosen experts and 0 for the others."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            callback(args[0].reshape(-1, args[0].shape[-1]), *nonzero_topk(output[0], layer.top_k))

        handle: Handle = layer.ancestors[-1].router.register_forward_hook(hook)
        return handle

    def _activate(self, experts: nn.Module, up_TF: Tensor) -> Tensor:
        gate, up = up_TF.chunk(2, dim=-1)
        return up * experts.act_fn(gate)


class _ModuleDict(ExpertsAdapter):
    """Experts as modules `expert_0`, `expert_1`, ... of two linear layers each."""

    linears: tuple[str, str]

    def matches(self, experts: nn.Module, ancestors: Sequence[nn.Module]) -> bool:
        """A dictionary of experts with this family's linear layers."""
        return isinstance(experts, nn.ModuleDict) and "expert_0" in experts and hasattr(experts["expert_0"], self.linears[0])

    def num_experts(self, experts: nn.Module) -> int:
        """Entries named expert_i; NLLB-MoE keeps a dropout among them."""
        return sum(name.startswith("expert_") for name, _ in experts.named_children())

    def expert_matrices(self, experts: nn.Module, expert: int) -> list[Tensor]:
        """Weights of the two linear layers."""
        return [layer.weight for layer in self._layers(experts, expert)]

    def expert_vectors(self, experts: nn.Module, expert: int) -> list[Tensor]:
        """Biases of the two linear layers, where they have one."""
        return [layer.bias for layer in self._layers(experts, expert) if layer.bias is not None]

    def hidden(self, experts: nn.Module, expert: int, x_TD: Tensor, ups: Sequence[Tensor]) -> Tensor:
        """act(first(x))."""
        first, _ = self._layers(experts, expert)
        hidden_TF: Tensor = experts[f"expert_{expert}"].act(affine(x_TD, ups[0], first.bias))
        return hidden_TF

    def run(self, experts: nn.Module, expert: int, x_TD: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        """second(act(first(x)))."""
        *ups, down = matrices
        _, second = self._layers(experts, expert)
        return affine(self.hidden(experts, expert, x_TD, ups), down, second.bias)

    def _layers(self, experts: nn.Module, expert: int) -> list[nn.Linear]:
        return [getattr(experts[f"expert_{expert}"], name) for name in self.linears]


class Switch(_ModuleDict):
    """Switch Transformers: top-1 as a one-hot mask [T, 1, E]; all zero for a token beyond its expert's capacity."""

    layout = "switch"
    partial = "token over an expert's capacity"
    linears = ("wi", "wo")

    def top_k(self, experts: nn.Module, ancestors: Sequence[nn.Module]) -> int:
        """One, by construction."""
        return 1

    def observe(self, layer: Layer, callback: Callback) -> Handle:
        """Hook the call of the experts module."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, mask_T1E, weights_T1 = call_arguments(module, args, kwargs, 3)
            served_T1, ids_T1 = mask_T1E.max(dim=-1)
            callback(hidden, ids_T1.masked_fill(served_T1 == 0, mask_T1E.shape[-1]), weights_T1)

        handle: Handle = layer.experts.register_forward_pre_hook(hook, with_kwargs=True)
        return handle


class NllbMoe(_ModuleDict):
    """NLLB-MoE: top-2 as combining weights [T, E]; zero where the token is over capacity or the second was not taken."""

    layout = "nllb_moe"
    partial = "token over an expert's capacity"
    linears = ("fc1", "fc2")
    defect = (
        "transformers' NllbMoeExperts.forward one-hots the 0/1 dispatch mask instead of an index, so that all tokens are "
        "computed by experts 0 and 1 whatever the router chose"
    )

    def top_k(self, experts: nn.Module, ancestors: Sequence[nn.Module]) -> int:
        """Two, by construction."""
        return 2

    def observe(self, layer: Layer, callback: Callback) -> Handle:
        """Hook the call of the experts module; the router's combining weights are its choice."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, _, weights_TE = call_arguments(module, args, kwargs, 3)
            callback(hidden, *nonzero_topk(weights_TE, 2))

        handle: Handle = layer.experts.register_forward_pre_hook(hook, with_kwargs=True)
        return handle


class JetMoe(ExpertsAdapter):
    """JetMoE: input_linear and output_linear hold [E, out, in]; the router returns its selections sorted by expert.

    The block itself stands for the experts module. JetMoE's routed attention projections (mixture of attention heads) are
    no feed-forward experts and are left alone.
    """

    layout = "jetmoe"

    def matches(self, experts: nn.Module, ancestors: Sequence[nn.Module]) -> bool:
        """A feed-forward block (it has an activation) with two stacked linear layers and a router."""
        has_parts = all(hasattr(experts, name) for name in ("input_linear", "output_linear", "router", "activation"))
        return has_parts and hasattr(experts.output_linear, "weight")

    def router_name(self, ancestors: Sequence[nn.Module]) -> str | None:
        """The router lies inside the experts module."""
        return None

    def top_k(self, experts: nn.Module, ancestors: Sequence[nn.Module]) -> int:
        """As the router says."""
        return int(experts.router.top_k)

    def num_experts(self, experts: nn.Module) -> int:
        """Length of the stack."""
        return int(experts.output_linear.weight.shape[0])

    def expert_matrices(self, experts: nn.Module, expert: int) -> list[Tensor]:
        """[gate and up] and down, as views."""
        return [experts.input_linear.weight[expert], experts.output_linear.weight[expert]]

    def hidden(self, experts: nn.Module, expert: int, x_TD: Tensor, ups: Sequence[Tensor]) -> Tensor:
        """act(gate) * up."""
        gate, up = affine(x_TD, ups[0]).chunk(2, dim=-1)
        return experts.activation(gate) * up

    def run(self, experts: nn.Module, expert: int, x_TD: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        """output(act(gate) * up); the layer's bias is outside the experts."""
        *ups, down = matrices
        return affine(self.hidden(experts, expert, x_TD, ups), down)

    def observe(self, layer: Layer, callback: Callback) -> Handle:
        """Hook the router and put its sorted selections back into the order of tokens."""
        n, k = layer.num_experts, layer.top_k

        def hook(module: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            order, _, sorted_weights, expert_sizes = output[:4]
            sizes = torch.as_tensor(expert_sizes, device=order.device)
            ids, weights = torch.empty_like(order), torch.empty_like(sorted_weights)
            ids[order] = torch.arange(n, device=order.device).repeat_interleave(sizes)
            weights[order] = sorted_weights
            callback(args[0], ids.view(-1, k), weights.view(-1, k))

        handle: Handle = layer.experts.router.register_forward_hook(hook)
        return handle


class Dbrx(Fused):
    """DBRX: w1 (gate), v1 (up) and w2 (down, stored (in, out)) as 2-D parameters [E * F, D]."""

    layout = "dbrx"

    def matches(self, experts: nn.Module, ancestors: Sequence[nn.Module]) -> bool:
        """A module whose `mlp` has w1, v1 and w2."""
        mlp = getattr(experts, "mlp", None)
        return hasattr(experts, "num_experts") and all(hasattr(mlp, name) for name in ("w1", "v1", "w2"))

    def num_experts(self, experts: nn.Module) -> int:
        """As the module says."""
        return int(experts.num_experts)

    def expert_matrices(self, experts: nn.Module, expert: int) -> list[Tensor]:
        """Gate, up and down, as views."""
        shape = (self.num_experts(experts), -1, experts.hidden_size)
        w1, v1, w2 = (getattr(experts.mlp, name).view(shape)[expert] for name in ("w1", "v1", "w2"))
        return [w1, v1, w2.T]

    def expert_vectors(self, experts: nn.Module, expert: int) -> list[Tensor]:
        """None."""
        return []

    def hidden(self, experts: nn.Module, expert: int, x_TD: Tensor, ups: Sequence[Tensor]) -> Tensor:
        """act(gate(x)) * up(x)."""
        gate, up = ups
        return experts.mlp.activation_fn(affine(x_TD, gate)) * affine(x_TD, up)

    def run(self, experts: nn.Module, expert: int, x_TD: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        """down(act(gate(x)) * up(x))."""
        *ups, down = matrices
        return affine(self.hidden(experts, expert, x_TD, ups), down)
