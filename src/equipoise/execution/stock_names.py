"""Under which names a stock checkpoint holds the experts of a model, and which rows of which expert each tensor is.

Asked of transformers itself: its own way back from fused experts to a family's checkpoint is run on tensors whose rows are
numbered, and the numbers tell what went where. Nothing is assumed about a family, and no weight is needed.

Shapes: E experts, R rows and C columns of an expert's matrix.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from equipoise.errors import CheckpointError, ModelError
from equipoise.models.layers import MoELayer, expert_matrices

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class StockTensor:
    """A tensor of a stock checkpoint that holds rows of one expert's matrix.

    Attributes:
        name: in the checkpoint, ending in ".weight".
        expert: which expert.
        which: 0 for the rows of up (gate and up joined), 1 for those of down.
        start, stop: rows of that matrix.
    """

    name: str
    expert: int
    which: int
    start: int
    stop: int


def skeleton(directory: Path) -> PreTrainedModel:
    """The model of a checkpoint without its weights (on the meta device); a quantization is not looked at.

    Raises:
        CheckpointError: config.json names no architecture that this transformers has, or does not suit it.
    """
    import transformers

    name = next(iter(read_config(directory).get("architectures") or ()), None)
    kind = getattr(transformers, str(name), None)
    if kind is None:
        raise CheckpointError(f"'{directory}' is a {name}, which this transformers ({transformers.__version__}) does not have.")
    try:
        config = kind.config_class.from_pretrained(directory)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"'{directory}/config.json' is not one of a {name}: {str(error).splitlines()[0]}.") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model: PreTrainedModel = kind._from_config(config)
    return model


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a checkpoint.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read '{directory}/config.json': {error.strerror or error}.") from error
    except ValueError as error:
        raise CheckpointError(f"'{directory}/config.json' is not JSON ({error}).") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"'{directory}/config.json' is not a configuration.")
    return config


def stock_state(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model under the names, and in the shapes, of its family's checkpoints."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(state)))


def stock_path(model: PreTrainedModel, path: str) -> str:
    """The path of a module in the names of its family's checkpoints ("mlp.experts" is "block_sparse_moe.experts")."""
    (name,) = stock_state(model, {f"{path}.slots": torch.empty(0)})
    return name.removesuffix(".slots")


def stock_tensors(model: PreTrainedModel, layer: MoELayer) -> list[StockTensor]:
    """What the family's checkpoints hold of a layer's experts.

    Args:
        model: with or without weights.
        layer: one of its MoE layers.

    Returns:
        Every row of every expert's matrices, once.

    Raises:
        ModelError: the family's checkpoints do not hold each expert by itself.
    """
    numbered = {}
    for which, (name, rows) in enumerate(stacked_parameters(layer)):
        numbers = torch.arange(layer.num_experts * rows, device="cpu")
        # Two columns: a single one would not survive where all axes of length 1 are dropped.
        numbers = (numbers + which * layer.num_experts * max(_rows(layer))).view(-1, rows, 1).expand(-1, -1, 2)
        numbered[f"{layer.path}.{name}"] = numbers
    if not numbered:
        raise ModelError(_not_by_itself(layer))
    found = []
    for name, tensor in stock_state(model, numbered).items():
        first, rows = int(tensor.flatten()[0]), tensor.shape[0]
        if tensor.shape != (rows, 2) or not torch.equal(tensor[:, 1], torch.arange(first, first + rows)):
            raise ModelError(_not_by_itself(layer))
        which, rest = divmod(first, layer.num_experts * max(_rows(layer)))
        expert, start = divmod(rest, _rows(layer)[which])
        found.append(StockTensor(name, expert, which, start, start + rows))
    assert sum(t.stop - t.start for t in found) == layer.num_experts * sum(_rows(layer)), "every row has one place"
    return sorted(found, key=lambda t: (t.expert, t.which, t.start))


def stacked_parameters(layer: MoELayer) -> list[tuple[str, int]]:
    """Names below the experts module, and rows R, of the parameters [E, R, C] that hold up and down; none if not so stored."""
    matrices = expert_matrices(layer, 0)
    names = [_parameter_name(layer.experts, matrix) for matrix in matrices]
    parameters = dict(layer.experts.named_parameters())
    stacked = [
        (name, len(matrix))
        for name, matrix in zip(names, matrices, strict=True)
        if name and parameters[name].shape == (layer.num_experts, *matrix.shape) and matrix.is_contiguous()
    ]
    return stacked if len(stacked) == len(matrices) == 2 else []


def _parameter_name(experts: nn.Module, matrix: Tensor) -> str | None:
    """The parameter that a matrix is, or is a view of."""
    base = matrix if matrix._base is None else matrix._base
    return next((name for name, parameter in experts.named_parameters() if parameter is base), None)


def _rows(layer: MoELayer) -> tuple[int, int]:
    """Rows of up, all joined, and of down."""
    *ups, down = layer.matrices
    return sum(rows for rows, _ in ups), down[0]


def _not_by_itself(layer: MoELayer) -> str:
    return (
        f"stock transformers reads quantized experts only of families that it fuses from one tensor per expert and matrix; "
        f"{type(layer.experts).__name__} is not one. Export 16-bit weights instead (--to checkpoint)."
    )
