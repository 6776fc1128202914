"""Named, described, listed methods; one registry per kind of method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from equipoise.errors import unknown_name

F = TypeVar("F", bound=Callable[..., object])


@dataclass(frozen=True, slots=True)
class Entry(Generic[F]):
    """One registered method: its name, one line for people, and the function."""

    name: str
    summary: str
    source: str
    function: F


class Registry(Generic[F]):
    """Methods of one kind by name; an unknown name answers with the nearest known one."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry[F]] = {}

    def register(self, name: str, *, summary: str, source: str) -> Callable[[F], F]:
        """Decorator that adds a function under a name.

        Args:
            name: lower case, unique in this registry.
            summary: one line that `equipoise methods` prints.
            source: paper section or formula it implements, or "Equipoise".

        Raises:
            ValueError: the name is taken or not lower case (a mistake of the programmer, not of the user).
        """
        if name != name.lower() or name in self._entries:
            raise ValueError(f"{self.kind} '{name}' must be lower case and not registered yet")

        def add(function: F) -> F:
            self._entries[name] = Entry(name, summary, source, function)
            return function

        return add

    def get(self, name: str) -> F:
        """The function registered under a name.

        Raises:
            EquipoiseError: unknown name; the message lists the known ones and the nearest.
        """
        if name not in self._entries:
            raise unknown_name(self.kind, name, self._entries)
        return self._entries[name].function

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[Entry[F]]:
        return iter(self._entries.values())

    def names(self) -> list[str]:
        """All registered names, in order of registration."""
        return list(self._entries)
