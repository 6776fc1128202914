"""What balance can be had for how many bytes and how much error: plans over a grid of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from equipoise.artifacts import Plan, Profile
from equipoise.errors import PlanError
from equipoise.planning.budget import UnreachableError
from equipoise.planning.methods import make_plan

BYTES_FRACTIONS = (0.5, 0.75, 1.0, 1.25)
ERROR_BOUNDS = (0.0, 0.01, 0.02, 0.03, 0.05, 0.1)


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """One cell of the grid.

    Attributes:
        bytes_fraction, error_bound: what the plan was allowed.
        plan: the plan, or None where bytes and error cannot both be met.
        problem: why there is no plan; empty when there is one.
        efficient: no other point has at most its bytes, error and LIS and less of one of them.
    """

    bytes_fraction: float
    error_bound: float
    plan: Plan | None
    problem: str
    efficient: bool


def frontier(
    profile: Profile,
    *,
    bytes_fractions: Sequence[float] = BYTES_FRACTIONS,
    error_bounds: Sequence[float] = ERROR_BOUNDS,
    units: int | None = None,
    seed: int = 0,
    **options: Any,
) -> list[FrontierPoint]:
    """Plans by `rq` for every pair of a byte fraction and an error bound, fewest bytes first.

    Args:
        profile: what was measured.
        bytes_fractions: of the original experts' 16-bit bytes.
        error_bounds: relative RMS errors of the layers' routed output.
        units: U, as for `make_plan`.
        seed: as for `make_plan`.
        **options: other options of method "rq".

    Raises:
        PlanError: an option is wrong, whatever the bytes and the error; a cell that cannot be met is no error but a
            point without plan.
    """
    if not bytes_fractions or not error_bounds:
        raise PlanError("bytes_fractions and error_bounds: empty list given; give at least one number in each.")
    grid = [(b, e) for b in sorted(set(bytes_fractions)) for e in sorted(set(error_bounds))]
    cells = [(b, e, *_plan(profile, b, e, units, seed, options)) for b, e in grid]
    costs = [None if plan is None else _cost(plan, e) for _, e, plan, _ in cells]

    def beaten(mine: tuple[float, ...]) -> bool:
        """Whether another point has at most the same of everything, and less of something."""
        return any(o is not None and o != mine and all(x <= y for x, y in zip(o, mine, strict=True)) for o in costs)

    return [
        FrontierPoint(b, e, plan, problem, cost is not None and not beaten(cost))
        for (b, e, plan, problem), cost in zip(cells, costs, strict=True)
    ]


def _plan(
    profile: Profile, fraction: float, bound: float, units: int | None, seed: int, options: dict[str, Any]
) -> tuple[Plan | None, str]:
    try:
        plan = make_plan(profile, "rq", units=units, seed=seed, bytes_fraction=fraction, error_bound=bound, **options)
    except UnreachableError as error:
        return None, str(error)
    return plan, ""


def _cost(plan: Plan, bound: float) -> tuple[float, float, float]:
    """Bytes, error (its bound where it is not measured) and LIS of a plan."""
    predicted = plan.predicted
    assert predicted is not None, "every planned plan carries its prediction"
    error = bound if predicted.output_error is None else predicted.output_error
    return float(predicted.bytes), error, predicted.lis


def frontier_rows(points: Sequence[FrontierPoint]) -> dict[str, Any]:
    """The points as plain values under "points"; `lis`, `bytes` and `output_error` are null where there is no plan."""
    rows = []
    for point in points:
        predicted = point.plan.predicted if point.plan else None
        rows.append(
            {
                "bytes_fraction": point.bytes_fraction,
                "error_bound": point.error_bound,
                "lis_base": predicted.lis_raw if predicted else None,
                "lis": predicted.lis if predicted else None,
                "lower_bound": predicted.lower_bound if predicted else None,
                "output_error": predicted.output_error if predicted else None,
                "kl": predicted.kl if predicted else None,
                "bytes": predicted.bytes if predicted else None,
                "slots": sum(layer.num_slots for layer in point.plan.layers) if point.plan else None,
                "efficient": point.efficient,
                "problem": point.problem,
            }
        )
    return {"points": rows}
