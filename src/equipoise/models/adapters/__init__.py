"""One small adapter per family of experts modules; `layers.find_moe_layers` picks the first that matches.

A family that shares the common call and storage needs none of its own: `Fused` reads the flags of
`transformers.integrations.moe.use_experts_implementation`.
"""

from equipoise.models.adapters.access import expert_hidden, expert_matrices, expert_vectors, gated_expert, observe, run_expert
from equipoise.models.adapters.base import Callback, ExpertsAdapter, Handle, storage_name
from equipoise.models.adapters.fused import Fused, IdentityExperts, ModalityExperts, SkipClass
from equipoise.models.adapters.undecorated import Dbrx, JetMoe, Llama4, NllbMoe, Switch

ADAPTERS: tuple[ExpertsAdapter, ...] = (
    SkipClass(),
    ModalityExperts(),
    IdentityExperts(),
    Llama4(),
    Fused(),
    Switch(),
    NllbMoe(),
    JetMoe(),
    Dbrx(),
)
"""All families, the more particular before the general."""

__all__ = [
    "ADAPTERS",
    "Callback",
    "ExpertsAdapter",
    "Handle",
    "expert_hidden",
    "expert_matrices",
    "expert_vectors",
    "gated_expert",
    "observe",
    "run_expert",
    "storage_name",
]
