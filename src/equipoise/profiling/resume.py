"""The state of an unfinished run on disk: whole or absent, refused by any other run, never pickled."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from equipoise.artifacts.files import write_atomic
from equipoise.errors import ProfileError

SCHEMA = "equipoise.profile-state/2"
Arrays = dict[str, NDArray[Any]]


class Checkpoint:
    """Saves a run's state now and then, and gives it back to the same run.

    Args:
        path: file of the state; None keeps nothing.
        identity: everything that the result depends on; a state of another identity is refused.
        every: seconds between saves.
    """

    def __init__(self, path: str | Path | None, identity: Mapping[str, Any], every: float = 30.0) -> None:
        self.path = None if path is None else Path(path)
        self.identity = {key: _digest(value) for key, value in identity.items()}
        self.every = every
        self._saved = time.monotonic()

    def require_writable(self) -> None:
        """Raise `EquipoiseError` when the state could not be written, before hours are spent on it."""
        if self.path is not None:
            probe = self.path.with_name(f".{self.path.name}.probe")
            write_atomic(probe, b"")
            probe.unlink()

    def save(self, done: int, state: Callable[[], Arrays], *, force: bool = False) -> None:
        """Write the state if the last save is long enough ago.

        Args:
            done: forward passes that the state holds.
            state: makes the arrays; called only when something is written.
            force: write in any case.
        """
        if self.path is None or not (force or time.monotonic() - self._saved >= self.every):
            return
        header = json.dumps({"schema": SCHEMA, "identity": self.identity, "done": done})
        data = save({key: np.ascontiguousarray(array) for key, array in state().items()}, metadata={"equipoise": header})
        write_atomic(self.path, data)
        self._saved = time.monotonic()

    def load(self) -> tuple[int, Arrays] | None:
        """The passes done and the state's arrays; None when there is no file yet.

        Raises:
            ProfileError: the file is no state, or a state of a run with another model, text or options.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="numpy") as file:
                header = json.loads((file.metadata() or {})["equipoise"])
                arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ProfileError(
                f"'{self.path}' is not the state of a profiling run ({error}); delete it to start anew."
            ) from error
        if header.get("schema") != SCHEMA:
            raise ProfileError(f"'{self.path}' has schema '{header.get('schema')}', not '{SCHEMA}'; delete it to start anew.")
        other = [key for key, digest in self.identity.items() if header["identity"].get(key) != digest]
        if other:
            raise ProfileError(
                f"'{self.path}' is the state of another run: {', '.join(other)} differ(s). "
                "Run with the same model, text and options, choose another file, or delete it to start anew."
            )
        return int(header["done"]), arrays


def with_prefix(prefix: str, arrays: Mapping[str, NDArray[Any]]) -> Arrays:
    """The arrays under keys that start with a prefix."""
    return {f"{prefix}{key}": array for key, array in arrays.items()}


def without_prefix(prefix: str, arrays: Mapping[str, NDArray[Any]]) -> Arrays:
    """The arrays whose keys start with a prefix, under the rest of their keys."""
    return {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
