"""Chain-of-Experts: a layer's tokens pass its experts C times, each time by a router of its own.

CoE (arXiv:2506.18945), section 3: x_0 = x; x_t = x_{t-1} + sum_i g_{t,i} E_i(x_{t-1}) for t = 1..C; y = x_C. Each step chooses
top-(K/C) of the same experts, with weights g from a softmax over all of them, not renormalised.

Where the paper leaves the norm open we keep the stream whole: every step adds to the residual stream what its experts make of
the normed stream, with the layer's one norm, so that C = 1 is a plain pre-norm MoE layer (Qwen3-MoE without renormalised
weights), to the last bit, and C steps have C - 1 router matrices more and nothing else. The code published with the paper adds
the steps to the *normed* stream instead, which drops the stream of all layers before; that is not done here.

Shapes: C steps, E experts, K experts of a token in all steps together, D model width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeDecoderLayer,
    Qwen3MoeExperts,
    Qwen3MoeForCausalLM,
    Qwen3MoeModel,
    Qwen3MoeTopKRouter,
)

from equipoise.errors import ModelError


class ChainOfExpertsConfig(Qwen3MoeConfig):  # type: ignore[misc]
    """Qwen3-MoE's, and the steps.

    Attributes:
        steps: C, how often a token passes the experts of a layer; `num_experts_per_tok` is K / C, the experts of one step.
    """

    model_type = "chain_of_experts"
    steps: int = 2

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the steps."""
        if self.steps < 1:
            raise ModelError(f"steps is {self.steps}; a token passes the experts of a layer at least once.")
        super().__post_init__(**kwargs)


class ChainBlock(nn.Module):  # type: ignore[misc]
    """The experts of a layer and the router of each step.

    Attributes:
        routing_events: C, as the recorder reads it: how often one forward pass calls the experts.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.routing_events = config.steps
        self.experts = Qwen3MoeExperts(config)
        self.gate = nn.ModuleList(Qwen3MoeTopKRouter(config) for _ in range(config.steps))

    def forward(self, hidden_states: Tensor, step: int) -> Tensor:
        """What the experts of one step add to the stream, from the normed stream."""
        rows_TD = hidden_states.view(-1, hidden_states.shape[-1])
        _, weights_TK, experts_TK = self.gate[step](rows_TD)
        out: Tensor = self.experts(rows_TD, experts_TK, weights_TK)
        return out.view_as(hidden_states)


class ChainLayer(Qwen3MoeDecoderLayer):  # type: ignore[misc]
    """Attention, then C steps through the experts."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.mlp = ChainBlock(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """The stream behind the layer."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        for step in range(len(self.mlp.gate)):
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), step)
        return hidden_states


class ChainOfExpertsModel(Qwen3MoeModel):  # type: ignore[misc]
    """Qwen3-MoE's stack of such layers."""

    config_class = ChainOfExpertsConfig
    _can_set_experts_implementation_cached_value = True

    def __init__(self, config: ChainOfExpertsConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(ChainLayer(config, index) for index in range(config.num_hidden_layers))
        self.post_init()


class ChainOfExpertsForCausalLM(Qwen3MoeForCausalLM):  # type: ignore[misc]
    """The language model."""

    config_class = ChainOfExpertsConfig
    _can_set_experts_implementation_cached_value = True  # transformers looks for the decorator in this file's text alone

    def __init__(self, config: ChainOfExpertsConfig) -> None:
        super().__init__(config)
        self.model = ChainOfExpertsModel(config)
        self.post_init()


AutoConfig.register(ChainOfExpertsConfig.model_type, ChainOfExpertsConfig)
AutoModelForCausalLM.register(ChainOfExpertsConfig, ChainOfExpertsForCausalLM)
