"""The processes of one profiling run: which passes are whose, how their parts come together, and how all end when one does.

Started by `torchrun`; one process alone is a team of one. What travels is small (sums, never tokens or weights) and goes over
a gloo group of its own, whatever backend the model itself uses.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from equipoise.errors import EquipoiseError

Item = TypeVar("Item")
Arrays = dict[str, NDArray[Any]]

PATIENCE = timedelta(hours=24)
"""How long a process waits for slower ones; a process that has died is noticed at once, since its connections close."""

AGAIN = "Run the same command again: every process goes on from what it has saved."
ENDED = f"another process of this run has ended; torchrun names it and how it ended. {AGAIN}"
LOST = ("Connection closed by peer", "Connection reset by peer")
"""What gloo's errors say when the process at the other end is no more."""
STOPPED = f"stopped by SIGTERM, which torchrun sends when another process of the run has ended, and names that one. {AGAIN}"


@dataclass(frozen=True, eq=False)
class Team:
    """The processes of a run, as one of them sees them.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
        together: all run every pass, each with a part of the model (expert parallelism), instead of each a part of the text.
        group: what they communicate over; None for a process alone.
    """

    rank: int = 0
    size: int = 1
    together: bool = False
    group: Any = None

    @property
    def leads(self) -> bool:
        """Whether this process shows progress and writes the result."""
        return self.rank == 0

    @property
    def divides(self) -> bool:
        """Whether each process runs a part of the text."""
        return self.size > 1 and not self.together

    @property
    def part(self) -> str:
        """What names the state file of this process: empty for one that has the whole text, else such as '.1of4'."""
        return f".{self.rank}of{self.size}" if self.divides else ""

    def stretch(self, sizes: Sequence[int]) -> range:
        """The consecutive passes that this process runs, about an equal part of all tokens.

        Args:
            sizes: tokens of each pass of the whole run.
        """
        if not self.divides:
            return range(len(sizes))
        ends = np.cumsum(sizes)
        # A pass belongs to the process in whose part of the tokens its middle lies.
        owner = ((2 * ends - sizes) * self.size // max(2 * int(ends[-1]), 1)) if len(ends) else ends
        first, last = np.searchsorted(owner, [self.rank, self.rank + 1])
        return range(int(first), int(last))

    def mine(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every `size`-th item: this process's part of work that any of them can do."""
        return items[self.rank :: self.size] if self.divides else items

    def join(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """One array from all, in which each has filled its own part and left NaN elsewhere; all have to call it."""
        joined = values
        for arrays in self.exchange({"values": values}) if self.divides else ():
            joined = np.where(np.isnan(joined), arrays["values"], joined)
        return joined

    def agree(self, facts: Mapping[str, str]) -> None:
        """Raise unless all processes were given the same.

        Args:
            facts: name -> digest of what must be equal.

        Raises:
            EquipoiseError: names what differs, and where.
        """
        mine = {name: np.frombuffer(digest.encode(), np.uint8) for name, digest in facts.items()}
        for rank, arrays in enumerate(list(self.exchange(mine))):
            other = [name for name, digest in mine.items() if not np.array_equal(arrays[name], digest)]
            if other:
                raise EquipoiseError(
                    f"process {rank} and process {self.rank} of this run differ in {', '.join(other)}; start all with one "
                    "command and the same files."
                )

    def wait(self) -> None:
        """Go on when all have come here."""
        for _ in self.exchange({}):
            pass

    def exchange(self, arrays: Mapping[str, NDArray[Any]]) -> Iterator[Arrays]:
        """What each process gives, in order of their ranks; all have to call it, and to take all.

        Raises:
            EquipoiseError: another process has ended.
        """
        for source in range(self.size):
            yield dict(arrays) if self.size == 1 else self._broadcast(source, arrays)

    def from_leader(self, arrays: Mapping[str, NDArray[Any]]) -> Arrays:
        """What the first process gives; all have to call it."""
        return dict(arrays) if self.size == 1 else self._broadcast(0, arrays)

    def _broadcast(self, source: int, arrays: Mapping[str, NDArray[Any]]) -> Arrays:
        import torch

        mine = source == self.rank
        data = save({key: np.ascontiguousarray(array) for key, array in arrays.items()}) if mine else b""
        length = torch.tensor([len(data)])
        self._send(length, source)
        content = torch.frombuffer(bytearray(data), dtype=torch.uint8) if mine else torch.empty(int(length), dtype=torch.uint8)
        self._send(content, source)
        return dict(arrays) if mine else load(content.numpy().tobytes())

    def _send(self, content: Any, source: int) -> None:
        """Give a tensor of the source's to all, in place."""
        from torch.distributed import broadcast

        try:
            broadcast(content, source, group=self.group)
        except RuntimeError as error:  # gloo's only kind: a closed connection, or patience at an end
            raise EquipoiseError(ENDED) from error


@contextmanager
def team(*, together: bool = False) -> Iterator[Team]:
    """The processes that `torchrun` has started with this one; a team of one outside it.

    Within it, the signal by which torchrun ends what is left of a run after a process has died is an error that says so.

    Args:
        together: all run every pass, each with a part of the model.

    Raises:
        EquipoiseError: the others cannot be reached; later: one of them has ended.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Team()
        return
    import torch
    import torch.distributed as dist

    def stopped(signum: int, frame: FrameType | None) -> None:
        raise EquipoiseError(STOPPED)

    main = threading.current_thread() is threading.main_thread()  # which alone may say what a signal does
    before = signal.signal(signal.SIGTERM, stopped) if main else None
    began = not dist.is_initialized()
    try:
        try:
            if began:
                gpus = torch.cuda.is_available()
                if gpus:
                    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
                # With GPUs both gloo and NCCL, which transformers needs where the model is divided.
                dist.init_process_group(None if gpus else "gloo", timeout=PATIENCE)
            group = dist.new_group(backend="gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise EquipoiseError(f"the {size} processes of this run cannot reach each other: {reason}.") from error
        try:
            yield Team(dist.get_rank(), size, together, group)
        except RuntimeError as error:  # of a model whose processes run each pass together
            if isinstance(error, dist.DistError) or any(mark in str(error) for mark in LOST):
                raise EquipoiseError(ENDED) from error
            raise
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
        if began and dist.is_initialized():
            dist.destroy_process_group()
