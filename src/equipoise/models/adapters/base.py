"""What every family of experts modules must tell: how many experts, their weights, their function, and what was sent to them.

Shapes: T tokens of one call, E routed experts, K top-k, D model width, F expert width.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from equipoise.errors import ModelError

Callback = Callable[[Tensor, Tensor, Tensor], None]
"""Called as callback(hidden_TD, experts_TK, weights_TK); ids outside 0..E-1 mark selections that reach no routed expert."""


class Handle(Protocol):
    """What a hook returns: call `remove` to take it out."""

    def remove(self) -> None:
        """Take the hook out."""
        ...


class Layer(Protocol):
    """What adapters know of a layer; `layers.MoELayer` is one."""

    @property
    def path(self) -> str:
        """Module path of the experts module."""

    @property
    def experts(self) -> nn.Module:
        """The experts module."""

    @property
    def ancestors(self) -> tuple[nn.Module, ...]:
        """Modules that contain it, outermost first."""

    @property
    def num_experts(self) -> int:
        """Routed experts E."""

    @property
    def top_k(self) -> int:
        """Routed experts of a token."""

    @property
    def balanced(self) -> bool:
        """Its weights have become slots."""

    @property
    def adapter(self) -> ExpertsAdapter:
        """How its family is read."""


TOP_K_NAMES = (
    "top_k",
    "num_experts_per_tok",
    "moe_top_k",
    "top_k_experts",
    "moe_topk",
    "num_experts_per_token",
    "moe_k",
)
SHARED_COUNT_NAMES = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")
SHARED_MODULE_NAMES = ("shared_expert", "shared_experts", "shared_mlp", "shared_experts_mlp")
ROUTER_NAMES = ("router", "gate")


class ExpertsAdapter(ABC):
    """One family of experts modules; stateless, so one instance serves all models.

    The module called *experts* is the one whose path names the layer; `ancestors` are the modules that contain it,
    outermost first, so `ancestors[-1]` is its block.

    Attributes:
        layout: name of the family.
        partial: why a real token's selection may legitimately reach no routed expert; empty when it never may.
        gate_on_input: the gate weight scales the expert's input (Llama 4), not its output.
        defect: what the installed transformers computes wrongly in this family; empty when it is sound.
    """

    layout: str
    partial: str = ""
    gate_on_input: bool = False
    defect: str = ""

    @abstractmethod
    def matches(self, experts: nn.Module, ancestors: Sequence[nn.Module]) -> bool:
        """Whether a module is an experts module of this family."""

    @abstractmethod
    def num_experts(self, experts: nn.Module) -> int:
        """Routed experts of the layer, over all ranks."""

    @abstractmethod
    def expert_matrices(self, experts: nn.Module, expert: int) -> list[Tensor]:
        """The weight matrices of one expert, each (out, in), views where the storage allows it."""

    def expert_vectors(self, experts: nn.Module, expert: int) -> list[Tensor]:
        """The biases of one expert, in the order in which they are added; empty for most families."""
        return []

    @abstractmethod
    def hidden(self, experts: nn.Module, expert: int, x_TD: Tensor, ups: Sequence[Tensor]) -> Tensor:
        """[T, F] what one expert multiplies its last matrix with, from the given matrices before it."""

    @abstractmethod
    def run(self, experts: nn.Module, expert: int, x_TD: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        """The function of one expert with the given matrices, without the gate weight."""

    @abstractmethod
    def observe(self, layer: Layer, callback: Callback) -> Handle:
        """Call `callback` whenever tokens are sent to the layer's experts, before they are computed; balanced or not."""

    def lane(self, path: str) -> int:
        """Layers of one stack that serve different tokens (text, vision) are ordered by lane first, then by depth."""
        return 0

    def router_name(self, ancestors: Sequence[nn.Module]) -> str | None:
        """Name of the router within the experts' block."""
        return next((name for name in ROUTER_NAMES if isinstance(getattr(ancestors[-1], name, None), nn.Module)), None)

    def top_k(self, experts: nn.Module, ancestors: Sequence[nn.Module]) -> int:
        """Routed experts that a token is sent to, from the router, its block, or the nearest configuration.

        Raises:
            ModelError: none of them says.
        """
        router = self.router_name(ancestors)
        block = ancestors[-1]
        holders = [getattr(block, router) if router else None, block]
        holders += [getattr(m, "config", None) for m in [*holders, experts, *reversed(ancestors)] if m is not None]
        for holder in holders:
            for name in TOP_K_NAMES:
                value = getattr(holder, name, None)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
        raise ModelError(f"cannot tell the top-k of {type(experts).__name__}; looked for {', '.join(TOP_K_NAMES)}.")

    def num_shared(self, experts: nn.Module, ancestors: Sequence[nn.Module]) -> int:
        """Shared experts beside the routed ones."""
        block = ancestors[-1]
        if not any(isinstance(getattr(m, name, None), nn.Module) for m in ancestors[-2:] for name in SHARED_MODULE_NAMES):
            return 0
        configs = [getattr(m, "config", None) for m in (block, experts, *reversed(ancestors))]
        counts = (getattr(c, name, None) for c in configs for name in SHARED_COUNT_NAMES)
        return next((int(n) for n in counts if isinstance(n, int) and n > 0), 1)


