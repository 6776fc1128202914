"""Files that are either whole or absent: write to a temporary neighbour, then rename."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from equipoise.errors import EquipoiseError


def make_directory(path: str | Path) -> None:
    """Make a directory that results go to, with the directories above it, if it is not there.

    Raises:
        EquipoiseError: it cannot be made, or is not writable.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise EquipoiseError(f"cannot write to '{path}': {error.strerror or error}. Choose a writable place.") from error


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write a whole file in one step: a temporary neighbour, then a rename.

    Args:
        path: the file; missing parent directories are made.
        data: its content; text is written as UTF-8.

    Raises:
        EquipoiseError: the directory is missing or not writable; nothing is left behind.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes private files; a result is as readable as any other file
        temporary.replace(path)
    except OSError as error:
        raise EquipoiseError(f"cannot write '{path}': {error.strerror or error}. Choose a writable place.") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
