"""Weights that accelerate keeps away from the device until a module runs (`device_map` beyond the devices' memory).

Between two calls such a parameter is on the meta device, and a hook of its module knows where the data is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def in_reach(module: nn.Module) -> Iterator[Any]:
    """Put a module's weights where they can be read: stacks of experts as views of where they are kept, the rest on the device.

    Yields:
        the device that the module runs on; None for a module whose weights are where they belong.
    """
    put: list[tuple[nn.Module, str, Tensor]] = []
    device = None
    for part in module.modules():
        kept = _kept(part)
        if kept is None:
            continue
        weights, device = kept
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_meta:
                data = weights[name]
                put.append((part, name, parameter))
                part._parameters[name] = nn.Parameter(data if data.dim() > 2 else data.to(device), requires_grad=False)
    try:
        yield device
    finally:
        for part, name, parameter in put:
            part._parameters[name] = parameter


def data_of(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A tensor of the model's state dict, or its data where accelerate keeps it."""
    if not tensor.is_meta:
        return tensor
    path, _, own = name.rpartition(".")
    kept = _kept(model.get_submodule(path))
    data: Tensor = tensor if kept is None else kept[0][own]
    return data


def _kept(module: nn.Module) -> tuple[Any, Any] | None:
    """What a module's hook reads its weights from, and the device it brings them to."""
    hook: Any = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "offload", False) and getattr(one, "weights_map", None) is not None:
            return one.weights_map, one.execution_device
    return None
