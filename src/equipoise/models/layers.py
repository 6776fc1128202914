"""The MoE layers of any transformers model as one view: where they are, how wide, and how to reach one expert."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from equipoise.artifacts import LayerFacts, ModelFacts
from equipoise.errors import ModelError
from equipoise.models.adapters import (
    ADAPTERS,
    ExpertsAdapter,
    expert_hidden,
    expert_matrices,
    expert_vectors,
    gated_expert,
    observe,
    run_expert,
    storage_name,
)
from equipoise.models.adapters.base import forward_names
from equipoise.models.fingerprint import check_weights, fingerprint
from equipoise.models.policy_marks import MARK, RoutingMark

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "MoELayer",
    "check_weights",
    "expert_hidden",
    "expert_matrices",
    "expert_vectors",
    "find_moe_layers",
    "fingerprint",
    "gated_expert",
    "is_stack",
    "model_facts",
    "observe",
    "run_expert",
]

TOKEN_ARGUMENTS = ("input_ids", "inputs_embeds", "decoder_input_ids")
"""Names under which transformers' models take tokens."""

MASK_ARGUMENTS = ("attention_mask", "decoder_attention_mask")
"""Names under which they take the mask over their tokens."""

ORIGIN = "_equipoise_origin"
"""Attribute of a listed experts module: what it was, so that it is still known when its weights have become slots."""

UNSUPPORTED = {
    "DogeCDMoE": "its experts are rows of an embedding, retrieved by product keys; there are no weight matrices to copy",
    "VitPoseBackboneMoeMLP": "its experts are chosen by the data set, not by a router",
}
"""Modules of transformers that are called experts but have nothing to balance, and why."""


@dataclass(frozen=True, eq=False)
class MoELayer:
    """One MoE layer of a model.

    Attributes:
        index: row of this layer in every array: the order in which a token meets the layers, encoder before decoder.
        stack: "decoder" or "encoder"; the stack's module path where a model has several of a kind.
        stack_path: module path of the transformer stack that holds the layer.
        model_layer: index of the transformer layer within its stack.
        path: module path of the experts module.
        num_experts: routed experts E.
        top_k: routed experts that a token is sent to, by all routing events together.
        num_shared: shared experts, which every token visits.
        matrices: (out, in) of each weight matrix of one expert.
        vector_elements: elements of one expert's biases.
        dtype: storage of the experts: fp32, bf16 or fp16.
        experts: the experts module.
        router_path: module path of the router, where it is a module of the layer's block.
        adapter: how this family is read.
        ancestors: modules that contain the experts module, outermost first.
        balanced: its weights have become the slots of a plan; `matrices` and `dtype` tell what they were.
        events: how often one forward pass calls the experts, each time with an equal part of `top_k`; 1 for all but chains
            of experts.
    """

    index: int
    stack: str
    stack_path: str
    model_layer: int
    path: str
    num_experts: int
    top_k: int
    num_shared: int
    matrices: tuple[tuple[int, int], ...]
    vector_elements: int
    dtype: str
    experts: nn.Module = field(repr=False)
    router_path: str | None
    adapter: ExpertsAdapter = field(repr=False)
    ancestors: tuple[nn.Module, ...] = field(repr=False)
    balanced: bool = False
    events: int = 1

    @property
    def layout(self) -> str:
        """Name of the family of experts modules it belongs to."""
        return self.adapter.layout

    @property
    def sent(self) -> RoutingMark:
        """What a routing policy sends to its experts; top-k of them, all real, under the model's own."""
        mark: RoutingMark = getattr(self.experts, MARK, None) or RoutingMark(self.top_k, False)
        return mark

    @property
    def facts(self) -> LayerFacts:
        """What profiles and plans keep of this layer."""
        return LayerFacts(
            path=self.path,
            stack=self.stack,
            model_layer=self.model_layer,
            num_experts=self.num_experts,
            top_k=self.top_k,
            num_shared=self.num_shared,
            matrices=self.matrices,
            vector_elements=self.vector_elements,
        )


def find_moe_layers(model: PreTrainedModel) -> tuple[MoELayer, ...]:
    """List the MoE layers of a model.

    Args:
        model: any transformers model: decoder-only, encoder-decoder, multimodal, hybrid.

    Returns:
        the layers in the order in which a token meets them; encoder before decoder.

    Raises:
        ModelError: the model is dense, or its experts are of a kind that cannot be read.
    """
    found = []
    for path, module in model.named_modules():
        ancestors = _ancestors(model, path)
        adapter = _adapter(module, ancestors) if ancestors else None
        if adapter is not None and (stack := _stack_path(path, ancestors)) is not None:
            found.append((path, ancestors, adapter, stack))
    if not found:
        raise ModelError(_no_layers(model))
    labels = _stack_labels([stack for *_, stack in found])
    met = list(labels)
    found.sort(key=lambda layer: (met.index(layer[3]), layer[2].lane(layer[0])))
    # The sort is stable: within a stack and lane, layers keep the order in which the model registered them.
    return tuple(_layer(model, index, *layer, labels[layer[3]]) for index, layer in enumerate(found))


def name_of(model: PreTrainedModel) -> str:
    """What a model was loaded from, a directory or a hub name; its class where it was not loaded."""
    return str(getattr(model, "name_or_path", "") or type(model).__name__)


