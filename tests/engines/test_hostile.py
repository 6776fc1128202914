"""Files that are cut, garbled or malicious: an error of ours, in little memory, and nothing left behind."""

from __future__ import annotations

import io
import json
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save as safetensors_bytes

from engines_support import placed, recorded
from equipoise.engines import READERS, read_plan, read_records, write_plan
from equipoise.errors import EquipoiseError, ProfileError

PROFILE = recorded(layers=4, experts=8)
PLANS = {
    "vllm": "x.jsonl",
    "sglang": "x.json",
    "tensorrt-llm": "x.yaml",
    "vllm-ascend": "x.json",
    "omni": "x.npy",
    "lmdeploy": "x.json",
    "deepseek": "x.npz",
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def npz(**arrays: object) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def torch_file(content: object) -> bytes:
    torch = pytest.importorskip("torch")
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def stat_file() -> bytes:
    torch = pytest.importorskip("torch")
    return torch_file({"rank": 0, "logical_count": torch.ones(3, 4, 8, dtype=torch.int32)})


def per_pass_file() -> bytes:
    torch = pytest.importorskip("torch")
    record = {"forward_pass_id": 0, "rank": 0, "global_physical_count": torch.ones(4, 8, dtype=torch.int32)}
    return torch_file({"records": [record], "last_physical_to_logical_map": torch.arange(8).repeat(4, 1)})


def parquet_file() -> bytes:
    pa = pytest.importorskip("pyarrow")
    buffer = io.BytesIO()
    table = pa.table({"layer": [0, 0, 1, 1], "expert": [0, 1, 0, 1], "count": [5, 6, 7, 8]})
    pytest.importorskip("pyarrow.parquet").write_table(table, buffer)
    return buffer.getvalue()


CSV = b"layer,expert,count,scenario\n" + b"".join(b"%d,%d,%d,chat\n" % (i, j, i + j + 1) for i in range(3) for j in range(4))
OMNI = b",ep_0,ep_1\nlayer_0,5,6\nlayer_1,7,8\n"
RECORDS: dict[str, tuple[str, str, Callable[[], bytes]]] = {
    "npz": ("table", "x.npz", lambda: npz(counts=np.ones((2, 3, 4), int), scenarios=np.array(["a", "b"]))),
    "csv": ("table", "x.csv", lambda: CSV),
    "parquet": ("table", "x.parquet", parquet_file),
    "stat": ("sglang", "x_1.5.pt", stat_file),
    "per_pass": ("sglang", "x_1.5_0.pt", per_pass_file),
    "omni": ("omni", "x.csv", lambda: OMNI),
    "lmdeploy": ("lmdeploy", "x.json", lambda: b"[[1, 2], [3, 4]]"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


def damaged(data: st.DataObject, whole: bytes) -> bytes:
    """A file that was cut, changed in some bytes, or both."""
    broken = bytearray(whole[: data.draw(st.integers(0, len(whole)), label="cut")])
    for position, value in data.draw(
        st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6), label="bytes"
    ):
        if broken:
            broken[position % len(broken)] = value
    return bytes(broken)


@pytest.mark.parametrize("kind", RECORDS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_records_are_an_error_or_a_profile(place, kind, data):
    engine, name, whole = RECORDS[kind]
    (place / kind).mkdir(exist_ok=True)
    path = place / kind / name
    path.write_bytes(damaged(data, whole()))
    try:
        profile = read_records(engine, [path])
    except EquipoiseError:
        return
    assert profile.load.min() >= 0
    assert profile.load.sum() > 0


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_statistics_directories_are_an_error_or_a_profile(place, data):
    path = place / "statistics"
    path.mkdir(exist_ok=True)
    meta = json.dumps({"num_experts": 4, "num_experts_per_token": 2}).encode()
    (path / "meta_info.json").write_bytes(damaged(data, meta) if data.draw(st.booleans()) else meta)
    tensors = safetensors_bytes({f"{i}_{layer}": np.ones(4, np.int64) for i in range(3) for layer in range(2)})
    (path / "rank0.safetensors").write_bytes(damaged(data, tensors))
    with suppress(EquipoiseError):
        assert read_records("tensorrt-llm", [path]).load.sum() > 0


@pytest.mark.parametrize("engine", PLANS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_plans_are_an_error_or_a_placement(place, engine, data):
    path = place / f"plan-{engine}" / PLANS[engine]
    path.parent.mkdir(exist_ok=True)
    write_plan(placed(PROFILE, 4, 8), engine, path)
    path.write_bytes(damaged(data, path.read_bytes()))
    try:
        physical = read_plan(engine, path, PROFILE, 4)
    except EquipoiseError:
        return
    assert all(set(row.tolist()) == set(range(8)) for row in physical)


@pytest.mark.parametrize("engine", ["sglang", "vllm-ascend", "lmdeploy", "tensorrt-llm", "vllm"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    value=JSON, key=st.sampled_from(["physical_to_logical_map", "layer_list", "initial_global_assignments", "moe_layer_count"])
)
def test_json_of_any_shape_is_an_error(place, engine, value, key):
    """JSON is YAML as well. Nothing that is drawn here has every expert in every layer."""
    path = place / f"json-{engine}" / PLANS[engine]
    path.parent.mkdir(exist_ok=True)
    for content in (value, {key: value}, {key: [value] * 4, "moe_layer_count": 4}):
        path.write_text(json.dumps(content))
        with pytest.raises(EquipoiseError):
            read_plan(engine, path, PROFILE, 4)


@pytest.mark.parametrize("engine", ["lmdeploy", "sglang"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=JSON)
def test_json_of_any_shape_is_an_error_or_a_profile(place, engine, value):
    path = place / f"records-{engine}.json"
    for content in (value, [value, value], {"logical_count": value}, {"records": value}, {"records": [value]}):
        path.write_text(json.dumps(content))
        with suppress(EquipoiseError):
            assert read_records(engine, [path]).load.sum() > 0


def header(shape: str, dtype: str = "<i8") -> bytes:
    """A `.npy` header that declares a shape, and no data."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (63 - (10 + len(text)) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def peak_of(action: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(EquipoiseError):
            action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "shape", ["(4294967296,)", "(-1,)", "(3, -5)", "(99999999999999999999,)", "(1, 4294967296, 4294967296)", "'x'", "(2,) * 9"]
)
def test_declared_sizes_are_not_allocated(tmp_path, shape):
    (tmp_path / "x.npy").write_bytes(header(shape) + b"\0" * 64)
    assert peak_of(lambda: read_plan("omni", tmp_path / "x.npy", PROFILE, 4)) < 1 << 21
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("counts.npy", header(shape) + b"\0" * 64)
    assert peak_of(lambda: read_records("table", [tmp_path / "x.npz"])) < 1 << 21


def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch):
    """A few kilobytes that unpack to more than may be read."""
    monkeypatch.setattr("equipoise.engines.untrusted.MAX_BYTES", 1 << 24)
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive, archive.open("counts.npy", "w") as file:
        file.write(header("(1, 1, 4194304)") + b"\0" * (1 << 25))
    assert path.stat().st_size < 1 << 18
    assert peak_of(lambda: read_records("table", [path])) < 1 << 20


def test_objects_are_not_unpickled(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(ProfileError, match=r"not a \.npy file"):
        read_plan("omni", tmp_path / "x.npy", PROFILE, 4)


def test_torch_files_run_nothing_and_declare_no_more_than_they_hold(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "x_1.5.pt"
    hit = tmp_path / "hit"

    class Bad:
        def __reduce__(self):
            return Path.write_text, (hit, "run")

    for content in (
        {"logical_count": Bad()},
        {"logical_count": torch.ones(1, dtype=torch.int32).expand(1000, 1000, 1000)},
        {"logical_count": torch.ones(3, 4, 8).to_sparse()},
        {"logical_count": torch.ones(3, 4, 8, dtype=torch.bfloat16)},
        {"logical_count": torch.ones(3, 4, 8, dtype=torch.complex64)},
        {"logical_count": "ten"},
        {"logical_count": None},
        {"records": [], "last_physical_to_logical_map": torch.ones(2, 2)},
        {"records": [{"rank": 10**9}]},
        {"records": 5},
        [1, 2],
        None,
    ):
        path.write_bytes(torch_file(content))
        assert peak_of(lambda: read_records("sglang", [path])) < 1 << 24
    assert not hit.exists()
    with zipfile.ZipFile(path) as source:
        parts = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    with pytest.raises(ProfileError, match="compressed"):
        read_records("sglang", [path])


def test_a_torch_tensor_larger_than_its_storage_is_not_allocated(tmp_path):
    """A hand-made pickle that asks for 2**33 elements of a storage of 12."""
    path = tmp_path / "x_1.5.pt"
    path.write_bytes(torch_file({"logical_count": pytest.importorskip("torch").ones(1, 3, 4, dtype=torch_int32())}))
    with zipfile.ZipFile(path) as source:
        parts = {name: source.read(name) for name in source.namelist()}
    name = next(name for name in parts if name.endswith("data.pkl"))
    small, large = b"K\x01K\x03K\x04\x87", b"K\x01J\x00\x00\x01\x00J\x00\x00\x02\x00\x87"
    assert small in parts[name], "torch pickles the size as three small integers"
    parts[name] = parts[name].replace(small, large)
    with zipfile.ZipFile(path, "w") as archive:
        for part, content in parts.items():
            archive.writestr(part, content)
    with pytest.raises(ProfileError, match="not a torch file"):
        read_records("sglang", [path])


def torch_int32():
    import torch

    return torch.int32


@pytest.mark.parametrize("engine", sorted(READERS.names()))
def test_nothing_there(tmp_path, engine):
    for path in (tmp_path / "missing.json", tmp_path / "missing.npz", tmp_path / "a\0b"):
        with pytest.raises(EquipoiseError):
            read_records(engine, [path])
    with pytest.raises(EquipoiseError):
        read_records(engine, [])


@pytest.mark.parametrize("engine", PLANS)
def test_a_place_that_cannot_be_written_is_an_error(tmp_path, engine):
    (tmp_path / "file").write_text("")
    with pytest.raises(EquipoiseError, match="cannot write"):
        write_plan(placed(PROFILE, 4, 8), engine, tmp_path / "file" / PLANS[engine])
