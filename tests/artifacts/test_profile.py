from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from equipoise.artifacts import Profile
from equipoise.errors import EquipoiseError, ProfileError


def test_saved_profile_reads_back_whole(profile, tmp_path):
    path = tmp_path / "x.profile.safetensors"
    profile.save(path)
    read = Profile.load_file(path)
    assert read.model == profile.model
    assert read.source == profile.source
    for name, array in profile._arrays().items():
        np.testing.assert_array_equal(read._arrays()[name], array)
        assert read._arrays()[name].dtype == array.dtype


def test_saving_twice_gives_the_same_bytes(profile, tmp_path):
    profile.save(tmp_path / "a")
    profile.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_fresh_process_reads_it_without_torch(profile, tmp_path):
    profile.save(tmp_path / "a")
    code = (
        "import sys; from equipoise.artifacts import Profile; p = Profile.load_file(sys.argv[1]);"
        "print(int(p.load.sum()), 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True, check=True)
    assert out.stdout.split() == [str(profile.load.sum()), "False"]


@pytest.mark.parametrize("keep", [0, 4, 40, 400, -1])
def test_truncated_files_are_refused(profile, tmp_path, keep):
    path = tmp_path / "x"
    profile.save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ProfileError, match="not a whole equipoise profile"):
        Profile.load_file(path)


def test_missing_file_and_foreign_safetensors_are_refused(tmp_path):
    with pytest.raises(ProfileError, match="No such file"):
        Profile.load_file(tmp_path / "absent")
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3)}, tmp_path / "foreign")
    with pytest.raises(ProfileError, match="not a whole equipoise profile"):
        Profile.load_file(tmp_path / "foreign")


def test_wrong_shapes_and_impossible_counts_are_refused(profile):
    names = ("model", "source", "gate_mass", "tokens", "windows", "window_scenario")
    arrays = {name: getattr(profile, name) for name in names}
    with pytest.raises(ProfileError, match="'counts' has shape"):
        Profile(counts=profile.counts[:, :, :1], **arrays)
    with pytest.raises(ProfileError, match="negative"):
        Profile(counts=profile.counts - 1, **arrays)
    ghost = profile.counts.copy()
    ghost[0, 0, 1, 3] = 1  # the second layer has three experts
    with pytest.raises(ProfileError, match="does not have"):
        Profile(counts=ghost, **arrays)


def test_arrays_are_immutable(profile):
    with pytest.raises(ValueError, match="read-only"):
        profile.counts[0] = 0


def test_relative_error_is_relative_to_the_layer(profile):
    np.testing.assert_allclose(profile.relative_error("int8")[:, 0], [0.01, 0.005])
    with pytest.raises(ProfileError, match=r"int3.*it has: int8"):
        profile.relative_error("int3")


def test_unwritable_place_is_one_clear_error(profile, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EquipoiseError, match="cannot write"):
        profile.save(tmp_path / "file" / "x")
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == '["file"]'
