"""Bits and copies decided together: balance and quality of joint plans beside the baselines, at equal bytes and units.

    python benchmarks/joint_plan.py --data DIRECTORY --seeds 3 --only "rq, least loaded" --write docs/joint-planning.md
    python benchmarks/joint_plan.py --data DIRECTORY --part baselines --write docs/joint-planning.md
    python benchmarks/joint_plan.py --data DIRECTORY --frontier --write docs/joint-planning.md --plot docs/joint-frontier.svg

The first makes the table of plans, the second that of all baselines, the third the frontier: plans over a grid of bytes and
error bounds, measured. Planned on four fifths of the training documents. `--split tune` judges on the last fifth of them,
which is what settings were chosen on; `--split report`, the default, on held-out documents. Seeds draw other excerpts of
both. `--data` is the directory that the lab's mix is relative to; without it, and for the reference model always, the text is
the demo's. Profiles and what was measured of a plan are kept in `--out` and not measured again; delete it when how they are
measured changed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import joint_plan_page
from shelf import texts

from equipoise.artifacts import Evaluation, Plan, Profile
from equipoise.artifacts.files import write_atomic
from equipoise.evaluation.evaluate import evaluate
from equipoise.execution.apply import apply_plan
from equipoise.lab import shelf
from equipoise.models.reference import demo_texts, reference_model_dir
from equipoise.pipeline import hold_out
from equipoise.planning.budget import UnreachableError
from equipoise.planning.methods import make_plan
from equipoise.profiling.calibrate import profile
from equipoise.profiling.loading import load_model, load_tokenizer
from equipoise.profiling.sequences import Batch, Framing, text_batches
from equipoise.quantization.methods import METHODS
from equipoise.reporting.frontier_plot import frontier_plot

REFERENCE = "reference"
PRECISIONS = ("int8", "int4-g32", "int3-g32", "int2-g32")
FRACTIONS, BOUNDS = (0.5, 0.75, 1.0, 1.25), (0.02, 0.04, 0.08, 0.16)
SEQ_LEN, BATCH_ROWS = 512, 4
PUBLISHED = "rq-paper"

Texts = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Subject:
    """A model under test and its text."""

    name: str
    directory: str
    planned: Texts
    judged: Texts


def subject(name: str, told: argparse.Namespace) -> Subject:
    """A model's directory, the text to plan from and the text of the split that is judged."""
    reference = name == REFERENCE
    training, heldout = (demo_texts("calibration"), demo_texts("heldout")) if reference else texts(told.data)
    planned, tuning = hold_out(training)
    directory = str(reference_model_dir() if reference else shelf.path(name))
    return Subject(name, directory, planned, tuning if told.split == "tune" else heldout)


def measured(tested: Subject, seed: int, told: argparse.Namespace) -> Profile:
    """The profile of the text to plan from: loads, errors at all widths, sensitivity of the experts."""
    path = told.out / f"{tested.name}-{told.tokens}-{told.sensitivity_tokens}-{seed}.profile.safetensors"
    if not path.is_file():
        made = profile(
            load_model(tested.directory), load_tokenizer(tested.directory), tested.planned,
            tokens=told.tokens, seq_len=SEQ_LEN, batch_size=BATCH_ROWS, seed=seed, importance=("wanda",), precisions=PRECISIONS,
            importance_options={"output_error": {"sensitivity_tokens": told.sensitivity_tokens}}, name=tested.name,
        )  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        made.save(path)
    return Profile.load_file(path)


def contenders(told: argparse.Namespace) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> method and options of every row."""
    bound: dict[str, Any] = {} if told.error_bound is None else {"error_bound": told.error_bound}
    return {
        PUBLISHED: (PUBLISHED, {}),
        "rq, int8 only": ("rq", {"precisions": ["int8"], "error_bound": 1.0, "dispatch": "least_loaded"}),
        "rq, bits by frequency": ("rq", {**bound, "dispatch": "least_loaded", "bits_by": "frequency"}),
        "rq, own bits per copy": ("rq", {**bound, "dispatch": "least_loaded", "alike": False}),
        "rq, even": ("rq", bound),
        "rq, least loaded": ("rq", {**bound, "dispatch": "least_loaded"}),
    }


def calibration(tested: Subject, seed: int, tokens: int) -> list[Batch]:
    """Batches for rounding on text, of the documents that are planned from."""
    model, tokenizer = load_model(tested.directory), load_tokenizer(tested.directory)
    framing = Framing.of(tokenizer, model.config)
    return text_batches(tested.planned, tokenizer, framing, tokens=tokens, seq_len=SEQ_LEN, batch_size=BATCH_ROWS, seed=seed)


def judge(tested: Subject, seed: int, plans: Mapping[str, Plan], told: argparse.Namespace) -> Evaluation:
    """Apply plans and measure them against the base on the split's text; what is kept is not measured again."""
    asked = [told.split, told.heldout_tokens, told.rounding, told.rounding_tokens, *(plan.to_json() for plan in plans.values())]
    path = told.out / f"{tested.name}-{seed}-{sha256(json.dumps(asked).encode()).hexdigest()[:12]}.eval.json"
    if path.is_file():
        return Evaluation.load_file(path)
    batches = calibration(tested, seed, told.rounding_tokens) if METHODS.get(told.rounding).needs_hessian else None
    models = {}
    for name, plan in plans.items():
        plain = name == PUBLISHED  # the paper rounds to nearest
        models[name] = apply_plan(
            load_model(tested.directory), plan,
            method="rtn" if plain else told.rounding, batches=None if plain else batches,
        )  # fmt: skip
    found = evaluate(
        load_model(tested.directory), models, load_tokenizer(tested.directory), texts=tested.judged, tokens=told.heldout_tokens,
        seq_len=SEQ_LEN, batch_size=BATCH_ROWS, seed=seed, base_name=tested.name,
    )  # fmt: skip
    found.save(path)
    return found


