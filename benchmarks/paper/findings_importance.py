"""Finding (ii), frequency against importance: does an expert that is used much, or that a score names, matter more to the loss.

    python benchmarks/paper/findings_importance.py --data DIRECTORY --write docs/paper.md

Scores are measured on calibration text. What they are held against is the loss on held-out text: by how much it rises without
one expert (leave-one-out, its contribution zero), layer by layer as a rank correlation, and with the least or the most
important experts of every layer left out at once, in two ways: `zero` (their contribution is zero, as in leave-one-out; one
expert a layer) and `masked` (the router chooses among the rest; a quarter of the experts). `leave-one-out` as a score is
measured on the calibration text like all others: how far it agrees with itself on held-out text is what to compare scores with.

Wanda's score is told in both directions: as published (a lower score means more important) and inverted.
Shapes: L MoE layers, E experts, R rows of text.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from common import CHARACTERS, Cells, Subject, arguments, digest, excerpts, machine, publish, subjects, texts
from numpy.typing import NDArray
from quantization_page import percent
from scipy.stats import spearmanr

from equipoise.artifacts.evaluation import Interval
from equipoise.errors import PlanError
from equipoise.evaluation import statistics
from equipoise.execution.prune import prune_model
from equipoise.profiling.calibrate import profile
from equipoise.profiling.forward import run_batch
from equipoise.profiling.importance.leave_one_out import removed
from equipoise.profiling.sequences import IGNORED, Batch, text_batches

Floats = NDArray[np.float64]
Texts = Mapping[str, Sequence[str]]
ORACLE = "leave-one-out"
SCORES = (
    "frequency", "wanda, as published", "wanda, inverted", "gate-norm", "easy-ep", "output error", "output error x sensitivity",
    ORACLE,
)  # fmt: skip
RANDOM = "random"
MIRRORED = {"wanda, inverted": "wanda, as published"}
"""A score whose least are the most of another: not run twice."""
ENDS, WAYS = ("least", "most"), ("zero", "masked")
BATCH = 11
FORMATS = ("int8", "int4-g32")


def measured(subject: Subject, planned: Texts, judged: Texts, told: argparse.Namespace, cells: Cells) -> dict[str, Any]:
    """Scores of every expert on calibration text, larger for more important ones, and its removal on held-out text."""
    common: dict[str, Any] = {"tokens": 1 << 30, "seq_len": told.row, "batch_size": BATCH, "seed": told.seed, "progress": False}
    seen = profile(
        subject.model, subject.tokenizer, {"all": excerpts(planned, told.rows, told.seed)}, precisions=FORMATS, **common,
        importance=("frequency", "wanda", "gate_norm", "easy_ep", "output_error"),
        importance_options={"output_error": {"sensitivity_tokens": told.sensitivity_tokens}},
    )  # fmt: skip
    removal = {}
    for name, documents in (("calibration", planned), ("held out", judged)):
        chosen_text = excerpts(documents, told.removal_rows, told.seed)
        state = cells.place / f"{subject.name}-{subject.identity}-{digest(chosen_text)}-{told.row}.state"
        state.parent.mkdir(parents=True, exist_ok=True)
        made = profile(
            subject.model, subject.tokenizer, {"all": chosen_text}, **common, importance=("leave_one_out",),
            importance_options={"leave_one_out": {"tokens": 1 << 30}}, resume_path=state,
        )  # fmt: skip
        removal[name] = made.importance["leave_one_out"]
    coarse = seen.importance["output_error"]
    scores = {
        "frequency": seen.importance["frequency"],
        "wanda, as published": -seen.importance["wanda"],
        "wanda, inverted": seen.importance["wanda"],
        "gate-norm": seen.importance["gate_norm"],
        "easy-ep": seen.importance["easy_ep"],
        "output error": coarse,
        "output error x sensitivity": coarse * seen.sensitivity,
        ORACLE: removal["calibration"],
    }
    return {
        "scores": {name: score.tolist() for name, score in scores.items()},
        "removal": removal["held out"].tolist(),
        "widths": seen.widths.tolist(),
    }


def correlations(score_LE: Floats, truth_LE: Floats, widths: Sequence[int]) -> list[float | None]:
    """[L] Spearman's rank correlation; None where one of the two is the same for all experts."""
    found: list[float | None] = []
    for score_E, truth_E, width in zip(score_LE, truth_LE, widths, strict=True):
        constant = len(set(score_E[:width])) < 2 or len(set(truth_E[:width])) < 2
        found.append(None if constant else float(spearmanr(score_E[:width], truth_E[:width]).statistic))
    return found


