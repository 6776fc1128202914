"""Table 3 of the paper: which expert is copied and which is stored in fewer bits, with the balance and the bytes it leaves out.

    python benchmarks/paper/tables_ablation.py --data DIRECTORY --write docs/paper.md

Planned on training documents, judged on held-out ones. First the paper's four settings, one of them in both of its readings,
with what each does to bytes; then, in the bytes of R&Q, every choice of who is copied with every choice of who is quantized.
Choices at random are drawn three times.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ablation_arms import ARMS, COPIED, GRID, QUANTIZED, Arm, arm_plan
from common import Cells, Subject, arguments, digest, machine, publish, subjects, texts
from tables_parts import ABLATION_TASKS, BATCH_ROWS, OURS, PRINTED_ABLATION, SEQ_LEN, carried_out, measured, plan_of

from equipoise.artifacts import Plan, Profile
from equipoise.evaluation.evaluate import evaluate

SEEDS = 3
"""Draws of a choice at random."""
PUBLISHED_PAIR = ("heaviest", "less important")

Cell = Mapping[str, Any]


def judged(tested: Subject, plans: Mapping[str, Plan], told: argparse.Namespace) -> dict[str, Cell]:
    """Plans carried out and measured on held-out text, beside the model as it is."""
    planned, heldout = texts(told.data)
    found = evaluate(
        tested.model, {name: carried_out(tested, plan, planned, told.seed) for name, plan in plans.items()}, tested.tokenizer,
        texts=heldout, tokens=told.judged_tokens, seq_len=SEQ_LEN, batch_size=BATCH_ROWS, seed=told.seed, base_name=tested.name,
    )  # fmt: skip
    cells = {}
    for contender in found.contenders:
        predicted = plans[contender.name].predicted
        assert predicted is not None, "plans of this script are assembled with their prediction"
        cells[contender.name] = contender.texts[-1].model_dump() | {
            "bytes": contender.expert_bytes,
            "base_bytes": found.base_expert_bytes,
            "overrun_bytes": predicted.overrun_bytes,
            "units": found.units,
        }
    return cells


def drawn(arm: Arm) -> range:
    """Draws of an arm: several where something is chosen at random."""
    return range(SEEDS if arm.random else 1)


def found_arms(tested: Subject, told: argparse.Namespace) -> dict[str, list[Cell]]:
    """Name of an arm -> its figures, one for each draw; those that an earlier run measured are read."""
    planned, heldout = texts(told.data)
    cells = Cells(told.out, "ablation")
    key = {
        "tokens": told.tokens,
        "judged": told.judged_tokens,
        "seed": told.seed,
        "text": f"{digest(planned)}{digest(heldout)}",
    }
    made: Profile | None = None
    found: dict[str, list[Cell]] = {}
    wanted = [(arm.name, arm, draw) for arm in (*ARMS, *GRID) for draw in drawn(arm)] + [(OURS, None, 0)]

    def profiled() -> Profile:
        nonlocal made
        made = made or measured(tested, planned, told.tokens, told.seed, told.out / "profiles")
        return made

    def plan(arm: Arm | None, draw: int) -> Plan:
        return plan_of(profiled(), OURS, told.seed) if arm is None else arm_plan(profiled(), arm, told.seed + draw)

    for start in range(0, len(wanted), told.together):
        batch = wanted[start : start + told.together]
        names = {f"{name} {draw}": (arm, draw) for name, arm, draw in batch}

        def make(names: Mapping[str, tuple[Arm | None, int]] = names) -> dict[str, Cell]:
            return judged(tested, {name: plan(*of) for name, of in names.items()}, told)

        together = cells.get(tested, {"arms": f"{start}", "names": sorted(names), **key}, make)
        for name, _, draw in batch:
            found.setdefault(name, []).append(together[f"{name} {draw}"])
    return found


def spread(draws: Sequence[Cell], name: str, digits: int = 3) -> str:
    """A figure, or the mean of several draws with the least and the greatest."""
    values = [float(draw[name]) for draw in draws]
    text = f"{np.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def change(draws: Sequence[Cell]) -> str:
    """Change of perplexity in %, with its interval over documents; of several draws the mean with least and greatest."""
    told = [draw["perplexity_change"] for draw in draws]
    if len(told) == 1:
        return f"{100 * told[0]['value']:+.2f} ({100 * told[0]['low']:+.2f}..{100 * told[0]['high']:+.2f})"
    values = [100 * interval["value"] for interval in told]
    return f"{np.mean(values):+.2f} ({min(values):+.2f}..{max(values):+.2f}, {len(values)} draws)"


def bytes_of(draws: Sequence[Cell]) -> str:
    """Bytes of all experts, in % of the original's."""
    return f"{100 * np.mean([draw['bytes'] / draw['base_bytes'] for draw in draws]):.1f} %"


