"""Records of omni-infer and lmdeploy."""

from __future__ import annotations

import json

import numpy as np
import pytest

from equipoise.engines import read_records
from equipoise.errors import ProfileError


def omni_csv(path, counts: np.ndarray) -> None:
    header = ",".join(["", *(f"ep_{e}" for e in range(counts.shape[1]))])
    path.write_text("\n".join([header, *(f"layer_{i}," + ",".join(map(str, row)) for i, row in enumerate(counts))]) + "\n")


def test_omni_csv_tells_its_phase_by_its_name(tmp_path):
    counts = np.random.default_rng(0).integers(1, 99, (3, 8))
    paths = [tmp_path / "topk_ids_count_1_prefill.csv", tmp_path / "topk_ids_count_1_decode.csv"]
    for path in paths:
        omni_csv(path, counts)
    profile = read_records("omni", paths)
    assert (profile.counts[0, 0] == counts).all()
    assert (profile.counts[1, 1] == counts).all()
    assert not profile.counts[0, 1].any()
    assert profile.model.hidden_layers == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "0 layers"),
        (",ep_0,ep_1\n", "0 layers"),
        (",ep_0,ep_1\nlayer_0,1,2\nlayer_2,1,2\n", "layer_1 is expected"),
        (",ep_0,ep_1\nlayer_0,1,2\nlayer_1,1\n", "layer 1 does not have 2"),
        (",ep_0,ep_1\nlayer_0,1,-2\n", "whole numbers"),
        (",ep_0,ep_1\nlayer_0,1,nan\n", "0 layers|whole numbers"),
        (",ep_0,ep_1\nlayer_0,1,99999999999999999999\n", "whole numbers"),
        (",ep_0,ep_1\nlayer_0,0,0\n", "all its counts are zero"),
    ],
)
def test_omni_csv_that_is_not_whole_is_refused(tmp_path, text, message):
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(ProfileError, match=message):
        read_records("omni", [path])


def test_lmdeploy_loads(tmp_path):
    table = np.random.default_rng(0).integers(1, 99, (4, 8))
    table[0] = 0
    (tmp_path / "x.json").write_text(json.dumps(table.tolist()))
    profile = read_records("lmdeploy", [tmp_path / "x.json"], top_k=2)
    assert (profile.load == table[1:]).all()
    assert profile.model.hidden_layers == 4
    for text, message in [
        ("[[1, 2], [3]]", "differ in length"),
        ("{}", "not counts"),
        ("[1, 2]", "2 dimensions"),
        ("[[1, NaN]]", "NaN"),
        ("[[1, -1]]", "negative"),
        ("[[0.5, 1]]", "fractions"),
        ("[[1, 2]", "not a JSON file"),
        ("[" * 100_000, "not a JSON file"),
        ("[[1" + "0" * 400 + "]]", "not counts|overflowed"),
    ]:
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ProfileError, match=message):
            read_records("lmdeploy", [tmp_path / "x.json"])
