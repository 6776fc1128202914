"""Several forward passes in lockstep: all halt at a module, it is seen with all their calls at once, then they go on.

Quantizing with calibration text takes a model layer by layer: all text must have reached a layer before it is rounded, and
none may pass it before. Every forward is therefore a thread that halts at the entry of each chosen module (a station). What
lies between stations is the model's own code, so its masks, position embeddings and second stack are what they always are.
The stations themselves are run here, one forward after the other, and can be run before by whoever is shown their calls.

Only one thread runs at any time, in a fixed order, so the outcome is that of the same forwards one after the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from functools import wraps
from typing import Any

import torch
from torch import nn

from equipoise.errors import ModelError
from equipoise.models.tokens import CallsInProgress, TokenTracker


class Call:
    """The call of a station at which one forward has halted.

    Attributes:
        station: the module.
        args, kwargs: what it was called with.
    """

    def __init__(
        self, station: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], flow: _Flow
    ) -> None:
        self.station, self.args, self.kwargs = station, args, kwargs
        self._forward, self._flow, self._context = forward, flow, copy_context()

    def run(self) -> Any:
        """What the station computes for this call, as if the forward had not halted; may be run again."""
        # The context holds what the forward has set for code further down (transformers collects outputs that way).
        with self._flow.tokens_known():
            return self._context.run(self._compute)

    def _compute(self) -> Any:
        _CURRENT.set(None)  # within a station nothing halts
        with torch.no_grad():
            return self._forward(*self.args, **self.kwargs)


Visit = Callable[[nn.Module, Sequence[Call]], bool]
"""Called as visit(station, calls) with one call of each forward; says whether they are to run the station and go on."""


def run_in_lockstep(
    forwards: Sequence[Callable[[], object]],
    stations: Sequence[nn.Module],
    visit: Visit,
    tracker: TokenTracker,
    put_by: Callable[[Call], None] = lambda call: None,
) -> None:
    """Run forwards side by side and show all their calls of each station before the station is run.

    Args:
        forwards: the passes; each must meet the same stations in the same order.
        stations: modules at whose entry every forward halts.
        visit: is shown a station and the calls, in the order of the forwards; may change the station.
        tracker: entered on the model; knows the tokens of whichever forward is being run.
        put_by: is given each call that begins to wait, to store its tensors elsewhere.

    Raises:
        ModelError: the forwards do not meet the same stations.
        Exception: whatever a forward, a station or `visit` raises; all threads have ended by then.
    """
    flows = [_Flow(forward, tracker) for forward in forwards]
    with _halting(stations):
        try:
            for flow in flows:
                _start(flow)
                flow.advance()
                _put_by(flow, put_by)
            while _visited(flows, visit):
                for flow in flows:  # each to its next halt before the next one runs: its old inputs are free by then
                    flow.advance()
                    _put_by(flow, put_by)
        finally:
            for flow in flows:
                flow.end()


STACK_BYTES = 2 << 20
"""Stack of a thread: only what lies between stations runs on it, and there may be hundreds."""


def _start(flow: _Flow) -> None:
    usual = threading.stack_size(STACK_BYTES)
    try:
        flow.start()
    finally:
        threading.stack_size(usual)


def _put_by(flow: _Flow, put_by: Callable[[Call], None]) -> None:
    """Hand over the call of a forward that waits."""
    if flow.call is not None:
        put_by(flow.call)


def _visited(flows: Sequence[_Flow], visit: Visit) -> bool:
    """Show the calls that wait; False when there are none, or when no more are wanted."""
    calls = [flow.call for flow in flows if flow.call is not None]
    if not calls:
        return False
    station = calls[0].station
    if len(calls) < len(flows) or any(call.station is not station for call in calls):
        raise ModelError(
            f"the calibration batches take different ways through the model (at {type(station).__name__}); give batches of "
            "one kind, without images or other parts that only some of them have."
        )
    return visit(station, calls)


@contextmanager
def _halting(stations: Sequence[nn.Module]) -> Iterator[None]:
    """The stations' forwards replaced by one that halts the flow it is called from."""

    def halting(station: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            flow = _CURRENT.get()
            if flow is None:
                return original(*args, **kwargs)
            return flow.halt(Call(station, original, args, kwargs, flow))

        return forward

    replaced: list[tuple[nn.Module, Any]] = []
    try:
        for station in stations:
            replaced.append((station, station.__dict__.get("forward")))
            station.forward = halting(station, station.forward)
        yield
    finally:
        for station, own in replaced:
            if own is None:
                del station.forward
            else:
                station.forward = own


class _Stopped(BaseException):
    """Unwinds a thread whose forward is not to go on; no Exception, so that no model code catches it."""


class _Flow(threading.Thread):
    """One forward: a thread that runs only between `advance` and its next halt.

    Attributes:
        call: where it has halted; None before its first station and after its last.
    """

    def __init__(self, forward: Callable[[], object], tracker: TokenTracker) -> None:
        super().__init__(daemon=True)
        self.call: Call | None = None
        self._forward, self._tracker = forward, tracker
        self._tokens: CallsInProgress | None = None
        self._output: Any = None
        self._error: BaseException | None = None
        self._stopped = False
        self._go, self._halted = threading.Semaphore(0), threading.Semaphore(0)

    def advance(self) -> None:
        """Run the station at which the forward waits, and let it go on to the next or to its end."""
        if self.call is not None:
            self._output, self.call = self.call.run(), None
        with self.tokens_known():
            self._go.release()
            self._halted.acquire()
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """Stop the forward where it is, and wait for its thread."""
        self.call, self._stopped = None, True
        if self.ident is not None:  # it was started
            with self.tokens_known():
                self._go.release()
                self.join()

    @contextmanager
    def tokens_known(self) -> Iterator[None]:
        """The model's tracker knows this forward's tokens instead of those that it knew."""
        others = self._tracker.exchange(self._tokens)
        try:
            yield
        finally:
            self._tokens = self._tracker.exchange(others)

    def halt(self, call: Call) -> Any:
        """In the thread: show a call, and wait for what the station makes of it."""
        self.call = call
        del call
        self._halted.release()
        self._go.acquire()
        if self._stopped:
            raise _Stopped
        output, self._output = self._output, None
        return output

    def run(self) -> None:
        """In the thread: the forward, from the first `advance` on."""
        self._go.acquire()
        _CURRENT.set(self)
        try:
            if not self._stopped:
                with torch.no_grad():
                    self._forward()
        except _Stopped:
            pass
        except BaseException as error:  # handed to the caller by `advance`
            self._error = error
        finally:
            self._halted.release()


_CURRENT: ContextVar[_Flow | None] = ContextVar("equipoise_lockstep_flow", default=None)
"""The forward whose thread this is; None elsewhere, and within a station."""