def first_table(model: str, found: Mapping[str, Sequence[Cell]]) -> Iterator[str]:
    """The paper's settings of one model."""
    raw = found[ARMS[0].name][0]
    yield (
        f"| `{model}` | as it is | {raw['lis_base']:.3f} | {raw['lis_base']:.3f} | 100.0 % | | {raw['perplexity_base']:.2f} | |"
    )
    for name in [*(arm.name for arm in ARMS), OURS]:
        draws = found[name]
        over = max(draw["overrun_bytes"] / (draw["base_bytes"] / draw["units"]) for draw in draws)
        yield (
            f"| | {f'`{name}`' if name == OURS else name} | {spread(draws, 'lis')} | {spread(draws, 'lis_paper')} | "
            f"{bytes_of(draws)} | {f'{100 * over:.1f} %' if over > 0 else ''} | {change(draws)} | "
            f"{spread([d['kl'] for d in draws], 'value', 5)} |"
        )


def grid_table(model: str, found: Mapping[str, Sequence[Cell]]) -> Iterator[str]:
    """Who is copied (rows) and who is quantized (columns), in the bytes of R&Q."""
    for row in COPIED:
        cells = []
        for column in QUANTIZED:
            draws = found[f"{row} / {column}"]
            mark = "**" if (row, column) == PUBLISHED_PAIR else ""
            percent = 100 * np.mean([draw["perplexity_change"]["value"] for draw in draws])
            cells.append(f"{mark}{np.mean([d['lis'] for d in draws]):.3f}, {np.mean([d['lis_paper'] for d in draws]):.3f}, "
                         f"{percent:+.2f}{mark}")  # fmt: skip
        yield f"| {f'`{model}`' if row == COPIED[0] else ''} | {row} | {' | '.join(cells)} |"


def page(found: Mapping[str, Mapping[str, Sequence[Cell]]]) -> str:
    """Both tables, what they say, and what the paper printed."""
    lines = [
        "| model | setting | LIS over units | `lis_paper` | bytes | fullest unit over its bytes | perplexity, change in % | "
        "KL, nats |",
        "|---|---|---:|---:|---:|---:|---|---:|",
    ]
    for model, arms in found.items():
        lines += first_table(model, arms)
    lines += [
        "",
        "Copied (rows) and quantized together with the copy (columns), one of each in every layer, in the bytes of R&Q: LIS "
        "over units, `lis_paper`, change of perplexity in %. Bold: as published.",
        "",
        f"| model | copied | {' | '.join(f'quantized: {name}' for name in QUANTIZED)} |",
        f"|---|---|{'---|' * len(QUANTIZED)}",
    ]
    for model, arms in found.items():
        lines += grid_table(model, arms)
    return "\n".join([*lines, "", *says(found), "", *printed()])


def mean(draws: Sequence[Cell], name: str) -> float:
    """A figure, over draws."""
    return float(np.mean([draw[name] for draw in draws]))


