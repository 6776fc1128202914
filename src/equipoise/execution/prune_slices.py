"""What leaving out experts changes in a model: the expert count of its configuration, and the slices of its tensors that stay.

Asked of transformers itself: a model of the smaller configuration is made without weights, and the tensors whose shapes differ
are those with a part for each expert: the experts, the router's rows, its selection bias. Nothing is assumed about a family.

Shapes: E experts, M experts kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from equipoise.errors import ModelError, PlanError
from equipoise.models.layers import MoELayer, find_moe_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kept = Sequence[Sequence[int]]


@dataclass(frozen=True, eq=False)
class Slice:
    """Where a tensor of the pruned model comes from.

    Attributes:
        source: its name in the whole model.
        axis: along which a part of it stays.
        places: indices that stay along the axis, in order; None takes the tensor as it is.
    """

    source: str
    axis: int = 0
    places: tuple[int, ...] | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The part that stays."""
        if self.places is None:
            return tensor
        return tensor.index_select(self.axis, torch.tensor(self.places, device=tensor.device))


@dataclass(frozen=True, eq=False)
class Pruning:
    """A pruned model before it has weights.

    Attributes:
        config: of the pruned model.
        skeleton: the pruned model on the meta device.
        slices: name in the pruned model -> where it comes from, for every tensor of its state that is not as it was.
        changed: what of the configuration is another number, for people.
    """

    config: Any
    skeleton: PreTrainedModel
    slices: dict[str, Slice]
    changed: str

    def source(self, name: str) -> str:
        """The name in the whole model of a tensor of the pruned one."""
        return self.slices[name].source if name in self.slices else name

    def taken(self, name: str, tensor_of: Callable[[str], Tensor]) -> Tensor:
        """A tensor of the pruned model, from the whole model's tensors by name."""
        tensor = tensor_of(self.source(name))
        return self.slices[name].of(tensor) if name in self.slices else tensor


