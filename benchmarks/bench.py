"""What is quick of the benchmarks, side by side: one JSON and one Markdown page. `make bench` runs it.

    python benchmarks/bench.py --data DIRECTORY --write docs/benchmarks.md
    python benchmarks/bench.py --only recorder growth          # some parts;  --small: seconds a part, to try out the frame

Every part is a script of this directory, in a process of its own with a time limit; together they have --minutes. What a part
found is kept in --out and not run again while its command is the same (--again runs it anew), so an interrupted run goes on. A
part that fails or runs out of time is told on the page with its last words; the others go on, and the exit status is 1.
`--data` is the directory of text that scripts take; without it one part is skipped and others take the demo's text. Ratios are
taken by each script within its own run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from ast import get_docstring, parse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench_parts import PARTS, Figure, Part, parsed
from quantization_page import write_between

from equipoise.artifacts.files import write_atomic

HERE = Path(__file__).parent
PACKAGES = ("equipoise", "numpy", "scipy", "torch", "transformers")


@dataclass
class Found:
    """What became of a part.

    Attributes:
        command: what was run; a part with another command is run again.
        status: "done", "failed", "out of time" or "skipped".
        seconds: wall clock.
        load_average: of the machine when it began; above the number of its cores, times are those of a busy machine.
        figures: what it found.
        page: a table of its own, where it writes one.
        note: why there are no figures.
    """

    command: list[str]
    status: str
    seconds: float = 0.0
    load_average: float = 0.0
    figures: list[Figure] = field(default_factory=list)
    page: str = ""
    note: str = ""


def machine() -> dict[str, object]:
    """The machine and the versions that figures hold for."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": model or platform.machine(), "cores": cores, "python": platform.python_version(), "versions": versions}


def command_of(part: Part, out: Path, data: Path | None, small: bool) -> list[str]:
    """The words of a part's command; a later option overrides an earlier one of the same name."""
    words = list(part.words)
    if data is None and "DATA" in words:
        at = words.index("DATA")
        del words[at - 1 : at + 1]
    if small:
        words += part.small
    places = {"FILE": str(out / f"{part.name}.raw.json"), "DIR": str(out / part.name), "DATA": str(data)}
    return [sys.executable, str(HERE / words[0]), *(places.get(word, word) for word in words[1:])]


