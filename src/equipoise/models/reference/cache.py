"""A cache of directories that are either whole or absent, and built by one process at a time."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from equipoise.errors import EquipoiseError


def cache_dir() -> Path:
    """Where built and downloaded things are kept: $EQUIPOISE_CACHE, else $XDG_CACHE_HOME/equipoise, else ~/.cache/equipoise."""
    if chosen := os.environ.get("EQUIPOISE_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "equipoise"


def cached(name: str, fill: Callable[[Path], None]) -> Path:
    """The directory of this name in the cache; `fill` builds it if it is not there.

    It is built under another name and moved into place when whole, so a build that is killed leaves no half-built
    directory; a second process waits for the first and then takes its result.

    Args:
        name: one name for one content: put versions into it.
        fill: writes the content into the empty directory that it is given.

    Raises:
        EquipoiseError: the cache cannot be written.
    """
    target = cache_dir() / name
    if target.is_dir():  # the usual case, which a read-only cache must serve too
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{name}.lock"):
            if target.is_dir():
                return target
            for abandoned in target.parent.glob(f".{name}.*.partial"):  # of a builder that was killed: we hold its lock
                shutil.rmtree(abandoned)
            partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{name}.", suffix=".partial"))
            try:
                fill(partial)
                partial.chmod(0o755)  # mkdtemp makes private directories
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise EquipoiseError(
            f"cannot fill the cache '{target.parent}': {error.strerror or error}. "
            "Set EQUIPOISE_CACHE to a writable directory with 1 GB free."
        ) from error
    return target
