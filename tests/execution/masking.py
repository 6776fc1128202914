"""Leaving out experts without taking them away: their logits and selection biases become minus infinity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from equipoise.execution.prune_slices import Slice
from equipoise.models.layers import find_moe_layers


class _Masking(TorchFunctionMode):
    """Fills what is computed with a router's matrix, in the columns of experts that are left out."""

    def __init__(self, routers: Mapping[int, tuple[int, list[int]]]) -> None:
        super().__init__()
        self.routers = routers
        self.filled = 0

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point() and result.dim():
            for given in (*args, *(kwargs or {}).values()):
                found = self.routers.get(given.data_ptr()) if isinstance(given, Tensor) and given.dim() == 2 else None
                if found and result.shape[-1] == found[0] and result.data_ptr() != given.data_ptr() and len(args) > 1:
                    result = result.clone()
                    result[..., found[1]] = -torch.inf
                    self.filled += 1
                    break
        return result


@contextmanager
def masked(model: PreTrainedModel, slices: Mapping[str, Slice], kept: Sequence[Sequence[int]]) -> Iterator[None]:
    """Within, the model's routers cannot choose other experts than those kept; its weights are as before afterwards.

    Args:
        model: a whole model in float32.
        slices: what its pruned model takes, for the names of the routers' tensors.
        kept: experts of each MoE layer that can be chosen.
    """
    routers: dict[int, tuple[int, list[int]]] = {}
    biases: list[tuple[Tensor, Tensor]] = []
    layers = find_moe_layers(model)
    for name, taken in slices.items():
        layer = next(x for x in sorted(layers, key=lambda x: -len(x.path)) if name.startswith(x.path.rpartition(".")[0]))
        tensor = model.get_parameter_or_buffer(taken.source)
        inside = name.startswith(f"{layer.path}.") and layer.router_path is not None
        if inside or taken.places is None:
            continue
        out = sorted({*range(layer.num_experts)} - {*kept[layer.index]})
        if tensor.dim() == 2 and taken.axis == 0:
            routers[tensor.data_ptr()] = (len(tensor), out)
        else:
            biases.append((tensor, tensor.detach().clone()))
            tensor.data.movedim(taken.axis, 0)[out] = -torch.inf
    try:
        with _Masking(routers) as mode:
            yield
        assert mode.filled >= len(routers), "every router was used"
    finally:
        for tensor, original in biases:
            tensor.data.copy_(original)
