"""A balanced model as a compressed-tensors checkpoint, which stock transformers, vLLM and others load.

A layer's experts must have one precision. How they are stored follows from what readers can do (transformers 5.23,
compressed-tensors 0.20, vLLM 0.32):

- Transformers fuses the experts of most families while it loads them, and reads one scheme for all of them, symmetric, packed
  (or fp8). Layers of other formats are therefore stored in the narrowest scheme that holds them all exactly (a code minus its
  zero point is a symmetric code of one bit more; a scale repeated serves smaller groups), and 16-bit layers as fused tensors.
- Readers that look schemes up by layer (vLLM) can be given every layer in its own (`by_layer`). Transformers would misread
  such a checkpoint in silence, so its first group is one that transformers takes for the experts' and refuses.
- Families whose experts are not fused (Switch) cannot be read packed: transformers initializes their weights under names that
  packing has taken away.

Shapes: R rows, C columns, G groups of a matrix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.errors import ModelError, PlanError
from equipoise.execution.export_checkpoint import (
    Exported,
    Named,
    Progress,
    float_experts,
    replicas_left_out,
    write_checkpoint,
)
from equipoise.execution.stock_names import (
    StockTensor,
    stacked_parameters,
    stock_path,
    stock_state,
    stock_tensors,
)
from equipoise.execution.stock_source import Source
from equipoise.models.layers import MoELayer
from equipoise.planning.per_layer import main_slots
from equipoise.precisions import Precision, precision
from equipoise.quantization.codes import pack, unpack, unpack_zeros
from equipoise.quantization.formats import FLOAT_DTYPES, QuantizedMatrix

PACKED, FLOAT = "pack-quantized", "float-quantized"
GUARD, UNREADABLE = "re:^experts of layers in schemes of their own: not for transformers$", "marlin-24"
"""The group that stops transformers: a target that no module has, in a format that compressed-tensors knows but cannot read."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How compressed-tensors stores the weights of some modules.

    Attributes:
        bits: of one code.
        group: columns that share a scale; None for one scale per row.
        symmetric: whether there are no zero points.
        fp8: e4m3 instead of integers.
    """

    bits: int
    group: int | None
    symmetric: bool = True
    fp8: bool = False

    def settings(self, targets: Sequence[str]) -> dict[str, Any]:
        """The scheme as an entry of `config_groups`, for the modules that the targets name.

        With fp8 weights go fp8 activations, rounded per token, since vLLM runs such experts no other way; transformers, which
        computes in 16 bits, does not round them.
        """
        weights = {
            "num_bits": self.bits, "type": "float" if self.fp8 else "int", "symmetric": self.symmetric, "dynamic": False,
            "strategy": "channel" if self.group is None else "group", "group_size": self.group,
        }  # fmt: skip
        token = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token", "group_size": None}
        return {
            "targets": list(targets), "weights": weights, "input_activations": token if self.fp8 else None,
            "output_activations": None, "format": FLOAT if self.fp8 else PACKED,
        }  # fmt: skip

    def holds(self, form: Precision) -> Precision:
        """The format whose codes this scheme's are, for packing."""
        return form if self.fp8 else Precision(f"int{self.bits}", self.bits, self.group, self.symmetric)


