"""Storage formats of an expert's weights and their exact bytes; no tensors here, so planning needs no torch.

A matrix is [rows = output channels, columns = inputs]. A quantized row is packed on its own:
ceil(columns * bits / 8) bytes, followed in a second tensor by one bf16 scale per group of columns
(per row when `group` is None). Formats are symmetric: there are no zero points.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from equipoise.errors import EquipoiseError

SCALE_BYTES = 2
FLOATS = {"fp32": 32, "fp16": 16, "bf16": 16}


@dataclass(frozen=True, slots=True)
class Precision:
    """One storage format of expert weights.

    Attributes:
        name: "fp32", "fp16", "bf16", "int8" or "int4-gN".
        bits: bits of one stored weight, scales not counted.
        group: columns that share one scale; None for one scale per row; unused by floats.
    """

    name: str
    bits: int
    group: int | None = None

    @property
    def is_float(self) -> bool:
        """True for formats without scales."""
        return self.name in FLOATS

    def matrix_bytes(self, rows: int, columns: int) -> int:
        """Bytes of one [rows, columns] matrix: packed weights plus scales."""
        packed = rows * ((columns * self.bits + 7) // 8)
        if self.is_float:
            return packed
        groups = 1 if self.group is None else -(-columns // self.group)
        return packed + rows * groups * SCALE_BYTES

    def expert_bytes(self, matrices: Sequence[tuple[int, int]], vector_elements: int = 0) -> int:
        """Bytes of one expert: its matrices in this format, and its biases in at least 16 bits (they are not quantized)."""
        vector_bytes = 4 if self.name == "fp32" else 2
        return sum(self.matrix_bytes(r, c) for r, c in matrices) + vector_elements * vector_bytes


def precision(name: str) -> Precision:
    """The format of a name: fp32, fp16, bf16, int8, int4 (= int4-g32), int4-g64, ...

    Raises:
        EquipoiseError: unknown name.
    """
    if name in FLOATS:
        return Precision(name, FLOATS[name])
    if name == "int8":
        return Precision("int8", 8)
    if name == "int4":
        return Precision("int4-g32", 4, 32)
    match = re.fullmatch(r"int4-g(\d+)", name)
    if match and int(match[1]) > 0:
        return Precision(name, 4, int(match[1]))
    raise EquipoiseError(f"unknown precision '{name}'; known: fp32, fp16, bf16, int8, int4, int4-gN with N columns per scale.")
