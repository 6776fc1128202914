"""Tell one model from another by its weights, and whether the weights are usable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from equipoise.errors import ModelError
from equipoise.models.adapters.access import STREAMED
from equipoise.models.adapters.offloaded import data_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLES = 4096
"""Elements of each parameter that the fingerprint reads; of stacked experts, at least 64 of each."""

VOLATILE = {"transformers_version", "dtype", "torch_dtype", "use_cache", "name_or_path", "attn_implementation"}
"""Configuration fields that say how a model is loaded or run, not what it computes."""


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over the configuration's scalars and a spread sample of every parameter and persistent buffer, cast to bf16.

    Raises:
        ModelError: a parameter is on the meta device and has no data.
    """
    streamed = getattr(model, STREAMED, None)
    if streamed is None:
        return _digest(model, sorted(model.state_dict().items()))
    streamed.digest = streamed.digest or _digest(model, streamed.tensors())
    return str(streamed.digest)


def check_weights(model: PreTrainedModel) -> None:
    """Refuse a model whose weights cannot give a meaningful measurement.

    Raises:
        ModelError: names the first parameter that has a NaN or an infinity, or has no data.
    """
    streamed = getattr(model, STREAMED, None)
    if streamed is None:
        for name, tensor in model.named_parameters():
            _check(name, data_of(model, name, tensor))
    elif not streamed.digest:  # all weights are read once, for this and for the fingerprint
        streamed.digest = _digest(model, _checked(streamed.tensors()))


def _digest(model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The fingerprint, from tensors in the order of their names."""
    config = _scalars(model.config.to_dict())
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, given in tensors:
        tensor = data_of(model, name, given)
        if tensor.is_meta:
            raise ModelError(f"'{name}' has no data (meta device); load the weights before profiling.")
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(_sample(tensor.detach()).to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _checked(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        if isinstance(tensor, nn.Parameter):
            _check(name, tensor)
        yield name, tensor


def _check(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ModelError(f"parameter '{name}' has no data (meta device); load the weights first.")
    if hasattr(tensor, "to_local"):  # laid out over processes: each checks what it holds
        tensor = tensor.to_local()
    if tensor.is_floating_point() and tensor.numel():
        low, high = torch.aminmax(tensor.detach())  # one pass without a temporary; NaN propagates
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise ModelError(f"parameter '{name}' holds NaN or infinite weights; the checkpoint is damaged.")


def _scalars(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Plain values of a configuration and its sub-configurations, those that say only how to load or run left out."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key.startswith("_") or key in VOLATILE or key.endswith("token_id"):
            continue
        if isinstance(value, dict) and key.endswith("config") and key != "quantization_config":
            found |= _scalars(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float | str):
            found[prefix + key] = value
    return found


def _sample(tensor: Tensor) -> Tensor:
    """Every n-th element; of a tensor that is laid out over processes, gathered from all of them."""
    if getattr(tensor, "device_mesh", None) is not None:
        return _sample_parts(tensor)
    flat = tensor.reshape(-1)
    return flat[:: _stride(tensor)]


def _sample_parts(tensor: Any) -> Tensor:
    """The sample of a DTensor without gathering the weights, where each process holds an equal stretch of them."""
    from torch.distributed import all_gather_object

    mesh = tensor.device_mesh
    if mesh.ndim != 1 or not tensor.placements[0].is_shard(0) or tensor.shape[0] % mesh.size():
        return _sample(tensor.full_tensor())
    local = tensor.to_local().reshape(-1)
    first = -mesh.get_local_rank() * local.numel() % _stride(tensor)
    parts: list[Any] = [None] * mesh.size()
    all_gather_object(parts, local[first :: _stride(tensor)].float().cpu(), group=mesh.get_group())
    return torch.cat(parts)


def _stride(tensor: Tensor) -> int:
    wanted = max(SAMPLES, 64 * tensor.shape[0]) if tensor.dim() == 3 else SAMPLES
    # An odd stride does not stay in the same columns of a matrix whose width is a power of two.
    return int(max(1, tensor.numel() // wanted) | 1)
