"""Finding (i), LIS against batch size: what is counted decides. Padding counted, padding masked, and means over batches.

    python benchmarks/paper/findings_batch.py --data DIRECTORY --write docs/paper.md --plot docs/paper-batch.svg

A router decides token by token, so the load of a whole set cannot depend on how its items are put into batches, unless
padding tokens are counted, tokens are dropped, or scores of single batches are averaged. The same items of an evaluation set
are run at every batch size, padded right or left, in the set's order or sorted by length (as lm-eval sends them, which needs
less padding). Four readings of each run:

- `padding counted`: LIS of the selections of all rows that the experts were called with, over all batches together;
- `padding masked`: LIS of the selections of real tokens alone, over all batches together;
- `mean of batches, counted` and `mean of batches, masked`: LIS of each batch, averaged.

Each is told over experts (the model as it is), and as `lis_paper` under the published plan, made from other items of the set, a
tenth as many as are run. LIS is the mean over MoE layers. An encoder-decoder model reads the first half of an item and is given
the second.
Shapes: B rows, S positions, N batches, L MoE layers, E experts.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import Cells, Subject, arguments, digest, machine, publish, quoted, subjects
from figures import save_figure
from numpy.typing import NDArray

from equipoise.artifacts import Plan
from equipoise.metrics import lis
from equipoise.models.recorder import record
from equipoise.models.reference import TASKS as DEMO_TASKS
from equipoise.models.reference import demo_task_items
from equipoise.planning.methods import make_plan
from equipoise.profiling.calibrate import profile
from equipoise.profiling.forward import run_batch
from equipoise.profiling.sequences import Batch, Rows, make_batches

TASKS = {
    "mmlu": "mmlu_validation",
    "gsm8k": "gsm8k_test",
    "hellaswag": "hellaswag_val",
    "piqa": "piqa_val",
    "truthfulqa": "truthfulqa",
    "winogrande": "winogrande_xl_val",
}
"""The paper's tasks -> file of their items."""
QUOTED = {("switch-8", "mmlu"): ("1.5405", "3.9897")}
"""(model, task) -> LIS at batch size 1 and 32, as the paper prints them; of another Switch than the shelf's."""
READINGS = ("padding counted", "padding masked", "mean of batches, counted", "mean of batches, masked")
ARRANGEMENTS = (("right", "given"), ("left", "given"), ("right", "sorted"))
FEW, MANY = 1, 32
"""The paper's batch sizes."""

Floats = NDArray[np.float64]


