"""The main job in one call: record, plan, apply, save, reload, prove.

The run directory holds everything that the run made, and a run that was interrupted goes on from it:

    model/                        the balanced model, for `from_pretrained`
    METHOD.plan.json              one plan per method
    run.profile.safetensors       what was measured
    run.eval.json                 what was proved
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipoise.artifacts import Evaluation, Plan, Profile
from equipoise.errors import EquipoiseError, TextError
from equipoise.planning.methods import make_plan

PROFILE = "run.profile.safetensors"
EVALUATION = "run.eval.json"
PRECISIONS = ("int8", "int4-g32")
"""Formats whose output error is measured, because plans choose among them."""

Texts = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Balanced:
    """What a run made: the values, and the directory that holds the balanced model and all files."""

    directory: Path
    profile: Profile
    plans: Mapping[str, Plan]
    evaluation: Evaluation

    @property
    def model_directory(self) -> Path:
        """Where the balanced model was saved."""
        return self.directory / "model"


STRETCH = 4000
"""Characters of one stretch of a long document, where a scenario has too few documents to hold some out."""


def hold_out(texts: Texts, fraction: float = 0.2) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Divide documents into those to plan from and those to judge on, by a hash of each document.

    A scenario of fewer than ten documents (one long file, say) is first cut into stretches of about `STRETCH` characters.

    Args:
        texts: scenario -> documents.
        fraction: of the documents that are held out.

    Returns:
        The two parts, each with every scenario.

    Raises:
        TextError: a scenario has too little text for both parts.
    """
    parts: tuple[dict[str, list[str]], dict[str, list[str]]] = ({}, {})
    for name, given in texts.items():
        documents = list(given) if len(given) >= 10 else [part for document in given for part in _stretches(document)]
        ranked = sorted(documents, key=lambda d: hashlib.sha256(d.encode()).digest())
        held = max(1, round(fraction * len(ranked)))
        if len(ranked) - held < 1:
            raise TextError(
                f"scenario '{name}' has too little text to plan from some of it and judge on the rest: give more documents, "
                f"at least {2 * STRETCH} characters, or held-out text of its own with --heldout."
            )
        chosen = set(ranked[:held])
        parts[0][name] = [d for d in documents if d not in chosen]
        parts[1][name] = [d for d in documents if d in chosen]
    return parts


