"""Dynamic MoE: how many experts a token visits is learned, by top-p routing under a balance and an entropy loss.

For making models whose number of experts differs from token to token, which the recorder and the planner must bear. The
architecture is `models.architectures.dynamic_moe`; its losses (arXiv:2403.07652, section 3) are

    alpha * E * sum_i f_i Q_i  +  beta * mean over tokens of -sum_i P_i log P_i

with f_i the share of *tokens* that visit expert i and Q_i its mean probability; alpha = 1e-2, beta = 1e-4. Without the entropy
term, a router may flatten and so visit many experts. The terms of all layers are added up. No training code was published.

Shapes: T tokens, E experts, K the most experts that a token may visit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from equipoise.lab.extensions import ARCHITECTURES, EXTENSIONS, Extension, Step
from equipoise.lab.recipes.aux_loss import balance_loss
from equipoise.lab.recipes.routers import RouterTap, selections
from equipoise.models.architectures import learn


def visit_balance(probs_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """E * sum_i f_i Q_i, f_i the share of tokens that visit expert i: the mean number of visits at balance.

    Args:
        probs_TE: [T, E] routing probabilities.
        experts_TK: [T, K] experts visited; E for none.
    """
    visits = selections(experts_TK, probs_TE.shape[1]).sum() / len(experts_TK)
    return visits * balance_loss(probs_TE, experts_TK)


def entropy(probs_TE: Tensor) -> Tensor:
    """Mean over tokens of the routing entropy -sum_i P_i log P_i, in nats."""
    return -torch.xlogy(probs_TE, probs_TE).sum(-1).mean()


@EXTENSIONS.register(
    "dynamic-moe",
    summary="losses of top-p routing: level load, and a router that makes up its mind",
    source="Dynamic MoE (arXiv:2403.07652) section 3",
)
class DynamicMoe(Extension):
    """Adds the balance and the entropy loss of every layer.

    Args:
        alpha: of the balance loss.
        beta: of the entropy loss; 0 is the ablation.
    """

    def __init__(self, alpha: float = 1e-2, beta: float = 1e-4) -> None:
        self.alpha, self.beta = alpha, beta

    def attach(self, model: Any) -> None:
        """Listen to the routers."""
        self._tap = RouterTap(model)

    def loss(self, step: Step) -> Tensor | None:
        """The terms of this step."""
        terms = []
        for event in self._tap.take():
            probs_TE = event.probabilities("softmax")
            terms.append(self.alpha * visit_balance(probs_TE, event.experts_TK) + self.beta * entropy(probs_TE))
        return torch.stack(terms).sum()


@contextmanager
def shuffled_visits(model: Any, seed: int) -> Iterator[None]:
    """The control for adaptivity: inside, the tokens' numbers of experts are dealt out among the tokens of each call at random.

    Args:
        model: of the architecture `dynamic_moe`.
        seed: of the dealing.
    """
    from equipoise.models.architectures.dynamic_moe import TopPRouter

    found = [module for module in model.modules() if isinstance(module, TopPRouter)]
    assert found, "the model has top-p routers"
    for number, router in enumerate(found):
        router.shuffle = torch.Generator().manual_seed(seed * 1000 + number)
    try:
        yield
    finally:
        for router in found:
            router.shuffle = None


@ARCHITECTURES.register(
    "dynamic_moe",
    summary="Qwen3-MoE with top-p routers: a token visits as many experts as reach a share of its routing mass",
    source="Dynamic MoE (arXiv:2403.07652) section 3.1",
)
def dynamic_moe(**config: Any) -> Any:
    """A freshly initialised model; the fields are Qwen3-MoE's and `router_top_p`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    learn("dynamic_moe")
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("dynamic_moe", **config))