def table(name: str, told: argparse.Namespace) -> list[dict[str, Any]]:
    """One model's rows: a contender each, of all seeds."""
    tested = subject(name, told)
    rows: dict[str, dict[str, Any]] = {}
    for seed in range(told.seeds):
        made = measured(tested, seed, told)
        chosen = {key: value for key, value in contenders(told).items() if not told.only or key in told.only}
        plans = {key: make_plan(made, method, seed=seed, **options) for key, (method, options) in chosen.items()}
        for key, plan in plans.items():
            plan.save(told.out / f"{name}-{seed}-{key.replace(' ', '-').replace(',', '')}.plan.json")
        found = judge(tested, seed, plans, told)
        for contender in found.contenders:
            row = rows.setdefault(contender.name, {"model": name, "plan": contender.name, "seeds": []})
            row["seeds"].append(joint_plan_page.figures(contender, found, plans[contender.name]))
    return list(rows.values())


def frontier(name: str, told: argparse.Namespace) -> list[dict[str, Any]]:
    """One model's points: measured LIS and KL at each number of bytes and error bound that can be met."""
    tested, seed = subject(name, told), 0
    made, plans = measured(tested, seed, told), {}
    for fraction in FRACTIONS:
        for bound in BOUNDS:
            try:
                plan = make_plan(made, "rq", seed=seed, bytes_fraction=fraction, error_bound=bound, dispatch="least_loaded")
            except UnreachableError:
                continue
            plans[f"{fraction:g} {bound:g}"] = plan
    found = judge(tested, seed, plans, told)
    points = []
    for contender in found.contenders:
        fraction, bound = map(float, contender.name.split())
        point = joint_plan_page.figures(contender, found, plans[contender.name])
        points.append({"model": name, "bytes_fraction": fraction, "error_bound": bound, **point})
    return points


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path("out/joint"))
    parser.add_argument("--models", nargs="*", default=None, help="of the shelf, or 'reference'; all of them by default")
    parser.add_argument("--split", choices=("tune", "report"), default="report")
    parser.add_argument("--tokens", type=int, default=4096, help="of each domain, to plan from")
    parser.add_argument("--heldout-tokens", type=int, default=4096, help="of each domain, to judge on")
    parser.add_argument("--sensitivity-tokens", type=int, default=8192)
    parser.add_argument("--rounding", default="agq", help="quantization method of all plans but the published one")
    parser.add_argument("--rounding-tokens", type=int, default=2048, help="of each domain, for rounding on text")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--error-bound", type=float, default=None, help="of the rq rows  [default: rq's own]")
    parser.add_argument("--only", nargs="*", default=None, help="rows to make")
    parser.add_argument("--frontier", action="store_true", help="points over bytes and error bounds instead of the table")
    parser.add_argument("--part", default="table", help="marked part of the page that the table replaces: table or baselines")
    parser.add_argument("--plot", type=Path, default=None, help="with --frontier: picture to write (.svg or .png)")
    parser.add_argument("--write", type=Path, default=None, help="Markdown file whose marked part is replaced")
    told = parser.parse_args()
    told.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in told.models or [*shelf.names(), REFERENCE]:
        rows += frontier(name, told) if told.frontier else table(name, told)
        page = joint_plan_page.frontier_page(rows, told) if told.frontier else joint_plan_page.table_page(rows, told)
        print(page, flush=True)
    kind = "frontier" if told.frontier else told.part
    write_atomic(told.out / f"{kind}-{told.split}.json", json.dumps(rows, indent=1))
    if told.write:
        joint_plan_page.replace_part(told.write, kind, page)
    if told.frontier and told.plot:
        frontier_plot(rows, told.plot)


if __name__ == "__main__":
    main()
