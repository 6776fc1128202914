"""Safetensors files as views of the file and as a stream: what is read or written never lies in memory as a whole."""

from __future__ import annotations

import json
import math
import mmap
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equipoise.errors import CheckpointError, EquipoiseError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's names of element types."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}
STRIDE = 1 << 24


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of several safetensors files by name.

    A tensor is a view of its file: it takes no memory but what the operating system keeps of the file, and may drop.
    Views must not be written to.

    Attributes:
        metadata: of all files together.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        """Read the headers.

        Args:
            paths: the files; a name that several hold is read from the last.

        Raises:
            CheckpointError: a file is missing, truncated or not a safetensors file.
        """
        self.metadata: dict[str, str] = {}
        self._entries: dict[str, tuple[mmap.mmap, torch.dtype, tuple[int, ...], int]] = {}
        for path in map(Path, paths):
            data, start, header = _open(path)
            self.metadata |= header.pop("__metadata__", {})
            for name, entry in header.items():
                self._entries[name] = (data, *_checked(path, name, entry, start, len(data)))

    def __getitem__(self, name: str) -> Tensor:
        data, dtype, shape, start = self._entries[name]
        if not math.prod(shape):
            return torch.empty(shape, dtype=dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(data, dtype=dtype, count=math.prod(shape), offset=start).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def nbytes(self, name: str) -> int:
        """Bytes of one tensor."""
        _, dtype, shape, _ = self._entries[name]
        return int(math.prod(shape) * dtype.itemsize)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, tensor by tensor, whole or not at all; the same tensors give the same bytes.

    Args:
        path: the file; replaced if it exists.
        tensors: by name, on any device.
        metadata: text by key.

    Raises:
        EquipoiseError: a tensor of a type that the format does not have, or no room.
    """
    path = Path(path)
    # Wide elements first, so that every tensor is aligned to its elements without gaps, which the format forbids.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | dict(sorted((metadata or {}).items()))}
    end = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in NAMES:
            raise EquipoiseError(f"tensor '{name}' is of {tensor.dtype}, which cannot be written to '{path}'.")
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                _write(file, tensors[name])
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise EquipoiseError(f"cannot write '{path}': {error.strerror or error}. Choose a place with enough room.") from error


def _write(file: Any, tensor: Tensor) -> None:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    for start in range(0, len(data), STRIDE):
        file.write(data[start : start + STRIDE])


def _open(path: Path) -> tuple[mmap.mmap, int, dict[str, Any]]:
    """The file as memory, where its tensors start, and its header."""
    try:
        with path.open("rb") as file:
            # Shared and read-only: pages of the file itself, which count as no one's memory and need no swap.
            data = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        size = int.from_bytes(data[:8], "little")
        if len(data) < 8 or size > len(data) - 8:
            raise ValueError(f"its header of {size:,} bytes does not fit")
        header = json.loads(data[8 : 8 + size])
        if not isinstance(header, dict):
            raise ValueError("its header is no table of tensors")
    except FileNotFoundError as error:
        raise CheckpointError(f"the checkpoint is not whole: '{path}' is missing; copy it again.") from error
    except OSError as error:
        raise CheckpointError(f"cannot read '{path}': {error.strerror or error}.") from error
    except ValueError as error:
        raise CheckpointError(f"'{path}' is not a whole safetensors file: {error}. Copy it again.") from error
    return data, 8 + size, header


def _checked(path: Path, name: str, entry: Any, start: int, size: int) -> tuple[torch.dtype, tuple[int, ...], int]:
    try:
        dtype, shape, (first, last) = DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"]), entry["data_offsets"]
        if last - first != math.prod(shape) * dtype.itemsize or not 0 <= first <= last <= size - start:
            raise ValueError("its place in the file is not that of its shape")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"'{path}' is not a whole safetensors file: tensor '{name}': {error}. Copy it again.") from error
    return dtype, shape, start + first
