"""Domain pruning: perplexity in the domain and outside of it, by what experts are chosen by and how many are kept.

    python benchmarks/pruning.py --data DIRECTORY --write docs/pruning.md

Experts are chosen on 25 demonstrations of a domain (excerpts of its training documents), drawn anew by every seed, and judged
on the same held-out rows: of the domain, and of the other domains. The control is a model of the same shape that was never
trained. `--data` is the directory that the lab's mix is relative to; without it, the texts of the demo are used. What was
measured is kept in `--out` and not measured again; delete it when a model or a method changed. The shelf's models continue no
prompt sensibly, so the answers are those of the text; models that do can be given their own (`equipoise demonstrations`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pruning_page
import torch
from quantization_page import write_between
from shelf import texts

from equipoise.artifacts import Profile
from equipoise.artifacts.files import write_atomic
from equipoise.evaluation.evaluate import evaluate
from equipoise.execution.apply import apply_plan
from equipoise.execution.prune import prune_model
from equipoise.lab import shelf
from equipoise.models.layers import find_moe_layers, model_facts
from equipoise.planning.methods import make_plan
from equipoise.planning.prune import keep_experts, mixed
from equipoise.planning.prune_scores import PRUNING
from equipoise.profiling.calibrate import profile
from equipoise.profiling.forward import negative_log_likelihood
from equipoise.profiling.sequences import Batch, Framing, text_batches

KEEPS = (0.75, 0.5, 0.25)
DEMONSTRATIONS, CHARACTERS, ROW = 25, 800, 256
COUNTS, REFERENCE = (1, 5, 25), 100
"""Demonstrations of the overlap curve, and of the choice that they are held against."""
CONTROL = "untrained"

Kept = tuple[tuple[int, ...], ...]


class Subject:
    """A model, and perplexities of what is left of it, each measured once."""

    def __init__(self, name: str, judged: Mapping[str, Sequence[str]], tokens: int) -> None:
        base = name.removesuffix(f", {CONTROL}")
        self.name, (self.model, self.tokenizer) = name, shelf.load(base, dtype="fp32")
        if name != base:
            torch.manual_seed(0)
            self.model = type(self.model)(self.model.config).eval()
        framing = Framing.of(self.tokenizer, self.model.config)
        self.rows: dict[str, list[Batch]] = {
            text: text_batches({text: documents}, self.tokenizer, framing, tokens=tokens, seq_len=ROW, batch_size=8)
            for text, documents in judged.items()
        }
        self.layers = find_moe_layers(self.model)
        self.facts = model_facts(self.model, name, self.layers)
        self.loss = cache(self._loss)

    def _loss(self, kept: Kept | None) -> dict[str, tuple[float, int]]:
        """Text -> summed loss in nats of the model that keeps these experts (None: all), and over how many tokens."""
        model = self.model if kept is None else prune_model(self.model, kept)
        found = {}
        for text, batches in self.rows.items():
            losses = [negative_log_likelihood(model, batch) for batch in batches]
            found[text] = (sum(nats for nats, _ in losses), sum(count for _, count in losses))
        return found

    def measure(self, documents: Sequence[str], count: int, seed: int, removal_tokens: int = 0) -> Profile:
        """The profile of some demonstrations, with all that the scores read."""
        drawn = np.random.default_rng([seed, count]).permutation(len(documents))[:count]
        options: dict[str, Any] = {"leave_one_out": {"tokens": removal_tokens}} if removal_tokens else {}
        return profile(
            self.model, self.tokenizer, {"domain": [documents[i][:CHARACTERS] for i in drawn]}, tokens=1 << 30, seq_len=1024,
            batch_size=8, seed=seed, importance=("easy_ep", "gate_norm", *options), importance_options=options, progress=False,
        )  # fmt: skip

    def kept(self, made: Profile, score: str, keep: float, seed: int) -> Kept:
        """The experts that a score keeps."""
        score_LE = mixed(PRUNING.get(score)(made, made.source.scenarios, seed))
        return tuple(tuple(ids) for ids in keep_experts(score_LE, self.facts, keep))


def changes(found: Mapping[str, tuple[float, int]], base: Mapping[str, tuple[float, int]], domain: str) -> tuple[float, float]:
    """Relative change of perplexity in the domain, and in all other texts together."""

    def change(names: Sequence[str]) -> float:
        nats, before = (sum(losses[name][0] for name in names) for losses in (found, base))
        return float(np.expm1((nats - before) / sum(base[name][1] for name in names)))

    return change([domain]), change([name for name in base if name != domain])


def one_seed(
    tested: Subject, domain: str, documents: Sequence[str], seed: int, told: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of one domain and one draw of demonstrations: every score at every number of experts."""
    trained = not tested.name.endswith(CONTROL)
    oracle = told.removal_tokens if trained else 0
    made = tested.measure(documents, DEMONSTRATIONS, seed, oracle)
    rows = []
    for keep in KEEPS if trained else (0.5,):
        for score in PRUNING.names():
            if score == "leave-one-out" and not oracle:
                continue
            inside, outside = changes(tested.loss(tested.kept(made, score, keep, seed)), tested.loss(None), domain)
            row = {"model": tested.name, "domain": domain, "seed": seed, "keep": keep, "score": score}
            rows.append({**row, "in": inside, "out": outside})
    return rows


