"""A cached directory is whole or absent, and built once."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from equipoise.errors import EquipoiseError
from equipoise.models.reference.cache import cache_dir, cached


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fill(directory: Path) -> None:
    (directory / "file").write_text("whole")


def test_place_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("EQUIPOISE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "equipoise"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "equipoise"


def test_a_second_call_takes_what_is_there() -> None:
    first = cached("thing", fill)

    def refuse(_: Path) -> None:
        raise AssertionError("filled twice")

    assert cached("thing", refuse) == first
    assert (first / "file").read_text() == "whole"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_build_leaves_nothing(own_cache: Path, error: type[BaseException]) -> None:
    def interrupted(directory: Path) -> None:
        fill(directory)
        raise error

    with pytest.raises(error):
        cached("thing", interrupted)
    assert not [path for path in own_cache.iterdir() if path.is_dir()]
    assert (cached("thing", fill) / "file").read_text() == "whole"


def test_what_a_killed_build_left_is_swept_away(own_cache: Path) -> None:
    left = own_cache / ".thing.abc.partial"
    left.mkdir(parents=True)
    (left / "half").write_text("half")
    other = own_cache / ".other.abc.partial"
    other.mkdir()
    cached("thing", fill)
    assert not left.exists()
    assert other.exists()


def test_two_builders_build_once() -> None:
    built = []

    def slow(directory: Path) -> None:
        built.append(directory)
        time.sleep(0.2)
        fill(directory)

    threads = [threading.Thread(target=cached, args=("thing", slow)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(EquipoiseError, match="Set EQUIPOISE_CACHE"):
        cached("thing", fill)


def test_a_built_directory_is_as_readable_as_any_other() -> None:
    umask = os.umask(0)
    os.umask(umask)
    assert cached("thing", fill).stat().st_mode & 0o777 == 0o777 & ~umask
