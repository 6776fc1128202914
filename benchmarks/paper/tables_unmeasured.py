"""What the paper never measures: time over ranks and of quantized experts, memory, cost of changing the plan. From other pages.

    python benchmarks/paper/tables_unmeasured.py --write docs/paper.md

Every figure is taken from the page that its own benchmark writes, or from the figures kept beside it, and stands with a link.
Nothing is measured here; a page that lacks the figure is an error.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import publish

DOCS = Path(__file__).resolve().parents[2] / "docs"

Row = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Table:
    """One table of a page.

    Attributes:
        heading: the bold line or heading above it.
        rows: column -> cell; columns without a name are named by their number.
    """

    heading: str
    rows: tuple[Row, ...]


def cells(line: str) -> list[str]:
    """The cells of one line of a Markdown table."""
    return [cell.strip().strip("`") for cell in line.strip().strip("|").split("|")]


def tables(text: str) -> list[Table]:
    """All tables of a page, with cells left empty filled from above in their first column."""
    found: list[Table] = []
    heading, lines = "", []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            lines.append(line)
            continue
        if len(lines) > 2:
            names = [name or str(at) for at, name in enumerate(cells(lines[0]))]
            rows, last = [], ""
            for one in lines[2:]:
                values = cells(one)
                last = values[0] or last
                rows.append(dict(zip(names, [last, *values[1:]], strict=True)))
            found.append(Table(heading, tuple(rows)))
        lines = []
        if title := re.match(r"#+ (.+)|\*\*(.+?)\*\*", line):
            heading = title[1] or title[2]
    return found


def page(name: str) -> list[Table]:
    """The tables of a page of the documentation."""
    return tables((DOCS / name).read_text(encoding="utf-8"))


def only(found: Sequence[Table], heading: str) -> Table:
    """The table under a heading.

    Raises:
        SystemExit: there is none.
    """
    for table in found:
        if table.heading.startswith(heading):
            return table
    raise SystemExit(f"no table under '{heading}'; its benchmark has to write it first")


def where(table: Table, name: str, value: str) -> Row:
    """The row of a table whose cell has a value.

    Raises:
        SystemExit: there is none.
    """
    for row in table.rows:
        if row.get(name) == value:
            return row
    raise SystemExit(f"no row '{value}' in the table under '{table.heading}'; its benchmark has to write it first")


def ranks() -> Iterator[str]:
    """Time of one layer over ranks, on the model's own skew."""
    for table in page("expert-parallel.md"):
        if not table.heading.endswith("natural"):
            continue
        first = next(iter(table.rows[0]))
        plain, told = where(table, first, "contiguous"), []
        for name in ("R&Q", "R&Q + least loaded", "EPLB"):
            row = where(table, first, name)
            told.append(f"{name} {row['time / contiguous']}, rows {row['max / mean rows']}")
        yield (
            f"| time of one layer over {table.heading.removesuffix(', natural')}, of experts in order | {'; '.join(told)}; "
            f"in order: rows {plain['max / mean rows']} | [expert-parallel.md](expert-parallel.md) |"
        )


def kernels() -> Iterator[str]:
    """Speed of copied and of quantized experts beside transformers' own."""
    every: Mapping[str, Any] = json.loads((DOCS / "execution-speed.json").read_text(encoding="utf-8"))
    for dtype in ("bf16", "fp32"):
        figures = every[dtype]["figures"]
        told = []
        for name in ("slots, replicated", "slots int8", "slots mixed"):
            rows = [row for row in figures if row["contender"] == name]
            if not rows:
                raise SystemExit(
                    f"execution-speed.json has no '{name}' in {dtype}; benchmarks/execution.py has to write it first"
                )
            speeds = [row["speed"] for row in rows]
            told.append(f"{name} {min(speeds):.2f} to {max(speeds):.2f}")
        tokens = sorted({row["tokens"] for row in figures})
        yield (
            f"| speed of one layer's experts, {dtype}, {tokens[0]} to {tokens[-1]:,} tokens, of transformers' `grouped_mm` | "
            f"{'; '.join(told)} | [execution-speed.md](execution-speed.md) |"
        )


def memory() -> Iterator[str]:
    """Bytes of all experts under both plans, measured from the tensors."""
    rows = only(page("results.md"), "The main job on the shelf").rows
    for name in ("rq-paper", "rq"):
        shares = [float(row["bytes"].rstrip(" %")) for row in rows if row["plan"] == name]
        yield (
            f"| bytes of the experts under `{name}`, of the original's, {len(shares)} models | {min(shares):.1f} to "
            f"{max(shares):.1f} % | [results.md](results.md) |"
        )


def replanning() -> Iterator[str]:
    """What a change of plan costs while a model serves, and what planning takes."""
    found = page("streaming.md")
    measured = only(found, "Measured on the running model")
    for row in measured.rows:
        yield (
            f"| changing the plan of `{row['model']}` while it serves | {row['of a change']} a change and "
            f"{row['of a moved MB']} a moved MB; "
            f"forwards held back {row['forwards held back']}; at most {row['most staged']} held beside the slots "
            "| [streaming.md](streaming.md) |"
        )
    shifts = only(found, "shifts")
    for name in ("all history (published)", "last step (published)", "adaptive rq"):
        rows = [row for row in shifts.rows if row["policy"].replace("`", "") == name]
        if not rows:
            raise SystemExit(f"streaming.md has no '{name}' under 'shifts'; benchmarks/streaming.py has to write it first")
        told = "; ".join(
            f"`{row['model']}` {row['net, ms'] or '0'} ms net, {row['that paid'] or '0'} of "
            f"{(row['changes (of slots)'] or '0').split()[0]} changes paid"
            for row in rows
        )
        yield f"| what {name} won on traffic that shifts, all changes deducted | {told} | [streaming.md](streaming.md) |"
    speed = only(page("results.md"), "Speed of planning")
    rq, eplb = (where(speed, "planner", name) for name in ("rq", "EPLB's rule, plain numpy"))
    yield (
        f"| planning 61 layers of 256 experts | `rq` {rq['seconds']} s, EPLB's rule {eplb['seconds']} s | "
        f"[results.md](results.md#speed-of-planning) |"
    )


def slower() -> str:
    """In how many settings balance over ranks did not become time."""
    ratios = []
    for table in page("expert-parallel.md"):
        if "ranks," in table.heading and "time / contiguous" in table.rows[0]:
            row = where(table, next(iter(table.rows[0])), "R&Q")
            ratios.append(float(row["time / contiguous"].split()[0]))
    faster = sum(ratio < 1 for ratio in ratios)
    told = f"in {faster} of {len(ratios)} settings, even load included; its time is {min(ratios):.2f} to {max(ratios):.2f}"
    return (
        "The paper names faster inference and measures none. Here, over processes on CPU cores, a layer under R&Q is faster "
        f"than with experts in order {told} times theirs. That a lower LIS means less time is a premise, not a result. No "
        "GPU was measured."
    )


def main() -> None:
    """Read, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", type=Path, default=None, help="Markdown file whose marked part is replaced")
    told = parser.parse_args()
    lines = ["| what | measured | by |", "|---|---|---|", *ranks(), *kernels(), *memory(), *replanning()]
    publish({"paper-unmeasured": "\n".join([slower(), "", *lines])}, told.write)


if __name__ == "__main__":
    main()
