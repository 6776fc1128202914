"""Safetensors files copied with tensors renamed and rows reordered, byte by byte: any number format, no model loaded.

Shapes: E rows that are put in order, of any axis.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from equipoise.errors import CheckpointError

Ints = NDArray[np.int64]
MAX_HEADER_BYTES = 100_000_000
"""Largest header that the format allows."""

CHUNK = 1 << 24


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where one tensor lies in a file.

    Attributes:
        shape: as declared.
        start: first byte, counted from the start of the file.
        end: byte after the last.
    """

    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True, eq=False)
class Reorder:
    """A tensor's rows in a new order: row i of the new tensor is row order[i] of the old."""

    axis: int
    order: Ints


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors that a safetensors file declares, checked to lie within it.

    Raises:
        CheckpointError: missing, truncated, or not a safetensors file.
    """
    return _header(path)[1]


def rewrite(path: Path, out: Path, names: Mapping[str, str], reorders: Mapping[str, Reorder]) -> None:
    """Copy a safetensors file with other names and orders; memory stays bounded by one row and a buffer.

    Args:
        path: the file.
        out: where to; must not exist.
        names: new name by old name; tensors that are not named keep theirs.
        reorders: by old name.

    Raises:
        CheckpointError: not a whole safetensors file, or a tensor whose rows are not whole bytes.
    """
    header, tensors = _header(path)
    renamed = {names.get(name, name): value for name, value in header.items()}
    assert len(renamed) == len(header), f"names of '{path}' must stay distinct"
    text = json.dumps(renamed, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format pads with spaces so that tensors are aligned
    try:
        with path.open("rb") as source, out.open("xb") as target:
            target.write(len(text).to_bytes(8, "little") + text)
            begin = target.tell() - _data_start(source)
            for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
                source.seek(tensor.start)
                target.seek(begin + tensor.start)
                if name in reorders:
                    _copy_rows(source, target, tensor, reorders[name], f"'{path}': {name}")
                else:
                    _copy(source, target, tensor.end - tensor.start)
            target.flush()
            os.fsync(target.fileno())
    except OSError as error:
        raise CheckpointError(f"cannot write '{out}': {error.strerror or error}. Choose a place with enough room.") from error


def _header(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = _data_start(file)
            if start - 8 > MAX_HEADER_BYTES or start > size:
                raise ValueError(f"its header of {start - 8:,} bytes does not fit")
            header = json.loads(file.read(start - 8))
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            shape, (first, last) = tuple(int(n) for n in entry["shape"]), entry["data_offsets"]
            if not 0 <= first <= last <= size - start or any(n < 0 for n in shape):
                raise ValueError(f"tensor '{name}' is declared beyond its end")
            tensors[name] = Tensor(shape, start + first, start + last)
    except OSError as error:
        raise CheckpointError(f"cannot read '{path}': {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is not a whole safetensors file: {error}. Copy it again.") from error
    return header, tensors


def _data_start(file: IO[bytes]) -> int:
    file.seek(0)
    return 8 + int.from_bytes(file.read(8), "little")


def _copy(source: IO[bytes], target: IO[bytes], size: int) -> None:
    while size > 0:
        part = source.read(min(size, CHUNK))
        if not part:
            raise CheckpointError(f"'{source.name}' ended too early; copy it again.")
        target.write(part)
        size -= len(part)


def _copy_rows(source: IO[bytes], target: IO[bytes], tensor: Tensor, reorder: Reorder, what: str) -> None:
    outer = math.prod(tensor.shape[: reorder.axis])
    row, rest = divmod(tensor.end - tensor.start, outer * len(reorder.order))
    if rest or tensor.shape[reorder.axis] != len(reorder.order):
        raise CheckpointError(f"{what} has no {len(reorder.order)} rows of whole bytes; this checkpoint cannot be permuted.")
    for block in range(outer):
        for index in reorder.order.tolist():
            source.seek(tensor.start + (block * len(reorder.order) + index) * row)
            _copy(source, target, row)
