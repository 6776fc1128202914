"""Train a recipe's model: AdamW, warm-up and cosine, one packed batch a step, resumed bit for bit after a stop.

A run directory holds

    checkpoint.safetensors    the newest state; removed when the run is done
    watch.jsonl               held-out loss and balance, one line a measurement
    losses.json               loss of every step
    model/                    the trained model and its tokenizer, for `from_pretrained`
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from equipoise.artifacts.files import write_atomic
from equipoise.lab.checkpoints import load_checkpoint, save_checkpoint
from equipoise.lab.extensions import EXTENSIONS, Extension, Step
from equipoise.lab.model import build_model
from equipoise.lab.recipe import Recipe, RecipeError
from equipoise.lab.rows import RowOrder, heldout_rows
from equipoise.lab.text import load_or_train_tokenizer, streams
from equipoise.lab.watch import measure
from equipoise.profiling.progress import ProgressBar
from equipoise.profiling.sequences import IGNORED, Batch, Framing

CHECKPOINT, LOSSES, WATCH = "checkpoint.safetensors", "losses.json", "watch.jsonl"


def train(
    recipe: Recipe,
    data: Path,
    out: Path,
    *,
    device: str = "cpu",
    until: int | None = None,
    progress: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> list[float]:
    """Train a model, or go on with a run that was stopped.

    Args:
        recipe: what to train.
        data: directory of the text.
        out: run directory.
        device: "cpu" or "cuda"; the same recipe runs on both.
        until: stop after this step with a checkpoint and no model; the schedule stays that of the whole run.
        progress: show a progress bar with loss and tokens a second.
        say: called with one line at each held-out measurement.

    Returns:
        The loss of every step so far, in nats.

    Raises:
        EquipoiseError: no text, a checkpoint of another recipe, or a loss that is not a number.
    """
    with _reproducible(device, recipe.training.threads):
        return _train(recipe, data, out, device, until, progress, say)


@contextmanager
def _reproducible(device: str, threads: int) -> Iterator[None]:
    """The same bits each time, as far as torch can; its settings are put back afterwards."""
    own_threads = torch.get_num_threads()
    own_rule = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    own_fill = torch.utils.deterministic.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it CUDA's products are not reproducible
    if device == "cpu":
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # a guard against faulty operators, paid for by every new tensor
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_num_threads(own_threads)
        torch.use_deterministic_algorithms(own_rule[0], warn_only=own_rule[1])
        torch.utils.deterministic.fill_uninitialized_memory = own_fill


def _train(
    recipe: Recipe, data: Path, out: Path, device: str, until: int | None, progress: bool, say: Callable[[str], None]
) -> list[float]:
    setting = recipe.training
    tokenizer = load_or_train_tokenizer(recipe.mix, recipe.tokenizer_directory, data)
    model = build_model(recipe, tokenizer).to(device).train()
    framing = Framing.of(tokenizer, model.config)
    order = RowOrder(
        streams(recipe.mix, data, tokenizer, "train"),
        {name: domain.weight for name, domain in recipe.mix.domains.items()},
        framing,
        seq_len=setting.seq_len,
        batch_size=setting.batch_size,
        seed=setting.seed,
        encoder_fractions=setting.encoder_fractions,
        text_tokens=setting.text_tokens,
    )
    watched = heldout_rows(
        streams(recipe.mix, data, tokenizer, "heldout"), framing, seq_len=setting.seq_len, rows=setting.watch_rows
    )
    extensions = {name: EXTENSIONS.get(name)(**options) for name, options in recipe.extensions.items()}
    for one in extensions.values():
        one.attach(model)
    optimizer = _optimizer(model, recipe)
    state, losses = out / CHECKPOINT, []
    if state.is_file():
        losses = load_checkpoint(state, model, optimizer, extensions, fingerprint=recipe.fingerprint())
    elif (out / LOSSES).is_file():
        raise RecipeError(f"the run in '{out}' is done; give another --out to train again.")
    _forget_after(out / WATCH, len(losses))
    last = min(until or setting.steps, setting.steps)

    def keep() -> None:
        save_checkpoint(state, model, optimizer, extensions, fingerprint=recipe.fingerprint(), losses=losses)

    with ProgressBar(progress) as bar:
        bar.stage(f"train {recipe.name}", last * order.tokens, "tokens", len(losses) * order.tokens)
        for number in range(len(losses), last):
            losses.append(_step(number, model, order.batch(number), optimizer, extensions, recipe, device))
            bar.advance(order.tokens)
            bar.describe(f"train {recipe.name}, loss {losses[-1]:.3f}")
            done = number + 1
            if done % setting.watch_every == 0 or done == setting.steps:
                told = {"step": done, "tokens": done * order.tokens, **measure(model, watched).summary()}
                with (out / WATCH).open("a") as file:
                    file.write(json.dumps(told) + "\n")
                say(_line(told))
            if (done % setting.checkpoint_every == 0 and done < last) or (done == last < setting.steps):
                keep()
    if last == setting.steps:
        model.save_pretrained(str(out / "model"))
        tokenizer.save_pretrained(str(out / "model"))
        write_atomic(out / LOSSES, json.dumps(losses))
        state.unlink(missing_ok=True)
    return losses


def learning_rate(recipe: Recipe, number: int) -> float:
    """Of a step (from 0): a linear warm-up to the peak, then half a cosine down to `final_fraction` of it."""
    setting = recipe.training
    if number < setting.warmup:
        return setting.learning_rate * (number + 1) / setting.warmup
    gone = (number - setting.warmup) / max(setting.steps - setting.warmup, 1)
    return setting.learning_rate * (setting.final_fraction + (1 - setting.final_fraction) * (1 + math.cos(math.pi * gone)) / 2)


def _optimizer(model: Any, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; matrices alone decay. A group's `scale` is what the schedule's learning rate is times for it."""
    setting = recipe.training
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    unused = {*setting.rates, *setting.undecayed}
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        unused -= {part for part in unused if part in name}
        scale = next((rate for part, rate in setting.rates.items() if part in name), None)
        if scale is None:
            scale = max(float(weight.detach().square().mean().sqrt()), 1e-3) if setting.relative else 1.0
        decays = weight.ndim >= 2 and not any(part in name for part in setting.undecayed)
        groups.setdefault((scale, setting.weight_decay if decays else 0.0), []).append(weight)
    if unused:
        raise RecipeError(f"[training] names '{min(unused)}', and no tensor of '{recipe.name}' has that in its name.")
    told = [{"params": weights, "scale": scale, "weight_decay": decay} for (scale, decay), weights in groups.items()]
    return torch.optim.AdamW(told, lr=setting.learning_rate, betas=(setting.beta1, setting.beta2), fused=True)