def overlap(tested: Subject, domain: str, documents: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """How many of the experts that many demonstrations keep are kept by few, at half of the experts."""
    half = len(documents) // 2
    wanted = tested.kept(_reference(tested, domain, tuple(documents[half:])), "easy-ep", 0.5, seed)
    rows = []
    for count in COUNTS:
        kept = tested.kept(tested.measure(documents[:half], count, seed), "easy-ep", 0.5, seed)
        share = np.mean([len({*mine} & {*theirs}) / len(theirs) for mine, theirs in zip(kept, wanted, strict=True)])
        rows.append({"model": tested.name, "domain": domain, "seed": seed, "count": count, "overlap": float(share)})
    return rows


@cache
def _reference(tested: Subject, domain: str, documents: tuple[str, ...]) -> Profile:
    return tested.measure(documents, REFERENCE, seed=10_000)


def then_balance(tested: Subject, domain: str, documents: Sequence[str], judged: Mapping[str, Sequence[str]]) -> Any:
    """Prune half of the experts and spend their memory on copies; plans over as many units as the whole model has experts."""
    units = tested.facts.max_experts
    kept = tested.kept(tested.measure(documents, DEMONSTRATIONS, 0), "easy-ep", 0.5, 0)
    traffic = {domain: documents[: 4 * DEMONSTRATIONS]}
    tokenizer = tested.tokenizer
    heldout = {"in": judged[domain], "out": [text for name, texts in judged.items() if name != domain for text in texts]}

    def whole() -> Any:
        return shelf.load(tested.name)[0]

    def pruned() -> Any:
        return prune_model(whole(), kept)

    rows = []
    for name, make, fraction in (("whole", whole, 1.0), ("pruned", pruned, units / len(kept[0]))):
        original = make()
        seen = profile(original, tokenizer, traffic, tokens=8192, seq_len=ROW, precisions=("int8", "int4"), progress=False)
        alone = {"precisions": [seen.model.dtype], "error_bound": 0.0}
        contenders = {}
        for label, options in (("rq", {}), ("copies alone", alone)):
            plan = make_plan(seen, "rq", units=units, bytes_fraction=fraction, dispatch="least_loaded", **options)
            contenders[f"{name}, {label}"] = apply_plan(make(), plan)
        found = evaluate(
            original, contenders, tokenizer, texts=heldout, tokens=4096, seq_len=ROW, units=units, progress=False
        )  # fmt: skip
        rows += pruning_page.balance_rows(name, found, tested.name, domain)
    return rows


def cached(path: Path, make: Any) -> list[dict[str, Any]]:
    """What an earlier run measured, or what this one does."""
    if not path.is_file():
        write_atomic(path, json.dumps(make(), indent=1))
    found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


def of_model(
    tested: Subject, domains: Sequence[str], training: Mapping[str, Sequence[str]], judged: Any, told: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    """All rows of one model; of the control, those of the scores alone."""
    found: dict[str, list[dict[str, Any]]] = {"scores": [], "overlap": [], "balance": []}
    for domain in domains:
        documents = training[domain]
        label = f"{tested.name.replace(', ', '-')}-{domain}"
        for seed in range(told.seeds):
            path = told.out / f"{label}-{told.tokens}-{told.removal_tokens}-{seed}.json"
            found["scores"] += cached(path, partial(one_seed, tested, domain, documents, seed, told))
            if not tested.name.endswith(CONTROL):
                path = told.out / f"{label}-overlap-{seed}.json"
                found["overlap"] += cached(path, partial(overlap, tested, domain, documents, seed))
            print(tested.name, domain, seed, flush=True)
        if not tested.name.endswith(CONTROL):
            found["balance"] += cached(
                told.out / f"{label}-balance.json", partial(then_balance, tested, domain, documents, judged)
            )
    return found


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path("out/pruning"))
    parser.add_argument("--models", nargs="*", default=["mixtral-8", "qwen3-32"])
    parser.add_argument("--domains", nargs="*", default=None, help="to prune for  [default: math and python, or the first two]")
    parser.add_argument("--others", nargs="*", default=None, help="judged as well  [default: prose and chat, or all]")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1024, help="of each domain, to judge on")
    parser.add_argument("--removal-tokens", type=int, default=512, help="of the leave-one-out oracle; 0 leaves it out")
    parser.add_argument("--write", type=Path, default=None, help="Markdown file whose marked parts are replaced")
    told = parser.parse_args()
    told.out.mkdir(parents=True, exist_ok=True)
    training, heldout = texts(told.data)
    domains = told.domains or [name for name in ("math", "python") if name in training] or list(training)[:2]
    others = told.others or [name for name in ("prose", "chat") if name in heldout] or list(heldout)
    judged = {name: heldout[name] for name in dict.fromkeys([*domains, *others])}
    found: dict[str, list[dict[str, Any]]] = {"scores": [], "overlap": [], "balance": []}
    for name in [*told.models, f"{told.models[0]}, {CONTROL}"]:
        for kind, rows in of_model(Subject(name, judged, told.tokens), domains, training, judged, told).items():
            found[kind] += rows
    pages = pruning_page.pages(found, told, domains, list(judged))
    print("\n\n".join(pages.values()))
    write_atomic(told.out / "pruning.json", json.dumps(found, indent=1))
    for mark, page in pages.items() if told.write else ():
        write_between(told.write, mark, page)


if __name__ == "__main__":
    main()
