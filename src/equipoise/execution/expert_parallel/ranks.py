"""The processes that run one model together, and what they say to each other; a process that ends or hangs ends them all.

Everything goes through collectives that gloo (CPU) and NCCL (GPUs) both have. Shapes: H ranks, N rows, D model width.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from equipoise.errors import ParallelError

TIMEOUT_S = 60.0
"""Seconds that a rank waits for the others in one exchange before it takes them for lost."""
ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process."""


@dataclass(frozen=True)
class Ranks:
    """One process among those that run a model together; a context manager that leaves them at its end.

    When a process is killed, gloo's connections to it close and the others raise `ParallelError` at once; when one hangs,
    they raise after `timeout_s`. Under NCCL both show after `timeout_s`, and it is torch's watchdog that ends the process.

    Attributes:
        rank: this process, from 0.
        size: how many there are.
        timeout_s: seconds that an exchange may take.
        device: where the tensors that are exchanged live.
        group: torch's process group; None for all processes of the job.
    """

    rank: int = 0
    size: int = 1
    timeout_s: float = TIMEOUT_S
    device: str = "cpu"
    group: Any = None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def gather(self, mine: Tensor, what: str) -> Tensor:
        """[H, ...] the tensors of all ranks, of one shape.

        Args:
            mine: this rank's.
            what: what is being done, for the error.
        """
        if self.size == 1:
            return mine[None]
        all_ranks = [torch.empty_like(mine) for _ in range(self.size)]
        with self._together(what):
            dist.all_gather(all_ranks, mine.contiguous(), group=self.group)
        return torch.stack(all_ranks)

    def add(self, tensor: Tensor, what: str) -> Tensor:
        """The sum over ranks, in place."""
        if self.size > 1:
            with self._together(what):
                dist.all_reduce(tensor, group=self.group)
        return tensor

    def swap(self, x: Tensor, send_H: Sequence[int], receive_H: Sequence[int], what: str) -> Tensor:
        """Rows to each rank and from each rank (all-to-all).

        Args:
            x: [N, ...] rows in the order of the ranks that they go to.
            send_H: rows for each rank.
            receive_H: rows from each rank.
            what: what is being done, for the error.

        Returns:
            [sum of receive_H, ...] rows in the order of the ranks that they are from.
        """
        return self.start_swap(x, send_H, receive_H, what).wait()

    def start_swap(self, x: Tensor, send_H: Sequence[int], receive_H: Sequence[int], what: str) -> Pending:
        """As `swap`, going on while other work is done."""
        if self.size == 1:
            return Pending(self, x, x, None, what)
        received = x.new_empty(sum(receive_H), *x.shape[1:])
        with self._together(what):
            work = dist.all_to_all_single(
                received, x.contiguous(), list(receive_H), list(send_H), group=self.group, async_op=True
            )
        return Pending(self, received, x, work, what)

    def meet(self, what: str) -> None:
        """Wait for all ranks, such as after loading, which may take one longer than another."""
        self.gather(torch.zeros(1, device=self.device), what)

    @contextlib.contextmanager
    def _together(self, what: str) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise  # the others are there, memory is not
        except RuntimeError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise ParallelError(
                f"rank {self.rank} of {self.size} lost the others while {what}: a rank has ended, or has not answered for "
                f"{self.timeout_s:g} s. All ranks end; the one that failed first says why. ({reason})"
            ) from error


@dataclass
class Pending:
    """Rows under way; `wait` gives them.

    Attributes:
        sent: what is being sent, which must live until it is.
    """

    ranks: Ranks
    received: Tensor
    sent: Tensor
    work: Any
    what: str

    def wait(self) -> Tensor:
        """The rows, as soon as they are here."""
        if self.work is not None:
            with self.ranks._together(self.what):
                self.work.wait()
            self.work = None
        return self.received


def start_ranks(*, device: str = "cpu", timeout_s: float = TIMEOUT_S, backend: str | None = None) -> Ranks:
    """Join the processes that torchrun started; alone if it started none.

    Args:
        device: "cpu", or "cuda" for the GPU that torchrun's LOCAL_RANK names.
        timeout_s: seconds that one exchange may take, the first one after loading included.
        backend: torch's; gloo for the CPU and nccl for GPUs when omitted.

    Raises:
        ParallelError: torch cannot do this here, or the others do not come.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    if size == 1:
        return Ranks(0, 1, timeout_s, device)
    if missing := [name for name in ENVIRONMENT if name not in os.environ]:
        raise ParallelError(f"{', '.join(missing)} not set; start the processes by torchrun --nproc-per-node N.")
    if not dist.is_available():
        raise ParallelError("this torch was built without torch.distributed; install one that has it.")
    chosen = backend or ("nccl" if device.startswith("cuda") else "gloo")
    try:
        dist.init_process_group(chosen, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as error:
        raise ParallelError(f"rank {rank} of {size} could not join the others by {chosen}: {error}") from error
    return Ranks(rank, size, timeout_s, device)
