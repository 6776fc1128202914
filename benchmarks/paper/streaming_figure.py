"""The paper's Figure 8: LIS of every step and of all steps so far, raw, under both streaming forms, and under `adaptive`.

    python benchmarks/paper/streaming_figure.py --data DIRECTORY --write docs/paper.md --plot docs/paper-streaming.svg

As in the paper: the quantized experts are chosen on 10 % of MMLU; the rest is run once, in every layer the tokens that its
heaviest expert is given are collected, and they are cut into ten steps (`adversarial`). Beside it the same text as it comes, in
as many steps. Recording, policies, replay and costs are those of `benchmarks/streaming.py`. Without `--data` the text is prose.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import Cells, Subject, arguments, digest, machine, publish, subjects
from figures import save_figure
from numpy.typing import NDArray
from streaming import OURS, PUBLISHED, SEGMENTS, domains, executed, figures, policy_for, recorded_at, streams
from tables_tasks import available, requests_of, task_directory

from equipoise.planning.budget import sixteen_bit
from equipoise.planning.methods import make_plan
from equipoise.planning.uniform import uniform_plan
from equipoise.simulation.stream import replay_stream

POLICIES = (
    ("raw", "uniform", "static"),
    ("all previous steps (published, Option 1)", PUBLISHED, "all_history"),
    ("previous step (published, Option 2)", PUBLISHED, "last_step"),
    ("`adaptive`, the same slots", PUBLISHED, "adaptive"),
    ("`rq`, kept", OURS, "static"),
    ("`adaptive` on `rq`", OURS, "adaptive"),
)
"""Name in figure and table, plan at the start, policy."""
STREAMS = ("adversarial", "as it comes")
PART = 10
"""One item in this many is planned from."""

Texts = Mapping[str, Sequence[str]]


def stream_text(data: Path | None) -> tuple[Texts, Texts]:
    """MMLU's questions, a tenth of them to plan from and the others to stream; without it, prose of two kinds of documents."""
    found = [] if data is None else available(["mmlu"], task_directory(data))
    if not found:
        planned, streamed = domains(None)
        first = next(iter(planned))
        return planned, {first: streamed[first]}
    questions = [
        f"{requests[0].args[0]} {requests[0].doc['choices'][requests[0].doc['answer']]}"
        for part in found[0].parts
        for requests in requests_of(part, len(part.test_docs())).values()
    ]
    return {"mmlu": questions[::PART]}, {"mmlu": [text for at, text in enumerate(questions) if at % PART]}


def replayed(tested: Subject, texts: tuple[Texts, Texts], told: argparse.Namespace) -> dict[str, Any]:
    """All policies on both streams of one model."""
    place = told.out / "streaming" / f"{tested.name}-{tested.identity}-{digest(texts[1])}-{told.steps}-{told.step_tokens}"
    made, ids = recorded_at(place, tested.name, tested.directory, texts, told)
    plans = {PUBLISHED: make_plan(made, PUBLISHED), OURS: make_plan(made, OURS)}
    costs, _ = executed(tested.directory, texts[1], plans, made, told)
    plans["uniform"] = uniform_plan(made.model, made.model.dtype)
    original = sum(layer.num_experts * layer.expert_bytes(sixteen_bit(made.model)) for layer in made.model.layers)
    every = streams(ids, made.model.max_experts, told.step_tokens)
    rows = []
    for stream, steps_NLE in zip(STREAMS, (every["adversarial"], in_segments(every["stationary"])), strict=True):
        for label, start, policy in POLICIES:
            done = replay_stream(steps_NLE, plans[start], policy_for(policy, plans[start], made), costs)
            rows.append({"stream": stream, "policy": label} | figures(done, original))
    return {"rows": rows, "costs": {name: getattr(costs, name) for name in ("per_selection", "per_byte", "per_swap")}}


def in_segments(steps_NLE: NDArray[np.int64]) -> NDArray[np.int64]:
    """[SEGMENTS, L, E] neighbouring steps joined."""
    return np.stack([part.sum(0) for part in np.array_split(steps_NLE, SEGMENTS)])