def _step(
    number: int,
    model: Any,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    extensions: dict[str, Extension],
    recipe: Recipe,
    device: str,
) -> float:
    """One optimizer step; returns the language-model loss in nats, without the extensions' terms."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(recipe, number) * group["scale"]
    inputs = {name: torch.from_numpy(array).to(device) for name, array in batch.inputs().items()}
    wanted = recipe.training.precision
    kind = device.partition(":")[0]
    with torch.autocast(kind, torch.bfloat16, enabled=wanted == "bf16" or (wanted == "auto" and kind != "cpu")):
        output = model(**inputs, use_cache=False)
    labels = torch.from_numpy(batch.labels).to(device)
    loss = torch.nn.functional.cross_entropy(output.logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    seen = Step(number, model, batch, output)
    terms = [term for one in extensions.values() if (term := one.loss(seen)) is not None]
    total = torch.stack([loss, *terms]).sum() if terms else loss
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.training.clip)
    told = float(loss.detach())
    if not math.isfinite(told):
        raise RecipeError(f"the loss of step {number} is {told}; lower learning_rate in the recipe of '{recipe.name}'.")
    optimizer.step()
    for one in extensions.values():
        one.after_step(Step(number, model, batch, None))
    return told


def _forget_after(path: Path, steps: int) -> None:
    """Drop measurements of steps that a resumed run does again, and make the run directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= steps]
        write_atomic(path, "".join(f"{line}\n" for line in lines))


def _line(told: dict[str, Any]) -> str:
    balance = f", LIS {sum(told['lis']) / len(told['lis']):.2f}, MaxVio {max(told['maxvio']):.2f}" if "lis" in told else ""
    return f"step {told['step']}: held-out perplexity {told['perplexity']:.2f}{balance}"
