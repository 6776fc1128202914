"""MoE layers that are done, kept on disk one file each: what a run that was killed goes on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from equipoise.artifacts.files import write_atomic
from equipoise.errors import CheckpointError
from equipoise.execution.slots import ExpertSlots
from equipoise.models.layers import MoELayer
from equipoise.models.tensor_files import TensorFiles, write_tensors

Report = dict[str, Any]
"""What is known of a layer's rounding, as JSON holds it."""

RUN_FILE = "equipoise.run.json"
"""What run a directory of finished layers belongs to."""


class Kept(Protocol):
    """Where finished layers are kept."""

    def read(self, layer: MoELayer, slots: ExpertSlots) -> Report | None:
        """Fill the slots of a layer that is finished; None when it is not."""
        ...

    def write(self, layer: MoELayer, slots: ExpertSlots, report: Report) -> None:
        """Keep a finished layer."""
        ...


class Nowhere:
    """Keeps nothing."""

    def read(self, layer: MoELayer, slots: ExpertSlots) -> Report | None:
        """Nothing."""
        return None

    def write(self, layer: MoELayer, slots: ExpertSlots, report: Report) -> None:
        """Nowhere."""


class FinishedLayers:
    """Finished layers in a directory that belongs to one run.

    Attributes:
        directory: of the run.
    """

    def __init__(
        self, directory: str | Path, identity: Mapping[str, Any], stored_name: Callable[[str], str] = lambda name: name
    ) -> None:
        """Begin a run, or go on with it.

        Args:
            directory: where the layers are kept; made if missing.
            identity: everything that the layers depend on, as JSON.
            stored_name: the name in a file of a tensor of the model.

        Raises:
            CheckpointError: the directory belongs to another run.
            EquipoiseError: it cannot be written to.
        """
        self.directory, self._stored_name = Path(directory), stored_name
        mine = {key: _digest(value) for key, value in identity.items()}
        path = self.directory / RUN_FILE
        if path.exists():
            _refuse_other(path, mine)
        else:
            write_atomic(path, json.dumps(mine, indent=2) + "\n")
        for unfinished in self.directory.glob(".*"):  # what a killed run was writing
            unfinished.unlink()

    def path(self, layer: MoELayer) -> Path:
        """File of a layer."""
        return self.directory / f"equipoise-moe-{layer.index:05d}.safetensors"

    def read(self, layer: MoELayer, slots: ExpertSlots) -> Report | None:
        """Fill the slots of a layer that is finished; None when it is not."""
        path = self.path(layer)
        if not path.exists():
            return None
        tensors = TensorFiles([path])
        # Copied into the slots' own memory: a view of the file could be aligned otherwise than what was computed with before.
        slots.load_state_dict({name: tensors[self._name(layer, name)] for name in slots.state_dict()})
        report: Report = json.loads(tensors.metadata["equipoise"])
        return report

    def write(self, layer: MoELayer, slots: ExpertSlots, report: Report) -> None:
        """Keep a finished layer, whole or not at all."""
        tensors = {self._name(layer, name): tensor for name, tensor in slots.state_dict().items()}
        write_tensors(self.path(layer), tensors, {"equipoise": json.dumps(report, sort_keys=True)})

    def _name(self, layer: MoELayer, name: str) -> str:
        return self._stored_name(f"{layer.path}.slots.{name}")


def _refuse_other(path: Path, mine: Mapping[str, str]) -> None:
    try:
        theirs = json.loads(path.read_bytes())
        other = sorted(key for key in {*mine, *theirs} if theirs.get(key) != mine.get(key))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"'{path}' is not the record of a run ({error}); delete '{path.parent}' to start anew."
        ) from error
    if other:
        raise CheckpointError(
            f"'{path.parent}' holds the finished layers of another run: {', '.join(other)} differ(s). Run with the same "
            "model, plan, text and options to go on with it, choose another place, or delete it to start anew."
        )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