def _stretches(document: str) -> list[str]:
    """A document in consecutive stretches of about `STRETCH` characters, cut at line ends where there are any."""
    parts: list[str] = []
    while len(document) > 1.5 * STRETCH:
        end = document.rfind("\n", STRETCH // 2, STRETCH) + 1 or STRETCH
        parts.append(document[:end])
        document = document[end:]
    return [*parts, document]


def balance(
    model: str,
    texts: Texts,
    out: str | Path,
    *,
    heldout: Texts | None = None,
    method: str = "rq",
    compare: Sequence[str] = ("rq-paper",),
    units: int | None = None,
    plan_options: Mapping[str, Any] | None = None,
    dispatch: str = "even",
    tokens: int = 8192,
    heldout_tokens: int | None = 4096,
    seq_len: int = 512,
    batch_size: int = 4,
    seed: int = 0,
    tasks: Sequence[str] = (),
    task_dir: str | Path | None = None,
    limit: int | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    files: Mapping[str, Sequence[str]] | None = None,
    progress: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Balanced:
    """Balance a model and prove what that did.

    Args:
        model: directory or hub name.
        texts: scenario -> documents to measure the load on.
        out: run directory.
        heldout: scenario -> documents to judge on; a fifth of `texts`, not planned from, when omitted.
        method: planning method whose model is saved.
        compare: further methods that are applied and judged beside it, not saved: METHOD or METHOD:DISPATCH.
        units: parallel units U; the number of routed experts when omitted.
        plan_options: further options of `method`.
        dispatch: which copy serves which token: "even", "least_loaded" or "gate_aware".
        tokens: tokens per scenario to measure on.
        heldout_tokens: tokens per scenario to judge on; None for all.
        seq_len: longest sequence, in tokens.
        batch_size: sequences of one forward pass.
        seed: order of the text and every random sample.
        tasks: lm-eval tasks to judge on.
        task_dir: directory with their rows as local files; None for the hub.
        limit: items of each task, None for all.
        dtype: "auto" (as stored), "fp32", "bf16" or "fp16".
        device: where the models run, as torch names it.
        files: scenario -> files, for the record.
        progress: show progress bars.
        say: called with one line before each step.

    Returns:
        The run's values; the model is in `model_directory`.

    Raises:
        EquipoiseError: whatever a step finds wrong, with what to do; what earlier steps wrote stays and is used again.
    """
    from equipoise.evaluation.evaluate import evaluate
    from equipoise.execution.apply import apply_plan
    from equipoise.execution.checkpoint import save_balanced
    from equipoise.profiling.calibrate import profile as measure
    from equipoise.profiling.loading import load_model, load_tokenizer

    out = Path(out)
    planned_from, judged_on = (texts, heldout) if heldout else hold_out(texts)
    say(f"load {model}")
    base, tokenizer = load_model(model, dtype=dtype, device=device), load_tokenizer(model)
    say(f"record where tokens go, and what each expert's bits cost ({', '.join(planned_from)})")
    out.mkdir(parents=True, exist_ok=True)
    resume = out / f".{PROFILE}.part"
    profile = measure(
        base, tokenizer, planned_from, tokens=tokens, seq_len=seq_len, batch_size=batch_size, seed=seed,
        precisions=PRECISIONS, resume_path=resume, progress=progress, name=model, files=files,
    )  # fmt: skip
    profile.save(out / PROFILE)
    plans: dict[str, Plan] = {}
    for name in dict.fromkeys([method, *compare]):
        say(f"plan {name}")
        base_name, _, own = name.partition(":")
        options = dict(plan_options or {}) if base_name == method else {}
        if own or name == method:
            options["dispatch"] = own or dispatch
        plans[name] = make_plan(profile, base_name, units=units, seed=seed, **options)
        plans[name].save(out / f"{name.replace(':', '-')}.plan.json")
    contenders: dict[str, Any] = {}
    for name in plans:
        if name != method:
            say(f"apply {name}")
            contenders[name] = apply_plan(load_model(model, dtype=dtype, device=device), plans[name])
    say(f"apply {method}, save to {out / 'model'} and load it again")
    save_balanced(apply_plan(load_model(model, dtype=dtype, device=device), plans[method]), tokenizer, out / "model")
    contenders[method] = load_balanced(out / "model", dtype=dtype, device=device)
    say(f"prove on text that was not planned from ({', '.join(judged_on)})")
    evaluation = evaluate(
        base, contenders, tokenizer, texts=judged_on, tokens=heldout_tokens, tasks=tasks, task_dir=task_dir, limit=limit,
        seq_len=seq_len, batch_size=batch_size, seed=seed, base_name=model, progress=progress,
    )  # fmt: skip
    evaluation.save(out / EVALUATION)
    resume.unlink(missing_ok=True)
    return Balanced(out, profile, plans, evaluation)


def load_balanced(directory: str | Path, *, dtype: str = "auto", device: str = "cpu") -> Any:
    """Load a balanced model onto a device; `dtype` is of what is not quantized, as in `profiling.loading.load_model`."""
    from equipoise.execution.checkpoint import load
    from equipoise.profiling.loading import DTYPES

    return load(directory, dtype=DTYPES[dtype]).to(device).eval()


def read_artifact(path: str | Path) -> Profile | Plan | Evaluation:
    """Read any of the three values, told apart by the file's content.

    Raises:
        EquipoiseError: unreadable, or none of them.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise EquipoiseError(f"cannot read '{path}': {error.strerror or error}.") from error
    if not data.startswith(b"{"):
        return Profile.load_file(path)
    return Evaluation.load_file(path) if b'"equipoise.evaluation/' in data else Plan.load_file(path)
