"""Storage formats of an expert's weights and their exact bytes; no tensors here, so planning needs no torch.

A matrix is [rows = output channels, columns = inputs]. Quantized weights lie row by row as in compressed-tensors
checkpoints: bytes for 8 bits, for fewer a dense stream of bits in 32-bit words, each row starting a new word. Beside them
lies one bf16 scale per row and group of columns (per row when `group` is None; a last group may be shorter than the others)
and, in asymmetric formats, one zero point per scale: bytes for 8 bits, for fewer packed like the weights, along the rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from equipoise.errors import EquipoiseError

SCALE_BYTES = 2
WORD_BITS = 32
FLOATS = {"fp32": 32, "fp16": 16, "bf16": 16}
INTEGERS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
DEFAULT_GROUP = 32
"""Columns per scale where a name gives none; formats of 8 bits then have one scale per row."""
KNOWN = "fp32, fp16, bf16, fp8, int8, int4, int3, int2; integers also as int4-gN with N columns per scale, and with -asym"


@dataclass(frozen=True, slots=True)
class Precision:
    """One storage format of expert weights.

    Attributes:
        name: "fp32", "fp16", "bf16", "fp8", or an integer format such as "int8", "int4-g32" or "int3-g64-asym".
        bits: bits of one stored weight, scales not counted.
        group: columns that share one scale; None for one scale per row; unused by floats.
        symmetric: whether zero is always code 0; otherwise each scale has a zero point.
    """

    name: str
    bits: int
    group: int | None = None
    symmetric: bool = True

    @property
    def is_float(self) -> bool:
        """True for formats without scales."""
        return self.name in FLOATS

    @property
    def is_fp8(self) -> bool:
        """True for 8-bit floats (e4m3) with one scale per row."""
        return self.name == "fp8"

    def packed_columns(self, columns: int) -> int:
        """Stored elements of one row: a byte or float per weight, or 32-bit words of packed codes."""
        return columns if self.bits >= 8 else -(-columns * self.bits // WORD_BITS)

    def groups(self, columns: int) -> int:
        """Scales of one row; none in float formats."""
        if self.is_float:
            return 0
        return 1 if self.group is None else -(-columns // self.group)

    def zero_rows(self, rows: int) -> int:
        """Stored elements of one column of zero points: bytes, or 32-bit words packed along the rows; 0 when symmetric."""
        if self.symmetric:
            return 0
        return rows if self.bits == 8 else -(-rows * self.bits // WORD_BITS)

    def matrix_bytes(self, rows: int, columns: int) -> int:
        """Bytes of one [rows, columns] matrix as stored: weights, scales, zero points and the padding of each."""
        element = self.bits // 8 if self.bits >= 8 else WORD_BITS // 8
        zero_element = 1 if self.bits == 8 else WORD_BITS // 8
        scales = self.groups(columns) * (rows * SCALE_BYTES + self.zero_rows(rows) * zero_element)
        return rows * self.packed_columns(columns) * element + scales

    def expert_bytes(self, matrices: Sequence[tuple[int, int]], vector_elements: int = 0) -> int:
        """Bytes of one expert: its matrices in this format, and its biases in at least 16 bits (they are not quantized).

        Args:
            matrices: (rows, columns) of each; all but the last read the same inputs and are stored as one. May be empty.
            vector_elements: elements of biases.
        """
        ups, downs = matrices[:-1], matrices[-1:]
        stored = [(sum(rows for rows, _ in ups), ups[0][1]), *downs] if ups else downs
        vector_bytes = 4 if self.name == "fp32" else 2
        return sum(self.matrix_bytes(r, c) for r, c in stored) + vector_elements * vector_bytes


def precision(name: str) -> Precision:
    """The format of a name.

    Args:
        name: fp32, fp16, bf16, fp8, or int8, int4, int3, int2; integers with "-gN" for N columns per scale (8 bits: one
            scale per row without it, fewer bits: N = 32), and with "-asym" for zero points. "int4" is "int4-g32".

    Raises:
        EquipoiseError: unknown name.

    Examples:
        >>> precision("int4").name, precision("int8").group
        ('int4-g32', None)
        >>> precision("int4").matrix_bytes(rows=64, columns=128)  # half a byte a weight, and 4 scales of 2 bytes a row
        4608
    """
    if name in FLOATS:
        return Precision(name, FLOATS[name])
    if name == "fp8":
        return Precision(name, 8)
    match = re.fullmatch(r"(int[2348])(?:-g([1-9]\d{0,8}))?(-asym)?", name)
    if match is None:
        raise EquipoiseError(f"unknown precision '{name}'; known: {KNOWN}.")
    bits = INTEGERS[match[1]]
    group = int(match[2]) if match[2] else (None if bits == 8 else DEFAULT_GROUP)
    canonical = match[1] + (f"-g{group}" if group else "") + (match[3] or "")
    return Precision(canonical, bits, group, symmetric=not match[3])
