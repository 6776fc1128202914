"""Files that somebody else wrote, read within bounded memory: their sizes are checked before anything is allocated.

Every reader here raises `EquipoiseError` for a file that is missing, truncated, garbled, or declares more than it holds.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from equipoise.errors import ProfileError, missing_package

MAX_BYTES = 1 << 31
"""What the arrays of one file may take in memory."""

MAX_TEXT_BYTES = 1 << 28
"""Largest text file that is parsed; parsed text takes many times its size."""


def refuse(path: Path, error: Exception | str, kind: str) -> NoReturn:
    """Raise that a file is not a whole file of its kind.

    Args:
        path: the file.
        error: what the parser said.
        kind: what the file should have been, with its article.
    """
    said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    raise ProfileError(f"'{path}' is not {kind} that is whole: {said}. Write or copy the file again.") from (
        error if isinstance(error, Exception) else None
    )


def size_of(path: Path, limit: int = MAX_BYTES) -> int:
    """Bytes of a regular file, checked against a limit."""
    try:
        if not path.is_file():
            raise ProfileError(f"'{path}' is not a file; give the file that the engine wrote.")
        size = path.stat().st_size
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise ProfileError(f"cannot read '{path}': {error}.") from error
    if size > limit:
        raise ProfileError(f"'{path}' has {size:,} bytes; at most {limit:,} are read. Split it into several files.")
    return size


def read_text(path: Path) -> str:
    """A text file in UTF-8, at most `MAX_TEXT_BYTES` long."""
    size_of(path, MAX_TEXT_BYTES)
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        refuse(path, error, "a text file")


def read_json(path: Path) -> Any:
    """Parsed JSON; NaN and infinities, which JSON does not have, are refused."""
    return parse_json(read_text(path), path)


def parse_json(text: str, path: Path) -> Any:
    """Parse JSON that was read from a file, which errors name."""

    def constant(name: str) -> NoReturn:
        raise ValueError(f"it holds {name}")

    try:
        return json.loads(text, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        refuse(path, error, "a JSON file")


def read_npy(path: Path) -> NDArray[Any]:
    """The array of a `.npy` file of numbers."""
    size = size_of(path)
    try:
        with path.open("rb") as file:
            return _array(file, size)
    except Exception as error:  # numpy's header parser raises whatever it trips over
        refuse(path, error, "a .npy file")


def read_npz(path: Path, wanted: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
    """The arrays of a `.npz` file of numbers and names.

    Args:
        path: the file.
        wanted: names to read; all when omitted.
    """
    size_of(path)
    names = None if wanted is None else {f"{name}.npy" for name in wanted}
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if names is None or m.filename in names]
            total = sum(member.file_size for member in members)
            if total > MAX_BYTES:
                raise ValueError(f"its arrays take {total:,} bytes, at most {MAX_BYTES:,} are read")
            for member in members:
                with archive.open(member) as file:
                    arrays[member.filename.removesuffix(".npy")] = _array(file, member.file_size)
    except Exception as error:  # zipfile, zlib and numpy raise whatever they trip over
        refuse(path, error, "a .npz file")
    return arrays


def _array(file: IO[bytes], size: int) -> NDArray[Any]:
    """One array in numpy's format, of which `size` bytes exist, header included."""
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"array format version {version} is not known")
    shape, fortran, dtype = readers[version](file)
    if dtype.kind not in "biufU":
        raise ValueError(f"arrays of dtype {dtype} are not read")
    if any(n < 0 for n in shape):
        raise ValueError(f"shape {shape} is negative")
    number = int(np.prod([int(n) for n in shape], dtype=object))
    held = size - file.tell()
    if number * dtype.itemsize != held:
        raise ValueError(f"shape {shape} of {dtype} needs {number * dtype.itemsize:,} bytes, {held:,} are there")
    data = file.read(held)
    flat = np.frombuffer(data, dtype, number)
    return flat.reshape(shape, order="F" if fortran else "C").copy()


def npy_bytes(array: NDArray[Any]) -> bytes:
    """A `.npy` file of an array."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def npz_bytes(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """A `.npz` file of arrays."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def read_torch(path: Path) -> Any:
    """What a `.pt` file holds, with its tensors as numpy arrays; nothing in it is executed.

    Raises:
        ProfileError: torch is not installed, or the file is not a whole torch file of plain data and tensors.
    """
    torch = _torch(f"reading '{path}'")
    size = size_of(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
            raise ValueError("its parts are compressed, as torch never writes them")
        # Mapped storages cannot grow, so a tensor that declares more than the file holds is an error, not an allocation.
        content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
        return _numpy(content, size, torch)
    except Exception as error:  # torch's restricted unpickler raises whatever it trips over
        refuse(path, error, "a torch file")


def torch_bytes(content: Mapping[str, NDArray[Any]]) -> bytes:
    """A `.pt` file of a dictionary of arrays, as tensors."""
    torch = _torch("writing a .pt file")
    buffer = io.BytesIO()
    torch.save({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in content.items()}, buffer)
    return buffer.getvalue()


def _torch(purpose: str) -> Any:
    try:
        import torch
    except ImportError as error:
        raise missing_package(f"{purpose} needs", "torch") from error
    return torch


def _numpy(value: Any, size: int, torch: Any) -> Any:
    """Tensors in nested dictionaries and lists as arrays of their own; views that repeat their storage are refused."""
    if isinstance(value, torch.Tensor):
        if value.numel() * value.element_size() > size:
            raise ValueError(f"a tensor of shape {tuple(value.shape)} declares more than the file holds")
        return value.detach().contiguous().numpy().copy()
    if isinstance(value, dict):
        return {key: _numpy(item, size, torch) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_numpy(item, size, torch) for item in value]
    return value
