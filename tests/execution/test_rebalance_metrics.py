from __future__ import annotations

import urllib.request
from collections.abc import Callable

import pytest
from transformers import PreTrainedModel

from equipoise.artifacts import ModelFacts
from equipoise.errors import EquipoiseError
from equipoise.execution.apply import apply_plan
from equipoise.execution.rebalance.metrics import StreamMetrics
from equipoise.execution.rebalance.rebalancer import Rebalancer
from equipoise.execution.rebalance.store import ExpertStore
from equipoise.planning.streaming.decision import Costs, Decision
from equipoise.reporting.live import read_metrics
from execution.helpers import make_plan, token_batch


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "prometheus_client", None)
    with pytest.raises(EquipoiseError, match="pip install prometheus-client"):
        StreamMetrics()


def test_metrics_are_what_the_reports_say(fresh: Callable[[], PreTrainedModel], facts: ModelFacts, tmp_path):
    pytest.importorskip("prometheus_client")
    old, new = (make_plan(facts, precisions=["fp32", "int8"], extra=4, seed=seed) for seed in (1, 2))
    targets = [new, None]

    class Scripted:
        def decide(self, load_LE, plan, costs):
            if not targets:
                raise ValueError("no more")
            return Decision(targets.pop(0), "told so", drift=0.25)

    store = ExpertStore.create(fresh(), tmp_path / "store", ["int8"])
    model, metrics = apply_plan(fresh(), old), StreamMetrics()
    server, thread = metrics.serve(0)
    rebalancer = Rebalancer(
        model, Scripted(), store, step_tokens=1, costs=Costs(1e-6, 1e-9, 1e-6), background=False, on_report=metrics.update
    )
    metrics.attach(rebalancer)
    with rebalancer:
        reports = []
        for seed in range(3):
            model(**token_batch(64, (9, 5), seed=seed))
            reports.append(rebalancer.advance())
    with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics") as answer:
        served = read_metrics(answer.read().decode())
    metrics.write(tmp_path / "metrics.prom")
    assert read_metrics((tmp_path / "metrics.prom").read_text()) == served
    server.shutdown()
    thread.join()
    assert served["replans_total"] == {"kept": 1, "swapped": 1, "postponed": 0, "failed": 1}
    assert served["lis"][""] == pytest.approx(reports[-1].lis)
    assert served["cumulative_lis"][""] == pytest.approx(reports[-1].cumulative_lis)
    assert served["moved_bytes_total"][""] == reports[0].moved_bytes > 0
    assert served["tokens_total"][""] == 42
    assert served["drift_bits"][""] == 0.25
    assert served["seconds_total"]["staging"] == pytest.approx(sum(r.staging for r in reports))
    assert served["plan_bytes"][""] > 0
    assert len(served["layer_lis"]) == len(facts.layers)
    assert 0 < served["balancedness"][""] <= 1


def test_a_port_in_use_is_refused():
    pytest.importorskip("prometheus_client")
    server, thread = StreamMetrics().serve(0)
    with pytest.raises(EquipoiseError, match="give another port"):
        StreamMetrics().serve(server.server_port)
    server.shutdown()
    thread.join()
