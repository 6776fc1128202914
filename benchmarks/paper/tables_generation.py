"""Generation under R&Q: greedy continuations of held-out documents, token by token beside the model's own, and GSM8K.

    python benchmarks/paper/tables_generation.py --data DIRECTORY --write docs/paper.md

Small models solve no generation task, so what is asked first is whether a balanced model still writes what the model itself
writes: how many continuations are equal, and how many tokens they have in common before the first difference. `the same weights
in slots` is a control: nothing is quantized, only the order of sums differs. Against the document's own continuation: F1 of the
bag of tokens. GSM8K's exact match is that of `tables_tasks.py`, read from its figures.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from common import Cells, Subject, arguments, digest, machine, publish, subjects, texts
from numpy.typing import NDArray
from tables_parts import OURS, PUBLISHED, RAW, carried_out, measured, plan_of, points
from tables_tasks import found_tasks, with_tasks

from equipoise.evaluation.balance import measure
from equipoise.evaluation.statistics import proportion_interval, ratio_interval
from equipoise.execution.apply import set_dispatch
from equipoise.planning.uniform import uniform_plan

Ints = NDArray[np.int64]
CONTROL = "the same weights in slots"
EVEN = "rq, even"
ARMS = (CONTROL, PUBLISHED, OURS, EVEN)

PRINTED = (
    ("CodexGLUE code2text", "smoothed BLEU", 1.5463, 1.5517, 2.6119, 1.9426),
    ("CoQA", "F1", 0.0106, 0.0104, 2.0412, 1.6488),
    ("WikiText", "byte perplexity", 17.2826, 17.2096, 2.0900, 1.6235),
)
"""Switch-8 in the paper's Figure 9: task, metric, raw, R&Q, LIS raw, LIS R&Q."""


def prompts(tested: Subject, told: argparse.Namespace) -> list[tuple[list[int], list[int]]]:
    """The first tokens of held-out documents, and those that follow; as many of each domain."""
    found = []
    for documents in texts(told.data)[1].values():
        kept = 0
        for document in documents:
            ids = tested.tokenizer(document[: 16 * (told.prompt + told.new)], add_special_tokens=False)["input_ids"]
            if len(ids) >= told.prompt + told.new and kept < told.each:
                found.append((ids[: told.prompt], ids[told.prompt : told.prompt + told.new]))
                kept += 1
    return found


def written(tested: Subject, model: Any, asked: Sequence[tuple[list[int], list[int]]], new: int) -> list[list[int]]:
    """Greedy continuations, one prompt at a time, each of exactly `new` tokens."""
    framing, answers = tested.framing, []
    for prompt, _ in asked:
        ids = torch.tensor([[*framing.prefix, *prompt, *(framing.suffix if framing.decoder_start is not None else ())]])
        with torch.no_grad():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, min_new_tokens=new,
                pad_token_id=framing.padding,
            )  # fmt: skip
        answers.append(out[0, -new:].tolist())
    return answers


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before the first difference."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def bag_f1(written_tokens: Sequence[int], wanted: Sequence[int]) -> float:
    """Harmonic mean of precision and recall of the tokens, order left out, as CoQA scores answers."""
    same = sum((Counter(written_tokens) & Counter(wanted)).values())
    return 2 * same / (len(written_tokens) + len(wanted))


def generated(tested: Subject, told: argparse.Namespace) -> dict[str, Any]:
    """All continuations of one model and its balanced forms, and how level the experts were while they were written."""
    planned = texts(told.data)[0]
    asked = prompts(tested, told)
    made = measured(tested, planned, told.profile_tokens, told.seed, told.out / "profiles")
    plans = {name: plan_of(made, name, told.seed) for name in (PUBLISHED, OURS)}
    plans[CONTROL] = uniform_plan(made.model, made.model.dtype)
    plans[EVEN] = plans[OURS].model_copy(update={"dispatch": "even"})
    units = plans[PUBLISHED].units
    with measure(tested.model, None, units) as balance:
        answers = {RAW: written(tested, tested.model, asked, told.new)}
    levels = {RAW: (balance.lis, balance.lis_paper)}
    ours = carried_out(tested, plans[OURS], planned, told.seed)
    for name in ARMS:
        model = ours if name in (OURS, EVEN) else carried_out(tested, plans[name], planned, told.seed)
        if name == EVEN:
            set_dispatch(model, "even")
        with measure(model, plans[name], units) as balance:
            answers[name] = written(tested, model, asked, told.new)
        levels[name] = (balance.lis, balance.lis_paper)
    return {"answers": answers, "documents": [wanted for _, wanted in asked], "lis": levels, "units": units}


