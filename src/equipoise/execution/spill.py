"""Tensors moved from memory into files while nobody computes with them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equipoise.errors import EquipoiseError

SMALLEST = 1 << 16
"""Bytes below which a tensor stays where it is."""


class Spill:
    """A directory for tensors; its files are gone when their tensors are, or when the process is.

    Args:
        directory: where to; made if missing. None leaves all tensors in memory.
    """

    def __init__(self, directory: str | Path | None) -> None:
        self.directory = None if directory is None else Path(directory)
        if self.directory is not None:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise EquipoiseError(f"cannot spill to '{directory}': {error.strerror or error}.") from error

    def move(self, tensor: Tensor) -> Tensor:
        """A tensor of the same content in a file; small ones, and those of other devices, as they are."""
        if self.directory is None or tensor.nbytes < SMALLEST or tensor.device.type != "cpu" or _in_file(tensor):
            return tensor
        try:
            handle, name = tempfile.mkstemp(dir=self.directory, prefix="spill.")
            os.posix_fallocate(handle, 0, tensor.nbytes)  # a full disk is an error here, not a signal at some later store
            os.close(handle)
        except OSError as error:
            raise EquipoiseError(f"cannot spill to '{self.directory}': {error.strerror or error}.") from error
        try:
            stored = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        finally:
            os.unlink(name)  # the mapping keeps the content until the tensor is gone
        return stored.view(tensor.shape).copy_(tensor)

    def move_all(self, value: Any) -> None:
        """Move all tensors within arguments of a call, in place, so that whoever else holds them follows."""
        if self.directory is None:
            return
        if isinstance(value, Tensor):
            moved = self.move(value)
            if moved is not value:
                value.data = moved
        elif isinstance(value, Mapping | tuple | list):
            for part in value.values() if isinstance(value, Mapping) else value:
                self.move_all(part)


def _in_file(tensor: Tensor) -> bool:
    return tensor.untyped_storage().filename is not None
