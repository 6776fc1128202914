"""What the ranks of a divided model did: rows, replicas, bytes and seconds of every call of every layer.

Shapes: L MoE layers, C calls, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from equipoise.errors import RecordingError
from equipoise.execution.expert_parallel.runtime import rank_slots
from equipoise.execution.expert_parallel.slots import Call

FIELDS = tuple(field.name for field in fields(Call))
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ParallelReport:
    """All calls of all ranks.

    Attributes:
        values: [L, C, R] of each field of `Call`, by its name.
    """

    values: dict[str, Floats]

    def select(self, *, decode: bool) -> ParallelReport:
        """The calls of one phase; the phase is that of the first layer."""
        calls = self.values["decode"][0, :, 0] == float(decode)
        return ParallelReport({name: array[:, calls] for name, array in self.values.items()})

    def without(self, calls: int) -> ParallelReport:
        """All but the first calls, which are slower as storage is laid out for kernels."""
        return ParallelReport({name: array[:, calls:] for name, array in self.values.items()})

    @property
    def calls(self) -> int:
        """C."""
        return int(self.values["rows"].shape[1])

    @property
    def layer_s(self) -> Floats:
        """[L, C] seconds of a call: those of the slowest rank."""
        return np.asarray(self.values["total_s"].max(2))

    @property
    def moved_L(self) -> Floats:
        """[L] share of the token-expert pairs that another rank served than the one that the token was on."""
        return np.asarray(self.values["sent_rows"].sum((1, 2)) / np.maximum(self.values["rows"].sum((1, 2)), 1))

    def rows(self) -> dict[str, Any]:
        """Figures, means over layers and calls, those of the context over calls alone; JSON-ready."""
        value = self.values
        served = value["rows"]
        mean_LC = served.mean(2)
        ratio = np.where(mean_LC > 0, served.max(2) / np.maximum(mean_LC, 1e-300), 1.0)
        return {
            "calls": self.calls,
            "rank_rows_max": float(served.max(2).mean()),
            "rank_rows_mean": float(served.mean()),
            "imbalance": float(ratio.mean()),
            "activated_max": float(value["activated"].max(2).mean()),
            "read_bytes_max": float(value["read_bytes"].max(2).mean()),
            "rows_moved": float(value["sent_rows"].sum(2).mean()),
            "weight_bytes_moved": float(value["received_bytes"].sum(2).mean()),
            "token_bytes_moved": float(value["token_bytes"].sum(2).mean()),
            "context_bytes_moved": float(value["context_bytes"].sum((0, 2)).mean()),
            "context_ms": float(1e3 * value["context_s"].max(2).sum(0).mean()),
            "layer_ms": float(1e3 * self.layer_s.mean()),
            "compute_ms_max": float(1e3 * value["compute_s"].max(2).mean()),
            "compute_ms_mean": float(1e3 * value["compute_s"].mean()),
            "decide_ms": float(1e3 * value["decide_s"].max(2).mean()),
            "rows_by_rank": served.sum(0).mean(0).tolist(),
        }


class ParallelMeter:
    """Notes what each call of a divided model's layers does while its context is open.

    with ParallelMeter(model) as meter:
        model(**batch)
    report = meter.report()  # all ranks call it

    Raises:
        ModelError: the model is not divided among ranks.
    """

    def __init__(self, model: Any) -> None:
        self._layers = rank_slots(model)
        self._calls: list[list[Call]] = []

    def __enter__(self) -> ParallelMeter:
        self._calls = []
        for slots in self._layers:
            slots.calls = []
            self._calls.append(slots.calls)
        return self

    def __exit__(self, *_: object) -> None:
        for slots in self._layers:
            slots.calls = None

    def drop(self, calls: int) -> None:
        """Forget the last calls of every layer."""
        for noted in self._calls:
            del noted[len(noted) - calls :]

    def report(self) -> ParallelReport:
        """What all ranks did; every rank calls it and gets the same.

        Raises:
            RecordingError: no layer was called, or layers were called differently often.
        """
        often = {len(noted) for noted in self._calls}
        if len(often) != 1 or often == {0}:
            raise RecordingError(f"the layers were called {sorted(often)} times; run the model inside the meter's context.")
        ranks = self._layers[0].ranks
        values = [[[float(getattr(c, f)) for f in FIELDS] for c in noted] for noted in self._calls]
        mine = torch.tensor(values, dtype=torch.float64, device=ranks.device)
        every = ranks.gather(mine, "gathering figures").cpu().numpy()  # [R, L, C, F]
        return ParallelReport({name: np.moveaxis(every[..., i], 0, 2) for i, name in enumerate(FIELDS)})