def page(found: Mapping[str, Mapping[str, Any]], plot: Path | None, planned: str) -> str:
    """The table and what it says."""
    lines = [] if plot is None else [f"![LIS of every step, and of all steps so far]({plot.name})", ""]
    lines += [
        "| model | stream | policy | LIS, mean of steps | LIS of all steps | `lis_paper`, mean of steps | bytes | changes "
        "(of slots) |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for model, cell in found.items():
        for at, row in enumerate(cell["rows"]):
            changes = f"{row['changes']} ({row['moving']})" if row["changes"] else ""
            first = row["policy"] == POLICIES[0][0]
            lines.append(
                f"| {'' if at else f'`{model}`'} | {row['stream'] if first else ''} | {row['policy']} "
                f"| {np.mean(row['instantaneous']):.3f} | {row['cumulative'][-1]:.3f} | {np.mean(row['paper']):.3f} "
                f"| {100 * row['bytes_of_original']:.1f} % | {changes} |"
            )
    return "\n".join([*lines, "", *says(found, planned)])


def says(found: Mapping[str, Mapping[str, Any]], planned: str) -> list[str]:
    """What the table says, in counts of steps."""

    def below(label: str, reading: str) -> str:
        under = steps = 0
        for cell in found.values():
            raw = next(row for row in cell["rows"] if row["stream"] == STREAMS[0] and row["policy"] == POLICIES[0][0])
            mine = next(row for row in cell["rows"] if row["stream"] == STREAMS[0] and row["policy"] == label)
            # The first step is served before any policy has seen a load: by the plan made beforehand.
            under += sum(np.array(mine[reading]) < np.array(raw[reading]))
            steps += len(raw[reading])
        return f"{under} of {steps}"

    names = [label for label, _, _ in POLICIES[1:]]
    rows = [row for cell in found.values() for row in cell["rows"] if row["stream"] == STREAMS[0]]
    published = sum(row["changes"] for row in rows if row["policy"] in names[:2])
    return [
        "- On the paper's stream, steps whose LIS over units is below raw: "
        + ", ".join(f"{below(name, 'instantaneous')} ({name})" for name in names)
        + "; whose `lis_paper` is: "
        + ", ".join(f"{below(name, 'paper')} ({name})" for name in names)
        + ".",
        "- That stream keeps only tokens of each layer's heaviest expert, so one expert is to be copied from beginning to "
        "end: a plan made beforehand may have its copy there already. The published forms together change a plan "
        f"{published} times on it.",
        "- It is no traffic that a model is ever given: every layer is fed other tokens. What shifting traffic does is in "
        "[streaming.md](streaming.md).",
        f"- Planned on {planned}; mean over layers; `lis_paper` gives the copy a unit of its own, LIS over units does not. "
        f"Costs that `adaptive` weighs were measured on the running model; {machine()}.",
    ]


def draw(found: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """A row for each model; LIS of every step on the left, of all steps so far on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 2.7 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), 2, squeeze=False)
    for line, (model, cell) in zip(axes, found.items(), strict=True):
        rows = [row for row in cell["rows"] if row["stream"] == STREAMS[0]]
        for axis, reading in zip(line, ("instantaneous", "cumulative"), strict=True):
            for index, row in enumerate(rows):
                steps = np.arange(1, len(row[reading]) + 1)
                # Lines that coincide show as one inside the other.
                style = "k--" if index == 0 else f"C{index}-"
                axis.plot(
                    steps,
                    row[reading],
                    style,
                    linewidth=3.4 - 0.45 * index,
                    marker="o",
                    markersize=2.5,
                    label=row["policy"].replace("`", ""),
                )
            axis.set_title(f"{model}: {reading}", fontsize="small")
            axis.tick_params(labelsize="x-small")
        line[0].set_ylabel("LIS over units", fontsize="x-small")
    for axis in axes[-1]:
        axis.set_xlabel("step", fontsize="x-small")
    save_figure(figure, path, columns=3)


def main() -> None:
    """Run, print, keep, draw."""
    parser = arguments(__doc__, "out/paper")
    parser.set_defaults(models=["mixtral-8", "deepseek-64"])
    parser.add_argument("--steps", type=int, default=10, help="recorded, before they are cut into ten")
    parser.add_argument("--step-tokens", type=int, default=2048)
    parser.add_argument("--profile-tokens", type=int, default=4096, help="of the tenth that is planned from")
    parser.add_argument("--execute-steps", type=int, default=3, help="on the running model, to measure costs")
    parser.add_argument("--plot", type=Path, default=None, help="file of the figure")
    told = parser.parse_args()
    if told.steps < SEGMENTS:
        parser.error(f"--steps {told.steps} cannot be cut into {SEGMENTS} steps; give at least {SEGMENTS}")
    texts = stream_text(told.data)
    cells = Cells(told.out, "streaming")
    key = {
        "steps": told.steps,
        "step_tokens": told.step_tokens,
        "tokens": told.profile_tokens,
        "text": f"{digest(texts[0])}{digest(texts[1])}",
    }
    found = {tested.name: cells.get(tested, key, lambda t=tested: replayed(t, texts, told)) for tested in subjects(told)}
    cells.keep("streaming-figure", found)
    if told.plot:
        draw(found, told.plot)
    planned = f"a tenth of {next(iter(texts[0])).upper()}" if told.data else "other documents of the same kind"
    publish({"paper-streaming": page(found, told.plot, planned)}, told.write)


if __name__ == "__main__":
    main()