def says(found: Mapping[str, Mapping[str, Sequence[Cell]]]) -> list[str]:
    """What the tables say, in counts over models."""
    rows, (heavy, published) = list(found.values()), PUBLISHED_PAIR
    n, others = len(rows), [name for name in QUANTIZED if name != published]
    over = ", ".join(bytes_of(arms[ARMS[1].name]) for arms in rows)
    equal = ", ".join(bytes_of(arms[ARMS[-1].name]) for arms in rows)

    def by(arms: Mapping[str, Sequence[Cell]], column: str, figure: str = "lis", row: str = heavy) -> float:
        return mean(arms[f"{row} / {column}"], figure)

    best = sum(min(COPIED, key=lambda row, a=arms: by(a, published, "lis_paper", row)) == heavy for arms in rows)
    lower = ", ".join(f"{name} on {sum(by(arms, name) < by(arms, published) for arms in rows)} of {n}" for name in others)
    changes = [draw["perplexity_change"] for arms in rows for arm in GRID for draw in arms[arm.name]]
    tellable = sum(interval["low"] > 0 or interval["high"] < 0 for interval in changes)
    largest = max(abs(100 * interval["value"]) for interval in changes)
    kl = {
        column: np.log([np.mean([draw["kl"]["value"] for draw in arms[f"{heavy} / {column}"]]) for arms in rows])
        for column in (published, "least frequent")
    }
    ratio = float(np.exp(np.mean(kl[published] - kl["least frequent"])))
    return [
        f"- **Bytes**: a copy without a second quantized expert takes {over} of the original's bytes, so the paper's row for "
        f"it is no contender at equal memory, unless the heavy hitter itself is quantized too. R&Q takes {equal}; what is "
        "above 100 % are scales.",
        f"- **Who is copied**: the heaviest gives the least `lis_paper` on {best} of {n} models, as the paper says.",
        "- **Who makes room**: with the heaviest copied, LIS over units is below that of the published choice when the "
        f"quantized expert is {lower}. The copy shares that expert's unit, so what it has to do itself counts; the "
        "paper's score does not see it.",
        f"- **Quality**: of the {len(changes)} plans of the second table {tellable} have an interval of the change of "
        f"perplexity that leaves zero out, where chance alone gives about {0.05 * len(changes):.2g}; the largest change is "
        f"{largest:.2f} %. With the heaviest copied, KL under Wanda's choice is {ratio:.2f} times that under the least "
        "frequent expert (geometric mean of models).",
    ]


def printed() -> list[str]:
    """The paper's own table."""
    lines = [
        "The paper's Table 3, accuracy in % (all figures quoted; it gives neither LIS nor bytes):",
        "",
        f"| model | setting | {' | '.join(ABLATION_TASKS)} |",
        f"|---|---|{'---:|' * len(ABLATION_TASKS)}",
    ]
    for model, rows in PRINTED_ABLATION.items():
        for setting, values in rows.items():
            lines.append(f"| {model} | {setting} | {' | '.join(f'{value:.2f}' for value in values)} |")
    rounding = "`rq` is rounded on the text it is planned from (`agq`), all others to nearest"
    return [*lines, "", f"Measured tables: text as in `benchmarks/shelf.py`; {rounding}; {machine()}."]


def main() -> None:
    """Run, print, keep."""
    parser = arguments(__doc__, "out/paper")
    parser.add_argument("--tokens", type=int, default=2048, help="of each domain, to plan from")
    parser.add_argument("--judged-tokens", type=int, default=1024, help="of each domain, to judge on")
    parser.add_argument("--together", type=int, default=7, help="plans held in memory beside the model")
    told = parser.parse_args()
    found = {tested.name: found_arms(tested, told) for tested in subjects(told)}
    Cells(told.out, "ablation").keep("table-3", found)
    publish({"paper-table-3": page(found)}, told.write)


if __name__ == "__main__":
    main()
