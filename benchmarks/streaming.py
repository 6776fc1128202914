"""Streaming policies on streams whose traffic changes: balance step by step, what each change of plan cost and what it won.

    python benchmarks/streaming.py --data DIRECTORY --write docs/streaming.md --plot docs/streaming.svg

Loads are recorded from models of the shelf on held-out text; plans are made from training text of the first domain alone, so
that what follows is a shift. The policies are replayed on the recorded steps with costs that were measured on the running
model, and one of them is carried out on it, to see that the replay tells what happens. `--data` is the directory that the lab's
mix is relative to; without it the demo's texts are used. What was recorded is kept in `--out`.

Streams: `stationary` (the first domain), `shifts` (three domains one after the other), `alternating` (they take turns), and the
paper's `adversarial` one (per layer, only tokens that its heaviest expert is given, in ten segments). Besides, `random`
ones: five domains in turns of random length, which begin with the first, for several seeds of the text and of the turns.
Shapes: N steps, L MoE layers, E experts, T tokens, K top-k.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from figures import save_figure
from numpy.typing import NDArray
from quantization_page import write_between

from equipoise.artifacts import Plan, Profile
from equipoise.artifacts.files import write_atomic
from equipoise.execution.rebalance.rebalancer import Rebalancer, summary
from equipoise.execution.rebalance.store import ExpertStore, apply_from_store
from equipoise.lab import shelf
from equipoise.lab.recipe import read_mix
from equipoise.models.recorder import record
from equipoise.models.reference import demo_texts
from equipoise.planning.budget import sixteen_bit
from equipoise.planning.methods import make_plan
from equipoise.planning.streaming.adaptive import adaptive
from equipoise.planning.streaming.decision import Costs, Policy
from equipoise.planning.streaming.policies import make_policy
from equipoise.profiling.calibrate import profile
from equipoise.profiling.forward import run_batch
from equipoise.profiling.loading import load_model, load_tokenizer
from equipoise.profiling.sequences import Batch, Framing, text_batches
from equipoise.profiling.texts import read_documents
from equipoise.simulation.stream import StreamRun, replay_stream

Ints = NDArray[np.int64]
DOMAINS = ("prose", "python", "chinese")
MORE = ("german", "c")
"""Domains that come in random streams besides."""
TURNS = (4, 8, 16)
"""Mean steps of a turn in random streams; one stream of each for each seed."""
RANDOM_STEPS = 60
SEQ_LEN, ROWS = 512, 4
TURN = 4
"""Steps of a domain before the next one's turn, in the alternating stream."""
SEGMENTS = 10
"""Steps of the adversarial stream, as in the paper."""
PUBLISHED, OURS = "rq-paper", "rq"
POLICIES = (
    ("static", PUBLISHED, "static"),
    ("all history (published)", PUBLISHED, "all_history"),
    ("last step (published)", PUBLISHED, "last_step"),
    ("adaptive, the same slots", PUBLISHED, "adaptive"),
    ("static `rq`", OURS, "static"),
    ("adaptive `rq`", OURS, "adaptive"),
)
"""Name in the tables, plan at the start, policy."""


@lru_cache(maxsize=2)
def domains(data: Path | None, more: bool = False) -> tuple[dict[str, Sequence[str]], dict[str, Sequence[str]]]:
    """Text of the first domain to plan from, and text of three domains to stream, or of all."""
    if data is None:
        planned, judged = demo_texts("calibration"), demo_texts("heldout")
        names = list(judged)[: None if more else len(DOMAINS)]
        return {names[0]: planned[names[0]]}, {name: judged[name] for name in names}
    mix = read_mix(Path(__file__).parents[1] / "configs" / "mix.toml").domains
    training = read_documents(data / file for file in mix[DOMAINS[0]].train)
    return {DOMAINS[0]: training}, {name: read_documents(data / file for file in mix[name].heldout)
                                  for name in DOMAINS + MORE * more}  # fmt: skip


