"""Top-p routing as an architecture: a token visits as many experts as it takes to reach a share p of its routing mass.

Dynamic MoE (arXiv:2403.07652), section 3.1: with P = softmax(W_r x) in descending order, t = min k such that
P_1 + ... + P_k >= p, and y is the sum of P_i E_i(x) over those t experts, with the raw probabilities. Everything else is
Qwen3-MoE's.

Shapes: T tokens, E experts, K the most experts that a token may visit, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM, Qwen3MoeTopKRouter

from equipoise.errors import ModelError


class DynamicMoeConfig(Qwen3MoeConfig):  # type: ignore[misc]
    """Qwen3-MoE's, and the mass to reach; `num_experts_per_tok` is the most experts that a token may visit.

    Attributes:
        router_top_p: p, in (0, 1].
    """

    model_type = "dynamic_moe"
    router_top_p: float = 0.4

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the mass."""
        if not 0 < self.router_top_p <= 1:
            raise ModelError(f"router_top_p is {self.router_top_p}; it is a share of the routing mass, above 0 and at most 1.")
        super().__post_init__(**kwargs)


def experts_needed(probs_TE: Tensor, p: float, most: int) -> Tensor:
    """[T] t = min k such that the k largest probabilities reach p (arXiv:2403.07652, equation 3), at most `most`.

    Args:
        probs_TE: [T, E] routing probabilities.
        p: mass to reach.
        most: K.
    """
    reached_TE = probs_TE.sort(dim=-1, descending=True).values.cumsum(-1)
    return ((reached_TE < p).sum(-1) + 1).clamp(max=most)


def first_experts(probs_TE: Tensor, count_T: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """A token's `count` most probable experts.

    Args:
        probs_TE: [T, E] routing probabilities.
        count_T: [T] how many each token visits.
        most: K, the columns of the answer.

    Returns:
        experts_TK and weights_TK, the raw probabilities. Columns beyond a token's count hold expert 0 with weight 0, which
        every implementation of experts computes to nothing.
    """
    weights_TK, experts_TK = probs_TE.topk(most, dim=-1)
    absent_TK = torch.arange(experts_TK.shape[1], device=probs_TE.device) >= count_T[:, None]
    return experts_TK.masked_fill(absent_TK, 0), weights_TK.masked_fill(absent_TK, 0)


class TopPRouter(Qwen3MoeTopKRouter):  # type: ignore[misc]
    """Chooses by mass; a token's number of experts differs.

    Attributes:
        router_top_p: p.
        shuffle: a generator that deals the tokens' numbers of experts out among the tokens of a call at random: a control
            that keeps their histogram and loses what they depend on; None for the model's own.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.router_top_p = config.router_top_p
        self.shuffle: torch.Generator | None = None

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """router_logits_TE, weights_TK and experts_TK, as stock routers give them."""
        hidden_TD = hidden_states.reshape(-1, self.hidden_dim)
        logits_TE = torch.nn.functional.linear(hidden_TD, self.weight)
        probs_TE = torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
        count_T = experts_needed(probs_TE.detach(), self.router_top_p, self.top_k)
        if self.shuffle is not None:
            count_T = count_T[torch.randperm(len(count_T), generator=self.shuffle).to(count_T.device)]
        experts_TK, weights_TK = first_experts(probs_TE, count_T, self.top_k)
        return logits_TE, weights_TK.to(logits_TE.dtype), experts_TK


class DynamicMoeForCausalLM(Qwen3MoeForCausalLM):  # type: ignore[misc]
    """Qwen3-MoE with top-p routers."""

    config_class = DynamicMoeConfig
    _can_set_experts_implementation_cached_value = True  # transformers looks for the decorator in this file's text alone

    def __init__(self, config: DynamicMoeConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            if hasattr(layer.mlp, "gate"):
                router = TopPRouter(config)
                router.weight = layer.mlp.gate.weight  # drawn already, as a Qwen3-MoE's would be
                layer.mlp.gate = router


AutoConfig.register(DynamicMoeConfig.model_type, DynamicMoeConfig)
AutoModelForCausalLM.register(DynamicMoeConfig, DynamicMoeForCausalLM)
