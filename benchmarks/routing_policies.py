"""Routing policies: what balance costs with each, alone and combined with Replicate-and-Quantize.

    python benchmarks/routing_policies.py --data DIRECTORY --write docs/routing-policies.md

Policies are fitted on training documents and judged on held-out ones, all against the model under its own router, in one run
per model. `--data` is the directory that the lab's mix is relative to; without it, and for `--models reference` always, the
text is the demo's. What was measured is kept in `--out` and not measured again; delete it when a policy changed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import routing_policies_page as page
import torch
from quantization_page import write_between
from shelf import texts as shelf_texts

from equipoise.artifacts import Profile
from equipoise.artifacts.files import write_atomic
from equipoise.artifacts.routing import RoutingPolicy
from equipoise.evaluation.balance import unit_load
from equipoise.evaluation.evaluate import evaluate
from equipoise.execution.apply import apply_plan
from equipoise.execution.routing.attach import attach_policy, routed
from equipoise.execution.routing.fit import fit_policy
from equipoise.lab import shelf
from equipoise.metrics import lis
from equipoise.models.layers import find_moe_layers
from equipoise.models.recorder import record
from equipoise.models.reference import demo_task_dir, demo_texts, reference_model_dir
from equipoise.planning.methods import make_plan
from equipoise.profiling.calibrate import profile
from equipoise.profiling.forward import run_batch
from equipoise.profiling.loading import load_model, load_tokenizer
from equipoise.profiling.sequences import Batch, Framing, text_batches

REFERENCE = "reference"
SEQ_LEN, BATCH_ROWS = 128, 16
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
SHARES = (0.25, 0.5, 1.0)
ERROR_BOUNDS = (0.02, 0.06, None)
PRECISIONS = ("int8", "int4-g32")
RANKS_OF = 4
"""Experts of a rank, where balance over ranks is scored."""
TASKS = ("arc_easy", "piqa")
DOMAINS = ("prose", "python", "chinese")
"""Domains that the bias is fitted on one by one."""

Texts = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Subject:
    """A model under test: its files, text to fit and plan on, text of other documents to judge on."""

    name: str
    directory: str
    fitted: Texts
    judged: Texts

    def load(self) -> Any:
        """A fresh copy of it."""
        return load_model(self.directory)


def subject(name: str, data: Path | None) -> Subject:
    """A model of the shelf, or the reference model."""
    if name == REFERENCE:
        return Subject(name, str(reference_model_dir()), demo_texts("calibration"), demo_texts("heldout"))
    fitted, judged = shelf_texts(data)
    return Subject(name, str(shelf.path(name)), fitted, judged)


def settings(top_k: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name of a row -> policy and options."""
    rows: dict[str, tuple[str, dict[str, Any]]] = {}
    for k in range(1, top_k):
        rows[f"static top-{k}"] = ("static_k", {"k": k})
    for mean_k in sorted({k for k in (1.5, 2.0, 3.0, 1.25, 1.75) if 1 < k < top_k and (top_k <= 2 or k in (1.5, 2.0, 3.0))}):
        rows[f"top_p, mean k {mean_k:g}"] = ("top_p", {"mean_k": mean_k})
        rows[f"random_k, mean k {mean_k:g}"] = ("random_k", {"mean_k": mean_k})
        rows[f"top_p full, mean k {mean_k:g}"] = ("top_p", {"mean_k": mean_k, "mass": "full"})
    for strength in STRENGTHS:
        rows[f"bias, strength {strength:g}"] = ("bias", {"strength": strength})
    for share in SHARES:
        rows[f"laser_style, share {share:g}"] = ("laser_style", {"share": share})
    rows["laser_style, share 1, t 0.02"] = ("laser_style", {"share": 1.0, "t": 0.02})
    rows["random_pool"] = ("random_pool", {})
    rows["load_only"] = ("load_only", {})
    return rows


def combined(top_k: int) -> dict[str, tuple[str, dict[str, Any]] | None]:
    """Policies that are combined with R&Q; None is the model's own router."""
    rows: dict[str, tuple[str, dict[str, Any]] | None] = {"": None}
    rows |= {f"bias, strength {strength:g}": ("bias", {"strength": strength}) for strength in (0.25, 0.5, 1.0)}
    mean_k = 1.5 if top_k == 2 else top_k - 1.0
    rows[f"top_p, mean k {mean_k:g}"] = ("top_p", {"mean_k": mean_k})
    return rows


