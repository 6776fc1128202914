"""Which experts matter: estimators behind one registry, most of them fed by the same pass that counts the load."""

from equipoise.profiling.importance import (  # noqa: F401 (they register)
    easy_ep,
    frequency,
    gate_norm,
    leave_one_out,
    output_error,
    wanda,
)
from equipoise.profiling.importance.base import IMPORTANCE, Context, Estimator, Measured, Observation, make_estimators

__all__ = ["IMPORTANCE", "Context", "Estimator", "Measured", "Observation", "make_estimators"]
