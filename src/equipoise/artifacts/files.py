"""Files that are either whole or absent: write to a temporary neighbour, then rename."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from equipoise.errors import EquipoiseError


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step.

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
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes private files; a result is as readable as any other file
        temporary.replace(path)
    except OSError as error:
        raise EquipoiseError(f"cannot write '{path}': {error.strerror or error}. Choose a writable place.") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
