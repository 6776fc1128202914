from __future__ import annotations

import pytest
from rich.console import Console

from equipoise.errors import EquipoiseError
from equipoise.reporting.live import live_view, read_metrics, sparkline

TEXT = """# HELP equipoise_lis LIS
# TYPE equipoise_lis gauge
equipoise_lis 1.25
# TYPE equipoise_layer_lis gauge
equipoise_layer_lis{layer="0"} 1.5
equipoise_layer_lis{layer="10"} 1.0
equipoise_layer_lis{layer="2"} 2.0
# TYPE equipoise_replans counter
equipoise_replans_total{outcome="swapped"} 3.0
equipoise_replans_total{outcome="failed"} 1.0
# TYPE python_info gauge
python_info{version="3"} 1.0
"""


def shown(view) -> str:
    console = Console(width=80, record=True, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(view)
    return capture.get()


def test_metrics_become_a_screen():
    pytest.importorskip("prometheus_client")
    samples = read_metrics(TEXT)
    assert samples == {
        "lis": {"": 1.25},
        "layer_lis": {"0": 1.5, "10": 1.0, "2": 2.0},
        "replans_total": {"swapped": 3.0, "failed": 1.0},
    }
    text = shown(live_view(samples, [1.5, 1.25]))
    assert "1.2500" in text
    assert "LIS by layer ▅█▁  1.000..2.000" in text  # in order of number, not of name
    assert "LIS by step" in text


def test_other_texts_are_refused():
    pytest.importorskip("prometheus_client")
    with pytest.raises(EquipoiseError, match="no metrics of a stream"):
        read_metrics("python_info 1.0\n")
    with pytest.raises(EquipoiseError, match="no text of Prometheus"):
        read_metrics("<html> not metrics { at all\n")


def test_a_line_of_blocks_begins_at_balance():
    assert sparkline([1.0, 2.0]) == "▁█"
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([]) == ""
