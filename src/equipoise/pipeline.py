"""The main job in one call: record, plan, apply, save, reload, prove.

The run directory holds everything that the run made, and a run that was interrupted goes on from it:

    model/                        the balanced model, for `from_pretrained`
    METHOD.plan.json              one plan per method
    run.profile.safetensors       what was measured
    run.eval.json                 what was proved
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipoise.artifacts import Evaluation, Plan, Profile
from equipoise.artifacts.files import make_directory
from equipoise.artifacts.routing import RoutingPolicy
from equipoise.errors import EquipoiseError, TextError
from equipoise.planning.methods import METHODS as PLANNING
from equipoise.planning.methods import make_plan

PROFILE = "run.profile.safetensors"
EVALUATION = "run.eval.json"
PRECISIONS = ("int8", "int4-g32", "int3-g32", "int2-g32")
"""Formats whose output error is measured, because plans choose among them."""
SENSITIVITY_TOKENS = 4096
"""Tokens on which it is measured how much each layer's error matters; at least one row of each scenario."""
ROUNDING = "agq"
ROUNDING_TOKENS = 2048
"""Most tokens of a scenario that experts are rounded on. On two shelf models of eleven scenarios, 4,096 instead of 1,024 took
0.02 and 0.06 percentage points off the change of perplexity."""

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

    @property
    def profile_file(self) -> Path:
        """What was measured."""
        return self.directory / PROFILE

    @property
    def plan_files(self) -> dict[str, Path]:
        """Plan by plan, by the name of its method, what was decided."""
        return {name: plan_file(self.directory, name) for name in self.plans}

    @property
    def evaluation_file(self) -> Path:
        """What was proved."""
        return self.directory / EVALUATION


def plan_file(directory: Path, name: str) -> Path:
    """Where a run keeps the plan of METHOD or METHOD:DISPATCH."""
    return directory / f"{name.replace(':', '-')}.plan.json"


HELD_OUT = 0.2
"""Part of the documents that is judged on, where no text is given for that."""
STRETCH = 4000
"""Characters of one stretch of a long document, where a scenario has too few documents to hold some out."""


