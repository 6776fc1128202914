"""How long `import equipoise` and `equipoise --help` take beside a bare interpreter.

Runs each in a process of its own, in turn, so that a drift of the machine's speed hits all alike.

    python benchmarks/startup.py [--runs 11] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "bare interpreter": [sys.executable, "-c", "pass"],
    "import equipoise": [sys.executable, "-c", "import equipoise"],
    "equipoise --help": [sys.executable, "-m", "equipoise", "--help"],
}


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for run in range(arguments.runs + 1):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if run:  # the first round warms the file cache
                seconds[name].append(time.perf_counter() - start)
    rows = {name: {"median": statistics.median(s), "min": min(s), "max": max(s), "runs": len(s)} for name, s in seconds.items()}
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    for name, row in rows.items():
        print(f"{name:<18} median {row['median']:.3f} s (min {row['min']:.3f}, max {row['max']:.3f}, {row['runs']} runs)")


if __name__ == "__main__":
    main()
