"""Is the error that plans are made by the one that counts? Predicted error against the measured divergence of applied plans.

    python benchmarks/error_proxy.py --data DIRECTORY --write docs/joint-planning.md

For each model plans with random bits are applied, one precision an expert, no copies, rounded to nearest as the errors were
measured. Two draws: `free`, where the mix of precisions differs from plan to plan and layer to layer, so that errors span
orders of magnitude; and `equal bytes`, where each plan gives the same precisions to other experts, which is what the
planner has to tell apart. Spearman's rank correlation of predicted error and measured KL divergence on held-out text, with
the 95 % interval of a bootstrap over plans, for

    plain        sum over experts of the relative squared error of their layer's output
    weighted     the same, experts weighted by their measured sensitivity: what `rq` minimises
    frequency    frequency x gate weight x change of output, the objective of Mixture Compressor
    bits         the mean of the bits, which a uniform rule goes by

The model runs in fp32, so that what is measured is the rounding of experts and not of sums. `--data` as in joint_plan.py.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import joint_plan_page
import numpy as np
import torch
from joint_plan import PRECISIONS, REFERENCE, subject
from scipy.stats import spearmanr

from equipoise.artifacts import LayerPlan, Plan, Profile
from equipoise.artifacts.files import write_atomic
from equipoise.evaluation import language
from equipoise.execution.apply import apply_plan
from equipoise.lab import shelf
from equipoise.planning.budget import Budget, make_budget
from equipoise.planning.replicate_quantize import mixture_costs
from equipoise.planning.uniform import uniform_plan
from equipoise.precisions import precision
from equipoise.profiling.calibrate import profile
from equipoise.profiling.loading import load_model, load_tokenizer
from equipoise.profiling.sequences import Rows

KINDS = ("free", "equal bytes")
TOGETHER = 6
"""Models that are measured in one run over the text."""
BOOTSTRAPS = 2000
HEAD = (
    "| model | plans | proxy | rank correlation with KL | 95 % interval | KL, nats |",
    "|---|---|---|---:|---|---|",
)
SCALE_HEAD = (
    "| model | plans | measured over predicted KL, median | 10th to 90th percentile |",
    "|---|---|---:|---|",
)


def random_bits(kind: str, widths: np.ndarray, options: int, rng: np.random.Generator) -> np.ndarray:
    """[L, E] option of each expert; with `equal bytes` a permutation, over the model, of one fixed mix."""
    n_layers, n_experts = len(widths), int(widths.max())
    if kind == "free":
        mix = rng.dirichlet(np.full(options, 0.7))
        return np.stack([rng.choice(options, n_experts, p=rng.dirichlet(4 * mix + 0.05)) for _ in range(n_layers)])
    chosen = np.arange(n_layers * n_experts) % options
    return rng.permutation(chosen).reshape(n_layers, n_experts)


def plan_of_bits(base: Plan, budget: Budget, option_LE: np.ndarray) -> Plan:
    """Every expert once, in its own precision."""
    layers = tuple(
        LayerPlan(
            experts=layer.experts,
            precisions=tuple(budget.precisions[option_LE[index, expert]].name for expert in layer.experts),
            units=layer.units,
            shares=layer.shares,
        )
        for index, layer in enumerate(base.layers)
    )
    return base.model_copy(update={"layers": layers, "exactness": "weights"})


def proxies(made: Profile, budget: Budget, option_LE: np.ndarray) -> dict[str, float]:
    """What each proxy says of a choice of bits."""
    present_LE = np.arange(option_LE.shape[1]) < made.widths[:, None]

    def total(cost_LEQ: np.ndarray) -> float:
        return float((np.take_along_axis(cost_LEQ, option_LE[:, :, None], 2)[:, :, 0] * present_LE).sum())

    plain = np.stack(
        [made.relative_error(p.name) if not p.is_float else np.zeros(option_LE.shape) for p in budget.precisions], -1
    )
    bits = np.array([-p.bits for p in budget.precisions], np.float64)
    return {
        "plain": total(plain),
        "weighted": total(budget.errors),
        "frequency": total(mixture_costs(made, budget)),
        "bits": total(np.broadcast_to(bits, (*option_LE.shape, len(bits)))),
    }


def correlation(predicted: np.ndarray, measured: np.ndarray) -> tuple[float, float, float]:
    """Spearman's rank correlation and its bootstrap interval; nan where a proxy says the same of all."""
    if np.ptp(predicted) == 0:
        return (float("nan"),) * 3
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(measured), (BOOTSTRAPS, len(measured)))
    values = [float(spearmanr(predicted[rows], measured[rows])[0]) for rows in drawn if np.ptp(predicted[rows]) > 0]
    return float(spearmanr(predicted, measured)[0]), *map(float, np.percentile(values, (2.5, 97.5)))


