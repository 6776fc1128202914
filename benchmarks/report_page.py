"""How large the report page of a 61 x 256 model is, how long it takes to write, and when a browser has drawn it.

Real loads (DeepSeek-R1, recorded by SGLang) where --data has them, else drawn ones; five scenarios, three importance
estimators, three plans. Each round starts a fresh headless Chromium: the first opening is cold, the second warm. Times are
counted by the page from the start of its navigation: when buttons work (ready), when all figures are drawn (done), and the
longest single figure (slowest), which is the longest that the page does not answer. The first view of each figure is drawn,
as when a page is opened. `cpu` is the processor time of the page's main thread until all is drawn: the page's own work,
whatever else the machine does; the load average beside it tells how much that was.

    python benchmarks/report_page.py [--rounds 5] [--data DIR] [--json]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from equipoise.artifacts import LayerFacts, ModelFacts, Profile, Source
from equipoise.planning.methods import make_plan
from equipoise.reporting.evidence import Evidence
from equipoise.reporting.page import page
from equipoise.reporting.report_parts import make_report

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from reporting.browser import open_page, start  # the browser of the tests

LAYERS, EXPERTS, TOP_K, SCENARIOS = 61, 256, 8, 5


def base_load(data: Path) -> tuple[np.ndarray, str]:
    """[61, 256] selections, and where they come from; the three dense layers of the real model repeat the next three."""
    path = data / "routing" / "dsr1_srt_slurm" / "logical_count.npz"
    if path.is_file():
        real = np.load(path)["fp4_1k1k"].astype(np.float64)
        real[:3] = real[3:6]
        return real, "DeepSeek-R1, recorded by SGLang"
    return np.random.default_rng(0).lognormal(0, 1.2, (LAYERS, EXPERTS)) * 1e4, "log-normal"


def make_profile(load_LE: np.ndarray) -> Profile:
    """A profile of five scenarios of five windows each that scatter around a load."""
    rng = np.random.default_rng(0)
    kinds = rng.gamma(3, 1 / 3, (SCENARIOS, 1, LAYERS, EXPERTS))
    windows = rng.poisson(load_LE / 50 * np.repeat(kinds, 5, 1)).reshape(-1, LAYERS, EXPERTS).astype(np.int64)
    scenario = np.repeat(np.arange(SCENARIOS), 5)
    counts = np.zeros((SCENARIOS, 2, LAYERS, EXPERTS), np.int64)
    counts[:, 0] = [windows[scenario == s].sum(0) for s in range(SCENARIOS)]
    matrices = ((2048, 7168), (2048, 7168), (7168, 2048))
    facts = tuple(
        LayerFacts(path=f"model.layers.{i}.mlp.experts", model_layer=i, num_experts=EXPERTS, top_k=TOP_K, matrices=matrices)
        for i in range(LAYERS)
    )
    profile = Profile(
        model=ModelFacts(name="61 x 256", model_type="deepseek_v3", dtype="bf16", fingerprint="0" * 64, layers=facts),
        source=Source(scenarios=("chat", "code", "math", "wiki", "prose")), counts=counts, gate_mass=counts.sum(1) / TOP_K,
        tokens=counts[:, 0, 0].sum(1) // TOP_K, windows=windows, window_scenario=scenario,
    )  # fmt: skip
    noisy = profile.load * rng.random((LAYERS, EXPERTS))
    return dataclasses.replace(
        profile, importance={"wanda": rng.random(noisy.shape), "gate_norm": noisy, "output_error": noisy**0.5}
    )


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("EQUIPOISE_SHARED_DATA", "../shared/data")))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    load, origin = base_load(arguments.data)
    profile = make_profile(load)
    plans = {
        "rq": make_plan(profile, "rq"),
        "eplb": make_plan(profile, "eplb", units=32, slots=288),
        "rq-paper": make_plan(profile, "rq-paper"),
    }
    begin = time.perf_counter()
    html = page(make_report(Evidence(profile, plans)))
    rows = {"load": origin, "bytes": len(html.encode()), "seconds_to_write": time.perf_counter() - begin, "openings": {}}
    alone = len(page(make_report(Evidence(profile))))
    rows["bytes_of"] = {"profile alone": alone} | {
        f"plan {name}": len(page(make_report(Evidence(profile, {name: plan})))) - alone for name, plan in plans.items()
    }
    seen: dict[str, dict[str, list[float]]] = {
        kind: {"ready": [], "done": [], "slowest": [], "cpu": []} for kind in ("cold", "warm")
    }
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "report.html"
        path.write_text(html)
        for number in range(arguments.rounds):
            browser = start(Path(place) / f"chromium-{number}")
            driver = next(browser)
            rows["browser"] = f"{driver.capabilities['browserName']} {driver.capabilities['browserVersion']}, headless, no GPU"
            driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
            for kind in ("cold", "warm"):
                open_page(driver, path)
                metrics = driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
                cpu = next(metric["value"] for metric in metrics if metric["name"] == "ThreadTime")  # since the navigation
                found = driver.execute_script("return window.equipoise")
                assert found["drawn"] == found["wanted"] == 7, "every figure is drawn"
                for name, values in seen[kind].items():
                    values.append(cpu if name == "cpu" else found[name] / 1e3)
            browser.close()
    rows["cores"], rows["load_average"] = os.cpu_count(), os.getloadavg()[0]
    rows["openings"] = {
        kind: {
            name: {"median": statistics.median(v), "min": min(v), "max": max(v), "rounds": len(v)} for name, v in own.items()
        }
        for kind, own in seen.items()
    }
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{rows['bytes'] / 1e6:.2f} MB, written in {rows['seconds_to_write']:.2f} s; load: {origin}; {rows['browser']}")
    print("of which " + ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in rows["bytes_of"].items()))
    print(f"{rows['cores']} cores, load average {rows['load_average']:.1f}; seconds, median (min..max)")
    for kind, own in rows["openings"].items():
        told = ", ".join(f"{name} {v['median']:.2f} ({v['min']:.2f}..{v['max']:.2f})" for name, v in own.items())
        print(f"{kind}: {told}")


if __name__ == "__main__":
    main()
