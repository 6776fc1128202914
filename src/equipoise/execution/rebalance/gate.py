"""Who may run when: forwards one after the other, requests side by side, and a change of plan between them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from equipoise.errors import EquipoiseError


class SwapPostponedError(EquipoiseError):
    """Requests that are pinned to the plan in force did not end in time; the change of plan is tried again later."""


class Gate:
    """Lets forwards through one at a time, counts the requests that are pinned to a plan, and closes between them.

    A forward that is not part of a pinned request waits while the gate is closed, microseconds as a rule. One that is goes
    on, so that its request can end; new requests wait until the gate is open again.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: int | None = None  # the thread whose forward runs, or that has closed the gate
        self._depth = 0
        self._closing = False
        self._requests = 0
        self._mine = threading.local()

    @property
    def depth(self) -> int:
        """Forwards within forwards, for the thread that is inside."""
        return self._depth

    def enter(self) -> None:
        """Begin a forward; forwards within it are part of it."""
        me = threading.get_ident()
        with self._changed:
            if self._inside != me:
                # Whoever closes the gate is let in next, or a model that never rests would keep it out.
                self._changed.wait_for(lambda: self._inside is None and not (self._closing and self._requests == 0))
                self._inside = me
            self._depth += 1

    def leave(self) -> bool:
        """End a forward; True when it was the outermost of this thread."""
        with self._changed:
            assert self._inside == threading.get_ident(), "a forward leaves that never entered"
            self._depth -= 1
            if self._depth:
                return False
            self._inside = None
            self._changed.notify_all()
            return True

    @contextmanager
    def request(self) -> Iterator[None]:
        """A request whose forwards, in whatever thread they run, all see one plan."""
        depth = getattr(self._mine, "requests", 0)
        with self._changed:
            if depth == 0:
                self._changed.wait_for(lambda: not self._closing)
            self._requests += 1
        self._mine.requests = depth + 1
        try:
            yield
        finally:
            self._mine.requests = depth
            with self._changed:
                self._requests -= 1
                self._changed.notify_all()

    @contextmanager
    def closed(self, patience: float) -> Iterator[None]:
        """Nothing runs while this is open; requests that began have ended.

        Args:
            patience: seconds to wait for pinned requests and a running forward.

        Raises:
            SwapPostponedError: they did not end in time.
            EquipoiseError: called from within a request or a forward, which would wait for itself.
        """
        me = threading.get_ident()
        if getattr(self._mine, "requests", 0) or self._inside == me:
            raise EquipoiseError("a change of plan was asked for from within a request or a forward; ask between them.")
        until = time.monotonic() + patience
        with self._changed:
            self._closing = True
            try:
                free = self._changed.wait_for(
                    lambda: self._inside is None and self._requests == 0, max(0.0, until - time.monotonic())
                )
                if not free:
                    raise SwapPostponedError(
                        f"{self._requests} pinned request(s) and {int(self._inside is not None)} forward(s) did not end "
                        f"within {patience:g} s; the plan in force stays, and the change is tried again later."
                    )
                self._inside = me
            finally:
                self._closing = False
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._inside = None
                self._changed.notify_all()
