"""The paper's three findings, one script after the other; each can be run by itself, with options of its own.

    python benchmarks/paper/findings.py --data DIRECTORY --write docs/paper.md --plots docs

Options that all of them have (`--data`, `--models`, `--out`, `--seed`, `--write`) are passed on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

SCRIPTS = {
    "findings_batch.py": "paper-batch.svg",
    "findings_importance.py": None,
    "findings_calibration.py": "paper-calibration.svg",
}
"""Each script, and the picture that it draws."""


def main() -> None:
    """Run them; the first that fails ends it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plots", type=Path, default=None, help="directory of the pictures")
    told, passed_on = parser.parse_known_args()
    for script, picture in SCRIPTS.items():
        drawn = ["--plot", str(told.plots / picture)] if told.plots and picture else []
        subprocess.run([sys.executable, str(Path(__file__).with_name(script)), *passed_on, *drawn], check=True)


if __name__ == "__main__":
    main()
