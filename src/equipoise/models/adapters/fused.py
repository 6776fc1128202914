"""Experts as stacked 3-D parameters, called with (hidden_TD, experts_TK, weights_TK): nearly all of transformers 5.

Weights are gate_up_proj [E, 2F, D] (or up_proj [E, F, D]) and down_proj [E, D, F]; `is_transposed` swaps the last two
axes. Flags on the module say which (`transformers.integrations.moe.use_experts_implementation`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from equipoise.models.adapters.base import Callback, ExpertsAdapter, Handle, Layer, affine, call_arguments, expert_of


class Fused(ExpertsAdapter):
    """Stacked parameters with the common call; observed by a hook on the experts module.

    A hook rather than an experts implementation of our own: it sees the logical choices whatever implementation computes
    them, and under transformers' expert parallelism it sees them before they become rank-local ids.
    """

    layout = "fused"

    def matches(self, experts: nn.Module, ancestors: Sequence[nn.Module]) -> bool:
        """Stacked 3-D weights and a `has_gate` flag or a gate function of the decorated classes."""
        return _is_stacked(experts, self._up_name(experts)) and hasattr(experts, "_apply_gate")

    def num_experts(self, experts: nn.Module) -> int:
        """Length of the stack; global also where expert parallelism has made `num_experts` local."""
        return int(experts.down_proj.shape[0])

    def expert_matrices(self, experts: nn.Module, expert: int) -> list[Tensor]:
        """[gate and up] (or up) and down, each (out, in), as views."""
        stacks = (getattr(experts, self._up_name(experts)), experts.down_proj)
        transposed = getattr(experts, "is_transposed", False)
        return [expert_of(stack, expert).T if transposed else expert_of(stack, expert) for stack in stacks]

    def expert_vectors(self, experts: nn.Module, expert: int) -> list[Tensor]:
        """Biases of up and down where the family has them."""
        biases = (getattr(experts, f"{name}_bias", None) for name in (self._up_name(experts), "down_proj"))
        return [expert_of(bias, expert) for bias in biases if bias is not None]

    def hidden(self, experts: nn.Module, expert: int, x_TD: Tensor, ups: Sequence[Tensor]) -> Tensor:
        """gate(up(x)), with the module's own gate and biases."""
        bias, *_ = self.expert_vectors(experts, expert) or (None,)
        return self._activate(experts, affine(x_TD, ups[0], bias))

    def run(self, experts: nn.Module, expert: int, x_TD: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        """down(gate(up(x))), with the module's own gate, biases and post-expert norm."""
        *ups, down = matrices
        *_, bias = self.expert_vectors(experts, expert) or (None,)
        y_TD = affine(self.hidden(experts, expert, x_TD, ups), down, bias)
        return experts.post_expert_norm(y_TD) if getattr(experts, "has_post_expert_norm", False) else y_TD

    def observe(self, layer: Layer, callback: Callback) -> Handle:
        """Hook the call of the experts module."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, ids, weights = call_arguments(module, args, kwargs, 3)
            k = ids.shape[-1]
            callback(*self._seen(layer, hidden.reshape(-1, hidden.shape[-1]), ids.reshape(-1, k), weights.reshape(-1, k)))

        handle: Handle = layer.experts.register_forward_pre_hook(hook, with_kwargs=True)
        return handle

    def _seen(self, layer: Layer, hidden: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the callback gets; families whose ids need reading differently override this."""
        return hidden, ids, weights

    @staticmethod
    def _up_name(experts: nn.Module) -> str:
        return "gate_up_proj" if "gate_up_proj" in experts._parameters else "up_proj"

    def _activate(self, experts: nn.Module, up_TF: Tensor) -> Tensor:
        if getattr(experts, "has_gate", True):
            return experts._apply_gate(up_TF)
        return experts.act_fn(up_TF)


class SkipClass(Fused):
    """No expert is written as expert 0 with weight 0.

    Zaya's routers have a class beyond the experts that means "skip"; those of Dynamic MoE choose fewer experts for some tokens.
    """

    layout = "fused-skip"
    partial = "the router chose fewer experts"

    def matches(self, experts: nn.Module, ancestors: Sequence[nn.Module]) -> bool:
        """A fused family whose router has one class more than there are experts, or chooses by mass."""
        router = getattr(ancestors[-1], self.router_name(ancestors) or "", None)
        marked = hasattr(router, "num_router_classes") or hasattr(router, "router_top_p")
        return super().matches(experts, ancestors) and marked

    def _seen(self, layer: Layer, hidden: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return hidden, ids.masked_fill((ids == 0) & (weights == 0), layer.num_experts), weights


class IdentityExperts(Fused):
    """LongCat-Flash: ids from E on are zero-compute experts that return their input."""

    layout = "fused-identity"
    partial = "zero-compute (identity) expert"

    def matches(self, experts: nn.Module, ancestors: Sequence[nn.Module]) -> bool:
        """Stacked weights beside an identity expert."""
        return _is_stacked(experts, "gate_up_proj") and hasattr(experts, "identity_expert")

    def _activate(self, experts: nn.Module, up_TF: Tensor) -> Tensor:
        gate, up = up_TF.chunk(2, dim=-1)
        return experts.act_fn(gate) * up


class ModalityExperts(Fused):
    """ERNIE 4.5 VL: text and vision tokens have experts of their own, which are called with their tokens alone.

    The callback gets all tokens of the forward; those of the other modality carry the absent id E.
    """

    layout = "fused-modality"
    partial = "token of the other modality"

    def matches(self, experts: nn.Module, ancestors: Sequence[nn.Module]) -> bool:
        """A fused family inside a block that holds one MoE per modality."""
        return super().matches(experts, ancestors) and len(ancestors) > 1 and hasattr(ancestors[-2], "vision_moe")

    def lane(self, path: str) -> int:
        """All text layers come before all vision layers, so that consecutive rows serve the same tokens."""
        return int(".vision_moe." in path)

    def observe(self, layer: Layer, callback: Callback) -> Handle:
        """Hook the block for the modality of each token and the experts for their choices."""
        block = layer.ancestors[-2]
        is_vision = layer.ancestors[-1] is block.vision_moe
        mine_T: Tensor | None = None

        def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal mine_T
            hidden, *rest = (*args, *kwargs.values())
            kinds = kwargs.get("moe_mm_token_type_ids", rest[0] if rest else None)
            vision_T = hidden.new_zeros(hidden.shape[:2]).bool() if kinds is None else kinds.bool()
            mine_T = (vision_T if is_vision else ~vision_T).reshape(-1)

        def spread(hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
            assert mine_T is not None, "the modality block is called before its experts"
            hidden_TD = hidden.new_zeros(len(mine_T), hidden.shape[-1]).masked_scatter(mine_T[:, None], hidden)
            ids_TK = ids.new_full((len(mine_T), ids.shape[-1]), layer.num_experts).masked_scatter(mine_T[:, None], ids)
            weights_TK = weights.new_zeros(len(mine_T), ids.shape[-1]).masked_scatter(mine_T[:, None], weights)
            callback(hidden_TD, ids_TK, weights_TK)

        return _Handles(block.register_forward_pre_hook(remember, with_kwargs=True), super().observe(layer, spread))


class _Handles:
    """Several hooks that are removed together."""

    def __init__(self, *handles: Handle) -> None:
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _is_stacked(experts: nn.Module, up_name: str) -> bool:
    parameters = experts._parameters
    return all(parameters.get(name) is not None and parameters[name].dim() == 3 for name in (up_name, "down_proj"))