def row(name: str, cell: Mapping[str, Any]) -> str:
    """One model's line."""
    mine, own = cell["answers"][name], cell["answers"][RAW]
    lis, paper = cell["lis"][name]
    f1 = np.array([bag_f1(*pair) for pair in zip(mine, cell["documents"], strict=True)])
    if name == RAW:
        return f"| raw | {lis:.3f} | {paper:.3f} | | | {100 * f1.mean():.1f} | |"
    common = np.array([common_prefix(*pair) for pair in zip(mine, own, strict=True)])
    new = len(own[0])
    equal = proportion_interval((common == new).astype(float), np.ones(len(common)))
    before = np.array([bag_f1(*pair) for pair in zip(own, cell["documents"], strict=True)])
    return (
        f"| {f'`{name}`' if name != CONTROL else name} | {lis:.3f} | {paper:.3f} "
        f"| {100 * equal.value:.0f} ({100 * equal.low:.0f}..{100 * equal.high:.0f}) "
        f"| {common.mean():.1f} of {new} | {100 * f1.mean():.1f} | {points(ratio_interval(f1 - before, np.ones(len(f1))))} |"
    )


def page(found: Mapping[str, Mapping[str, Any]], solved: Sequence[tuple[str, str, Mapping[str, Any]]]) -> str:
    """The tables."""
    lines = [
        "| model | | LIS over units | `lis_paper` | equal to the model's own, % | equal tokens before the first difference, "
        "mean | F1 against the document | difference to raw, points |",
        "|---|---|---:|---:|---|---:|---:|---|",
    ]
    for model, cell in found.items():
        for name in (RAW, *ARMS):
            lines.append(f"| {f'`{model}`' if name == RAW else ''} {row(name, cell)}")
    lines += ["", *says(found)]
    if solved:
        lines += ["", "| model | GSM8K, exact match (items) | `rq-paper`, points | `rq`, points |", "|---|---:|---|---|"]
        for model, _, cell in solved:
            one, ours = cell["contenders"][PUBLISHED], cell["contenders"][OURS]
            lines.append(
                f"| `{model}` | {100 * one['score_base']:.1f} % ({one['items']}) | {points(one['difference'])} | "
                f"{points(ours['difference'])} |"
            )
        zero = sum(cell["contenders"][PUBLISHED]["score_base"] == 0 for _, _, cell in solved)
        lines += ["", f"{zero} of {len(solved)} models solve no item, so GSM8K can show a harm of balancing in none of those."]
    lines += ["", "The paper's generation tasks, Switch-8 (its Figure 9; all figures quoted):", ""]
    lines += ["| task | metric | raw | R&Q | LIS raw | LIS R&Q |", "|---|---|---:|---:|---:|---:|"]
    lines += [f"| {task} | {metric} | {' | '.join(map(str, figures))} |" for task, metric, *figures in PRINTED]
    return "\n".join([*lines, "", f"One prompt at a time; {machine()}."])


def span(values: Sequence[float], form: str) -> str:
    """Least and greatest, or the one value."""
    least, most = f"{min(values):{form}}", f"{max(values):{form}}"
    return least if least == most else f"{least} to {most}"


def says(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the table says, in ranges over models."""

    def same(name: str) -> str:
        pairs = [(cell["answers"][name], cell["answers"][RAW]) for cell in found.values()]
        return span([100 * np.mean([a == b for a, b in zip(mine, own, strict=True)]) for mine, own in pairs], ".0f") + " %"

    def level(name: str) -> str:
        return span([cell["lis"][name][0] for cell in found.values()], ".2f")

    count = len(next(iter(found.values()))["documents"])
    return [
        f"- Of {count} continuations of every model, those equal to the model's own to the last token: {same(PUBLISHED)} "
        f"under `rq-paper`, {same(OURS)} under `rq`, {same(CONTROL)} with the same weights in slots. A greedy continuation "
        "that differs once goes its own way, so equality falls with length much faster than quality does.",
        f"- LIS while writing: {level(RAW)} raw, {level(PUBLISHED)} `rq-paper`, {level(OURS)} `rq` as `balance` makes it, "
        f"{level(EVEN)} `rq` with dispatch `even`. One sequence decodes one token a step: `least_loaded` splits each step by "
        "itself and has nothing to split there, so for batches that small `even` levels over time what `least_loaded` "
        "cannot.",
    ]  # fmt: skip


def main() -> None:
    """Run, print, keep."""
    parser = with_tasks(arguments(__doc__, "out/paper"))
    parser.set_defaults(tasks=["gsm8k"])
    parser.add_argument("--each", type=int, default=2, help="documents of each domain")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens that are written")
    parser.add_argument("--profile-tokens", type=int, default=2048, help="of each domain, to plan from")
    told = parser.parse_args()
    cells = Cells(told.out, "generation")
    planned, heldout = texts(told.data)
    key = {
        "each": told.each,
        "prompt": told.prompt,
        "new": told.new,
        "tokens": told.profile_tokens,
        "seed": told.seed,
        "text": f"{digest(planned)}{digest(heldout)}",
    }
    found = {tested.name: cells.get(tested, key, lambda t=tested: generated(t, told)) for tested in subjects(told)}
    solved = [(tested.name, task, cell) for tested, task, cell in found_tasks(told)]
    cells.keep("generation", found)
    publish({"paper-generation": page(found, solved)}, told.write)


if __name__ == "__main__":
    main()
