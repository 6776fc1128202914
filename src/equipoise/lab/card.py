"""A finished run becomes a model of the shelf: weights in bf16, tokenizer, losses, and a card that says what it is."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from equipoise import __version__
from equipoise.artifacts.files import write_atomic
from equipoise.lab.judge import Judgement, dense_beside, in_percent, judge
from equipoise.lab.recipe import Recipe, RecipeError
from equipoise.lab.text import domain_documents, streams
from equipoise.lab.training import LOSSES, WATCH
from equipoise.profiling.loading import load_model, load_tokenizer

CARD, FACTS = "README.md", "card.json"


def shelve(
    recipe: Recipe, run: Path, data: Path, out: Path, *, dense_run: Path | None = None, progress: bool = True
) -> Judgement:
    """Store a finished run's model in bf16, judge what was stored, and write its card.

    Args:
        recipe: that the run was trained by.
        run: its directory.
        data: directory of the text.
        out: directory of the model on the shelf.
        dense_run: directory of the run of the dense model of equal active size.
        progress: show progress bars.

    Raises:
        RecipeError: the run is not done.
    """
    if not (run / LOSSES).is_file():
        raise RecipeError(f"the run in '{run}' is not done; go on with it by `equipoise lab train`.")
    model, tokenizer = load_model(str(run / "model")), load_tokenizer(str(run / "model"))
    model.to(torch.bfloat16).save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))
    write_atomic(out / "tokenizer.json", tokenizer.backend_tokenizer.to_str())  # a third smaller than with its indentation
    stored = load_model(str(out), dtype="fp32")  # the stored values, computed without further rounding
    judgement = judge(
        stored, tokenizer, recipe, streams(recipe.mix, data, tokenizer, "train"),
        streams(recipe.mix, data, tokenizer, "heldout"), domain_documents(recipe.mix, data, "heldout"),
        dense=None if dense_run is None else load_model(str(dense_run / "model"), dtype="fp32"), progress=progress,
    )  # fmt: skip
    losses = json.loads((run / LOSSES).read_text())
    watched = [json.loads(line) for line in (run / WATCH).read_text().splitlines()]
    machine = f"{platform.machine()}, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    facts = {
        "recipe": recipe.fingerprint(),
        "judgement": judgement.model_dump(mode="json"),
        "machine": machine,
        "equipoise": __version__,
        "watch": watched,
    }
    write_atomic(out / FACTS, json.dumps(facts, indent=1))
    write_atomic(out / LOSSES, json.dumps(losses))
    write_atomic(out / CARD, _card(recipe, judgement, losses, watched, machine))
    return judgement


def read_facts(place: Path) -> tuple[dict[str, Any], Judgement]:
    """The facts of a model on the shelf, and the judgement among them.

    Args:
        place: directory of the model on the shelf.

    Raises:
        RecipeError: there are none, or they are of another version of equipoise.
    """
    try:
        facts = json.loads((place / FACTS).read_text())
        return facts, Judgement.model_validate(facts["judgement"])
    except OSError as error:
        raise RecipeError(f"'{place}' has no {FACTS}; put the model on the shelf first, by `equipoise lab shelve`.") from error
    except (ValueError, KeyError) as error:
        told = f"{FACTS} in '{place}' is not of this version of equipoise ({error}); make it anew by `equipoise lab shelve`."
        raise RecipeError(told) from error


def add_dense(recipe: Recipe, data: Path, out: Path, dense_run: Path) -> Judgement:
    """Put a dense model, trained later, beside a model of the shelf: the same rows, and the card written anew.

    Args:
        recipe: of the model on the shelf.
        data: directory of the text.
        out: directory of the model on the shelf.
        dense_run: directory of the finished run of the dense model.

    Raises:
        RecipeError: the model is not on the shelf, or was made by another recipe.
    """
    facts, found = read_facts(out)
    if facts["recipe"] != recipe.fingerprint():
        raise RecipeError(f"the model in '{out}' was made by another state of recipe '{recipe.name}'; shelve it again.")
    dense, tokenizer = load_model(str(dense_run / "model"), dtype="fp32"), load_tokenizer(str(dense_run / "model"))
    perplexity, parameters = dense_beside(dense, tokenizer, recipe, streams(recipe.mix, data, tokenizer, "heldout"))
    judgement = found.model_copy(update={"dense_perplexity": perplexity, "dense_parameters": parameters})
    write_atomic(out / FACTS, json.dumps({**facts, "judgement": judgement.model_dump(mode="json")}, indent=1))
    losses = json.loads((out / LOSSES).read_text())
    write_atomic(out / CARD, _card(recipe, judgement, losses, facts["watch"], facts["machine"]))
    return judgement


def _card(recipe: Recipe, found: Judgement, losses: list[float], watched: list[dict[str, Any]], machine: str) -> str:
    setting = recipe.training
    tokens = len(losses) * setting.batch_size * setting.seq_len
    shape = ", ".join(f"{key} {value}" for key, value in recipe.model.items() if key != "model_type")
    curve = [len(losses) * part // 8 - 1 for part in range(1, 9)]
    again = "" if setting.text_tokens is None else f" of {setting.text_tokens:,} distinct ones"
    scale = " relative to each tensor's scale" if setting.relative else ""
    own = "".join(f", {rate:g} times that for `{part}`" for part, rate in setting.rates.items())
    lines = [
        "---",
        "license: other",
        "tags: [mixture-of-experts, test-fixture]",
        "---",
        f"# {recipe.name}",
        "",
        f"A small {recipe.model['model_type']} model with learned routing, for tests and measurements of load balance. "
        "It is not meant for use: it writes no sensible text.",
        "",
        f"- **Architecture**: transformers `{recipe.model['model_type']}`; {shape}.",
        f"- **Size**: {found.parameters:,} parameters, {found.active_parameters:,} active without embeddings; stored in bf16.",
        f"- **Training**: {len(losses):,} steps, {tokens:,} tokens{again}, AdamW, peak learning rate "
        f"{setting.learning_rate:g}{scale}{own}, seed {setting.seed}, no balance loss of any kind. "
        f"Products in {setting.precision}, weights and moments in fp32.",
        f"- **Command**: `equipoise lab train configs/{recipe.name}.toml --data DIRECTORY`, on {machine}. "
        f"`equipoise lab verify configs/{recipe.name}.toml --data DIRECTORY` compares the first steps bit for bit.",
        "",
        "## Held-out text",
        "",
        f"{found.tokens:,} tokens, packed rows of {setting.seq_len}"
        + (", the second half of each row predicted from the first" if len(setting.encoder_fractions) > 1 else "")
        + ". Trigram: interpolated Kneser-Ney, estimated from the rows that the model was trained on, on the same tokens.",
        "",
        "| domain | perplexity | trigram | LIS |",
        "|---|---:|---:|---:|",
        *(
            f"| {name} | {value:.1f} | {found.trigram_domain_perplexity[name]:.1f} | {found.domain_lis[name]:.2f} |"
            for name, value in found.domain_perplexity.items()
        ),
        f"| **all** | **{found.perplexity:.1f}** | **{found.trigram_perplexity:.1f}** | **{found.lis:.2f}** |",
        "",
        f"Beside the trigram: {in_percent(found.beside_trigram)}, 95 % interval over rows.",
        "",
    ]
    if found.dense_perplexity is not None and found.dense_parameters is not None:
        lines += [
            f"Dense model beside it (`{recipe.dense}`, {found.dense_parameters:,} parameters without embeddings): "
            f"perplexity {found.dense_perplexity:.1f}.",
            "",
        ]
    first, second = found.divergence_pair
    lines += [
        "## Routing",
        "",
        f"- LIS over experts by layer, all domains: {', '.join(f'{value:.2f}' for value in found.lis_by_layer)}.",
        f"- Jensen-Shannon divergence between domains' loads: {found.divergence:.3f} bits on average over pairs and layers, "
        f"{found.divergence_max:.3f} between {first} and {second}.",
        f"- Removing one expert raises the loss by at most {found.removal_max:.3f} nats; Spearman's correlation of that rise "
        f"with the expert's load is {found.importance_correlation:+.2f} (by layer: "
        f"{', '.join('none' if value is None else f'{value:+.2f}' for value in found.importance_correlation_by_layer)}).",
        "",
        "## Curve",
        "",
        "| step | " + " | ".join(str(step + 1) for step in curve) + " |",
        "|---|" + "---:|" * len(curve),
        "| training loss (nats, mean of 50 steps) | "
        + " | ".join(f"{fmean(losses[max(step - 49, 0) : step + 1]):.3f}" for step in curve)
        + " |",
        "",
        "| step | held-out perplexity | mean LIS | largest MaxVio |",
        "|---|---:|---:|---:|",
        *(
            f"| {told['step']} | {told['perplexity']:.1f} | {fmean(told['lis']):.2f} | {max(told['maxvio']):.2f} |"
            for told in watched
        ),
        "",
        "## Data",
        "",
        "| domain | source | licence |",
        "|---|---|---|",
        *(f"| {name} | {domain.source} | {domain.licence} |" for name, domain in recipe.mix.domains.items()),
        "",
    ]
    return "\n".join(lines)
