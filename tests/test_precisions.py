from __future__ import annotations

import pytest

from equipoise.errors import EquipoiseError
from equipoise.precisions import precision


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fp32", 4 * 6 * 10),
        ("bf16", 2 * 6 * 10),
        ("int8", 6 * 10 + 6 * 2),
        ("int4", 6 * 5 + 6 * 2),
        ("int4-g4", 6 * 5 + 6 * 3 * 2),
    ],
)
def test_bytes_of_a_matrix_count_scales_and_padding(name, expected):
    assert precision(name).matrix_bytes(6, 10) == expected


def test_odd_widths_pad_each_row_to_whole_bytes():
    assert precision("int4-g64").matrix_bytes(3, 7) == 3 * 4 + 3 * 2


def test_vectors_are_not_quantized():
    assert precision("int8").expert_bytes([(4, 4)], vector_elements=5) == 16 + 8 + 10


@pytest.mark.parametrize("name", ["int5", "int4-g0", "INT8", ""])
def test_unknown_names_are_refused(name):
    with pytest.raises(EquipoiseError, match="unknown precision"):
        precision(name)
