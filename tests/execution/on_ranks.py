"""Some processes that run a model together, forked from the test's own, so that nothing need be imported again."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from equipoise.execution.expert_parallel.ranks import Ranks

LIMIT_S = 120
"""Seconds after which a test's processes are ended."""


def _run(rank: int, size: int, directory: Path, timeout_s: float, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    out = directory / f"{rank}"
    try:
        store = dist.FileStore(str(directory / "store"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s))
        with Ranks(rank, size, timeout_s) as ranks:
            torch.save(function(ranks, *args), out)
    except BaseException as error:
        out.with_suffix(".error").write_text(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        sys.stdout.flush()
        os._exit(1)
    os._exit(0)


def start(size: int, directory: Path, function: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """Begin `function(ranks, *args)` on so many ranks."""
    directory.mkdir(parents=True, exist_ok=True)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_run, args=(r, size, directory, timeout_s, function, args)) for r in range(size)]
    for process in processes:
        process.start()
    return processes


def on_ranks(size: int, directory: Path, function: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """What `function(ranks, *args)` returns on each rank."""
    processes = start(size, directory, function, *args, timeout_s=timeout_s)
    end = time.monotonic() + LIMIT_S
    for process in processes:
        process.join(max(0.1, end - time.monotonic()))
        if process.is_alive():
            process.kill()
    errors = [error(directory, rank) for rank in range(size) if processes[rank].exitcode]
    assert not errors, "\n".join(errors)
    return [torch.load(directory / f"{rank}", weights_only=True) for rank in range(size)]


def error(directory: Path, rank: int) -> str:
    """What ended a rank."""
    path = directory / f"{rank}.error"
    return path.read_text() if path.exists() else f"rank {rank} was killed"
