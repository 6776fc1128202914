"""A team of processes played by threads, so that many divisions can be tried without starting a process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from equipoise.profiling.team import Arrays, Team


@dataclass(eq=False)
class Meeting:
    """Where threads leave what they give, and wait for each other."""

    size: int
    given: dict[int, Arrays] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=60)


@dataclass(frozen=True, eq=False)
class ThreadTeam(Team):
    """A team whose members are threads; `group` is their meeting."""

    def exchange(self, arrays: Mapping[str, Any]) -> Iterator[Arrays]:
        self.group.given[self.rank] = {name: array.copy() for name, array in arrays.items()}
        self.group.barrier.wait()
        everything = [self.group.given[rank] for rank in range(self.size)]
        self.group.barrier.wait()
        yield from everything


def run_team(size: int, work: Callable[[Team], Any]) -> list[Any]:
    """What each member of a team returns, in order of ranks; the first error of any is raised."""
    meeting = Meeting(size)

    def member(rank: int) -> Any:
        try:
            return work(ThreadTeam(rank, size, group=meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(member, rank) for rank in range(size)]
    errors = [future.exception() for future in futures]
    real = [error for error in errors if error is not None and not isinstance(error, threading.BrokenBarrierError)]
    for error in real or errors:
        if error is not None:
            raise error
    return [future.result() for future in futures]
