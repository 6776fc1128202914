"""What profiles and plans know about a model: enough to size it, and to refuse another model."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from equipoise.precisions import Precision


class LayerFacts(BaseModel):
    """One MoE layer, as far as planning needs to know it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(description="module path of the layer's experts")
    stack: str = Field(default="decoder", description="decoder or encoder")
    model_layer: int = Field(ge=0, description="index of the transformer layer within its stack")
    num_experts: int = Field(ge=1, description="routed experts")
    top_k: int = Field(ge=1, description="routed experts that a token is sent to")
    num_shared: int = Field(default=0, ge=0, description="shared experts, which are never copied or quantized here")
    matrices: tuple[tuple[int, int], ...] = Field(
        description="[rows, columns] of each weight matrix of one expert; empty when recorded loads are all that is known"
    )
    vector_elements: int = Field(default=0, ge=0, description="elements of one expert's biases and norms")

    def expert_bytes(self, precision: Precision) -> int:
        """Bytes of one expert of this layer in a storage format, scales counted."""
        return precision.expert_bytes(self.matrices, self.vector_elements)


class ModelFacts(BaseModel):
    """A model's identity and its MoE layers, in the order in which a token meets them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="hub name or directory as the user gave it; not compared")
    model_type: str
    dtype: str = Field(description="storage format of the experts as loaded: fp32, fp16 or bf16")
    fingerprint: str = Field(description="hash of the configuration and of a sample of all weights")
    layers: tuple[LayerFacts, ...] = Field(min_length=1)
    hidden_layers: int = Field(
        default=0, ge=0, description="transformer layers of the decoder, dense ones counted; 0 = unknown"
    )
    expert_groups: int = Field(default=1, ge=1, description="groups that group-limited routing divides the experts into")

    @property
    def sized(self) -> bool:
        """Whether the shapes of the experts are known, so that bytes can be counted."""
        return all(layer.matrices for layer in self.layers)

    @property
    def max_experts(self) -> int:
        """Routed experts of the widest layer: the size of the expert axis of every array."""
        return max(layer.num_experts for layer in self.layers)
