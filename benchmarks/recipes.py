"""Training-time systems side by side: every arm of every recipe, over several seeds, judged alike. For docs/lab-recipes.md.

    python benchmarks/recipes.py --data DIRECTORY --write docs/lab-recipes.md
    python benchmarks/recipes.py --data DIRECTORY --only loss-free simbal --seeds 0 1 --steps 200

`--data` is the directory that the mixes' files are relative to. An arm trains for one to two minutes of one core; runs are kept
in `--out` and gone on with, so that the command can be stopped at any time and writes whatever is there already.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recipes_page import GROUPS, page
from recipes_same import Sequel, compressed, run_sequence
from scipy.stats import spearmanr

from equipoise.artifacts.files import write_atomic
from equipoise.evaluation.balance import measure as measure_balance
from equipoise.evaluation.similarity import expert_similarity
from equipoise.execution.apply import apply_plan
from equipoise.lab.model import build_model
from equipoise.lab.recipe import Recipe, read_mix, read_recipe
from equipoise.lab.recipes.dynamic_moe import shuffled_visits
from equipoise.lab.rows import RowOrder, heldout_rows
from equipoise.lab.text import data_directory, domain_documents, load_or_train_tokenizer, streams
from equipoise.lab.training import LOSSES, train
from equipoise.lab.watch import measure
from equipoise.metrics import lis, maxvio
from equipoise.models.recorder import record
from equipoise.pipeline import PRECISIONS
from equipoise.planning.methods import make_plan
from equipoise.profiling.calibrate import profile
from equipoise.profiling.forward import evaluation_mode, negative_log_likelihood, run_batch
from equipoise.profiling.loading import load_model
from equipoise.profiling.sequences import IGNORED, Framing, Rows, make_batches

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "recipes"
ROWS = 16
"""Held-out rows of each domain that models are judged on."""
TRAINING_BATCHES = 48
"""Last batches of the run on whose text the balance that training reached is measured."""
PLAN_TOKENS = 4096
"""Tokens of each domain that `rq` plans from."""


@dataclass(frozen=True)
class Arm:
    """One way to train: a recipe file and what is changed in it."""

    name: str
    group: str
    base: str
    told: str
    extensions: Mapping[str, Mapping[str, Any]] | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    equal_time: str = ""

    def recipe(self, seed: int, steps: int | None) -> Recipe:
        """The recipe of one run."""
        recipe = read_recipe(CONFIGS / f"{self.base}.toml")
        training = recipe.training.model_copy(update={"seed": seed, **({"steps": steps} if steps else {})})
        extensions = recipe.extensions if self.extensions is None else {k: dict(v) for k, v in self.extensions.items()}
        update = {"name": self.name, "training": training, "extensions": extensions, "model": {**recipe.model, **self.model}}
        return recipe.model_copy(update=update)


CHAIN = {"aux-loss": {"coefficient": 1e-3}}
ARMS = (
    Arm("none", "balance", "softmax", "no balance of any kind; the control"),
    Arm("aux-loss 0.001", "balance", "softmax", "", {"aux-loss": {"coefficient": 0.001}}),
    Arm("aux-loss 0.01", "balance", "softmax", "Switch's coefficient", {"aux-loss": {"coefficient": 0.01}}),
    Arm("aux-loss 0.1", "balance", "softmax", "", {"aux-loss": {"coefficient": 0.1}}),
    Arm("loss-free sign", "balance", "softmax", "the rule for sigmoid scores", {"loss-free": {"rule": "sign"}}),
    Arm("loss-free proportional", "balance", "softmax", "the rule for softmax scores", {"loss-free": {"rule": "proportional"}}),
    Arm("none, sigmoid", "balance", "sigmoid", "the control of the arms below"),
    Arm("loss-free 0.001, sigmoid", "balance", "sigmoid", "the paper's rate", {"loss-free": {"rate": 0.001}}),
    Arm("loss-free 0.003, sigmoid", "balance", "sigmoid", "", {"loss-free": {"rate": 0.003}}),
    Arm("loss-free 0.01, sigmoid", "balance", "sigmoid", "", {"loss-free": {"rate": 0.01}}),
    Arm("loss-free 0.01 proportional, sigmoid", "balance", "sigmoid", "",
        {"loss-free": {"rate": 0.01, "rule": "proportional"}}),
    Arm("simbal", "simbal", "softmax", "coefficient 0.1", {"simbal": {}}),
    Arm("simbal scale", "simbal", "softmax", "control: row lengths alone", {"simbal": {"form": "scale"}}),
    Arm("simbal unit", "simbal", "softmax", "control: angles alone", {"simbal": {"form": "unit"}}),
    Arm("simbal start", "simbal", "softmax", "control: orthonormal start, no loss", {"simbal": {"coefficient": 0.0}}),
    Arm("dynamic", "dynamic-moe", "dynamic-moe", "alpha 0.01, beta 0.0001"),
    Arm("dynamic, no entropy", "dynamic-moe", "dynamic-moe", "ablation", {"dynamic-moe": {"beta": 0.0}}),
    Arm("dynamic, entropy 0.01", "dynamic-moe", "dynamic-moe", "a hundred times the loss", {"dynamic-moe": {"beta": 0.01}}),
    Arm("static top-2", "dynamic-moe", "dynamic-moe", "the same router, two experts for every token",
        model={"router_top_p": 1.0, "num_experts_per_tok": 2}),
    Arm("chain", "chain-of-experts", "chain-of-experts", "2 steps of top-2", CHAIN),
    Arm("plain", "chain-of-experts", "chain-of-experts", "1 step of top-4: as many expert calls", CHAIN,
        {"steps": 1, "num_experts_per_tok": 4}),
    Arm("plain, equal time", "chain-of-experts", "chain-of-experts", "as much time as the chain", CHAIN,
        {"steps": 1, "num_experts_per_tok": 4}, equal_time="chain"),
)  # fmt: skip


class Judge:
    """What trained models are judged on, prepared once: text that they were trained on, held-out text, and other text."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.mix, self.other = read_mix(CONFIGS / "mix.toml"), read_mix(CONFIGS / "other.toml")
        recipe = ARMS[0].recipe(0, None)
        self.tokenizer = load_or_train_tokenizer(recipe.mix, recipe.tokenizer_directory, data)
        self.seq_len = recipe.training.seq_len
        self.train = streams(self.mix, data, self.tokenizer, "train")
        self.documents = domain_documents(self.mix, data, "train")
        held = [streams(mix, data, self.tokenizer, "heldout") for mix in (self.mix, self.other)]
        self.framing = Framing.of(self.tokenizer, build_model(recipe, self.tokenizer).config)
        self.inside, self.outside = (heldout_rows(part, self.framing, seq_len=self.seq_len, rows=ROWS) for part in held)

    def judge(self, arm: Arm, recipe: Recipe, place: Path) -> dict[str, Any]:
        """All figures of one run."""
        model = load_model(str(place / "model"), dtype="fp32")
        inside, outside = measure(model, self.inside), measure(model, self.outside)
        told: dict[str, Any] = {
            "perplexity": inside.perplexity,
            "other_perplexity": outside.perplexity,
            "domain_perplexity": inside.domain_perplexity(),
            "maxvio": float(np.mean(inside.balance()["maxvio"])),
            "maxvio_training": self._on_training_text(model, recipe),
            "pes": float(np.nanmean(expert_similarity(model, [_mixed(self.inside, 0)]))),
            "lis": {
                "mix": float(np.mean(inside.balance()["lis"])),
                "inside": inside.domain_lis(),
                "outside": outside.domain_lis(),
            },
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "experts_per_token": {**inside.experts_per_token(), **outside.experts_per_token()},
        }
        if arm.group == "dynamic-moe":
            told["adaptive"] = self._adaptivity(model, recipe)
        told["rq"] = self._planned(model)
        return told

    def _on_training_text(self, model: Any, recipe: Recipe) -> float:
        """MaxVio on the text of the last training steps, mean over layers."""
        setting = recipe.training
        order = RowOrder(
            self.train, {name: domain.weight for name, domain in recipe.mix.domains.items()}, self.framing,
            seq_len=setting.seq_len, batch_size=setting.batch_size, seed=setting.seed,
        )  # fmt: skip
        with evaluation_mode(model), record(model, transitions=False, coactivation=False) as recorder:
            for step in range(max(setting.steps - TRAINING_BATCHES, 0), setting.steps):
                run_batch(model, order.batch(step), all_logits=False)
        return float(np.mean(maxvio(recorder.counts.sum((0, 1)), [layer.num_experts for layer in recorder.layers])))

    def _planned(self, model: Any) -> dict[str, Any]:
        """What `rq`, planned on training text of the four domains, leaves of the imbalance, measured on the model it makes."""
        measured = profile(
            model, self.tokenizer, self.documents, tokens=PLAN_TOKENS, seq_len=self.seq_len, batch_size=8,
            precisions=PRECISIONS, progress=False,
        )  # fmt: skip
        plan = make_plan(measured, "rq")
        balanced = apply_plan(copy.deepcopy(model), plan, int8_activations=False)
        units: dict[str, np.ndarray] = {}
        nll = {"inside": 0.0, "outside": 0.0}
        scored = {"inside": 0, "outside": 0}
        with evaluation_mode(balanced):
            for side, parts in (("inside", self.inside), ("outside", self.outside)):
                for name, rows in parts.items():
                    with measure_balance(balanced, plan, plan.units) as found:
                        for batch in make_batches(rows, 8):
                            loss, count = negative_log_likelihood(balanced, batch)
                            nll[side] += loss
                            scored[side] += count
                    units[name] = found.unit_LU
        return {
            "mix": float(np.nanmean(lis(sum(units[name] for name in self.inside)))),
            "inside": {name: float(np.nanmean(lis(units[name]))) for name in self.inside},
            "outside": {name: float(np.nanmean(lis(units[name]))) for name in self.outside},
            "perplexity": float(np.exp(nll["inside"] / scored["inside"])),
            "other_perplexity": float(np.exp(nll["outside"] / scored["outside"])),
        }

    def _adaptivity(self, model: Any, recipe: Recipe) -> dict[str, Any]:
        """Experts per token: at the start, by domain, against the token's loss, and with the numbers dealt out at random."""
        fresh = build_model(recipe, self.tokenizer)
        with shuffled_visits(model, recipe.training.seed):
            dealt = self._visits(model)
        return {"start": self._visits(fresh)["mean"], "own": self._visits(model), "dealt": dealt}

    def _visits(self, model: Any) -> dict[str, Any]:
        """On batches of one row of each domain, so that dealing out mixes domains."""
        names = list(self.inside)
        visits, losses, domain_T = [], [], []
        with evaluation_mode(model):
            for row in range(ROWS):
                batch = _mixed(self.inside, row)
                with record(model, trace=True, transitions=False, coactivation=False) as recorder, torch.no_grad():
                    logits = model(torch.from_numpy(batch.input_ids)).logits.float()
                (trace,) = recorder.trace.values()
                labels = torch.from_numpy(batch.labels)
                loss = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
                )
                scored = labels.flatten() != IGNORED
                visits.append((trace.experts_LTK >= 0).sum(2).mean(0)[scored.numpy()])
                losses.append(loss[scored].numpy())
                domain_T.append(trace.sequence_T[scored.numpy()])
        visits_T, loss_T, where_T = (np.concatenate(part) for part in (visits, losses, domain_T))
        return {
            "mean": float(visits_T.mean()),
            "domains": {name: float(visits_T[where_T == place].mean()) for place, name in enumerate(names)},
            "loss": {name: float(loss_T[where_T == place].mean()) for place, name in enumerate(names)},
            "perplexity": float(np.exp(loss_T.mean())),
            "correlation": float(spearmanr(visits_T, loss_T).statistic) if visits_T.std() else 0.0,
        }


