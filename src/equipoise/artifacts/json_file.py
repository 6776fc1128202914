"""Values that are kept as one JSON text, validated when it is read."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from equipoise.artifacts.files import write_atomic
from equipoise.errors import EquipoiseError


class JsonFile(BaseModel):
    """A value with a file of its own; a kind may lay its text out (`to_json`) so that it reads and diffs well.

    Attributes:
        kind: what messages call it.
        problem: error of a text that is no such value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    kind: ClassVar[str]
    problem: ClassVar[type[EquipoiseError]] = EquipoiseError

    def to_json(self) -> str:
        """The value as JSON text."""
        return self.model_dump_json(indent=2, by_alias=True) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the value as JSON; whole or not at all."""
        write_atomic(path, self.to_json())

    @classmethod
    def from_json(cls, text: str | bytes, origin: str | None = None) -> Self:
        """Parse and validate.

        Args:
            text: JSON.
            origin: where it comes from, for messages.

        Raises:
            EquipoiseError: of the value's kind; the first problem, with the field that has it.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise cls.problem(f"'{origin or cls.kind}' is not a valid {cls.kind}: {first_problem(error)}") from error

    @classmethod
    def load_file(cls, path: str | Path) -> Self:
        """Read and validate a file; raises the kind's `EquipoiseError`, which names the field."""
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise cls.problem(f"cannot read {cls.kind} '{path}': {error.strerror or error}.") from error
        return cls.from_json(text, str(path))


def first_problem(error: Exception) -> str:
    """The first problem of a validation error as 'field: message', on one line."""
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        return f"{where}: {message}" if where else message
    return str(error).splitlines()[0]