def divergences(base: Any, plans: Sequence[Plan], rows: Sequence[Rows]) -> list[float]:
    """Mean KL divergence of each plan's model in nats per token; a few models at a time, so that the base runs less often."""
    found: list[float] = []
    for first in range(0, len(plans), TOGETHER):
        part = plans[first : first + TOGETHER]
        models = {str(i): apply_plan(copy.deepcopy(base), plan, int8_activations=False) for i, plan in enumerate(part)}
        sums = [language.compare(base, models, text, batch_size=4) for text in rows]
        found += [float(sum(s[i].kl.sum() for s in sums) / sum(s[i].tokens.sum() for s in sums)) for i in models]
    return found


def run(name: str, told: argparse.Namespace) -> dict[str, Any]:
    """All plans of one model: what the proxies say, and the divergence."""
    path = told.out / f"{name}-{told.plans}-{told.tokens}-{told.heldout_tokens}.json"
    if path.is_file():
        return dict(json.loads(path.read_text()))
    tested = subject(name, SimpleNamespace(data=told.data, split="report"))
    base, tokenizer = load_model(tested.directory, dtype="fp32"), load_tokenizer(tested.directory)
    made = profile(
        base, tokenizer, tested.planned, tokens=told.tokens, importance=("frequency",), precisions=PRECISIONS,
        importance_options={"output_error": {"sensitivity_tokens": told.sensitivity_tokens, "int8_activations": False}},
    )  # fmt: skip
    budget = make_budget(made, made.model.max_experts, ("bf16", *PRECISIONS), 64.0)
    uniform = uniform_plan(made.model, "bf16")
    rows = [
        language.cut(tokenizer, base.config, documents, name=domain, seq_len=512, tokens=told.heldout_tokens, seed=0)
        for domain, documents in tested.judged.items()
    ]
    found: dict[str, Any] = {}
    for kind in KINDS:
        rng = np.random.default_rng(0)
        bits = [random_bits(kind, made.widths, len(budget.precisions), rng) for _ in range(told.plans)]
        said = [proxies(made, budget, option_LE) for option_LE in bits]
        kl = divergences(base, [plan_of_bits(uniform, budget, option_LE) for option_LE in bits], rows)
        found[kind] = {
            "proxies": {name: [one[name] for one in said] for name in said[0]},
            "predicted_kl": [budget.nats * one["weighted"] for one in said],
            "kl": kl,
        }
    write_atomic(path, json.dumps(found))
    return found


def page(results: Mapping[str, Mapping[str, Any]], told: argparse.Namespace) -> str:
    """The table."""
    lines, scales = list(HEAD), []
    for name, found in results.items():
        for kind in KINDS:
            kl = np.array(found[kind]["kl"])
            low, middle, high = np.percentile(kl / np.array(found[kind]["predicted_kl"]), (10, 50, 90))
            scales.append(f"| `{name}` | {kind} | {middle:.2f} | {low:.2f}..{high:.2f} |")
            for proxy, values in found[kind]["proxies"].items():
                value, low, high = correlation(np.array(values), kl)
                said = ("-", "-") if np.isnan(value) else (f"{value:.3f}", f"{low:.3f}..{high:.3f}")
                lines.append(f"| `{name}` | {kind} | {proxy} | {said[0]} | {said[1]} | {kl.min():.4f}..{kl.max():.4f} |")
    used = ", ".join(precision(p).name for p in ("bf16", *PRECISIONS))
    told_how = (
        f"{told.plans} plans each of {used}; {told.heldout_tokens:,} held-out tokens of each domain; torch {torch.__version__}."
    )
    return "\n".join([*lines, "", *SCALE_HEAD, *scales, "", told_how])


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path("out/error-proxy"))
    parser.add_argument("--models", nargs="*", default=None, help="of the shelf, or 'reference'; all of them by default")
    parser.add_argument("--plans", type=int, default=40, help="of each kind")
    parser.add_argument("--tokens", type=int, default=4096, help="of each domain, to measure errors on")
    parser.add_argument("--heldout-tokens", type=int, default=1024, help="of each domain, to measure the divergence on")
    parser.add_argument("--sensitivity-tokens", type=int, default=8192)
    parser.add_argument("--write", type=Path, default=None, help="Markdown file whose marked part is replaced")
    told = parser.parse_args()
    told.out.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in told.models or [*shelf.names(), REFERENCE]:
        results[name] = run(name, told)
        print(page(results, told), flush=True)
    if told.write:
        joint_plan_page.replace_part(told.write, "proxy", page(results, told))


if __name__ == "__main__":
    main()