def _mixed(parts: Mapping[str, Rows], row: int) -> Any:
    """One batch of the n-th row of every domain."""
    some = next(iter(parts.values()))
    rows = Rows("mix", tuple(part.content[row] for part in parts.values()), tuple(range(len(parts))), some.framing)
    (batch,) = make_batches(rows, len(parts))
    return batch


def step_seconds(first: Recipe, second: Recipe, tokenizer: Any, rounds: int = 12) -> float:
    """Processor time of a training step of the first recipe over that of the second: median ratio of alternating steps."""
    models = [build_model(recipe, tokenizer).train() for recipe in (first, second)]
    ids = torch.randint(0, len(tokenizer), (first.training.batch_size, first.training.seq_len))
    ratios = []
    for _ in range(rounds):
        spent = []
        for model in models:
            start = time.process_time()
            model(ids, labels=ids).loss.backward()
            spent.append(time.process_time() - start)
        ratios.append(spent[0] / spent[1])
    return float(np.median(ratios[2:]))


def run(arm: Arm, seed: int, steps: int | None, judge: Judge, out: Path, *, only_kept: bool = False) -> dict[str, Any] | None:
    """Train and judge one arm with one seed, or read what an earlier call found; None if that is all and there is nothing."""
    recipe = arm.recipe(seed, steps)
    if arm.equal_time:
        if only_kept and not (out / f"{arm.equal_time}-time.json").is_file():
            return None
        recipe = _stretched(recipe, arm, judge, out)
    place = _place(arm, recipe, out)
    kept = place / "judged.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text()))
    if only_kept:
        return None
    if not (place / LOSSES).is_file():
        train(recipe, judge.data, place, progress=False)
    told = {"seed": seed, "steps": recipe.training.steps, **judge.judge(arm, recipe, place)}
    write_atomic(kept, json.dumps(told, indent=1))
    return told