def items(data: Path | None, task: str) -> list[str]:
    """The items of a set as texts: what is asked, the choices if any, and the right answer.

    Args:
        data: directory with `eval/`; None takes the demo's sets.
        task: a key of `TASKS`.
    """
    if data is None:
        return [as_text(row) for row in demo_task_items(TASKS[task])]
    with gzip.open(data / "eval" / f"{TASKS[task]}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [as_text(json.loads(line)) for line in lines]


def as_text(row: Mapping[str, Any]) -> str:
    """One item as a text."""
    asked = next(str(row[name]) for name in ("question", "context", "sentence") if name in row)
    if "answer" in row:
        return f"Question: {asked}\nAnswer: {row['answer']}"
    choices = row["choices"] if "choices" in row else row["mc1_choices"]
    right = choices[row.get("label", 0)]
    if "sentence" in row:
        return asked.replace("_", right)
    if "context" in row:
        return f"{asked} {right}"
    listed = "".join(f"\n{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(choices))
    return f"{asked}{listed}\nAnswer: {right}"


def rows_of(subject: Subject, texts: Sequence[str], longest: int) -> Rows:
    """Every text as one row, cut after so many tokens."""
    ids = [subject.tokenizer(text, add_special_tokens=False)["input_ids"][:longest] for text in texts]
    kept = [np.asarray(row, np.int64) for row in ids if row]
    return Rows("items", tuple(kept), tuple(range(len(kept))), subject.framing)


def arranged(rows: Rows, size: int, side: str, order: str) -> list[Batch]:
    """Batches as a loader makes them.

    Args:
        rows: the items.
        size: rows of a batch.
        side: of the padding, "right" or "left".
        order: "given", or "sorted" with the longest first.
    """
    if order == "sorted":
        rows = replace(rows, content=tuple(sorted(rows.content, key=len, reverse=True)))
    batches = make_batches(rows, size)
    return batches if side == "right" else [padded_left(batch) for batch in batches]


def padded_left(batch: Batch) -> Batch:
    """The same rows with the padding before them."""

    def moved(values_BS: NDArray[np.int64], mask_BS: NDArray[np.int64]) -> NDArray[np.int64]:
        width = mask_BS.shape[1]
        source = (np.arange(width) - (width - mask_BS.sum(1))[:, None]) % width
        return np.take_along_axis(values_BS, source, 1)

    encoder = batch.attention_mask
    if batch.decoder_input_ids is None or batch.decoder_attention_mask is None:
        labels = moved(batch.labels, encoder)
        return replace(batch, input_ids=moved(batch.input_ids, encoder), attention_mask=moved(encoder, encoder), labels=labels)
    decoder = batch.decoder_attention_mask
    return replace(
        batch, input_ids=moved(batch.input_ids, encoder), attention_mask=moved(encoder, encoder),
        labels=moved(batch.labels, decoder), decoder_input_ids=moved(batch.decoder_input_ids, decoder),
        decoder_attention_mask=moved(decoder, decoder),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Counted:
    """Selections of each expert in each batch: [N, L, E] of all rows of the experts' calls, and of real tokens alone."""

    rows_NLE: NDArray[np.int64]
    real_NLE: NDArray[np.int64]

    def readings(self, score: Callable[[Floats], Floats]) -> dict[str, float]:
        """The four readings.

        Args:
            score: [L, E] selections to [L] LIS.
        """
        kinds = {"counted": self.rows_NLE.astype(float), "masked": self.real_NLE.astype(float)}
        whole = {f"padding {kind}": score(counts.sum(0)) for kind, counts in kinds.items()}
        # A layer that served nothing in one batch has no score there.
        means = {f"mean of batches, {kind}": np.stack([score(one) for one in counts]) for kind, counts in kinds.items()}
        return {name: float(np.nanmean(values)) for name, values in (whole | means).items()}


def counted(subject: Subject, batches: Sequence[Batch]) -> Counted:
    """Run batches and count, with and without padding."""
    shape = (len(batches), len(subject.layers), subject.facts.max_experts)
    found = np.zeros((2, *shape), np.int64)
    with record(subject.model, transitions=False, coactivation=False) as recorder:
        at = -1

        def listen(layer: Any, hidden: Any, experts: Any, weights: Any, tokens: Any) -> None:
            ids_TK, real_T = experts.cpu().numpy(), tokens.real_T.cpu().numpy()
            for kind, chosen in enumerate((ids_TK, ids_TK[real_T])):
                served = chosen[(chosen >= 0) & (chosen < layer.num_experts)]
                found[kind, at, layer.index] += np.bincount(served.ravel(), minlength=shape[2])

        recorder.add_listener(listen)
        for at, batch in enumerate(batches):  # noqa: B007 (`listen` reads it)
            run_batch(subject.model, batch, all_logits=False)
    return Counted(*found)


def figures(subject: Subject, rows: Rows, plan: Plan, size: int, side: str, order: str) -> dict[str, Any]:
    """What one run of all items gives."""
    seen = counted(subject, arranged(rows, size, side, order))
    widths = np.array([layer.num_experts for layer in subject.layers])
    padding_LE = (seen.rows_NLE - seen.real_NLE).sum(0)
    return {
        "experts": seen.readings(lambda load_LE: lis(load_LE, widths)),
        "lis_paper": seen.readings(plan.lis_paper),
        "padding_share": float(padding_LE.sum() / seen.rows_NLE.sum()),
        "padding_alone": float(np.nanmean(lis(padding_LE, widths))) if padding_LE.any() else None,
        "real_LE": seen.real_NLE.sum(0).tolist(),
    }


def published_plan(subject: Subject, texts: Sequence[str], longest: int, seed: int) -> Plan:
    """The paper's plan, from items that are not judged."""
    made = profile(
        subject.model, subject.tokenizer, {"items": list(texts)}, tokens=longest * len(texts), seq_len=longest,
        batch_size=8, seed=seed, importance=("wanda",), progress=False,
    )  # fmt: skip
    return make_plan(made, "rq-paper")


def of_model(subject: Subject, told: argparse.Namespace, cells: Cells) -> list[dict[str, Any]]:
    """All runs of one model: the first task at every size, and arranged in other ways; the others at two sizes."""
    found = []
    for task in told.tasks:
        texts = items(told.data, task)
        order = np.random.default_rng(told.seed).permutation(len(texts))
        drawn = [texts[i] for i in order[: told.items + max(told.items // 10, 1)]]
        judged, planned = drawn[: told.items], drawn[told.items :]
        plans: list[Plan] = []

        def measure(size: int, side: str, arrangement: str, judged: Any, planned: Any, plans: list[Plan]) -> dict[str, Any]:
            if not plans:
                plans.append(published_plan(subject, planned, told.longest, told.seed))
            return figures(subject, rows_of(subject, judged, told.longest), plans[0], size, side, arrangement)

        many = {*told.sizes} if task == told.tasks[0] else {FEW, MANY}
        for side, arrangement in ARRANGEMENTS if task == told.tasks[0] else ARRANGEMENTS[:1]:
            for size in sorted(many) if (side, arrangement) == ARRANGEMENTS[0] else (MANY,):
                key = {"task": task, "side": side, "order": arrangement, "size": size, "items": told.items}
                key |= {"longest": told.longest, "seed": told.seed, "text": digest(drawn)}
                make = partial(measure, size, side, arrangement, judged, planned, plans)
                found.append(key | {"model": subject.name} | cells.get(subject, key, make))
    return found


def least_padding(before: float, after: float, bound: float) -> float:
    """Share of padding without which counting it cannot raise LIS from one value to another.

    LIS is convex in the counts: of real tokens and padding together it is at most (1 - p) LIS(real) + p bound.

    Args:
        before: LIS of real tokens.
        after: LIS with padding counted.
        bound: greatest LIS that padding can have, m / k.
    """
    return (after - before) / (bound - before)


def moved_share(runs: Sequence[Mapping[str, Any]]) -> float:
    """Largest share of real tokens' selections that another batch size sends elsewhere, at least (from the sums by expert)."""
    first = np.asarray(runs[0]["real_LE"])
    return max(float(np.abs(np.asarray(run["real_LE"]) - first).sum() / 2 / first.sum()) for run in runs)


def pages(found: Sequence[Mapping[str, Any]], told: argparse.Namespace) -> str:
    """The tables as Markdown."""
    task, sizes = told.tasks[0], told.sizes
    lines: list[str] = []
    for key, title in (("experts", "LIS over experts"), ("lis_paper", "`lis_paper` under the published plan")):
        lines += [f"**{title}**, {task}, padded right, in the set's order, by batch size:", ""]
        lines += ["| model | reading | " + " | ".join(map(str, sizes)) + " |", "|---|---|" + "---:|" * len(sizes)]
        for model in dict.fromkeys(run["model"] for run in found):
            runs = [r for r in found if (r["model"], r["task"], r["side"], r["order"]) == (model, task, "right", "given")]
            for i, reading in enumerate(READINGS):
                values = " | ".join(f"{run[key][reading]:.3f}" for run in runs)
                lines.append(f"| {f'`{model}`' if i == 0 else ''} | {reading} | {values} |")
            if key == "experts":
                lines.append(
                    "| | share of padding | " + " | ".join(f"{100 * run['padding_share']:.0f} %" for run in runs) + " |"
                )
        lines.append("")
    lines += [f"**How batches are made**, {task}, batch size {MANY}, LIS over experts:", ""]
    lines += ["| model | padding, order | share of padding | LIS of padding alone | padding counted | padding masked |"]
    lines += ["|---|---|---:|---:|---:|---:|"]
    for run in found:
        if run["task"] == task and run["size"] == MANY:
            alone = "" if run["padding_alone"] is None else f"{run['padding_alone']:.3f}"
            lines.append(
                f"| `{run['model']}` | {run['side']}, {run['order']} | {100 * run['padding_share']:.0f} % | {alone} "
                f"| {run['experts'][READINGS[0]]:.3f} | {run['experts'][READINGS[1]]:.3f} |"
            )
    lines += ["", f"**The paper's tasks**, batch size {FEW} -> {MANY}, padded right, in the set's order, LIS over experts:", ""]
    lines += ["| model | task | share of padding | padding counted | padding masked | the paper, its own Switch-8 |"]
    lines += ["|---|---|---:|---:|---:|---:|"]
    for model in dict.fromkeys(run["model"] for run in found):
        for name in told.tasks:
            pair = {
                run["size"]: run for run in found
                if (run["model"], run["task"], run["side"], run["order"]) == (model, name, "right", "given")
            }  # fmt: skip
            few, many = pair[FEW]["experts"], pair[MANY]["experts"]
            counted_, masked = (f"{few[reading]:.3f} -> {many[reading]:.3f}" for reading in READINGS[:2])
            said = quoted(" -> ".join(QUOTED[model, name])) if (model, name) in QUOTED else ""
            lines.append(f"| `{model}` | {name} | {100 * pair[MANY]['padding_share']:.0f} % | {counted_} | {masked} | {said} |")
    before, after = QUOTED["switch-8", "mmlu"]
    needed = least_padding(float(before), float(after), 8)
    lines += [
        "",
        f"Counting padding can raise LIS from {before} to {after} (quoted; 8 experts, top-1) only if at least "
        f"{100 * needed:.0f} % of the rows are padding, and does so with just that if all padding goes to the busiest expert.",
    ]
    moved = {
        model: moved_share([r for r in found if (r["model"], r["task"]) == (model, task)])
        for model in dict.fromkeys(run["model"] for run in found)
    }
    lines += [
        "",
        f"{told.items} items of each set, cut after {told.longest} tokens; planned on {max(told.items // 10, 1)} others. "
        "Real tokens' selections that differ between two arrangements, at least: "
        + ", ".join(f"`{model}` {100 * share:.2f} %" for model, share in moved.items())
        + f" (rounding of another batch in {'the stored dtype' if told.dtype == 'auto' else told.dtype}); seed {told.seed}; "
        + f"{machine()}.",
    ]
    return "\n".join(lines)


def draw(found: Sequence[Mapping[str, Any]], told: argparse.Namespace, path: Path) -> None:
    """LIS over experts by batch size: a panel for each model, a line for each reading."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(run["model"] for run in found))
    figure = Figure(figsize=(2.9 * len(names), 2.9), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        runs = [r for r in found if (r["model"], r["task"], r["side"], r["order"]) == (name, told.tasks[0], "right", "given")]
        for i, (reading, style) in enumerate(zip(READINGS, ("o-", "s-", "^--", "v--"), strict=True)):
            values = [run["experts"][reading] for run in runs]
            axis.plot([run["size"] for run in runs], values, style, color=f"C{i}", markersize=3, linewidth=1.2, label=reading)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=1)  # balance, so that panels compare
        axis.set_title(name, fontsize="small")
        axis.set_xlabel("batch size", fontsize="x-small")
        axis.tick_params(labelsize="x-small")
    figure.axes[0].set_ylabel("LIS over experts", fontsize="x-small")
    save_figure(figure, path, columns=4)


def main() -> None:
    """Run, print, keep."""
    parser = arguments(__doc__, "out/paper")
    parser.add_argument("--tasks", nargs="*", default=None, help="the first one is run at every size  [default: all]")
    parser.add_argument("--sizes", nargs="*", type=int, default=[1, 2, 4, 8, 16, 32, 64, 128], help="rows of a batch")
    parser.add_argument("--items", type=int, default=128, help="of each set")
    parser.add_argument("--longest", type=int, default=512, help="tokens of an item")
    parser.add_argument("--plot", type=Path, default=None)
    told = parser.parse_args()
    told.tasks = told.tasks or [name for name, file in TASKS.items() if told.data is not None or file in DEMO_TASKS]
    told.sizes = sorted({*told.sizes, FEW, MANY})
    cells = Cells(told.out, "batch")
    found = [run for subject in subjects(told) for run in of_model(subject, told, cells)]
    cells.keep(f"findings{told.mark}", found)
    publish({f"paper-batch{told.mark}": pages(found, told)}, told.write)
    if told.plot:
        draw(found, told, told.plot)


if __name__ == "__main__":
    main()
