"""What plans are worth before a GPU is touched: batches replayed through them, and the time, tokens and bytes that follow."""

from equipoise.dispatch.choice import RULES
from equipoise.simulation.report import SimulationReport
from equipoise.simulation.simulate import simulate
from equipoise.simulation.trace import Trace, load_trace

__all__ = ["RULES", "SimulationReport", "Trace", "load_trace", "simulate"]