def storage_name(matrices: Sequence[Tensor]) -> str:
    """Storage format of an expert's matrices as `precisions` names it.

    Raises:
        ModelError: the weights are stored in a format that is not a plain float.
    """
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    dtype = matrices[0].dtype
    if dtype not in names:
        raise ModelError(f"the experts are stored as {dtype}; load the model in float32, float16 or bfloat16.")
    return names[dtype]


_SIGNATURES: dict[type, tuple[str, ...]] = {}


def forward_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward, in order; of its class, for wrappers on an instance hide them."""
    kind = type(module)
    if kind not in _SIGNATURES:
        _SIGNATURES[kind] = tuple(inspect.signature(kind.forward).parameters)[1:]
    return _SIGNATURES[kind]


def call_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], count: int) -> list[Any]:
    """The first `count` arguments of a module's call, given by position or by name."""
    names = forward_names(module)[len(args) : count]
    return [*args[:count], *(kwargs[name] for name in names)]


def expert_of(stack: Tensor, expert: int) -> Tensor:
    """One expert's part of stacked weights: a view of them.

    Where each process of a group holds the whole experts of a stretch of the stack (transformers' expert parallelism), a copy
    from the one that holds it; then all processes have to ask, in the same order.
    """
    mesh: Any = getattr(stack, "device_mesh", None)
    if mesh is None:
        return stack[expert]
    from torch.distributed import broadcast, get_global_rank
    from torch.distributed.tensor import DTensor

    assert isinstance(stack, DTensor), "what is laid out over devices is a DTensor"
    if mesh.ndim != 1 or not stack.placements[0].is_shard(0) or stack.shape[0] % mesh.size():
        return stack[expert].full_tensor()
    owner, row = divmod(expert, stack.shape[0] // mesh.size())
    local = stack.to_local().detach()
    part = local[row].contiguous() if owner == mesh.get_local_rank() else local.new_empty(stack.shape[1:])
    broadcast(part, get_global_rank(mesh.get_group(), owner), group=mesh.get_group())
    return part


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer in the weight's dtype, whatever the input's and the bias's are."""
    return linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))


def nonzero_topk(weights_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Selections held as one weight per expert, zero where not selected.

    Returns:
        experts_TK with E where fewer than K were selected, and weights_TK.
    """
    weights_TK, experts_TK = weights_TE.topk(k, dim=-1)
    return experts_TK.masked_fill(weights_TK <= 0, weights_TE.shape[-1]), weights_TK
