"""Chain-of-Experts as an architecture of the lab: a token passes the same experts several times, each time by another router.

For testing the recorder and the planner on layers of several routing events. The model and its formula are in
`models.architectures.chain_of_experts`. Such a model is trained from scratch; an existing one cannot be made into it.
"""

from __future__ import annotations

from typing import Any

from equipoise.lab.extensions import ARCHITECTURES
from equipoise.models.architectures import learn


@ARCHITECTURES.register(
    "chain_of_experts",
    summary="Qwen3-MoE whose tokens pass a layer's experts several times, with a router for each step",
    source="CoE (arXiv:2506.18945) section 3",
)
def chain_of_experts(**config: Any) -> Any:
    """A freshly initialised model; the fields are Qwen3-MoE's and `steps`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    learn("chain_of_experts")
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("chain_of_experts", **config))
