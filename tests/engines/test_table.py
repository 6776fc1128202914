"""Plain tables: `.npz`, `.csv`, `.parquet`."""

from __future__ import annotations

import numpy as np
import pytest

from equipoise.engines import read_records
from equipoise.errors import EquipoiseError, ProfileError


def table(scenarios: int = 3, layers: int = 4, experts: int = 6) -> np.ndarray:
    counts = np.random.default_rng(0).integers(1, 50, (scenarios, layers, experts))
    counts[:, 0] = 0
    return counts


def test_npz(tmp_path):
    path = tmp_path / "in.npz"
    windows = np.concatenate([table(2), table(2)])
    np.savez(
        path,
        counts=table(),
        scenarios=np.array(["a", "b", "c"]),
        windows=windows,
        window_scenario=[0, 0, 1, 1],
        top_k=2,
        tokens=[10, 20, 30],
    )
    profile = read_records("table", [path])
    assert profile.source.scenarios == ("a", "b", "c")
    assert profile.source.origin == "table"
    assert (profile.scenario_load == table()[:, 1:]).all()
    assert (profile.windows[:4] == windows[:, 1:]).all()
    assert profile.window_scenario.tolist() == [0, 0, 1, 1, 2]
    assert profile.tokens.tolist() == [10, 20, 30]
    assert (profile.model.hidden_layers, profile.model.layers[0].model_layer, profile.model.layers[0].top_k) == (4, 1, 2)
    profile.save(tmp_path / "p.safetensors")
    assert (type(profile).load_file(tmp_path / "p.safetensors").load == profile.load).all()


def test_npz_with_nothing_but_counts(tmp_path):
    path = tmp_path / "load.npz"
    np.savez_compressed(path, counts=table()[0])
    profile = read_records("table", [path])
    assert profile.source.scenarios == ("load",)
    assert read_records("table", [path], scenarios=["x"]).source.scenarios == ("x",)
    with pytest.raises(ProfileError, match="2 scenarios are named, 1 are recorded"):
        read_records("table", [path], scenarios=["x", "y"])


def test_npz_of_phases_and_of_slots(tmp_path):
    path = tmp_path / "in.npz"
    both = np.stack([table()[:, 1:], 2 * table()[:, 1:]], axis=1)
    np.savez(path, counts=both, layers=[3, 4, 5])
    profile = read_records("table", [path])
    assert (profile.counts == both).all()
    assert [layer.model_layer for layer in profile.model.layers] == [3, 4, 5]
    slots = np.array([[0, 1, 2, 3, 4, 0]] * 3)
    np.savez(path, counts=table()[:, 1:], physical_to_logical_map=slots)
    logical = read_records("table", [path]).scenario_load
    assert logical.shape == (3, 3, 5)
    assert (logical[..., 0] == table()[:, 1:, 0] + table()[:, 1:, 5]).all()


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_long_tables_equal_the_npz(tmp_path, kind):
    lines = [
        (f"s{s}", w, layer, expert, int(n))
        for s in range(2)
        for w in range(2)
        for (layer, expert), n in np.ndenumerate(table()[s] + w * (table()[s] > 0))
        if n
    ]
    path = tmp_path / f"in.{kind}"
    names = ("scenario", "window", "layer", "expert", "count")
    if kind == "csv":
        path.write_text("\n".join([",".join(names), *(",".join(map(str, line)) for line in lines)]) + "\n")
    else:
        pa = pytest.importorskip("pyarrow")
        columns = dict(zip(names, zip(*lines, strict=True), strict=True))
        pytest.importorskip("pyarrow.parquet").write_table(pa.table({k: list(v) for k, v in columns.items()}), path)
    profile = read_records("table", [path])
    assert (profile.scenario_load == (2 * table()[:2] + (table()[:2] > 0))[:, 1:]).all()
    assert (profile.windows[1] == (table()[0] + 1)[1:]).all()
    assert profile.model.layers[0].model_layer == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layer,expert\n0,0\n", "no column 'count'"),
        ("layer,expert,count\n", "no lines"),
        ("layer,expert,count\n0,0,-4\n", "count is '-4'"),
        ("layer,expert,count\n0,0,NaN\n", "count is 'NaN'"),
        ("layer,expert,count\n0,0,1.5\n", "count is '1.5'"),
        ("layer,expert,count\n0,999999,1\n", "expert is '999999'"),
        ("layer,expert,count\n0,0,1\n0,0,2\n", "counted twice"),
        ("layer,expert,count\n0,0\n", "2 fields"),
        ("layer,expert,count\n0,0,99999999999999999999999999999999999999\n", "count is"),
        ("layer,layer,expert,count\n0,0,0,1\n", "twice"),
        ("layer,expert,count\n0,0,0\n0,1,0\n", "all its counts are zero"),
    ],
)
def test_csv_that_cannot_be_is_refused(tmp_path, text, message):
    path = tmp_path / "in.csv"
    path.write_text(text)
    with pytest.raises(ProfileError, match=message):
        read_records("table", [path])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"loads": table()}, "no array `counts`"),
        ({"counts": table(), "scenarios": ["a"]}, "1 scenarios are named, 3 are counted"),
        ({"counts": table(), "windows": np.ones((2, 4, 5), int)}, "do not fit"),
        ({"counts": table(), "windows": np.ones((1, 4, 6), int), "window_scenario": [7]}, "do not fit"),
        ({"counts": table(), "layers": [1]}, "1 layers are named"),
        ({"counts": table(), "tokens": [1]}, "tokens"),
        ({"counts": table(), "top_k": [1, 2]}, "top_k has 2 values"),
        ({"counts": np.ones((2, 2, 2, 2, 2), int)}, "shape"),
        ({"counts": np.array([[["x"]]])}, "not counts"),
        ({"counts": np.array([object()])}, "not a .npz file"),
    ],
)
def test_npz_that_cannot_be_is_refused(tmp_path, arrays, message):
    path = tmp_path / "in.npz"
    np.savez(path, **arrays)
    with pytest.raises(ProfileError, match=message):
        read_records("table", [path])


def test_unknown_engines_options_and_endings(tmp_path):
    with pytest.raises(EquipoiseError, match="Did you mean 'sglang'"):
        read_records("sglan", [tmp_path])
    with pytest.raises(EquipoiseError, match=r"no option .pair. here; it has: pairs\."):
        read_records("sglang", [tmp_path], pair=False)
    with pytest.raises(ProfileError, match=r"\.npz, \.csv, \.parquet"):
        read_records("table", [tmp_path / "x.xlsx"])
    with pytest.raises(ProfileError, match="is not a file"):
        read_records("table", [tmp_path / "x.npz"])