def plan_slices(model: PreTrainedModel, layers: Sequence[MoELayer], kept: Kept) -> Pruning:
    """Find the configuration and the slices of a pruned model.

    Args:
        model: the whole model; weights are not needed.
        layers: its MoE layers.
        kept: of each layer, the experts that stay, in rising order.

    Raises:
        ModelError: the family cannot be pruned: its configuration has no single number of experts, the number sizes other
            things than the MoE layers, or experts are named by number elsewhere.
        PlanError: layers keep different numbers of experts, or fewer than their routing needs.
    """
    _check_routing(model, layers, kept)
    problems = []
    for place, config in _configs(model.config, layers[0].num_experts, len(kept[0])):
        with torch.device("meta"):
            try:
                skeleton = type(model)._from_config(config)
            except (ValueError, TypeError, KeyError, IndexError, RuntimeError, AttributeError) as error:
                problems.append(f"{place}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
                continue
        try:
            return Pruning(config, skeleton, _slices(model, skeleton, layers, kept), place)
        except ModelError as error:
            problems.append(f"{place}: {str(error).rstrip('.')}")
    raise ModelError(
        f"{type(model).__name__} cannot be pruned to a stock model of {len(kept[0])} experts: "
        f"{'; '.join(problems) or 'no field of its configuration is their number'}."
    )


def _check_routing(model: PreTrainedModel, layers: Sequence[MoELayer], kept: Kept) -> None:
    if len(kept) != len(layers):
        raise PlanError(f"experts to keep are given for {len(kept)} layers, the model has {len(layers)} MoE layers.")
    for layer, experts in zip(layers, kept, strict=True):
        if not experts or list(experts) != sorted({*experts} & {*range(layer.num_experts)}):
            raise PlanError(
                f"{layer.path} is to keep {list(experts)}; give ids of 0 to {layer.num_experts - 1} in rising order, each once."
            )
    counts = sorted({len(experts) for experts in kept})
    if len(counts) > 1 or len({layer.num_experts for layer in layers}) > 1:
        raise PlanError(
            f"layers of {sorted({layer.num_experts for layer in layers})} experts keep {counts}: a stock model has one number "
            "of experts for all of its layers."
        )
    for layer in layers:
        if layer.adapter.defect:
            raise ModelError(f"{layer.path} cannot be pruned: {layer.adapter.defect}.")
        if counts[0] < layer.top_k:
            raise PlanError(
                f"{counts[0]} experts are kept, and {layer.path} sends a token to {layer.top_k}; keep as many at least."
            )
    text = model.config.get_text_config(decoder=True)
    groups, used = getattr(text, "n_group", None) or 1, getattr(text, "topk_group", None) or 1
    if groups > 1:
        size, each = layers[0].num_experts // groups, counts[0] // groups
        uneven = [layer.path for layer, ids in zip(layers, kept, strict=True) if len({*_group_counts(ids, size, groups)}) > 1]
        if uneven:
            raise PlanError(f"{uneven[0]}: its {groups} groups keep different numbers of experts; keep as many of each.")
        if each * used < layers[0].top_k:
            raise PlanError(
                f"{each} experts are kept of each group, and a token is sent to {layers[0].top_k} experts of {used} groups; "
                "keep more."
            )


def _group_counts(ids: Sequence[int], size: int, groups: int) -> list[int]:
    return [sum(expert // size == group for expert in ids) for group in range(groups)]


def _configs(config: Any, experts: int, kept: int) -> Iterator[tuple[str, Any]]:
    """Configurations in which one field that could be the number of experts is another, then one in which all are."""
    fields = list(_counts(config, experts))
    for chosen in [[field] for field in fields] + ([fields] if len(fields) > 1 else []):
        changed = copy.deepcopy(config)
        for path, name in chosen:
            holder = changed
            for part in path:
                holder = getattr(holder, part)
            value = getattr(holder, name)
            setattr(holder, name, kept if isinstance(value, int) else [kept] * len(value))
        yield ", ".join(".".join((*path, name)) for path, name in chosen), changed


def _counts(config: Any, experts: int, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path, name) of the fields, of nested configurations too, that hold the number and have experts in their name."""
    from transformers import PreTrainedConfig

    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _counts(value, experts, (*path, name))
        elif "expert" in name and (value == experts or (isinstance(value, list) and value == [experts] * max(1, len(value)))):
            yield path, name


def _slices(model: PreTrainedModel, skeleton: PreTrainedModel, layers: Sequence[MoELayer], kept: Kept) -> dict[str, Slice]:
    """Where every tensor of the pruned model that differs comes from.

    Raises:
        ModelError: other tensors than those of the MoE layers differ, or it cannot be told what stays of one.
    """
    for layer in find_moe_layers(skeleton):
        if layer.num_experts != len(kept[0]):
            raise ModelError(f"it does not size {layer.path}")
    old, new = model.state_dict(), skeleton.state_dict()
    slices: dict[str, Slice] = {}
    for name, tensor in new.items():
        index = _layer_of(name, layers)
        source = name if index is None else _source(name, layers[index], kept[index])
        if source not in old:
            raise ModelError(f"it adds '{name}'")
        before, after = old[source].shape, tensor.shape
        if before == after:
            if source != name:
                slices[name] = Slice(source)
            continue
        axes = [axis for axis, (a, b) in enumerate(zip(before, after, strict=False)) if a != b]
        if index is None or len(before) != len(after) or len(axes) != 1:
            raise ModelError(f"it sizes '{name}' too, which is no part of an MoE layer")
        places = _places(before[axes[0]], after[axes[0]], layers[index].num_experts, kept[index])
        if places is None:
            raise ModelError(f"it is not known which part of '{name}' belongs to which expert")
        slices[name] = Slice(source, axes[0], places)
    _refuse_numbered(old, layers)
    return slices


def _layer_of(name: str, layers: Sequence[MoELayer]) -> int | None:
    """The MoE layer that a tensor is of: of its experts, its router, or directly of the block that holds both."""
    for layer in layers:
        if name.startswith(f"{layer.path}."):
            return layer.index
        if layer.router_path is not None:
            block = layer.path.rpartition(".")[0]
            rest = name.removeprefix(f"{block}.") if name.startswith(f"{block}.") else ""
            if name.startswith(f"{layer.router_path}.") or (rest and not rest.startswith(("self_attn", "attention"))):
                return layer.index
    return None


def _source(name: str, layer: MoELayer, kept: Sequence[int]) -> str:
    """The tensor's name in the whole model, where each expert is a module with its number."""
    start = f"{layer.path}.expert_"
    if not name.startswith(start):
        return name
    number, dot, rest = name.removeprefix(start).partition(".")
    return f"{start}{kept[int(number)]}{dot}{rest}"


def _places(before: int, after: int, experts: int, kept: Sequence[int]) -> tuple[int, ...] | None:
    """Indices that stay along an axis: one for each expert, and after them what is no expert's; or as many for each expert."""
    if before - after == experts - len(kept) and before >= experts:
        return (*kept, *range(experts, before))
    each, rest = divmod(before, experts)
    if rest == 0 and after == each * len(kept):
        return tuple(expert * each + row for expert in kept for row in range(each))
    return None


def _refuse_numbered(state: dict[str, Tensor], layers: Sequence[MoELayer]) -> None:
    """Whole numbers in an MoE layer may name experts, as a table of the experts of each token does."""
    for name, tensor in state.items():
        if _layer_of(name, layers) is not None and not tensor.is_floating_point() and tensor.numel() > 1:
            raise ModelError(f"'{name}' holds whole numbers, which may name experts that are left out")
