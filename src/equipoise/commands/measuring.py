"""Commands that measure a model: profile, evaluate."""

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
    Limit,
    PolicyFile,
    Quiet,
    Scenario,
    Seed,
    SeqLen,
    TaskDir,
    Tasks,
    Text,
    TextOrSelf,
    Tokens,
    Units,
    assignments,
    estimator_options,
    names,
    one_model,
    read,
    refuse_given,
    scenario_files,
    text_sources,
)
from equipoise.commands.show import show, show_evaluation


def profile(
    source: Annotated[
        list[str],
        typer.Argument(metavar="MODEL|FILE...", help="a model: directory or hub name; with --from, an engine's records"),
    ],
    out: Annotated[Path, typer.Option(help="file to write, such as x.profile.safetensors")],
    engine: Annotated[
        str | None, typer.Option("--from", help="engine that recorded the files: sglang, vllm, tensorrt-llm, table, ...")
    ] = None,
    text: TextOrSelf = None,
    scenario: Scenario = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(help="text that importance and errors are measured on instead; the load is never taken from it"),
    ] = None,
    field: Field = "text",
    tokens: Tokens = 8192,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 4,
    seed: Seed = 0,
    layout: Annotated[str, typer.Option(help="documents (one a row) or packed (joined into full rows)")] = "documents",
    importance: Annotated[str, typer.Option(help="importance estimators, separated by commas")] = "wanda,gate_norm,frequency",
    options: Annotated[list[str] | None, typer.Option("--set", help="option of an estimator: wanda.fraction=0.3")] = None,
    precisions: Annotated[str, typer.Option(help="formats whose output error is measured")] = "int8,int4",
    window_tokens: Annotated[int | None, typer.Option(help="tokens of one time window", show_default="one full row")] = None,
    config: Annotated[
        Path | None, typer.Option(help="with --from: the model's config.json, for top-k, sizes and dense layers")
    ] = None,
    experts: Annotated[int | None, typer.Option(help="with --from: routed experts per layer, where no config tells")] = None,
    top_k: Annotated[int | None, typer.Option(help="with --from: experts per token, where no config tells")] = None,
    phase: Annotated[str, typer.Option(help="with --from: prefill or decode, where the records do not tell")] = "prefill",
    memory: Annotated[
        float | None,
        typer.Option(help="GB that weights may take; a larger model is read layer by layer", show_default="no limit"),
    ] = None,
    device_map: Annotated[
        str | None, typer.Option(help="spread the model over devices, memory and disk as accelerate does: auto, balanced, ...")
    ] = None,
    experts_parallel: Annotated[
        bool, typer.Option("--experts-parallel", help="under torchrun: each process holds experts, and none a part of the text")
    ] = False,
    policy: PolicyFile = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Record where a model sends the tokens of a text, and how much each expert matters; or read what an engine recorded.

    Under torchrun each process takes a part of the text, and the profile is the one that a single process would have made.
    """
    from equipoise.reporting.rows import profile_rows
    from equipoise.reporting.tables import profile_tables

    if engine is not None:
        refuse_given(
            "--from reads an engine's records",
            {"--text": text, "--calibration": calibration, "--memory": memory, "--device-map": device_map,
             "--experts-parallel": experts_parallel or None, "--policy": policy},
        )  # fmt: skip
        from equipoise.engines.registry import read_records

        result = read_records(
            engine, source, scenarios=scenario, config=config, experts=experts, top_k=top_k, phase=phase, **assignments(options)
        )  # fmt: skip
        result.save(out)
        show(as_json, profile_rows(result), profile_tables(result), out)
        return
    refuse_given("only --from ENGINE takes them", {"--config": config, "--experts": experts, "--top-k": top_k})
    name = one_model(source)
    own, files = text_sources(text, scenario)
    if own:
        refuse_given("--text self writes the calibration text", {"--calibration": calibration})
    if own:
        refuse_given("the processes of --experts-parallel cannot write text", {"--experts-parallel": experts_parallel or None})
    from equipoise.artifacts.routing import RoutingPolicy
    from equipoise.execution.routing.attach import attach_policy
    from equipoise.profiling.calibrate import profile as measure
    from equipoise.profiling.calibrate import state_path
    from equipoise.profiling.loading import load_model, load_tokenizer
    from equipoise.profiling.self_sampled import BALANCED, SELF_SAMPLED, cached_self_text
    from equipoise.profiling.team import team
    from equipoise.profiling.texts import refuse_balanced

    documents = read(files, field, name)
    refuse_balanced(documents)
    watched = read({"calibration": [str(path) for path in calibration]}, field, name) if calibration else None
    limit = None if memory is None else int(memory * 1e9)
    with team(together=experts_parallel) as us:
        model, tokenizer = load_model(
            name, dtype=dtype, device=device, memory=limit, device_map=device_map, experts_parallel=experts_parallel
        ), load_tokenizer(name)  # fmt: skip
        notes = []
        if own:
            wanted: dict[str, Any] = {"sentences": -(-tokens // seq_len), "length": seq_len, "seed": seed}
            wanted["progress"] = us.leads and not quiet
            written = cached_self_text(model, tokenizer, **wanted)
            watched = {BALANCED: list(written.texts)}
            whose = "the files given"
            if not files:
                whose = "text that the model drew from itself, not balanced"
                drawn = cached_self_text(model, tokenizer, sampler="plain", **wanted)
                documents, files = {SELF_SAMPLED: list(drawn.texts)}, {SELF_SAMPLED: [str(drawn.path)]}
            notes = [
                f"load: of {whose} ({', '.join(files)}); importance and errors: of text that the model wrote to use all "
                f"experts ({written.path})"
            ]
        if policy is not None:
            attach_policy(model, RoutingPolicy.load_file(policy))
        part = out.with_name(f".{out.name}.part")
        result = measure(
            model, tokenizer, documents, tokens=tokens, seq_len=seq_len, batch_size=batch_size, seed=seed, layout=layout,
            importance=names(importance), importance_options=estimator_options(options), precisions=names(precisions),
            window_tokens=window_tokens, resume_path=part, progress=not quiet, name=name, files=files, calibration=watched,
            team=us,
        )  # fmt: skip
        if us.leads:
            result.save(out)
        us.wait()  # nobody's state goes before the profile is there
        mine = state_path(part, us)
        if mine is not None:
            mine.unlink(missing_ok=True)
    if us.leads:
        show(as_json, profile_rows(result), [*profile_tables(result), *notes], out)


def evaluate(
    base: Annotated[str, typer.Argument(help="the model as it was")],
    balanced: Annotated[list[str] | None, typer.Argument(help="directories of balanced models")] = None,
    policy: Annotated[
        list[Path] | None, typer.Option(help="routing policy to judge on the base model by itself; may be repeated")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="file to write, such as x.eval.json")] = None,
    text: Text = None,
    scenario: Scenario = None,
    field: Field = "text",
    tokens: Annotated[int | None, typer.Option(help="tokens per scenario", show_default="all")] = None,
    task: Tasks = None,
    task_dir: TaskDir = None,
    limit: Limit = None,
    num_fewshot: Annotated[int, typer.Option(help="worked examples before each item")] = 0,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 4,
    seed: Seed = 0,
    units: Units = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prove what balancing did to balance and quality, against the base model, in one run."""
    files = scenario_files(text, scenario) if text or scenario else {}
    from equipoise.artifacts.routing import RoutingPolicy
    from equipoise.evaluation.evaluate import evaluate as prove
    from equipoise.execution.routing.attach import attach_policy
    from equipoise.pipeline import load_balanced
    from equipoise.profiling.loading import load_model, load_tokenizer

    documents = read(files, field, base)
    contenders = {name: load_balanced(name, dtype=dtype, device=device) for name in balanced or ()}
    for file in policy or ():
        routed = attach_policy(load_model(base, dtype=dtype, device=device), RoutingPolicy.load_file(file))
        contenders[f"policy {file.name}"] = routed
    result = prove(
        load_model(base, dtype=dtype, device=device), contenders, load_tokenizer(base), texts=documents, tasks=task or (),
        task_dir=task_dir, limit=limit, num_fewshot=num_fewshot, batch_size=batch_size, seq_len=seq_len, tokens=tokens,
        seed=seed, units=units, base_name=base, progress=not quiet,
    )  # fmt: skip
    if out:
        result.save(out)
    show_evaluation(as_json, result, out)