def run(part: Part, command: list[str], out: Path, limit: float) -> Found:
    """Run one part to its end or its limit."""
    file, directory = out / f"{part.name}.raw.json", out / part.name
    file.unlink(missing_ok=True)
    threads = {name: str(part.threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    # As in the command: threads that spin while they wait make a shared machine ten times slower.
    environment = os.environ | threads | {"TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "passive"}
    load, began = os.getloadavg()[0], time.perf_counter()
    # A session of its own: whatever processes the script starts end with it.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        printed, told = process.communicate(timeout=limit)
    except BaseException as stop:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if not isinstance(stop, subprocess.TimeoutExpired):
            raise
        return Found(command, "out of time", time.perf_counter() - began, load, note=f"not finished after {limit:.0f} s")
    seconds = time.perf_counter() - began
    (out / f"{part.name}.log").write_text(printed + told)
    if process.returncode:
        last = " ".join((told.strip() or printed.strip() or "no output").splitlines()[-1:])
        return Found(command, "failed", seconds, load, note=f"exit status {process.returncode}: {last}")
    raw = parsed(part, file, directory, printed)
    page = raw.get("page", "") if isinstance(raw, dict) else ""
    return Found(command, "done", seconds, load, part.read(raw), page)


def kept(file: Path, command: list[str]) -> Found | None:
    """What an earlier run of the same command found, if it was done."""
    if not file.is_file():
        return None
    held = json.loads(file.read_text())
    if held["command"] != command or held["status"] != "done":
        return None
    return Found(**held | {"figures": [Figure(**figure) for figure in held["figures"]]})


def shown(figure: Figure) -> str:
    """A figure with its spread and its unit."""
    one = f"{figure.value:+.2f}" if figure.unit == "%" else f"{figure.value:.3g}"
    if figure.low == figure.high:
        return f"{one} {figure.unit}".strip()
    low, high = (f"{x:+.2f}" if figure.unit == "%" else f"{x:.3g}" for x in (figure.low, figure.high))
    return f"{one} ({low}..{high}) {figure.unit}".strip()


def section(part: Part, found: Found) -> list[str]:
    """A part on the page: its figures, or why there are none."""
    lines = [f"### {part.title}", ""]
    told = f"`python benchmarks/{' '.join(part.words)}`"
    if found.status != "done":
        return [*lines, f"{told}: **{found.status}**, {found.note}.", ""]
    lines += [
        f"{told}; in brackets: {part.spread}; {found.seconds:.0f} s, load average {found.load_average:.1f} at the start.",
        "",
    ]
    if found.page:
        return [*lines, found.page.strip(), ""]
    return [*lines, *table(found.figures), ""]


def table(figures: Sequence[Figure]) -> list[str]:
    """A row for each name, a column for each column, in the order in which they come."""
    columns = list(dict.fromkeys(figure.column for figure in figures))
    cells = {(figure.name, figure.column): shown(figure) for figure in figures}
    assert len(cells) == len(figures), "no two figures of a part have the same place"
    head = [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    names = dict.fromkeys(figure.name for figure in figures)
    return head + [f"| {name} | {' | '.join(cells.get((name, column), '') for column in columns)} |" for name in names]


def page(about: dict[str, object], found: dict[str, Found]) -> str:
    """The Markdown between the marks of the page."""
    versions = ", ".join(f"{name} {version}" for name, version in dict(about["versions"]).items())  # type: ignore[call-overload]
    seconds = sum(one.seconds for one in found.values())
    head = f"{about['cpu']}, {about['cores']} cores; Python {about['python']}, {versions}; {seconds / 60:.1f} minutes in all."
    lines = [head, ""]
    for part in PARTS:
        if part.name in found:
            lines += section(part, found[part.name])
    return "\n".join(lines).strip()


def scripts() -> str:
    """Every script with the first sentence of what it says of itself, as a table."""
    rows = ["| script | measures |", "|---|---|"]
    for file in [*sorted(HERE.glob("*.py")), *sorted(HERE.glob("paper/*.py"))]:
        source = file.read_text(encoding="utf-8")
        if '__name__ == "__main__"' in source:
            rows.append(f"| `{file.relative_to(HERE.parent)}` | {(get_docstring(parse(source)) or '').splitlines()[0]} |")
    return "\n".join(rows)


def main() -> None:
    """Run what is missing, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="directory of text and traces")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], default=None)
    parser.add_argument("--minutes", type=float, default=30.0, help="for all parts together")
    parser.add_argument("--small", action="store_true", help="seconds a part: tries out the frame, measures nothing")
    parser.add_argument("--again", action="store_true", help="run finished parts anew")
    parser.add_argument("--write", type=Path, default=None, help="Markdown file whose marked parts are replaced")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part that runs is ended as by Ctrl-C
    end = time.perf_counter() + 60 * given.minutes
    found: dict[str, Found] = {}
    for part in PARTS:
        command = command_of(part, given.out, given.data, given.small)
        file = given.out / f"{part.name}.json"
        wanted = given.only is None or part.name in given.only
        one = None if given.again and wanted else kept(file, command)
        if not wanted:
            if one is not None:
                found[part.name] = one  # the page keeps what earlier runs found
            continue
        if one is None and part.text == "needed" and given.data is None:
            one = Found(command, "skipped", note="it needs --data")
        if one is None:
            if given.again and part.result is not None:
                shutil.rmtree(given.out / part.name, ignore_errors=True)  # such scripts keep what they found themselves
            left = end - time.perf_counter()
            one = (
                run(part, command, given.out, min(part.seconds, left))
                if left > 0
                else Found(command, "out of time", note="no time was left")
            )
            write_atomic(file, json.dumps(asdict(one), indent=1) + "\n")
        found[part.name] = one
        print(f"{part.name:16} {one.status:12} {one.seconds:6.1f} s  {one.note}", flush=True)
    about = machine()
    text = page(about, found)
    parts = {name: asdict(one) for name, one in found.items()}
    write_atomic(given.out / "bench.json", json.dumps({**about, "small": given.small, "parts": parts}, indent=1) + "\n")
    write_atomic(given.out / "bench.md", text + "\n")
    if given.write and not given.small:
        write_between(given.write, "bench", text)
        write_between(given.write, "scripts", scripts())
    if any(one.status in ("failed", "out of time") for one in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
