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
        ("fp8", 6 * 10 + 6 * 2),
        ("int8-g4", 6 * 10 + 6 * 3 * 2),
        ("int4", 6 * 2 * 4 + 6 * 2),  # 40 bits a row: two words
        ("int4-g4", 6 * 2 * 4 + 6 * 3 * 2),
        ("int3-g8", 6 * 1 * 4 + 6 * 2 * 2),
        ("int2", 6 * 1 * 4 + 6 * 2),
        ("int8-asym", 6 * 10 + 6 * 2 + 6),
        ("int4-g4-asym", 6 * 2 * 4 + 6 * 3 * 2 + 1 * 3 * 4),  # six zero points of a group share one word
    ],
)
def test_bytes_of_a_matrix_count_scales_zero_points_and_padding(name, expected):
    assert precision(name).matrix_bytes(6, 10) == expected


@pytest.mark.parametrize(
    ("name", "canonical", "bits", "group", "symmetric"),
    [
        ("int4", "int4-g32", 4, 32, True),
        ("int3-asym", "int3-g32-asym", 3, 32, False),
        ("int2-g128", "int2-g128", 2, 128, True),
        ("int8", "int8", 8, None, True),
        ("int8-g64-asym", "int8-g64-asym", 8, 64, False),
        ("fp8", "fp8", 8, None, True),
    ],
)
def test_names(name, canonical, bits, group, symmetric):
    form = precision(name)
    assert (form.name, form.bits, form.group, form.symmetric) == (canonical, bits, group, symmetric)
    assert precision(form.name) == form


def test_matrices_that_read_the_same_inputs_are_stored_as_one():
    form = precision("int4-g8-asym")
    assert form.expert_bytes([(10, 8), (10, 8), (8, 10)]) == form.matrix_bytes(20, 8) + form.matrix_bytes(8, 10)
    assert form.matrix_bytes(20, 8) < 2 * form.matrix_bytes(10, 8)  # one padding of zero points, not two


def test_unknown_sizes_have_no_bytes():
    assert precision("int8").expert_bytes(()) == 0


def test_vectors_are_not_quantized():
    assert precision("int8").expert_bytes([(4, 4)], vector_elements=5) == 16 + 8 + 10


@pytest.mark.parametrize(
    "name", ["int5", "int4-g0", "int4-g", "int4-asym-g32", "fp8-g32", "fp8-asym", "bf16-asym", "INT8", "int4\n", ""]
)
def test_unknown_names_are_refused(name):
    with pytest.raises(EquipoiseError, match="unknown precision"):
        precision(name)
