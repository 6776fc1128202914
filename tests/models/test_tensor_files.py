from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from equipoise.errors import CheckpointError, EquipoiseError
from equipoise.models.tensor_files import DTYPES, TensorFiles, write_tensors

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
kinds = st.sampled_from(sorted(DTYPES.values(), key=str))
tensor_sets = st.dictionaries(st.text("abc.", min_size=1, max_size=6), st.tuples(shapes, kinds), max_size=6)


def made(spec: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: (torch.rand(shape) * 100).to(dtype) for name, (shape, dtype) in spec.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(bits(a[k]), bits(b[k])) for k in a
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@settings(max_examples=40, deadline=None)
@given(spec=tensor_sets)
def test_files_are_those_of_the_safetensors_library(spec, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory, tensors = tmp_path_factory.mktemp("files"), made(spec)
    write_tensors(directory / "ours", tensors, {"note": "x"})
    assert same(load_file(directory / "ours"), tensors)
    assert same(dict(TensorFiles([directory / "ours"])), tensors)
    if tensors:
        save_file(tensors, directory / "theirs")
        assert same(dict(TensorFiles([directory / "theirs"])), tensors)
    assert TensorFiles([directory / "ours"]).metadata == {"format": "pt", "note": "x"}
    first = (directory / "ours").read_bytes()
    write_tensors(directory / "ours", dict(reversed(tensors.items())), {"note": "x"})
    assert (directory / "ours").read_bytes() == first


def test_a_view_takes_no_memory(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", {"a": torch.zeros(16 << 20)})
    file = TensorFiles([tmp_path / "x"])
    assert file.nbytes("a") == 64 << 20
    assert file["a"].data_ptr() == file["a"].data_ptr()  # the same place: nothing was copied


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.zeros(8)})
    whole = path.read_bytes()
    for damaged in (whole[:-4], whole[:20], b"", whole[:8] + b"[]" + whole[10:], whole.replace(b"F32", b"F31")):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"x\.safetensors"):
            TensorFiles([path])
    with pytest.raises(CheckpointError, match="is missing; copy it again"):
        TensorFiles([tmp_path / "nothing"])


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(EquipoiseError, match=r"torch\.complex64, which cannot be written"):
        write_tensors(tmp_path / "x", {"a": torch.zeros(2, dtype=torch.complex64)})
    with pytest.raises(EquipoiseError, match="Choose a place"):
        write_tensors(tmp_path / "no" / "x", {"a": torch.zeros(2)})
    assert not list(tmp_path.iterdir())
