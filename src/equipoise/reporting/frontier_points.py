"""The points of a frontier as `equipoise frontier --json` prints them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """One plan of a frontier: what it was allowed, and what is predicted of it; None where there is no plan or no prediction.

    Attributes:
        bytes_fraction, error_bound: what the plan was allowed.
        lis, lower_bound: over units, and what is proven to be out of reach below.
        output_error: relative error of the layers' output.
        kl: divergence that the error comes to, nats per token.
        bytes: of all slots.
        efficient: no other point has at most its bytes, error and LIS and less of one of them.
    """

    bytes_fraction: float
    error_bound: float
    lis: float | None
    lower_bound: float | None
    output_error: float | None
    kl: float | None
    bytes: float | None
    efficient: bool

    @property
    def label(self) -> str:
        """What it was allowed and what error it has, in words."""
        error = "" if self.output_error is None else f", error {self.output_error:.4f}"
        return f"{self.bytes_fraction:.0%} of the bytes, error bound {self.error_bound:g}{error}"


def frontier_points(found: Any) -> list[FrontierPoint] | None:
    """The points in parsed JSON; None when it is no frontier.

    Args:
        found: what `json.loads` made of a file.
    """
    rows = found.get("points") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not rows:
        return None
    points = []
    for row in rows:
        if not isinstance(row, dict) or not {"bytes_fraction", "error_bound", "lis", "bytes"} <= row.keys():
            return None
        numbers = {name: row.get(name) for name in ("lis", "lower_bound", "output_error", "kl", "bytes")}
        if any(isinstance(v, bool) or not isinstance(v, int | float | None) for v in numbers.values()):
            return None
        points.append(
            FrontierPoint(
                float(row["bytes_fraction"]), float(row["error_bound"]),
                **{name: None if v is None else float(v) for name, v in numbers.items()}, efficient=bool(row.get("efficient")),
            )
        )  # fmt: skip
    return points
