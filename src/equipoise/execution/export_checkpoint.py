"""A balanced model as a plain checkpoint that any tool loads: the weights that its slots compute with, and no plan.

Shapes: E experts, P slots of a layer.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equipoise.errors import CheckpointError
from equipoise.execution.checkpoint import put_in_place
from equipoise.execution.stock_names import stock_state
from equipoise.execution.stock_source import Matrix, Source
from equipoise.models.layers import MoELayer, expert_matrices, expert_vectors
from equipoise.models.tensor_files import write_tensors
from equipoise.planning.per_layer import main_slots
from equipoise.quantization.formats import FLOAT_DTYPES

SHARD_BYTES = 2 << 30
INDEX = "model.safetensors.index.json"
Named = tuple[str, Tensor]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Exported:
    """What an export wrote.

    Attributes:
        directory: where.
        bytes: of all tensors.
        expert_bytes: of the experts' tensors among them.
        notes: what a reader must know of what was left out or taken.
        facts: figures of the kind of export, for `--json`.
    """

    directory: Path
    bytes: int
    expert_bytes: int
    notes: list[str]
    facts: dict[str, Any] = field(default_factory=dict)


def export_checkpoint(source: Source, out: str | Path, *, progress: Progress = lambda done, of: None) -> Exported:
    """Write a balanced model as a stock checkpoint in the model's own dtype, layer by layer.

    Args:
        source: the balanced model, or a stock one and its plan.
        out: a new or empty directory.
        progress: told (layers done, layers in all).

    Raises:
        CheckpointError: the source is not whole, or the destination cannot be written.
    """
    notes = [note for note in (replicas_left_out(source), _mixed_copies(source)) if note]
    written = write_checkpoint(source, out, _layers(source, progress), {})
    return Exported(Path(out), *written, notes)


def _layers(source: Source, progress: Progress) -> Iterator[Named]:
    """The expert tensors of all layers under stock names."""
    for index, layer in enumerate(source.layers):
        yield from stock_state(source.model, float_experts(source, index)).items()
        layer.experts.to("meta")
        progress(index + 1, len(source.layers))


def float_experts(source: Source, index: int) -> dict[str, Tensor]:
    """One layer's expert parameters under the model's own names, filled from the slots.

    The experts module itself is filled, through the views that its adapter gives of each expert, so that every family's
    layout comes out right. A parameter that no expert wrote (a norm beside them) is not an expert's and is left out.
    """
    layer, dtype = source.layers[index], FLOAT_DTYPES[source.plan.model.dtype]
    layer.experts.to_empty(device="cpu")
    parameters = dict(layer.experts.named_parameters())
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.data = parameter.data.to(dtype).fill_(torch.nan)
        for expert, slot in enumerate(main_slots(source.plan.layers[index])):
            _write_expert(layer, expert, source.experts.matrices(index, slot), source.experts.biases(index, slot), dtype)
        for parameter in parameters.values():
            if parameter.dim() == 3 and len(parameter) > layer.num_experts:
                parameter[layer.num_experts :] = 0  # LongCat stacks weights for its identity experts too, and never reads them
    blank = {name: bool(torch.isnan(p).any()) for name, p in parameters.items()}
    for name, parameter in parameters.items():
        if blank[name] and not torch.isnan(parameter).all():
            raise CheckpointError(f"'{source.directory}' holds NaN weights, or a part of '{layer.path}.{name}'; save it again.")
    return {f"{layer.path}.{name}": parameter.data for name, parameter in parameters.items() if not blank[name]}


def _write_expert(layer: MoELayer, expert: int, stored: Iterable[Matrix], biases: list[Tensor], dtype: torch.dtype) -> None:
    up, down = (m.to(dtype) if isinstance(m, Tensor) else m.dequantize(dtype) for m in stored)
    *ups, last = expert_matrices(layer, expert)
    for view, part in zip(ups, up.split([len(view) for view in ups]), strict=True):
        view.copy_(part)
    last.copy_(down)
    for vector, bias in zip(expert_vectors(layer, expert), biases, strict=True):
        vector.copy_(bias)


def write_checkpoint(
    source: Source, out: str | Path, experts: Iterable[Named], quantization: dict[str, Any]
) -> tuple[int, int]:
    """Write a stock checkpoint, whole or not at all: the given experts, and everything else as it is in the source.

    Args:
        source: where all but the experts is copied from, tensor by tensor.
        out: a new or empty directory.
        experts: names and tensors.
        quantization: `quantization_config` of config.json; none when empty.

    Returns:
        bytes of all tensors, and of the experts among them.

    Raises:
        CheckpointError: the destination is not empty or cannot be written.
    """
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"'{out}' is not an empty directory; choose a new one.")
    temporary: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        names = source.experts.others()
        shards = Shards(temporary)
        for name in names:
            shards.add(name, source.files[name])
        other_bytes = shards.total
        for name, tensor in experts:
            shards.add(name, tensor)
        shards.finish()
        _copy_files(source, temporary, quantization)
        put_in_place(temporary, out)
    except OSError as error:
        raise CheckpointError(f"cannot write '{out}': {error.strerror or error}. Choose a place with enough room.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return shards.total, shards.total - other_bytes


class Shards:
    """Files of a checkpoint, written as soon as one is full."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.total = directory, 0
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._files: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor."""
        if self._held and self._held_bytes + tensor.nbytes > SHARD_BYTES:
            self._write()
        assert name not in self._held, f"'{name}' is given twice"
        self._held[name] = tensor
        self._held_bytes += tensor.nbytes
        self.total += tensor.nbytes

    def finish(self) -> None:
        """Write what is left, and name the files as a checkpoint's are."""
        self._write()
        if len(self._files) == 1:
            self._part(0).rename(self.directory / "model.safetensors")
            return
        names = [f"model-{i + 1:05d}-of-{len(self._files):05d}.safetensors" for i in range(len(self._files))]
        for i, name in enumerate(names):
            self._part(i).rename(self.directory / name)
        placed = {tensor: name for tensors, name in zip(self._files, names, strict=True) for tensor in tensors}
        content = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(placed.items()))}
        (self.directory / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _write(self) -> None:
        write_tensors(self._part(len(self._files)), self._held)
        self._files.append(list(self._held))
        self._held, self._held_bytes = {}, 0

    def _part(self, index: int) -> Path:
        return self.directory / f"part-{index}.safetensors"


def _copy_files(source: Source, out: Path, quantization: dict[str, Any]) -> None:
    """The tokenizer and all else that is neither weights nor ours, and config.json."""
    for path in source.directory.iterdir():
        ours = path.name.startswith("equipoise") or path.name == "config.json"
        weights = path.suffix in {".safetensors", ".bin", ".pt", ".pth", ".gguf"} or path.name.endswith(".index.json")
        if path.is_file() and not ours and not weights:
            shutil.copy2(path, out / path.name)
    config = source.config | ({"quantization_config": quantization} if quantization else {})
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def replicas_left_out(source: Source) -> str:
    """What is said of copies, which a stock checkpoint has no place for."""
    extra = sum(c.num_slots - layer.num_experts for c, layer in zip(source.plan.layers, source.layers, strict=True))
    if not extra:
        return ""
    return (
        f"{extra} copies of experts are left out: a stock checkpoint holds each expert once. Copies are the engine's to place: "
        "export the plan for it as well (--to vllm, sglang, ...)."
    )


def _mixed_copies(source: Source) -> str:
    """Which copy speaks for an expert whose copies differ."""
    mixed = [
        (index, expert)
        for index, columns in enumerate(source.plan.layers)
        for expert in range(source.layers[index].num_experts)
        if len({p for p, e in zip(columns.precisions, columns.experts, strict=True) if e == expert}) > 1
    ]
    if not mixed:
        return ""
    where = ", ".join(f"{expert} of layer {index}" for index, expert in mixed[:5])
    more = f" and {len(mixed) - 5} more" if len(mixed) > 5 else ""
    return f"copies differ in precision for {len(mixed)} experts ({where}{more}); the copy of the most bits is taken."
