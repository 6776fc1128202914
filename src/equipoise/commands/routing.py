"""Commands of routing policies: fit one, look at one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from equipoise.arguments import (
    BatchSize,
    Device,
    Dtype,
    Field,
    Json,
    Model,
    Options,
    Quiet,
    Scenario,
    Seed,
    SeqLen,
    Text,
    assignments,
    read,
    scenario_files,
)
from equipoise.commands.show import show
from equipoise.errors import EquipoiseError

app = typer.Typer(no_args_is_help=True, help="Routing policies (class `routing`): which experts a token is sent to.")


@app.command()
def fit(
    model: Model,
    out: Annotated[Path, typer.Option(help="file to write, such as x.policy.json")],
    policy: Annotated[str, typer.Option(help="name of the policy; `equipoise methods` lists them")],
    text: Text = None,
    scenario: Scenario = None,
    field: Field = "text",
    mean_k: Annotated[float | None, typer.Option(help="top_p, random_k: experts of a token to calibrate each layer to")] = None,
    options: Options = None,
    tokens: Annotated[int, typer.Option(help="tokens per scenario to fit on; all of their scores are held")] = 4096,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 4,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fit a routing policy to a model on text: thresholds or biases of every layer.

    Then profile with `--policy FILE`, plan from that profile, and apply with the same `--policy FILE`.
    """
    files = scenario_files(text, scenario)
    from equipoise.execution.routing.fit import fit_policy
    from equipoise.profiling.loading import load_model, load_tokenizer
    from equipoise.profiling.progress import ProgressBar
    from equipoise.profiling.sequences import Framing, text_batches

    given: dict[str, Any] = assignments(options)
    if mean_k is not None:
        if "mean_k" in given:
            raise EquipoiseError("--mean-k and --set mean_k both say how many experts a token has; give one.")
        given["mean_k"] = mean_k
    loaded, tokenizer = load_model(model, dtype=dtype, device=device), load_tokenizer(model)
    batches = text_batches(
        read(files, field, model), tokenizer, Framing.of(tokenizer, loaded.config),
        tokens=tokens, seq_len=seq_len, batch_size=batch_size, seed=seed,
    )  # fmt: skip
    with ProgressBar(not quiet) as bar:
        bar.stage(f"fitting {policy}", len(batches), "passes")
        fitted = fit_policy(loaded, policy, batches, given, model_name=model, progress=bar.set)
    fitted.save(out)
    _show(fitted, as_json, out)


@app.command("show")
def show_policy(file: Annotated[Path, typer.Argument(help="a policy file")], as_json: Json = False) -> None:
    """Print what a policy does in every layer."""
    from equipoise.artifacts.routing import RoutingPolicy

    _show(RoutingPolicy.load_file(file), as_json, None)


def _show(policy: Any, as_json: bool, out: Path | None) -> None:
    from equipoise.reporting.routing import policy_rows, policy_tables

    rows = policy_rows(policy)
    show(as_json, rows, policy_tables(rows), out)
