"""The frame of `make bench`: parts end, are kept, are told when they fail; what scripts write becomes figures."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def modules(script) -> tuple[ModuleType, ModuleType]:
    return script("bench"), script("bench_parts")


@pytest.fixture
def frame(modules, tmp_path, monkeypatch):
    """Run the frame over scripts of a few lines; returns its JSON, exit status and the page."""
    bench, parts = modules
    monkeypatch.setattr(bench, "HERE", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- {mark}: begin -->\n<!-- {mark}: end -->\n" for mark in ("bench", "scripts")))

    def call(scripts: dict[str, str], *words: str, seconds: int = 60, text: str | None = None):
        listed = []
        for name, source in scripts.items():
            (tmp_path / f"{name}.py").write_text(source)
            listed.append(parts.Part(name, name, (f"{name}.py",), (), seconds, read, "least..greatest", text=text))
        monkeypatch.setattr(bench, "PARTS", tuple(listed))
        monkeypatch.setattr(sys, "argv", ["bench.py", "--out", str(tmp_path / "out"), "--write", str(page), *words])
        status = 0
        try:
            bench.main()
        except SystemExit as stop:
            status = stop.code
        return json.loads((tmp_path / "out" / "bench.json").read_text()), status, page.read_text()

    def read(found):
        return [parts.Figure("ours / theirs", found["value"], found["value"] - 0.5, found["value"] + 0.5)]

    return call


def running(process: str) -> bool:
    """Whether a process is there and has not ended."""
    file = Path("/proc") / process / "stat"
    return file.exists() and file.read_text().rpartition(")")[2].split()[0] != "Z"


COUNTS = """
import pathlib
count = pathlib.Path(__file__).with_suffix(".count")
count.write_text(str(int(count.read_text()) + 1 if count.exists() else 1))
"""
WORKS = COUNTS + "print('{\"value\": 2}')\n"


def test_figures_machine_and_versions_are_told(frame):
    found, status, page = frame({"one": WORKS})
    assert status == 0
    assert found["versions"]["numpy"] != "not installed"
    figure = {"name": "ours / theirs", "value": 2, "low": 1.5, "high": 2.5, "unit": "x", "column": ""}
    assert found["parts"]["one"]["figures"] == [figure]
    assert "| ours / theirs | 2 (1.5..2.5) x |" in page
    assert "one.py` |" not in page, "scripts that are no programs are not listed"


def test_finished_parts_are_kept_and_run_anew_when_asked(frame, tmp_path):
    for words, times in (((), "1"), ((), "1"), (("--again",), "2")):
        frame({"one": WORKS}, *words)
        assert (tmp_path / "one.count").read_text() == times


def test_a_failed_part_is_told_and_run_again_and_the_others_go_on(frame, tmp_path):
    scripts = {"bad": COUNTS + "raise SystemExit('no such thing')\n", "good": WORKS}
    for times in ("1", "2"):
        found, status, page = frame(scripts)
        assert status == 1
        assert found["parts"]["bad"]["status"] == "failed"
        assert "no such thing" in page
        assert found["parts"]["good"]["status"] == "done"
        assert (tmp_path / "bad.count").read_text() == times
    assert (tmp_path / "good.count").read_text() == "1"


def test_a_part_that_does_not_end_is_ended_with_its_children(frame, tmp_path):
    child = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
    source = child + f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); time.sleep(60)\n"
    began = time.perf_counter()
    found, status, _ = frame({"endless": source}, seconds=3)
    assert (status, found["parts"]["endless"]["status"]) == (1, "out of time")
    assert time.perf_counter() - began < 40
    assert not running((tmp_path / "pid").read_text()), "the script's own process went with it"


def test_a_part_ends_with_the_frame(tmp_path):
    source = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    (tmp_path / "endless.py").write_text(source)
    driver = (
        f"import sys, pathlib; sys.path.insert(0, {str(HERE)!r}); import bench, bench_parts\n"
        f"bench.HERE = pathlib.Path({str(tmp_path)!r}); sys.argv = ['bench.py', '--out', {str(tmp_path / 'out')!r}]\n"
        "bench.PARTS = (bench_parts.Part('endless', 'endless', ('endless.py',), (), 60, None, ''),)\nbench.main()\n"
    )
    frame = subprocess.Popen([sys.executable, "-c", driver])
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert frame.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    frame.terminate()
    assert frame.wait(60) == 143
    assert not running((tmp_path / "pid").read_text())


def test_a_part_that_needs_text_is_skipped_without(frame):
    found, status, page = frame({"one": WORKS}, text="needed")
    assert (status, found["parts"]["one"]["status"]) == (0, "skipped")
    assert "--data" in page


def test_all_parts_name_scripts_that_are_there_and_fit_the_time(modules):
    bench, parts = modules
    for part in parts.PARTS:
        assert (HERE / part.words[0]).is_file()
        source = (HERE / part.words[0]).read_text()
        for word in (*part.words, *part.small):
            if word.startswith("--"):
                assert f'"{word}"' in source or 'f"--{name}"' in source, f"{part.words[0]} has no {word}"
    assert len({part.name for part in parts.PARTS}) == len(parts.PARTS)
    command = bench.command_of(parts.PARTS[-1], Path("o"), None, True)
    assert command[2:] == ["--json", "o/growth.raw.json", "--small", "--turns", "1"]


def test_growth_is_read_at_its_largest_sizes(modules):
    point = {"axis": "layers", "contender": "rq", "least": 1.0, "greatest": 3.0}
    found = {"points": [point | {"size": 4, "seconds": 1.0}, point | {"size": 64, "seconds": 2.0}]}
    assert [figure.name for figure in modules[1].growth(found)] == ["layers 64: rq"]


def test_figures_with_columns_make_one_row_for_each_name(modules):
    bench, parts = modules
    figures = [
        parts.Figure("a", 2, 1, 3, column="1 token"),
        parts.Figure("a", 4, 4, 4, column="2 tokens"),
        parts.Figure("b", 5, 5, 5, "%", "2 tokens"),
    ]
    assert bench.table(figures) == [
        "| | 1 token | 2 tokens |", "|---|---:|---:|", "| a | 2 (1..3) x | 4 x |", "| b |  | +5.00 % |",
    ]  # fmt: skip
