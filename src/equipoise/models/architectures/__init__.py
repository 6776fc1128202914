"""Architectures of our own, for study: what the lab's recipes need that transformers does not have.

A model of one is an ordinary transformers model; the Auto classes know it once `learn` was called with its `model_type`.
"""

from __future__ import annotations

from importlib import import_module

OWN = {"chain_of_experts": "chain_of_experts", "dynamic_moe": "dynamic_moe"}
"""model_type -> module of this package; each registers itself with transformers when it is imported."""


def learn(model_type: str) -> None:
    """Make transformers' Auto classes know an architecture of ours; any other name is left to transformers.

    Args:
        model_type: as in a model's config.json.
    """
    if model_type in OWN:
        import_module(f"{__name__}.{OWN[model_type]}")