def export_compressed(
    source: Source, out: str | Path, *, by_layer: bool = False, progress: Progress = lambda done, of: None
) -> Exported:
    """Write a balanced model as a compressed-tensors checkpoint, layer by layer; weights that do not change are only copied.

    Args:
        source: the balanced model, or a stock one and its plan.
        out: a new or empty directory.
        by_layer: each layer in its own scheme, for vLLM and other readers that look schemes up by layer.
        progress: told (layers done, layers in all).

    Raises:
        PlanError: a layer has several precisions, nothing is quantized, or no one scheme holds all layers.
        ModelError: the family's checkpoints do not hold each expert by itself.
        CheckpointError: the source is not whole, or the destination cannot be written.
    """
    forms = layer_forms(source)
    parts = [stock_tensors(source.model, layer) for layer in source.layers]
    if any(layer.vector_elements for layer in source.layers):
        raise ModelError("experts with biases cannot be read quantized by stock transformers; export --to checkpoint instead.")
    own = [own_scheme(form, layer) for form, layer in zip(forms, source.layers, strict=True)]
    schemes = own if by_layer else common_schemes(own, source.layers)
    config = quantization_config(source, schemes, parts, guarded=by_layer)

    def experts() -> Iterator[Named]:
        for index, scheme in enumerate(schemes):
            if scheme is not None:
                yield from _quantized_layer(source, index, parts[index], scheme)
            elif by_layer:
                yield from stock_state(source.model, float_experts(source, index)).items()
            else:
                yield from _fused_layer(source, index)
            source.layers[index].experts.to("meta")
            progress(index + 1, len(schemes))

    total, expert_bytes = write_checkpoint(source, out, experts(), config)
    planned = sum(
        layer.facts.expert_bytes(precision(name)) * layer.num_experts
        for layer, name in zip(source.layers, [form.name for form in forms], strict=True)
    )
    fused = 0 if by_layer else sum(scheme is None for scheme in schemes)
    notes = [replicas_left_out(source), _widened(own, schemes, planned, expert_bytes), _fused(fused)]
    return Exported(Path(out), total, expert_bytes, [note for note in notes if note], {"planned_expert_bytes": planned})


def layer_forms(source: Source) -> list[Precision]:
    """[L] the one precision of each layer.

    Raises:
        PlanError: a layer has several, or all are float formats.
    """
    forms = [{precision(name) for name in columns.precisions} for columns in source.plan.layers]
    mixed = [index for index, found in enumerate(forms) if len(found) > 1]
    if mixed:
        names = ", ".join(sorted(form.name for form in forms[mixed[0]]))
        raise PlanError(
            f"layer {mixed[0]} holds experts in {names} ({len(mixed)} such layers); readers of compressed-tensors know one "
            "precision per layer. Give --round-per-layer to round the plan, or plan with one precision per layer."
        )
    only = [next(iter(found)) for found in forms]
    if all(form.is_float for form in only):
        raise PlanError("no layer of this plan is quantized; export it with --to checkpoint.")
    return only


def own_scheme(form: Precision, layer: MoELayer) -> Scheme | None:
    """The scheme of one layer alone; None for 16 bits.

    Readers want groups that divide the columns. A shorter last group is cut, with the others, into groups that do, each with
    the scale of the one it was in.
    """
    if form.is_float:
        return None
    if form.is_fp8:
        return Scheme(8, None, fp8=True)
    columns = {c for _, c in layer.matrices}
    group = None if form.group is None or form.group >= max(columns) else math.gcd(form.group, *columns)
    return Scheme(form.bits, group, form.symmetric)


def common_schemes(own: Sequence[Scheme | None], layers: Sequence[MoELayer]) -> list[Scheme | None]:
    """The narrowest one scheme, symmetric, that holds every quantized layer exactly, for each of them.

    Raises:
        PlanError: fp8 beside integers, or asymmetric 8-bit codes, which would need nine bits.
    """
    quantized = [scheme for scheme in own if scheme is not None]
    kinds = {scheme.fp8 for scheme in quantized}
    if len(kinds) > 1:
        raise PlanError(
            "some layers are in fp8 and others in integers; stock transformers reads one scheme for all experts, and no scheme "
            "holds both. Plan with one of them, or export for vLLM alone (--set by_layer=true)."
        )
    if kinds == {True}:
        return list(own)
    bits = max(scheme.bits + (not scheme.symmetric) for scheme in quantized)
    if bits > 8:
        raise PlanError("asymmetric 8-bit experts cannot be read by stock transformers; use int8, or int4-gN-asym and below.")
    groups = {scheme.group for scheme in quantized}
    columns = {c for layer in layers for _, c in layer.matrices}
    group = None if groups == {None} else math.gcd(*(g for g in groups if g is not None), *columns)
    return [None if scheme is None else Scheme(bits, group) for scheme in own]


