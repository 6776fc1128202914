"""What a rebalancer does, as Prometheus counters and gauges; needs `prometheus-client`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from equipoise.errors import EquipoiseError, missing_package

if TYPE_CHECKING:
    from equipoise.execution.rebalance.rebalancer import Rebalancer, Report


class StreamMetrics:
    """Counters and gauges of one rebalancer, in a registry of their own.

        metrics = StreamMetrics()
        with Rebalancer(model, policy, store, on_report=metrics.update) as rebalancer:
            metrics.attach(rebalancer)
            metrics.serve(9400)

    Every name begins with `equipoise_`; docs/streaming.md lists them.
    """

    def __init__(self) -> None:
        """Metrics that were not updated yet.

        Raises:
            EquipoiseError: `prometheus-client` is not installed.
        """
        try:
            from prometheus_client import CollectorRegistry, Counter, Gauge
        except ImportError as error:
            raise missing_package("metrics need", "prometheus-client", instead="leave them out") from error
        self.registry = CollectorRegistry()

        def gauge(name: str, text: str, *labels: str) -> Any:
            return Gauge(f"equipoise_{name}", text, labels, registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Any:
            return Counter(f"equipoise_{name}", text, labels, registry=self.registry)

        self._lis = gauge("lis", "LIS over units of the last step, mean over layers; 1 is balance")
        self._layer = gauge("layer_lis", "LIS over units of the last step", "layer")
        self._cumulative = gauge("cumulative_lis", "LIS over units of all steps so far, mean over layers")
        self._balancedness = gauge("balancedness", "mean unit load over the largest, of the last step, mean over layers")
        self._drift = gauge("drift_bits", "Jensen-Shannon divergence between the window and the load that was planned for")
        self._steps = counter("steps", "steps closed")
        self._tokens = counter("tokens", "real tokens served")
        self._outcomes = counter("replans", "steps by what became of them: kept, swapped, postponed, failed", "outcome")
        self._moved = counter("moved_bytes", "bytes of slots that got another expert")
        self._slots = counter("moved_slots", "slots that got another expert")
        self._seconds = counter("seconds", "seconds spent planning, staging and with forwards held back", "stage")
        self._plan_bytes = gauge("plan_bytes", "bytes of all slots of the plan in force")
        self._staging = gauge("staged_bytes", "bytes held beside the plan's own by the last change")
        self._limit = gauge("staging_limit_bytes", "most bytes that may be held beside the plan's own")
        self._predicted = counter("predicted_seconds", "seconds that changes were predicted to win, costs deducted")
        self._won = gauge("won_seconds", "seconds that changes have won on the load that came, costs deducted")
        self._rebalancer: Rebalancer | None = None
        for outcome in ("kept", "swapped", "postponed", "failed"):
            self._outcomes.labels(outcome)
        for stage in ("planning", "staging", "paused"):
            self._seconds.labels(stage)

    def attach(self, rebalancer: Rebalancer) -> None:
        """Also tell what only the rebalancer knows: bytes of its plan, LIS by layer, what changes have won."""
        self._rebalancer = rebalancer
        self._limit.set(rebalancer.staging_bytes)
        self._plan_bytes.set(float(rebalancer.plan.bytes_by_unit().sum()))

    def update(self, report: Report) -> None:
        """Take in what became of a step."""
        self._lis.set(report.lis)
        self._cumulative.set(report.cumulative_lis)
        if not np.isnan(report.drift):
            self._drift.set(report.drift)
        self._steps.inc()
        self._tokens.inc(report.tokens)
        self._outcomes.labels(report.outcome).inc()
        self._moved.inc(report.moved_bytes)
        self._slots.inc(report.slots)
        for stage in ("planning", "staging", "paused"):
            self._seconds.labels(stage).inc(getattr(report, stage))
        if report.outcome == "swapped":
            self._staging.set(report.staged_bytes)
            self._predicted.inc(max(report.predicted, 0.0))
        if self._rebalancer is not None:
            self._from(self._rebalancer)

    def serve(self, port: int, host: str = "127.0.0.1") -> Any:
        """Answer `GET /metrics` on a port, in a thread of its own.

        Args:
            port: 0 takes a free one.
            host: address to listen on.

        Returns:
            (server, thread) of prometheus_client; `server.server_port`, `server.shutdown()`.

        Raises:
            EquipoiseError: the port cannot be used.
        """
        from prometheus_client import start_http_server

        try:
            return start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            raise EquipoiseError(
                f"cannot serve metrics on {host}:{port}: {error.strerror or error}; give another port."
            ) from error

    def write(self, path: str | Path) -> None:
        """Write the metrics as text, whole or not at all: for node_exporter's textfile collector, or `equipoise watch FILE`."""
        from prometheus_client import generate_latest

        from equipoise.artifacts.files import write_atomic

        write_atomic(path, generate_latest(self.registry))

    def _from(self, rebalancer: Rebalancer) -> None:
        score_L = rebalancer.last_lis
        for layer, score in enumerate(score_L.tolist()):
            if score == score:
                self._layer.labels(str(layer)).set(score)
        known = score_L[~np.isnan(score_L)]
        if len(known):
            self._balancedness.set(float((1 / known).mean()))
        self._won.set(sum(entry.paid for entry in rebalancer.ledger.entries))
