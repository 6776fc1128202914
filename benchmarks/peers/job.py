"""What the drivers share: jobs and results as JSON files, the calibration rows, time and memory. Needs numpy and torch alone.

A driver runs in its tool's own environment: `python DRIVER JOB RESULT`. The job names an action, "quantize" or "read".
"""

from __future__ import annotations

import json
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Job = Mapping[str, Any]
Actions = Mapping[str, Callable[[Job], dict[str, Any]]]


class Clock:
    """What the parts of a job took, by name: seconds on the wall, and of the processor in all threads together."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.processor: dict[str, float] = {}

    def measure(self, name: str, work: Callable[[], Any]) -> Any:
        """Do some work and keep how long it took."""
        wall, processor = time.perf_counter(), time.process_time()
        result = work()
        self.wall[name], self.processor[name] = time.perf_counter() - wall, time.process_time() - processor
        return result

    @property
    def told(self) -> dict[str, Any]:
        """For the job's result."""
        return {"wall": self.wall, "processor": self.processor}


def rows(job: Job, name: str = "calibration") -> list[list[int]]:
    """Rows of token ids, as the benchmark cut them."""
    with np.load(job[name]) as kept:
        return [ids.tolist() for ids in np.split(kept["ids"], np.cumsum(kept["lengths"])[:-1])]


def experts(model: Any) -> Iterator[tuple[str, Tensor]]:
    """All expert matrices [out, in] of a stock model, which keeps those of a layer in two parameters [E, out, in]."""
    for layer, block in enumerate(model.model.layers):
        fused = block.mlp.experts
        for expert, (gate_up, down) in enumerate(zip(fused.gate_up_proj, fused.down_proj, strict=True)):
            for part, matrix in zip(("gate", "up", "down"), (*gate_up.chunk(2), down), strict=True):
                yield f"{layer}.{expert}.{part}", matrix.detach()


def logits_of(model: Any, job: Job) -> Tensor:
    """[rows, positions, V] float32 logits of the probe, which all drivers and the benchmark compute alike."""
    with torch.no_grad():
        return torch.stack([model(torch.tensor([ids])).logits[0].float() for ids in rows(job, "probe")])


def _peak_memory() -> float:
    """Megabytes resident at most. Not `ru_maxrss`, which counts the process that this one was forked from."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkpoint can be read without the tool that wrote it
        return None


def main(actions: Actions, *packages: str) -> None:
    """Do one job and write what came of it; an exception of the tool is a result, told in the tool's own words."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    try:
        result = actions[job["action"]](job)
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"}
    result["peak_memory_mb"] = _peak_memory()
    result["versions"] = {package: told for package in ("torch", "transformers", *packages) if (told := _version(package))}
    Path(sys.argv[2]).write_text(json.dumps(result, indent=1))