def batches(
    told: argparse.Namespace, model: Any, tokenizer: Any, text: Mapping[str, Sequence[str]], steps: int, seed: int = 0
) -> list[Batch]:
    """Forward passes of the first steps of one domain's stream."""
    made = text_batches(
        text, tokenizer, Framing.of(tokenizer, model.config), tokens=told.steps * told.step_tokens,
        seq_len=SEQ_LEN, batch_size=ROWS, layout="packed", seed=seed,
    )  # fmt: skip
    return made[: steps * told.step_tokens // (SEQ_LEN * ROWS)]


def recorded(name: str, told: argparse.Namespace, seed: int) -> tuple[Profile, dict[str, NDArray[np.int32]]]:
    """The profile to plan from, and [L, T, K] what each domain's tokens were sent to, of a model of the shelf."""
    place = told.out / f"{name}-{told.steps}-{told.step_tokens}-{seed}"
    return recorded_at(place, name, str(shelf.path(name)), domains(told.data, more=True), told, seed)


def recorded_at(
    place: Path, name: str, directory: str, texts: tuple[Mapping[str, Sequence[str]], Mapping[str, Sequence[str]]],
    told: argparse.Namespace, seed: int = 0,
) -> tuple[Profile, dict[str, NDArray[np.int32]]]:  # fmt: skip
    """The same of any model and text, kept in files that begin with `place`.

    Args:
        place: without suffix.
        name: the model's, for the profile.
        directory: of the model.
        texts: text to plan from, and text to stream, each by domain.
        told: steps, step_tokens and profile_tokens.
        seed: of the order of the streamed text.
    """
    kept, path = Path(f"{place}.npz"), Path(f"{place}.profile.safetensors")
    if not (kept.is_file() and path.is_file()):
        place.parent.mkdir(parents=True, exist_ok=True)
        model, tokenizer = load_model(directory), load_tokenizer(directory)
        planned, streamed = texts
        made = profile(
            model, tokenizer, planned, tokens=told.profile_tokens, seq_len=SEQ_LEN, batch_size=ROWS, importance=("wanda",),
            precisions=("int8", "int4-g32"), name=name,
        )  # fmt: skip
        made.save(path)
        ids: dict[str, NDArray[np.int32]] = {}
        for domain, documents in streamed.items():
            with record(model, trace=True, transitions=False, coactivation=False) as recorder:
                for batch in batches(told, model, tokenizer, {domain: documents}, told.steps, seed):
                    run_batch(model, batch, all_logits=False)
            # Models whose stacks both have experts are streamed by their last one.
            ids[domain] = list(recorder.trace.values())[-1].experts_LTK
        np.savez(kept, **ids)
    arrays = np.load(kept)
    return Profile.load_file(path), {domain: arrays[domain] for domain in arrays.files}


def counted(ids_LTK: NDArray[np.int32], bounds: Sequence[int], experts: int) -> Ints:
    """[N, L, E] selections of each expert between bounds."""
    return np.stack(
        [
            np.stack([np.bincount(layer[a:b].ravel(), minlength=experts) for layer in ids_LTK])
            for a, b in itertools.pairwise(bounds)
        ]
    )


def streams(ids: Mapping[str, NDArray[np.int32]], experts: int, step_tokens: int) -> dict[str, Ints]:
    """[N, L, E] steps of each stream."""
    parts = [counted(x, range(0, x.shape[1] + 1, step_tokens), experts) for x in ids.values()]
    turns = [part[at : at + TURN] for at in range(0, len(parts[0]), TURN) for part in parts]
    together = np.concatenate(list(ids.values()), 1)
    heavy = []
    for layer_TK in together:
        hit_TK = layer_TK[(layer_TK == np.bincount(layer_TK.ravel(), minlength=experts).argmax()).any(1)]
        heavy.append([np.bincount(part.ravel(), minlength=experts) for part in np.array_split(hit_TK, SEGMENTS)])
    return {
        "stationary": parts[0],
        "shifts": np.concatenate(parts),
        "alternating": np.concatenate(turns),
        "adversarial": np.array(heavy).transpose(1, 0, 2),
    }


def random_stream(ids: Mapping[str, NDArray[np.int32]], experts: int, step_tokens: int, mean: int, seed: int) -> Ints:
    """[N, L, E] domains in turns of geometric length, the first one first, none twice in a row; each goes on where it was."""
    rng = np.random.default_rng([seed, mean])
    parts = [counted(x, range(0, x.shape[1] + 1, step_tokens), experts) for x in ids.values()]
    at, served, taken = 0, [0] * len(parts), []
    while len(taken) < RANDOM_STEPS:
        for _ in range(rng.geometric(1 / mean)):
            taken.append(parts[at][served[at] % len(parts[at])])
            served[at] += 1
        at = (at + rng.integers(1, len(parts))) % len(parts)
    return np.stack(taken[:RANDOM_STEPS])


def policy_for(name: str, plan: Plan, made: Profile) -> Policy:
    """A policy that has seen nothing; the published slots are changed as freely as the published forms change them."""
    if name != "adaptive":
        return make_policy(name)
    return adaptive(made, plan, error_bound=float("inf") if plan.method == PUBLISHED else None)


def executed(
    directory: str, streamed: Mapping[str, Sequence[str]], plans: Mapping[str, Plan], made: Profile, told: argparse.Namespace
) -> tuple[Costs, dict[str, Any]]:
    """Costs as measured on the running model, and the stream of several domains carried out on it."""
    tokenizer = load_tokenizer(directory)
    with TemporaryDirectory() as place:
        original = load_model(directory)
        store = ExpertStore.create(original, place, sorted({p for c in plans[OURS].layers for p in c.precisions} | {"int8"}))
        costs, kept = None, {}
        for plan, policy, steps in ((plans[PUBLISHED], "last_step", 2), (plans[OURS], "adaptive", told.execute_steps)):
            model = load_model(directory)
            apply_from_store(model, plan, store)
            rebalancer = Rebalancer(
                model, policy_for(policy, plan, made), store, step_tokens=told.step_tokens, costs=costs, background=False
            )  # fmt: skip
            with rebalancer:
                for domain, documents in streamed.items():
                    for batch in batches(told, model, tokenizer, {domain: documents}, steps):
                        run_batch(model, batch, all_logits=False)
                        rebalancer.advance()
            costs = rebalancer.costs
            kept = summary(list(rebalancer.reports), rebalancer.ledger)
            kept["lis"] = [report.lis for report in rebalancer.reports]
    return costs, kept


def run(name: str, told: argparse.Namespace) -> dict[str, Any]:
    """All streams and policies on one model."""
    made, every = recorded(name, told, 0)
    ids = dict(itertools.islice(every.items(), len(DOMAINS)))
    plans = {PUBLISHED: make_plan(made, PUBLISHED), OURS: make_plan(made, OURS)}
    costs, carried_out = executed(str(shelf.path(name)), domains(told.data)[1], plans, made, told)
    original = sum(layer.num_experts * layer.expert_bytes(sixteen_bit(made.model)) for layer in made.model.layers)
    rows = []
    for stream, steps_NLE in streams(ids, made.model.max_experts, told.step_tokens).items():
        for label, start, policy in POLICIES:
            done = replay_stream(steps_NLE, plans[start], policy_for(policy, plans[start], made), costs)
            rows.append({"model": name, "stream": stream, "policy": label} | figures(done, original))
    per_domain = [counted(x, range(0, told.execute_steps * told.step_tokens + 1, told.step_tokens), made.model.max_experts)
                  for x in ids.values()]  # fmt: skip
    again = replay_stream(np.concatenate(per_domain), plans[OURS], policy_for("adaptive", plans[OURS], made), costs)
    carried_out["replayed_lis"] = again.instantaneous.tolist()
    drawn = []
    for seed in range(told.seeds):
        ids = recorded(name, told, seed)[1]
        for mean in TURNS:
            steps_NLE = random_stream(ids, made.model.max_experts, told.step_tokens, mean, seed)
            for label, start, policy in POLICIES:
                done = replay_stream(steps_NLE, plans[start], policy_for(policy, plans[start], made), costs)
                drawn.append({"stream": f"turns of {mean}, seed {seed}", "policy": label} | figures(done, original))
    return {"model": name, "costs": {k: getattr(costs, k) for k in ("per_selection", "per_byte", "per_swap")}, "rows": rows,
            "random": drawn, "executed": carried_out}  # fmt: skip


def figures(done: StreamRun, original: int) -> dict[str, Any]:
    """A replay as JSON."""
    entries = done.ledger.entries
    return {
        "instantaneous": done.instantaneous.tolist(),
        "cumulative": done.cumulative.tolist(),
        "paper": done.paper.tolist(),
        "bytes_of_original": float(done.bytes.max()) / original,
        "changes": len(entries),
        "moving": sum(entry.slots > 0 for entry in entries),
        "paid": sum(entry.paid > 0 for entry in entries),
        "moved_bytes": sum(entry.bytes for entry in entries),
        "net_seconds": done.net,
        "planning_seconds": sum(made.seconds for made in done.decisions),
        "entries": [
            {"step": e.step, "slots": e.slots, "predicted": e.predicted, "cost": e.cost, "saved": e.saved, "steps": e.steps}
            for e in entries
        ],
    }


def page(found: Sequence[Mapping[str, Any]]) -> str:
    """The tables as Markdown."""
    lines = []
    for stream in dict.fromkeys(row["stream"] for one in found for row in one["rows"]):
        lines += [
            f"**{stream}**",
            "",
            "| model | policy | LIS, mean of steps | LIS, all steps | `lis_paper`, mean of steps | bytes | changes (of slots) "
            "| that paid | MB moved | net, ms |",
            "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for one in found:
            rows = [row for row in one["rows"] if row["stream"] == stream]
            for row in rows:
                changes = f"{row['changes']} ({row['moving']})" if row["changes"] else ""
                paid = str(row["paid"]) if row["changes"] else ""
                moved = f"{row['moved_bytes'] / 1e6:.2f}" if row["changes"] else ""
                net = f"{1e3 * row['net_seconds']:+.1f}" if row["changes"] else ""
                lines.append(
                    f"| {'`' + one['model'] + '`' if row is rows[0] else ''} | {row['policy']} "
                    f"| {np.mean(row['instantaneous']):.3f} | {row['cumulative'][-1]:.3f} | {np.mean(row['paper']):.3f} "
                    f"| {100 * row['bytes_of_original']:.1f} % | {changes} | {paid} | {moved} | {net} |"
                )
        lines.append("")
    lines += random_table(found)
    lines += [
        "**Measured on the running model** (adaptive `rq`, a shorter stream with the same shifts)",
        "",
        "| model | time of a selection | of a moved MB | of a change | steps | changes | most staged | forwards held back "
        "| LIS, measured | LIS, replayed |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in found:
        cost, done = one["costs"], one["executed"]
        measured, replayed = done["mean_instantaneous_lis"], np.mean(done["replayed_lis"])
        lines.append(
            f"| `{one['model']}` | {1e6 * cost['per_selection']:.2f} us | {1e9 * cost['per_byte']:.1f} ms "
            f"| {1e3 * cost['per_swap']:.2f} ms | {done['steps']} | {done['swapped']} "
            f"| {done['most_staged_bytes'] / 1e3:.0f} kB | {1e3 * done['seconds_paused']:.2f} ms "
            f"| {measured:.4f} | {replayed:.4f} |"
        )
    return "\n".join(lines)


def random_table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The random streams of each model together."""
    number = len(found[0]["random"]) // len(POLICIES)
    lines = [
        f"**random**: {number} streams of {RANDOM_STEPS} steps for each model",
        "",
        "| model | policy | LIS, mean of steps | streams in which it is at most that of both published forms | of static "
        "| changes (of slots) | that paid | net, ms | streams with a net loss |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in found:
        score = {label: np.array([np.mean(row["instantaneous"]) for row in one["random"] if row["policy"] == label])
                 for label, _, _ in POLICIES}  # fmt: skip
        published = np.minimum(*(score[label] for label, _, policy in POLICIES if policy in ("all_history", "last_step")))
        for label, start, policy in POLICIES:
            rows = [row for row in one["random"] if row["policy"] == label]
            still = next(score[name] for name, other, kept in POLICIES if (other, kept) == (start, "static"))
            told = ["", "", ""] if policy == "static" else [
                f"{sum(row['changes'] for row in rows)} ({sum(row['moving'] for row in rows)})",
                str(sum(row["paid"] for row in rows)),
                f"{1e3 * sum(row['net_seconds'] for row in rows):+.0f}",
            ]  # fmt: skip
            least = "" if policy != "adaptive" else f"{int((score[label] <= published + 1e-12).sum())} of {number}"
            kept = "" if policy == "static" else f"{int((score[label] <= still + 1e-12).sum())} of {number}"
            losses = "" if policy == "static" else str(sum(row["net_seconds"] < 0 for row in rows))
            lines.append(
                f"| {'`' + one['model'] + '`' if label == POLICIES[0][0] else ''} | {label} | {score[label].mean():.3f} "
                f"| {least} | {kept} | {told[0]} | {told[1]} | {told[2]} | {losses} |"
            )
    return [*lines, ""]


def draw(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Instantaneous LIS step by step: a row for each model, a column for each stream."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(row["stream"] for row in found[0]["rows"]))
    figure = Figure(figsize=(3.6 * len(kinds), 2.6 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), len(kinds), squeeze=False)
    styles = ("--", "-", "-", "-", "--", "-")
    for line, one in zip(axes, found, strict=True):
        for axis, kind in zip(line, kinds, strict=True):
            rows = [row for row in one["rows"] if row["stream"] == kind]
            for index, (row, style) in enumerate(zip(rows, styles, strict=True)):
                steps = np.arange(1, len(row["instantaneous"]) + 1)
                axis.plot(
                    steps, row["instantaneous"], style, linewidth=1.1, color=f"C{index}", label=row["policy"].replace("`", "")
                )  # fmt: skip
            axis.set_title(f"{one['model']}: {kind}", fontsize="small")
            axis.tick_params(labelsize="x-small")
        line[0].set_ylabel("LIS of the step, over units", fontsize="x-small")
    for axis in axes[-1]:
        axis.set_xlabel("step", fontsize="x-small")
    save_figure(figure, path, columns=3)


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--models", default="mixtral-8,qwen3-32,deepseek-64")
    parser.add_argument("--steps", type=int, default=20, help="of each domain")
    parser.add_argument("--step-tokens", type=int, default=2048)
    parser.add_argument("--profile-tokens", type=int, default=8192, help="of the first domain, to plan from")
    parser.add_argument("--execute-steps", type=int, default=6, help="of each domain, on the running model")
    parser.add_argument("--seeds", type=int, default=2, help="of the random streams")
    parser.add_argument("--out", type=Path, default=Path("out/streaming"))
    parser.add_argument("--write", type=Path, default=None, help="page with `streaming` marks")
    parser.add_argument("--plot", type=Path, default=None)
    told = parser.parse_args()
    found = [run(name, told) for name in told.models.split(",")]
    machine = {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    write_atomic(told.out / "streaming.json", json.dumps({"on": machine, "models": found}, indent=1, allow_nan=False) + "\n")
    text = page(found)
    print(text)
    if told.plot:
        draw(found, told.plot)
    if told.write:
        write_between(told.write, "streaming", text)


if __name__ == "__main__":
    main()