def hold_out(texts: Texts, fraction: float = HELD_OUT) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
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
    dispatch: str = "least_loaded",
    rounding: str = ROUNDING,
    own_text: bool = False,
    tokens: int = 8192,
    heldout_tokens: int | None = 4096,
    seq_len: int = 512,
    batch_size: int = 4,
    seed: int = 0,
    tasks: Sequence[str] = (),
    task_dir: str | Path | None = None,
    limit: int | None = None,
    policy: str | Path | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    files: Mapping[str, Sequence[str]] | None = None,
    progress: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Balanced:
    """Balance a model and prove what that did.

    Args:
        model: directory or hub name.
        texts: scenario -> documents to measure the load on; may be empty with `own_text`.
        out: run directory.
        heldout: scenario -> documents to judge on; a fifth of `texts`, not planned from, when omitted.
        method: planning method whose model is saved.
        compare: further methods that are applied and judged beside it, not saved: METHOD or METHOD:DISPATCH.
        units: parallel units U; the number of routed experts when omitted.
        plan_options: further options of `method`.
        dispatch: which copy serves which token: "even", "least_loaded" or "gate_aware".
        rounding: how the experts of `method` are rounded, a name of `quantization.methods.METHODS`; other methods are
            rounded to nearest.
        own_text: the model writes the text that importance, errors and rounding are measured on; and also, drawn plainly,
            the text that the load is measured on, if `texts` is empty.
        tokens: tokens per scenario to measure on.
        heldout_tokens: tokens per scenario to judge on; None for all.
        seq_len: longest sequence, in tokens.
        batch_size: sequences of one forward pass.
        seed: order of the text and every random sample.
        tasks: lm-eval tasks to judge on.
        task_dir: directory with their rows as local files; None for the hub.
        limit: items of each task, None for all.
        policy: file of a routing policy that the balanced models run under; profiled and planned under it, judged against the
            model under its own router.
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
    from equipoise.evaluation.tasks import load_tasks
    from equipoise.execution.apply import apply_plan
    from equipoise.execution.layerwise import Calibration
    from equipoise.execution.routing.attach import attach_policy, routed
    from equipoise.execution.streamed import apply_streamed
    from equipoise.profiling.calibrate import profile as measure
    from equipoise.profiling.loading import load_model, load_tokenizer
    from equipoise.profiling.progress import ProgressBar
    from equipoise.profiling.sequences import Framing, text_batches
    from equipoise.quantization.methods import METHODS

    out = Path(out)
    # What a user can have got wrong shows here, before hours of measuring.
    for name in (method, *compare):
        PLANNING.get(name.partition(":")[0])
    METHODS.get(rounding)
    judged_tasks = load_tasks(tasks, task_dir=None if task_dir is None else Path(task_dir), limit=limit, num_fewshot=0)
    make_directory(out)
    say(f"load {model}")
    base, tokenizer = load_model(model, dtype=dtype, device=device), load_tokenizer(model)
    calibration: Texts | None = None
    if own_text:
        say("let the model write its own text")
        texts, calibration = _own_text(base, tokenizer, texts, tokens, seq_len, seed, progress)
    planned_from, judged_on = (texts, heldout) if heldout else hold_out(texts)
    say(f"record where tokens go ({', '.join(planned_from)}), and what each expert's bits cost")
    resume = out / f".{PROFILE}.part"
    rule = None if policy is None else RoutingPolicy.load_file(policy)
    with routed(base, rule):
        profile = measure(
            base, tokenizer, planned_from, tokens=tokens, seq_len=seq_len, batch_size=batch_size, seed=seed,
            precisions=PRECISIONS, importance_options={"output_error": {"sensitivity_tokens": SENSITIVITY_TOKENS}},
            resume_path=resume, progress=progress, name=model, files=files, calibration=calibration,
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
        plans[name].save(plan_file(out, name))
    batches = text_batches(
        calibration or planned_from, tokenizer, Framing.of(tokenizer, base.config),
        tokens=min(tokens, ROUNDING_TOKENS), seq_len=seq_len, batch_size=batch_size, seed=seed,
    )  # fmt: skip
    contenders: dict[str, Any] = {}

    def fresh(memory: int | None = None) -> Any:
        loaded = load_model(model, dtype=dtype, device=device, memory=memory)
        return loaded if rule is None else attach_policy(loaded, rule)

    for name in plans:
        if name != method:
            same = name.partition(":")[0] == method  # other methods are taken as published, rounded to nearest
            say(f"apply {name}")
            contenders[name] = apply_plan(fresh(), plans[name], method=rounding if same else "rtn", batches=batches)
    say(f"apply {method}, rounding by {rounding}, save to {out / 'model'} and load it again")
    reads_text = METHODS.get(rounding).reads_hessian
    on_text = Calibration(batches, rounding, workers=os.cpu_count() or 1) if reads_text else None
    with ProgressBar(progress) as bar:
        bar.stage("rounding", len(plans[method].layers), "MoE layers")
        apply_streamed(
            fresh(memory=0), tokenizer, plans[method], out / "model",
            method=rounding, calibration=on_text, progress=bar.set,
        )  # fmt: skip
    contenders[method] = load_balanced(out / "model", dtype=dtype, device=device)
    say(f"prove on text that was not planned from ({', '.join(judged_on)})")
    evaluation = evaluate(
        base, contenders, tokenizer, texts=judged_on, tokens=heldout_tokens, tasks=judged_tasks, task_dir=task_dir, limit=limit,
        seq_len=seq_len, batch_size=batch_size, seed=seed, base_name=model, progress=progress,
    )  # fmt: skip
    evaluation.save(out / EVALUATION)
    resume.unlink(missing_ok=True)
    return Balanced(out, profile, plans, evaluation)


def _own_text(
    model: Any, tokenizer: Any, texts: Texts, tokens: int, seq_len: int, seed: int, progress: bool
) -> tuple[Texts, Texts]:
    """Text to measure the load on, and text to measure everything else on, the latter written by the model to use all experts.

    Balanced text says nothing of the load. If no other is given, the model draws from itself without balancing.
    """
    from equipoise.profiling.self_sampled import self_texts

    wanted: dict[str, Any] = {"sentences": -(-tokens // seq_len), "length": seq_len, "seed": seed, "progress": progress}
    balanced = self_texts(model, tokenizer, **wanted)
    if not texts:
        wanted["sentences"] = math.ceil(wanted["sentences"] / (1 - HELD_OUT))  # a part will be judged on
        texts = self_texts(model, tokenizer, sampler="plain", **wanted)
    return texts, balanced


def load_balanced(directory: str | Path, *, dtype: str = "auto", device: str = "cpu") -> Any:
    """Load a balanced model onto a device; `dtype` is of what is not quantized, as in `profiling.loading.load_model`."""
    from equipoise.execution.checkpoint import load
    from equipoise.profiling.loading import DTYPES

    return load(directory, dtype=DTYPES[dtype]).to(device).eval()


def read_artifact(path: str | Path) -> Profile | Plan | RoutingPolicy | Evaluation:
    """Read any of the three values, or a routing policy, told apart by the file's content.

    Raises:
        EquipoiseError: unreadable, or none of them.
    """
    try:
        data = Path(path).read_bytes()
    except IsADirectoryError as error:
        raise EquipoiseError(
            f"'{path}' is a directory; give a file: a profile, a plan (a balanced model's is equipoise.plan.json in its "
            "directory), a routing policy or an evaluation."
        ) from error
    except OSError as error:
        raise EquipoiseError(f"cannot read '{path}': {error.strerror or error}.") from error
    if not data.startswith(b"{"):
        return Profile.load_file(path)
    if b'"equipoise.evaluation/' in data:
        return Evaluation.load_file(path)
    return RoutingPolicy.load_file(path) if b'"equipoise.policy/' in data else Plan.load_file(path)