def model_facts(model: PreTrainedModel, name: str, layers: tuple[MoELayer, ...] | None = None) -> ModelFacts:
    """What profiles and plans know of a model.

    Args:
        model: the model, loaded.
        name: what the user called it: a hub name or a directory.
        layers: its MoE layers, when they have been listed already.

    Returns:
        the facts; equal fingerprints for the same weights in float32 or bfloat16, on any device, before and after saving.

    Raises:
        ModelError: no MoE layers, or weights without data (meta device).
    """
    layers = find_moe_layers(model) if layers is None else layers
    text = model.config.get_text_config(decoder=True)
    return ModelFacts(
        name=name,
        model_type=str(model.config.model_type),
        dtype=layers[0].dtype,
        fingerprint=fingerprint(model),
        layers=tuple(layer.facts for layer in layers),
        hidden_layers=getattr(text, "num_hidden_layers", None) or 0,
        expert_groups=getattr(text, "n_group", None) or 1,
    )


def _adapter(module: nn.Module, ancestors: Sequence[nn.Module]) -> ExpertsAdapter | None:
    """The family of an experts module, also of one that is balanced; None for any other module."""
    origin: _Origin | None = getattr(module, ORIGIN, None)
    match = next((adapter for adapter in ADAPTERS if adapter.matches(module, ancestors)), None)
    return match if match is not None or origin is None else origin.adapter


def _layer(
    model: nn.Module,
    index: int,
    path: str,
    ancestors: tuple[nn.Module, ...],
    adapter: ExpertsAdapter,
    stack_path: str,
    stack: str,
) -> MoELayer:
    experts = model.get_submodule(path)
    balanced = not adapter.matches(experts, ancestors)
    if not balanced:
        setattr(experts, ORIGIN, _Origin.of(adapter, experts, ancestors))
    router = adapter.router_name(ancestors)
    inside = path[len(stack_path) + 1 :] if stack_path else path
    return MoELayer(
        index=index,
        stack=stack,
        stack_path=stack_path,
        model_layer=next((int(part) for part in inside.split(".") if part.isdigit()), 0),
        path=path,
        experts=experts,
        router_path=f"{path.rpartition('.')[0]}.{router}" if router else None,
        ancestors=ancestors,
        balanced=balanced,
        **vars(getattr(experts, ORIGIN)),
    )


@dataclass(frozen=True)
class _Origin:
    """What only the weights of an experts module tell."""

    adapter: ExpertsAdapter
    num_experts: int
    top_k: int
    num_shared: int
    matrices: tuple[tuple[int, int], ...]
    vector_elements: int
    dtype: str
    events: int

    @classmethod
    def of(cls, adapter: ExpertsAdapter, experts: nn.Module, ancestors: Sequence[nn.Module]) -> _Origin:
        matrices = adapter.expert_matrices(experts, 0)
        events = int(getattr(ancestors[-1], "routing_events", 1))
        return cls(
            adapter=adapter,
            num_experts=adapter.num_experts(experts),
            top_k=adapter.top_k(experts, ancestors) * events,
            num_shared=adapter.num_shared(experts, ancestors),
            matrices=tuple((int(m.shape[0]), int(m.shape[1])) for m in matrices),
            vector_elements=sum(v.numel() for v in adapter.expert_vectors(experts, 0)),
            dtype=storage_name(matrices),
            events=events,
        )


def _ancestors(model: nn.Module, path: str) -> tuple[nn.Module, ...]:
    parts = path.split(".") if path else []
    return tuple(model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts)))


def is_stack(module: nn.Module) -> bool:
    """Whether a module takes a batch of token sequences and a mask over them."""
    names = {*forward_names(module)}
    return bool(names & {*TOKEN_ARGUMENTS}) and bool(names & {*MASK_ARGUMENTS})


def _stack_path(path: str, ancestors: Sequence[nn.Module]) -> str | None:
    """Path of the innermost model around `path`; None when it takes no tokens (an image tower has experts of its own)."""
    from transformers import PreTrainedModel

    parts = path.split(".")
    for depth in range(len(ancestors) - 1, -1, -1):
        if is_stack(ancestors[depth]):
            return ".".join(parts[:depth])
        if isinstance(ancestors[depth], PreTrainedModel):
            return None
    raise ModelError(f"'{path}' lies in no module that takes token sequences; give the whole model, not a part of it.")


def _stack_labels(stack_paths: Sequence[str]) -> dict[str, str]:
    """Name of each stack by its path, encoders first: its kind, or its path where the model has several of a kind."""
    kinds = {path: "encoder" if "encoder" in path.split(".") else "decoder" for path in stack_paths}
    often = Counter(kinds.values())
    in_order = sorted(kinds, key=lambda path: kinds[path] != "encoder")
    return {path: kinds[path] if often[kinds[path]] == 1 else path for path in in_order}


def _no_layers(model: PreTrainedModel) -> str:
    name = type(model).__name__
    kinds = {type(module).__name__ for module in model.modules()}
    for kind, reason in UNSUPPORTED.items():
        if kind in kinds:
            return f"the experts of {name} ({kind}) cannot be balanced: {reason}."
    return f"{name} is a dense model: it has no MoE layers, so there is nothing to balance. Give a Mixture-of-Experts model."
