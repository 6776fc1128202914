"""Experts read from disk one at a time: from a balanced model's slots, or from a stock checkpoint that a plan is put on.

Shapes: E experts, R rows and C columns of an expert's matrix.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor

from equipoise.artifacts import LayerPlan, Plan
from equipoise.errors import CheckpointError, PlanError
from equipoise.execution.balanced_config import METHOD, EquipoiseConfig
from equipoise.execution.slots import canonical, module_name
from equipoise.execution.stock_names import StockTensor, read_config, skeleton, stacked_parameters, stock_path, stock_tensors
from equipoise.models.layers import MoELayer, find_moe_layers
from equipoise.models.tensor_files import TensorFiles
from equipoise.precisions import precision
from equipoise.quantization.formats import QuantizedMatrix, quantize, to_float

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Matrix: TypeAlias = "QuantizedMatrix | Tensor"


class Experts(Protocol):
    """Where the experts of a model come from."""

    def matrices(self, layer: int, slot: int) -> tuple[Matrix, Matrix]:
        """Up (gate and up joined) and down of a slot, in its storage format."""
        ...

    def biases(self, layer: int, slot: int) -> list[Tensor]:
        """Biases of up and down; none where the family has none."""
        ...

    def others(self) -> list[str]:
        """Names of all tensors that are not the experts'."""
        ...


class Source:
    """A model on disk whose experts a plan describes.

    Attributes:
        directory: where it lies.
        config: its config.json, without a quantization.
        plan: its slots.
        model: the model without weights.
        layers: its MoE layers, in the order of the plan.
        files: its tensors by name.
        experts: what its slots hold.
    """

    def __init__(self, directory: str | Path, plan: Plan | None = None) -> None:
        """Read the configuration and the headers; no weights.

        Args:
            directory: a balanced model, or the 16- or 32-bit checkpoint that `plan` was made for, with safetensors files.
            plan: must be a balanced model's own, if given.

        Raises:
            CheckpointError: the directory holds no whole model, or one that is quantized otherwise.
            PlanError: no plan, or the plan of another model.
        """
        self.directory = Path(directory)
        self.config = read_config(self.directory)
        quantization = self.config.pop("quantization_config", None)
        balanced = quantization is not None and quantization.get("quant_method") == METHOD
        if quantization is not None and not balanced:
            raise CheckpointError(f"'{directory}' is quantized ({quantization.get('quant_method')}); give the original.")
        own = EquipoiseConfig(**quantization) if balanced else None
        if own is not None and own.rotated:
            raise CheckpointError(
                f"'{directory}' stores experts rotated, which a stock checkpoint cannot say; round the model without rotate."
            )
        self.plan = _plan(self.directory, None if own is None else own.read_plan(), plan)
        self.model: PreTrainedModel = skeleton(self.directory)
        self.layers = find_moe_layers(self.model)
        _check(self.plan, self.model, self.layers, self.directory)
        self.files = TensorFiles(_weight_files(self.directory, quantization["weights"] if balanced else None))
        self.experts: Experts = _Slots(self) if balanced else _Stock(self)


class _Slots:
    """Experts of a balanced model: slices of its stacked slots."""

    def __init__(self, source: Source) -> None:
        self.source = source
        paths = [(stock_path(source.model, layer.path), layer.path) for layer in source.layers]
        held = {name.rpartition(".slots.")[0] for name in source.files if ".slots." in name}
        self.paths = [next((path for path in both if path in held), both[0]) for both in paths]
        self.places = [_places(columns) for columns in source.plan.layers]

    def matrices(self, layer: int, slot: int) -> tuple[Matrix, Matrix]:
        """As stored."""
        up, down = (self._matrix(layer, slot, name) for name in ("up", "down"))
        return up, down

    def biases(self, layer: int, slot: int) -> list[Tensor]:
        """As stored."""
        if not self.source.layers[layer].vector_elements:
            return []
        return [self._tensor(layer, slot, f"{name}_bias") for name in ("up", "down")]

    def others(self) -> list[str]:
        """All that are not of slots."""
        prefixes = tuple(f"{path}.slots." for path in self.paths)
        return [name for name in self.source.files if not name.startswith(prefixes)]

    def _matrix(self, layer: int, slot: int, name: str) -> Matrix:
        form = precision(self.source.plan.layers[layer].precisions[slot])
        if form.is_float:
            return self._tensor(layer, slot, name)
        packed, scales = (self._tensor(layer, slot, f"{name}_{part}") for part in ("packed", "scales"))
        zeros = None if form.symmetric else self._tensor(layer, slot, f"{name}_zeros")
        *ups, down = self.source.layers[layer].matrices
        columns = (ups[0] if name == "up" else down)[1]
        return QuantizedMatrix(packed, scales, zeros, columns, form)

    def _tensor(self, layer: int, slot: int, name: str) -> Tensor:
        form = module_name(canonical(self.source.plan.layers[layer].precisions[slot]))
        key = f"{self.paths[layer]}.slots.{form}.{name}"
        if key not in self.source.files:
            raise CheckpointError(f"'{self.source.directory}' is not whole: tensor '{key}' is missing; save it again.")
        return self.source.files[key][self.places[layer][slot]]