def _stretched(recipe: Recipe, arm: Arm, judge: Judge, out: Path) -> Recipe:
    """The recipe with as many more steps as its are shorter than those of another arm; measured once."""
    kept = out / f"{arm.equal_time}-time.json"
    if not kept.is_file():
        other = next(one for one in ARMS if one.name == arm.equal_time)
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, json.dumps(step_seconds(other.recipe(0, None), arm.recipe(0, None), judge.tokenizer)))
    steps = round(recipe.training.steps * json.loads(kept.read_text()))
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"steps": steps})})


def run_same(seed: int, steps: int | None, judge: Judge, out: Path, *, only_kept: bool = False) -> dict[str, Any] | None:
    """The sequence of domains from the model of the first arm, or what an earlier call found."""
    recipe = ARMS[0].recipe(seed, steps)
    kept = out / f"same-{recipe.fingerprint()[:8]}.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text()))
    if only_kept:
        return None
    run(ARMS[0], seed, steps, judge, out)
    start = compressed(load_model(str(_place(ARMS[0], recipe, out) / "model"), dtype="fp32"))
    sequel = Sequel.of(judge, *(streams(judge.other, judge.data, judge.tokenizer, split) for split in ("train", "heldout")))
    told = {"seed": seed, "arms": run_sequence(start, list(judge.inside), sequel, seed)}
    write_atomic(kept, json.dumps(told, indent=1))
    return told