class Bench:
    """One model's measurements."""

    def __init__(self, tested: Subject, told: argparse.Namespace, kept: Path) -> None:
        self.tested, self.told, self.kept = tested, told, kept
        self.base, self.tokenizer = tested.load(), load_tokenizer(tested.directory)
        self.framing = Framing.of(self.tokenizer, self.base.config)
        self.top_k = find_moe_layers(self.base)[0].top_k

    def row(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A row that an earlier run kept, or that is measured now."""
        path = self.kept / f"{name.replace(' ', '-').replace(',', '')}.json"
        if not path.is_file():
            row = measure()
            print(page.brief(row), flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(row, indent=1))
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def batches(self, texts: Texts, tokens: int) -> list[Batch]:
        """Excerpts of texts."""
        return text_batches(
            texts, self.tokenizer, self.framing, tokens=tokens, seq_len=SEQ_LEN, batch_size=BATCH_ROWS, seed=self.told.seed
        )

    def fit(self, name: str, options: Mapping[str, Any], texts: Texts | None = None) -> RoutingPolicy:
        """A policy fitted on the training text."""
        return fit_policy(self.base, name, self.batches(texts or self.tested.fitted, self.told.tokens), options)

    def routed_loads(self, policy: RoutingPolicy | None, texts: Texts) -> tuple[float, float]:
        """Experts of a token, and LIS over ranks that hold `RANKS_OF` experts in order, on some text."""
        with routed(self.base, policy, check=False), record(self.base, transitions=False, coactivation=False) as recorder:
            for batch in self.batches(texts, self.told.heldout_tokens):
                run_batch(self.base, batch, all_logits=False)
        load_LE = recorder.counts.sum((0, 1))
        ranks = np.stack([unit_load(load_E, max(2, len(load_E) // RANKS_OF)) for load_E in load_LE])
        return float(load_LE.sum() / recorder.tokens_by_layer.sum()), float(np.nanmean(lis(ranks)))

    def judge(self, models: Mapping[str, Any], texts: Texts) -> list[dict[str, Any]]:
        """Contenders against the base, all texts together, each text's balance beside it."""
        tasks = TASKS if self.tested.name == REFERENCE and self.told.limit else ()
        found = evaluate(
            self.base, models, self.tokenizer, texts=texts, tokens=self.told.heldout_tokens, seq_len=SEQ_LEN,
            batch_size=BATCH_ROWS, seed=self.told.seed, base_name=self.tested.name, tasks=tasks,
            task_dir=demo_task_dir() if tasks else None, limit=self.told.limit if tasks else None,
        )  # fmt: skip
        rows = []
        for contender in found.contenders:
            text = contender.texts[-1]
            rows.append(
                {
                    "name": contender.name,
                    "lis_base": text.lis_base,
                    "lis": text.lis,
                    "kl": text.kl.value,
                    "perplexity_base": text.perplexity_base,
                    "change": [text.perplexity_change.value, text.perplexity_change.low, text.perplexity_change.high],
                    "batch_order_kl": contender.batch_order_kl,
                    "bytes": contender.expert_bytes / found.base_expert_bytes,
                    "by_text": {one.name: [one.lis_base, one.lis] for one in contender.texts},
                    "tasks": {
                        task.name: [task.score_base, task.difference.value, task.difference.low, task.difference.high]
                        for task in contender.tasks
                    },
                }
            )
        return rows

    def alone(self) -> list[dict[str, Any]]:
        """Every policy by itself."""

        def measured(name: str, policy: str, options: Mapping[str, Any]) -> dict[str, Any]:
            fitted = self.fit(policy, options)
            model = attach_policy(self.tested.load(), fitted, check=False)
            (row,) = self.judge({name: model}, self.tested.judged)
            mean_k, ranks = self.routed_loads(fitted, self.tested.judged)
            return {**row, "policy": policy, "mean_k": mean_k, "lis_ranks": ranks}

        told = settings(self.top_k)
        rows = [self.row(name, partial(measured, name, policy, options)) for name, (policy, options) in told.items()]
        mean_k, ranks = self.routed_loads(None, self.tested.judged)
        native = {
            "name": "native",
            "policy": "native",
            "mean_k": mean_k,
            "lis_ranks": ranks,
            "lis": rows[0]["lis_base"],
            "kl": 0.0,
        }
        return [{**rows[0], **native, "change": [0.0, 0.0, 0.0], "batch_order_kl": None, "tasks": {}}, *rows]

    def with_rq(self) -> list[dict[str, Any]]:
        """R&Q planned under each policy, at several bounds on the error."""
        rows = []
        for name, told in combined(self.top_k).items():

            @cache
            def ready(told: tuple[str, dict[str, Any]] | None = told) -> tuple[RoutingPolicy | None, Profile]:
                fitted = None if told is None else self.fit(*told)
                with routed(self.base, fitted, check=False):
                    return fitted, profile(
                        self.base, self.tokenizer, self.tested.fitted, tokens=self.told.tokens, seq_len=SEQ_LEN,
                        batch_size=BATCH_ROWS, seed=self.told.seed, importance=("wanda",), precisions=PRECISIONS,
                        name=self.tested.name, progress=False,
                    )  # fmt: skip

            for bound in ERROR_BOUNDS:
                label = f"{name} + rq" if name else "rq"
                label += "" if bound is None else f", error at most {bound:g}"
                told_name = told[0] if told else "native"
                row = self.row(label, partial(self._planned, label, ready, bound))
                rows.append({**row, "policy": told_name, "family": f"{told_name} + rq" if told else "rq"})
        return rows

    def _planned(
        self, label: str, ready: Callable[[], tuple[RoutingPolicy | None, Profile]], bound: float | None
    ) -> dict[str, Any]:
        fitted, measured = ready()
        plan = make_plan(measured, "rq", dispatch="least_loaded", **({} if bound is None else {"error_bound": bound}))
        model = self.tested.load()
        if fitted is not None:
            attach_policy(model, fitted, check=False)
        (row,) = self.judge({label: apply_plan(model, plan)}, self.tested.judged)
        return row

    def across(self) -> list[dict[str, Any]]:
        """The bias fitted on one domain and judged on others."""
        domains = [name for name in DOMAINS if name in self.tested.fitted] or list(self.tested.fitted)[:3]
        judged = {name: self.tested.judged[name] for name in domains}
        models = {}
        for name in [*domains, "all"]:
            texts = self.tested.fitted if name == "all" else {name: self.tested.fitted[name]}
            models[name] = attach_policy(self.tested.load(), self.fit("bias", {}, texts), check=False)
        rows = self.judge(models, judged)
        return [{"fitted": row["name"], "by_text": {name: row["by_text"][name] for name in domains}} for row in rows]


def measure(name: str, told: argparse.Namespace) -> dict[str, Any]:
    """Everything about one model, or what an earlier run kept."""
    path = told.out / f"{name}-{told.tokens}-{told.heldout_tokens}-{told.seed}.json"
    rows = path.with_suffix("")
    kept: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    bench: Bench | None = None
    for part in ("alone", "across", "with_rq"):
        if part not in kept:
            bench = bench or Bench(subject(name, told.data), told, rows)
            kept[part] = getattr(bench, part)()
            kept["top_k"] = bench.top_k
            kept["domains"] = list(bench.tested.judged)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(kept, indent=1))
    return kept


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path("out/routing-policies"))
    parser.add_argument("--models", nargs="*", default=["mixtral-8", "qwen3-32"], help="of the shelf, or reference")
    parser.add_argument("--tokens", type=int, default=256, help="of each domain, to fit and plan on")
    parser.add_argument("--heldout-tokens", type=int, default=256, help="of each domain, to judge on")
    parser.add_argument("--limit", type=int, default=64, help="items of each of the reference model's tasks; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, default=None, help="Markdown file whose marked part is replaced")
    parser.add_argument("--mark", default="routing", help="name of the marks, where models have a part of their own")
    told = parser.parse_args()
    found = {name: measure(name, told) for name in told.models}
    text = page.page(found, told, f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(text)
    if told.write:
        write_between(told.write, told.mark, text)


if __name__ == "__main__":
    main()
