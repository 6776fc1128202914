"""Training-time systems of other authors, as recipes for small models. They change how a model is trained: never plug-and-play.

Importing this package registers them: `[extensions.NAME]` of a recipe file, or an architecture by `model_type`.

    aux-loss        the balance loss of Switch and GShard
    loss-free       a selection bias that follows the load
    simbal          routers with orthonormal rows
    dynamic-moe     the losses of top-p routing, and its architecture
    chain_of_experts    an architecture: several passes through the same experts

`same` is no extension but a way to fine-tune: `same.fine_tune` over a sequence of domains, with a `same.Keeper`.
"""

from __future__ import annotations

from equipoise.lab.recipes import aux_loss, chain_of_experts, dynamic_moe, loss_free, simbal

__all__ = ["aux_loss", "chain_of_experts", "dynamic_moe", "loss_free", "simbal"]