def _place(arm: Arm, recipe: Recipe, out: Path) -> Path:
    return out / f"{arm.name.replace(' ', '-').replace(',', '')}-{recipe.fingerprint()[:8]}"


def main() -> None:
    """Train, judge, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=None, help="default: $EQUIPOISE_LAB_DATA")
    parser.add_argument("--out", type=Path, default=Path("out/recipes"))
    parser.add_argument("--only", nargs="*", default=None, help=f"groups ({', '.join(GROUPS)}) or arms; none: tables alone")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=None, help="of every run, instead of the recipes'")
    parser.add_argument("--write", type=Path, default=None, help="Markdown file whose marked parts are replaced")
    told = parser.parse_args()
    unknown = sorted({*(told.only or ())} - {*GROUPS, *(arm.name for arm in ARMS)})
    if unknown:
        parser.error(
            f"no group or arm '{unknown[0]}'; groups: {', '.join(GROUPS)}; arms: {', '.join(arm.name for arm in ARMS)}"
        )
    judge = Judge(data_directory(told.data))
    wanted = [arm for arm in ARMS if told.only is None or arm.group in told.only or arm.name in told.only]
    for seed in told.seeds:
        for arm in wanted:
            started = time.monotonic()
            one = run(arm, seed, told.steps, judge, told.out)
            assert one is not None, "a run that may train is judged"
            print(f"{arm.name}, seed {seed}: perplexity {one['perplexity']:.1f}, MaxVio {one['maxvio_training']:.2f} "
                  f"({time.monotonic() - started:.0f} s)", flush=True)  # fmt: skip
    if told.only is None or "same" in told.only:
        for seed in told.seeds:
            run_same(seed, told.steps, judge, told.out)
            print(f"same, seed {seed}", flush=True)
    runs = {arm.name: [run(arm, seed, told.steps, judge, told.out, only_kept=True) for seed in told.seeds] for arm in ARMS}
    found = {name: [one for one in ones if one is not None] for name, ones in runs.items()}
    write_atomic(told.out / "recipes.json", json.dumps(found, indent=1))
    same = [one for seed in told.seeds if (one := run_same(seed, told.steps, judge, told.out, only_kept=True)) is not None]
    print(page(ARMS, {name: ones for name, ones in found.items() if ones}, same, told.write))


if __name__ == "__main__":
    main()