class _Stock:
    """Experts of a stock checkpoint, rounded to nearest as they are read."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.parts = [_by_expert(stock_tensors(source.model, layer)) for layer in source.layers]
        self.stacks = [[self._stack(layer, name) for name, _ in stacked_parameters(layer)] for layer in source.layers]

    def matrices(self, layer: int, slot: int) -> tuple[Matrix, Matrix]:
        """Read, and rounded to the slot's format."""
        columns = self.source.plan.layers[layer]
        form, expert = precision(columns.precisions[slot]), columns.experts[slot]
        both = [self._weight(layer, expert, which) for which in (0, 1)]
        up, down = (to_float(w, form) if form.is_float else quantize(w, form) for w in both)
        return up, down

    def biases(self, layer: int, slot: int) -> list[Tensor]:
        """None: families with biases hold them elsewhere than beside an expert's matrices."""
        assert not self.source.layers[layer].vector_elements, "checked before"
        return []

    def others(self) -> list[str]:
        """All that hold no expert's rows."""
        mine = {part.name for layer in self.parts for parts in layer.values() for part in parts}
        mine.update(name for stacks in self.stacks for name in stacks if name)
        return [name for name in self.source.files if name not in mine]

    def _weight(self, layer: int, expert: int, which: int) -> Tensor:
        stacks, files = self.stacks[layer], self.source.files
        if stacks and stacks[which]:
            return files[stacks[which]][expert]
        parts = self.parts[layer][expert, which]
        missing = [part.name for part in parts if part.name not in files]
        if missing:
            raise CheckpointError(f"'{self.source.directory}' is not whole: tensor '{missing[0]}' is missing.")
        return torch.cat([files[part.name] for part in parts])

    def _stack(self, layer: MoELayer, name: str) -> str:
        """Name under which the checkpoint holds all experts of a layer as one tensor; empty when it does not."""
        paths = (stock_path(self.source.model, layer.path), layer.path)
        return next((f"{path}.{name}" for path in paths if f"{path}.{name}" in self.source.files), "")


def _by_expert(tensors: Sequence[StockTensor]) -> dict[tuple[int, int], list[StockTensor]]:
    """The tensors of each (expert, matrix), by rows."""
    found: dict[tuple[int, int], list[StockTensor]] = {}
    for tensor in tensors:
        found.setdefault((tensor.expert, tensor.which), []).append(tensor)
    return found


def _places(columns: LayerPlan) -> list[int]:
    """[P] index of each slot among the slots of its format."""
    seen: dict[str, int] = {}
    places = []
    for name in map(canonical, columns.precisions):
        places.append(seen.setdefault(name, 0))
        seen[name] += 1
    return places


def _plan(directory: Path, own: Plan | None, given: Plan | None) -> Plan:
    """The plan in force: a balanced model's own, which one that was given must equal."""
    if own is None and given is None:
        raise PlanError(f"'{directory}' holds no balanced model; give the plan to put on it, or a balanced model.")
    if own is not None and given is not None and own.layers != given.layers:
        raise PlanError(f"'{directory}' was balanced with another plan; give its own, or this one's original model.")
    plan = own or given
    assert plan is not None, "one of them is there"
    return plan


def _check(plan: Plan, model: PreTrainedModel, layers: Sequence[MoELayer], directory: Path) -> None:
    """The plan's layers must be the model's: the weights, which would tell two models of one shape apart, are not read."""
    plan.require_all_experts("put on a whole model")
    plan.require_native_routing("a stock checkpoint")
    wanted = [(facts.num_experts, facts.matrices) for facts in plan.model.layers]
    found = [(layer.num_experts, layer.matrices) for layer in layers]
    kind = model.config.model_type
    if (plan.model.model_type, wanted) != (kind, found):
        raise PlanError(
            f"the plan was made for '{plan.model.name}' ({plan.model.model_type}, {len(wanted)} MoE layers of "
            f"{wanted[0][0]} experts), not for '{directory}' ({kind}, {len(found)} of {found[0][0]}); give the plan's model."
        )


def _weight_files(directory: Path, named: str | None) -> list[Path]:
    """The safetensors files of a checkpoint, by its index where it has one."""
    index = directory / (named if named and named.endswith(".index.json") else "model.safetensors.index.json")
    if named is not None and not named.endswith(".index.json"):
        return [directory / named]
    if index.exists():
        content: Mapping[str, Any] = json.loads(index.read_bytes())
        return sorted({directory / str(name) for name in content["weight_map"].values()})
    files = sorted(directory.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(f"'{directory}' holds no safetensors files; save the model again with save_pretrained.")
    return files