def standing(score_LE: Floats, truth_LE: Floats, widths: Sequence[int], end: str) -> list[float]:
    """[L] where the expert at one end of a score stands by the truth: 0 least important, 1 most, 0.5 what chance gives.

    Args:
        score_LE: scores, larger for more important experts.
        truth_LE: [L, E] loss without each expert.
        widths: [L] experts of each layer.
        end: "least" or "most".
    """
    found = []
    for score_E, truth_E, width in zip(score_LE, truth_LE, widths, strict=True):
        picked = int(score_E[:width].argmin() if end == "least" else score_E[:width].argmax())
        others = np.delete(truth_E[:width], picked)
        below = (others < truth_E[picked]).sum() + 0.5 * (others == truth_E[picked]).sum()
        found.append(float(below / max(len(others), 1)))
    return found


def chosen(score_LE: Floats, widths: Sequence[int], count: Callable[[int], int], end: str) -> list[list[int]]:
    """Per layer, the experts at one end of a score."""
    orders = [np.argsort(score_E[:width], kind="stable") for score_E, width in zip(score_LE, widths, strict=True)]
    sizes = [count(width) for width in widths]
    return [
        sorted(int(e) for e in (order[:size] if end == "least" else order[len(order) - size :]))
        for order, size in zip(orders, sizes, strict=True)
    ]