def quantization_config(
    source: Source, schemes: Sequence[Scheme | None], parts: Sequence[Sequence[StockTensor]], *, guarded: bool
) -> dict[str, Any]:
    """`quantization_config` of config.json: a group for each scheme with its layers as targets, and what is not quantized.

    Args:
        source: the model.
        schemes: [L] of each layer; None for 16 bits.
        parts: [L] the stock tensors of each layer.
        guarded: layers are stored as they are, so that transformers must be stopped if it would misread them.
    """
    targets = [_target(tensors) for tensors in parts]
    groups: dict[Scheme, list[str]] = {}
    for scheme, target in zip(schemes, targets, strict=True):
        if scheme is not None:
            groups.setdefault(scheme, []).append(target)
    entries = [scheme.settings(wanted) for scheme, wanted in groups.items()]
    formats = sorted({entry["format"] for entry in entries})
    if guarded and (len(groups) > 1 or None in schemes):
        entries.insert(0, Scheme(4, None).settings([GUARD]) | {"format": UNREADABLE})
    plain = [target for scheme, target in zip(schemes, targets, strict=True) if scheme is None]
    return {
        "quant_method": "compressed-tensors",
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": entry for i, entry in enumerate(entries)},
        "ignore": [*_other_linears(source), *plain],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def stored(matrix: QuantizedMatrix, start: int, stop: int, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    """Some rows of a quantized matrix as a scheme stores them; their values are the same, exactly.

    Args:
        matrix: [R, C] in any format that the scheme holds.
        start: first row.
        stop: row after the last.
        scheme: how to store them.
        dtype: of the scales: the model's own, since readers compute weights in it.

    Returns:
        tensors by the last part of their names ("weight_packed", ...).
    """
    form, rows, columns = matrix.precision, slice(start, stop), matrix.columns
    scales = _regrouped(matrix.scales[rows], columns, form, scheme).to(dtype)
    if scheme.fp8:
        return {"weight": matrix.packed[rows], "weight_scale": scales}
    target = scheme.holds(form)
    found = {"weight_scale": scales, "weight_shape": torch.tensor([stop - start, columns])}
    zeros = None if matrix.zeros is None else unpack_zeros(matrix.zeros, len(matrix.packed), form)[rows]
    if form.bits == target.bits < 8:
        found["weight_packed"] = matrix.packed[rows]
    else:
        codes = unpack(matrix.packed[rows], columns, form)
        if zeros is not None and scheme.symmetric:
            codes = codes - _regrouped(zeros, columns, form, Scheme(form.bits, 1))
        found["weight_packed"] = pack_words(codes, target)
    if zeros is not None and not scheme.symmetric:
        regrouped = _regrouped(zeros, columns, form, scheme)
        found["weight_zero_point"] = pack_words(regrouped.T, target).T
    return found


def pack_words(codes: Tensor, form: Precision) -> Tensor:
    """Codes as 32-bit words, those of 8 bits too, which are stored as bytes elsewhere; any width from 2 to 8 bits."""
    if form.bits in (2, 3, 4):
        return pack(codes, form)
    return _pack_any(codes, form.bits)


def _pack_any(codes: Tensor, bits: int) -> Tensor:
    """A stream of 5 to 8 bits a code: its bits written out one by one, which is slow and plain."""
    columns = codes.shape[-1]
    unsigned = codes.to(torch.int32) + 2 ** (bits - 1)
    stream = (unsigned.unsqueeze(-1) >> torch.arange(bits)) & 1
    stream = nn.functional.pad(stream.flatten(-2).to(torch.uint8), (0, -columns * bits % 32)).unflatten(-1, (-1, 8))
    data = (stream << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return data.contiguous().view(torch.int32)


def _regrouped(scales: Tensor, columns: int, form: Precision, scheme: Scheme) -> Tensor:
    """Scales or zero points [R, G] repeated for the smaller groups of a scheme."""
    if scheme.group is None or scheme.group == form.group:
        assert scales.shape[-1] in (1, form.groups(columns)), "one scale per row has nothing to repeat"
        return scales
    first = torch.arange(0, columns, scheme.group)  # each group of the scheme lies in one group of the format
    return scales[:, first // (form.group or columns)]


def _quantized_layer(source: Source, index: int, parts: Sequence[StockTensor], scheme: Scheme) -> Iterator[Named]:
    slots, dtype = main_slots(source.plan.layers[index]), FLOAT_DTYPES[source.plan.model.dtype]
    for expert, slot in enumerate(slots):
        matrices = source.experts.matrices(index, slot)
        for part in (part for part in parts if part.expert == expert):
            matrix = matrices[part.which]
            assert isinstance(matrix, QuantizedMatrix), "a quantized layer holds quantized experts"
            path = part.name.removesuffix(".weight")
            for name, tensor in stored(matrix, part.start, part.stop, scheme, dtype).items():
                yield f"{path}.{name}", tensor


def _fused_layer(source: Source, index: int) -> Iterator[Named]:
    """A 16-bit layer beside packed ones: under fused names, which no reader takes for packed experts."""
    layer = source.layers[index]
    path, tensors = stock_path(source.model, layer.path), float_experts(source, index)
    for name, _ in stacked_parameters(layer):
        yield f"{path}.{name}", tensors[f"{layer.path}.{name}"]


def _target(tensors: Sequence[StockTensor]) -> str:
    """A pattern of compressed-tensors that matches the experts of one layer, wherever a reader hangs the model."""
    names = [tensor.name.removesuffix(".weight").split(".") for tensor in tensors]
    depth = next(i for i, level in enumerate(zip(*names, strict=False)) if len(set(level)) > 1)
    path = r"\.".join(re.escape(part) for part in names[0][:depth])
    return rf"re:(.*\.)?{path}\.[^.]*\d+\..*"


def _other_linears(source: Source) -> list[str]:
    """Stock paths of all linear modules that are not routed experts."""
    experts = tuple(f"{layer.path}." for layer in source.layers)
    paths = [
        path
        for path, module in source.model.named_modules()
        if isinstance(module, nn.Linear) and not f"{path}.".startswith(experts)
    ]
    names = stock_state(source.model, {f"{path}.weight": torch.empty(1, 1) for path in paths})
    return sorted(name.removesuffix(".weight") for name in names)


def _widened(own: Sequence[Scheme | None], schemes: Sequence[Scheme | None], planned: int, written: int) -> str:
    """What is said of layers that are stored wider than the plan has them."""
    wider = [i for i, (mine, used) in enumerate(zip(own, schemes, strict=True)) if mine != used]
    if not wider:
        return ""
    used = next(scheme for scheme in schemes if scheme is not None)
    per = "row" if used.group is None else f"{used.group} columns"
    return (
        f"{len(wider)} layers are stored in {used.bits} bits with one scale per {per}, since stock transformers reads one "
        f"symmetric scheme for all experts: {written / max(planned, 1) - 1:+.1%} bytes of experts, the same values. "
        "For vLLM alone, --set by_layer=true keeps each layer's own."
    )


def _fused(layers: int) -> str:
    """What is said of 16-bit layers beside packed ones."""
    if not layers:
        return ""
    return (
        f"{layers} layers stay in 16 bits, as fused tensors, since stock transformers reads them no other way here. vLLM reads "
        "such tensors of families with gate_proj, up_proj and down_proj only; for Mixtral in vLLM give --set by_layer=true."
    )
