"""State of a training run in one safetensors file, written whole: weights, moments, generator, extensions, losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from equipoise.artifacts.files import write_atomic
from equipoise.lab.extensions import Extension
from equipoise.lab.recipe import RecipeError

FORMAT = "equipoise.lab/1"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save_checkpoint(
    path: Path,
    model: Any,
    optimizer: torch.optim.Optimizer,
    extensions: dict[str, Extension],
    *,
    fingerprint: str,
    losses: list[float],
) -> None:
    """Write all that a run needs to go on bit for bit; `losses` are those of the steps done."""
    tensors = {f"model.{name}": tensor for name, tensor in _weights(model).items()}
    tensors |= {
        f"optimizer.{name}.{moment}": torch.as_tensor(optimizer.state[parameter][moment])
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for moment in MOMENTS
    }
    tensors |= {f"extension.{name}.{key}": value for name, one in extensions.items() for key, value in one.state().items()}
    tensors["generator"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["cuda_generator"] = torch.cuda.get_rng_state()
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    header = {"format": FORMAT, "recipe": fingerprint, "steps": str(len(losses))}
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, safetensors.torch.save(ready, {"equipoise": json.dumps(header)}))


def load_checkpoint(
    path: Path, model: Any, optimizer: torch.optim.Optimizer, extensions: dict[str, Extension], *, fingerprint: str
) -> list[float]:
    """Put a run back where it was; returns the losses of the steps done.

    Raises:
        RecipeError: unreadable, or of another recipe.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("equipoise", "{}"))
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise RecipeError(f"cannot read checkpoint '{path}': {error}; remove it to start the run anew.") from error
    if header.get("format") != FORMAT or header.get("recipe") != fingerprint:
        raise RecipeError(
            f"'{path}' belongs to another recipe, or to another state of this one; give another --out, or remove it."
        )
    with torch.no_grad():
        for name, weight in _weights(model).items():
            weight.copy_(tensors[f"model.{name}"])
    for name, parameter in model.named_parameters():
        state = {moment: tensors.get(f"optimizer.{name}.{moment}") for moment in MOMENTS}
        if state["step"] is not None:
            place = {moment: value.to(parameter.device) for moment, value in state.items() if value is not None}
            place["step"] = state["step"]
            optimizer.state[parameter] = place
    for name, one in extensions.items():
        prefix = f"extension.{name}."
        one.load_state({key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)})
    torch.set_rng_state(tensors["generator"])
    if "cuda_generator" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda_generator"])
    return [float(loss) for loss in tensors["losses"]]


def _weights(model: Any) -> dict[str, Tensor]:
    """Parameters and buffers, tied ones once."""
    return dict(model.named_parameters()) | {f"buffer.{name}": buffer for name, buffer in model.named_buffers()}