COUNTS: dict[str, Callable[[int], int]] = {"one": lambda width: 1, "a quarter": lambda width: max(width // 4, 1)}
"""How many experts of each layer are left out."""
CASES = (("one", "zero"), ("a quarter", "masked"))
ALL_CASES = tuple((count, way) for count in COUNTS for way in WAYS)


def row_losses(model: Any, batches: Sequence[Batch]) -> tuple[list[float], list[int]]:
    """[R] summed loss of each row in nats, and [R] how many tokens it is of."""
    nats, tokens = [], []
    for batch in batches:
        logits = run_batch(model, batch, all_logits=True).logits
        labels = torch.from_numpy(batch.labels).to(logits.device)
        for logits_SV, labels_S in zip(logits, labels, strict=True):
            kept = labels_S != IGNORED
            nats.append(float(torch.nn.functional.cross_entropy(logits_SV[kept].float(), labels_S[kept], reduction="sum")))
            tokens.append(int(kept.sum()))
    return nats, tokens


@contextmanager
def without(subject: Subject, left_out: Sequence[Sequence[int]], way: str) -> Iterator[Any]:
    """The model without some experts of each layer."""
    if way == "masked":
        kept = [
            tuple(e for e in range(layer.num_experts) if e not in gone)
            for layer, gone in zip(subject.layers, left_out, strict=True)
        ]
        yield prune_model(subject.model, tuple(kept))
        return
    with ExitStack() as stack:
        for layer, gone in zip(subject.layers, left_out, strict=True):
            for expert in gone:
                stack.enter_context(removed(layer, expert))
        yield subject.model


def losses_without(
    subject: Subject, batches: Sequence[Batch], score_LE: Floats, widths: Sequence[int], cases: Sequence[tuple[str, str]]
) -> dict[str, list[float]]:
    """Each case and end -> [R] loss of each row without the experts that a score names; none where routers need them."""
    found: dict[str, list[float]] = {}
    for count, way in cases:
        for end in ENDS:
            try:
                with without(subject, chosen(score_LE, widths, COUNTS[count], end), way) as model:
                    found[f"{count}/{end}/{way}"] = row_losses(model, batches)[0]
            except PlanError:  # routers that choose among groups of experts need groups of one size
                found[f"{count}/{end}/{way}"] = []
    return found


def of_model(subject: Subject, planned: Texts, judged: Texts, told: argparse.Namespace, cells: Cells) -> dict[str, Any]:
    """Scores, correlations and removals of one model."""
    key = {
        "rows": told.rows, "removal": told.removal_rows, "sensitivity": told.sensitivity_tokens, "seed": told.seed,
        "row": told.row,
        "text": digest({"planned": excerpts(planned, told.rows, told.seed), "judged": excerpts(judged, told.rows, told.seed)}),
    }  # fmt: skip
    found = cells.get(subject, {"what": "scores", **key}, partial(measured, subject, planned, judged, told, cells))
    widths, scores = found["widths"], {name: np.asarray(found["scores"][name]) for name in SCORES}
    rng = np.random.default_rng(told.seed)
    draws = {f"{RANDOM} {i}": rng.random(scores[ORACLE].shape) for i in range(told.draws)}
    batches: list[Batch] = []

    def rows() -> list[Batch]:
        if not batches:
            text = {"all": excerpts(judged, told.judged_rows, told.seed)}
            batches.extend(
                text_batches(text, subject.tokenizer, subject.framing, tokens=1 << 30, seq_len=told.row, batch_size=BATCH)
            )
        return batches

    judged_key = {**key, "judged": told.judged_rows, "cases": told.cases}
    base, tokens = cells.get(subject, {"what": "whole", **judged_key}, lambda: row_losses(subject.model, rows()))
    removals = {
        name: cells.get(
            subject, {"what": name, **judged_key},
            lambda score_LE=score_LE: losses_without(subject, rows(), score_LE, widths, told.cases),
        )
        for name, score_LE in {**scores, **draws}.items()
        if name not in MIRRORED
    }  # fmt: skip
    return {"model": subject.name, **found, "base": base, "predicted": tokens, "removals": removals}


def losses_of(found: Mapping[str, Any], score: str, count: str, end: str, way: str) -> list[float]:
    """[R] losses; of a mirrored score those of the other's other end."""
    if score in MIRRORED:
        score, end = MIRRORED[score], ENDS[1 - ENDS.index(end)]
    rows: list[float] = found["removals"][score][f"{count}/{end}/{way}"]
    return rows


def change_cell(found: Mapping[str, Any], score: str, count: str, end: str, way: str) -> str:
    """Change of perplexity, empty where the model cannot be run so."""
    some = f"{RANDOM} 0" if score == RANDOM else score
    return percent(change(found, score, count, end, way)) if losses_of(found, some, count, end, way) else ""


def change(found: Mapping[str, Any], score: str, count: str, end: str, way: str) -> Interval:
    """Change of perplexity without a score's experts, paired over rows; of random ones, its mean with the range of draws."""
    base, tokens = found["base"], found["predicted"]
    if score != RANDOM:
        return statistics.perplexity_change(base, losses_of(found, score, count, end, way), tokens)
    values = [
        float(np.expm1((np.sum(rows[f"{count}/{end}/{way}"]) - np.sum(base)) / np.sum(tokens)))
        for name, rows in found["removals"].items()
        if name.startswith(RANDOM)
    ]
    return Interval(value=float(np.mean(values)), low=min(values), high=max(values))


def table(head: str, rows: Sequence[str], found: Sequence[Mapping[str, Any]], cell: Callable[[str, Any], str]) -> list[str]:
    """Lines of a table with a column for each model."""
    lines = [f"| {head} | " + " | ".join(f"`{one['model']}`" for one in found) + " |", "|---|" + "---:|" * len(found)]
    return [*lines, *(f"| {name} | " + " | ".join(cell(name, one) for one in found) + " |" for name in rows), ""]


def correlation_cell(name: str, one: Mapping[str, Any]) -> str:
    """Mean over layers, and the range."""
    truth = np.asarray(one["removal"])
    values = [v for v in correlations(np.asarray(one["scores"][name]), truth, one["widths"]) if v is not None]
    return f"{np.mean(values):+.2f} ({min(values):+.2f}..{max(values):+.2f})" if values else ""


def standing_cell(name: str, one: Mapping[str, Any]) -> str:
    """Where the two ends of a score stand, means over layers."""
    score, truth = np.asarray(one["scores"][name]), np.asarray(one["removal"])
    least, most = (np.mean(standing(score, truth, one["widths"], end)) for end in ENDS)
    return f"{least:.2f}, {most:.2f}"


def agreement_cell(name: str, one: Mapping[str, Any]) -> str:
    """Rank correlation of a score with the frequency, mean over layers."""
    frequency = np.asarray(one["scores"]["frequency"])
    values = [v for v in correlations(np.asarray(one["scores"][name]), frequency, one["widths"]) if v is not None]
    return f"{np.mean(values):+.2f}" if values else ""


def pages(found: Sequence[Mapping[str, Any]], told: argparse.Namespace) -> str:
    """The tables as Markdown."""
    lines = ["**Rank correlation with leave-one-out on held-out text**, mean over layers (least..greatest of a layer):", ""]
    lines += table("score", SCORES, found, correlation_cell)
    lines += ["**Rank correlation with the frequency**, mean over layers:", ""]
    lines += table("score", SCORES[1:], found, agreement_cell)
    lines += [
        "**Where a score's least and most important expert stand** by leave-one-out on held-out text, means over layers "
        "(0 the least important, 1 the most; chance gives 0.5):",
        "",
    ]
    lines += table("score", SCORES, found, standing_cell)
    names = {"zero": "contribution zero", "masked": "the router chooses among the rest"}
    for count, way in told.cases:
        for end in ENDS:
            lines += [
                f"**Without {count} of each layer's experts, the {end} important by each score** ({names[way]}): change of "
                "perplexity in %",
                "",
            ]
            lines += table(
                "score", [*SCORES, RANDOM], found, lambda name, one, c=count, e=end, w=way: change_cell(one, name, c, e, w)
            )
    lines.append(
        "Empty where routers choose among groups of experts, which must keep as many each. "
        f"Intervals: 95 %, paired over rows of held-out text; of `{RANDOM}`, mean and range of {told.draws} draws. "
        f"Text: of each domain {told.rows} excerpts of {CHARACTERS:,} characters, in rows of at most {told.row} tokens, to "
        f"score experts on, {told.removal_rows} for leave-one-out, {told.judged_rows} held-out ones to judge removals on; "
        f"{told.dtype}; seed {told.seed}; {machine()}."
    )
    return "\n".join(lines)


def main() -> None:
    """Run, print, keep."""
    parser = arguments(__doc__, "out/paper")
    parser.set_defaults(dtype="fp32")
    parser.add_argument("--rows", type=int, default=8, help="excerpts of each domain, to score experts on")
    parser.add_argument("--row", type=int, default=256, help="tokens of a row at most")
    parser.add_argument("--sensitivity-tokens", type=int, default=2816, help="of all domains, for gradients")
    parser.add_argument("--removal-rows", type=int, default=1, help="excerpts of each domain, for leave-one-out")
    parser.add_argument("--judged-rows", type=int, default=2, help="held out, of each domain, for removals")
    parser.add_argument("--draws", type=int, default=3, help="of random experts")
    parser.add_argument("--all-cases", action="store_true", help="one and a quarter of the experts, each in both ways")
    told = parser.parse_args()
    told.cases = ALL_CASES if told.all_cases else CASES
    planned, judged = texts(told.data)
    cells = Cells(told.out, "importance")
    found = [of_model(subject, planned, judged, told, cells) for subject in subjects(told)]
    cells.keep(f"findings{told.mark}", found)
    publish({f"paper-importance{told.mark}": pages(found, told)}, told.write)


if __name__ == "__main__":
    main()
