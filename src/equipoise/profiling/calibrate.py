"""Run a model over text and measure it: one pass counts the load and feeds the importance estimators.

Shapes: S scenarios, L MoE layers, E logical experts of the widest layer, T tokens, K top-k, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from equipoise import __version__
from equipoise.artifacts import Profile, Source
from equipoise.errors import ModelError, TextError
from equipoise.models.layers import MoELayer, check_weights, find_moe_layers, model_facts
from equipoise.models.policy_marks import policy_id
from equipoise.models.recorder import Recorder, record
from equipoise.models.residual import ResidualStream
from equipoise.models.tokens import TokenBatch
from equipoise.precisions import precision
from equipoise.profiling.forward import evaluation_mode, run_batch
from equipoise.profiling.importance import Context, Estimator, Measured, Observation, make_estimators
from equipoise.profiling.progress import ProgressBar
from equipoise.profiling.resume import Arrays, Checkpoint, with_prefix, without_prefix
from equipoise.profiling.sequences import Batch, Framing, Rows, build_rows, fingerprint, make_batches
from equipoise.profiling.team import Team
from equipoise.profiling.texts import refuse_balanced

DEFAULT_IMPORTANCE = ("wanda", "gate_norm", "frequency")


def profile(
    model: Any,
    tokenizer: Any,
    scenarios: Mapping[str, Sequence[str]],
    *,
    tokens: int = 8192,
    seq_len: int = 512,
    batch_size: int = 4,
    seed: int = 0,
    layout: str = "documents",
    importance: Sequence[str] = DEFAULT_IMPORTANCE,
    importance_options: Mapping[str, Mapping[str, Any]] | None = None,
    precisions: Sequence[str] = (),
    window_tokens: int | None = None,
    resume_path: str | Path | None = None,
    save_every: float = 30.0,
    progress: bool = True,
    name: str | None = None,
    files: Mapping[str, Sequence[str]] | None = None,
    calibration: Mapping[str, Sequence[str]] | None = None,
    team: Team | None = None,
) -> Profile:
    """Measure the load of every expert on text, and how much each expert matters.

    The result depends on the model, the text and the options alone: a run that was interrupted and resumed, or divided among
    processes, gives the same profile, bit for bit, as one that was not (on one kind of machine, at one number of threads).

    Args:
        model: a transformers model with MoE layers; it runs where its weights are, and is left as it was. The profile is of
            the routing policy that it runs under.
        tokenizer: its tokenizer.
        scenarios: name -> documents of that traffic.
        tokens: budget of tokens per scenario; a scenario with less text is used whole.
        seq_len: longest row, in tokens.
        batch_size: rows of one forward pass.
        seed: order of the text, and every random sample.
        layout: "documents" or "packed", as `sequences.build_rows` explains.
        importance: names of estimators in `importance.IMPORTANCE`.
        importance_options: name of an estimator -> its options.
        precisions: storage formats whose output error is measured; giving any adds the estimator `output_error`.
        window_tokens: tokens of one time window; those of one full row when omitted. A forward pass is never divided, so
            smaller batches give finer windows.
        resume_path: file that keeps the state of an unfinished run; it stays, complete, so that nothing is lost if what
            follows fails. Delete it when the profile is saved.
        save_every: seconds between writes of that file.
        progress: show a progress bar on a terminal.
        name: the model as the user calls it; its configuration's name when omitted.
        files: scenario -> files of its text, for the record.
        calibration: name -> documents that the importance estimators watch instead of the scenarios, such as text that the
            model wrote itself; the load, and everything else that is counted, is of the scenarios alone. Each name has the
            same budget of tokens as a scenario.
        team: the processes that make this profile together (`team.team`); each calls this alike and gets the whole. Every one
            keeps a state of its own, beside `resume_path`.

    Raises:
        ModelError: no MoE layers, or weights, activations or losses that are not numbers.
        TextError: a scenario without text, or of text that was balanced by design; an option out of range.
        ProfileError: the state at `resume_path` is of another run.
        EquipoiseError: unknown estimator, option or precision; another process of the team has ended.
    """
    team = team or Team()
    if not scenarios:
        raise TextError("no scenarios given; give at least one name with its documents.")
    refuse_balanced(scenarios)
    if "output_error" not in importance and precisions:
        importance = (*importance, "output_error")
    precisions = tuple(dict.fromkeys(precision(p).name for p in precisions))
    window_tokens = seq_len if window_tokens is None else window_tokens
    if window_tokens < 1:
        raise TextError(f"window_tokens is {window_tokens}; it must be at least 1.")
    layers = find_moe_layers(model)
    check_weights(model)
    framing = Framing.of(tokenizer, model.config)

    def rows_of(texts: Mapping[str, Sequence[str]]) -> list[Rows]:
        return [
            build_rows(documents, tokenizer, framing, scenario=s, tokens=tokens, seq_len=seq_len, seed=seed, layout=layout)
            for s, documents in texts.items()
        ]

    rows, watched_rows = rows_of(scenarios), rows_of(calibration or {})
    batches, watched = ([b for part in parts for b in make_batches(part, batch_size)] for parts in (rows, watched_rows))
    options: dict[str, Any] = {
        "tokens": tokens,
        "seq_len": seq_len,
        "batch_size": batch_size,
        "seed": seed,
        "layout": layout,
        "importance": list(dict.fromkeys(importance)),
        "importance_options": {key: dict(value) for key, value in (importance_options or {}).items()},
        "precisions": list(precisions),
        "window_tokens": window_tokens,
    }
    if watched:
        options["calibration"] = {"names": [part.scenario for part in watched_rows], "text_sha256": fingerprint(watched_rows)}
    facts = model_facts(model, name or getattr(model.config, "_name_or_path", "") or type(model).__name__, layers)
    text_sha256 = fingerprint(rows)
    identity = {
        "model": facts.fingerprint,
        "policy": policy_id(model),
        "text": text_sha256,
        "options": options,
        "version": __version__,
    }
    context = Context(model, layers, watched or batches, precisions, seed, team)
    estimators = make_estimators(importance, context, importance_options)
    recorder = record(model, scenarios=list(scenarios), window_tokens=window_tokens)
    watcher = record(model, scenarios=[*(calibration or ["none"])], transitions=False, coactivation=False)
    checkpoint = Checkpoint(state_path(resume_path, team), identity | {"part": team.part}, save_every)
    team.agree({key: digest for key, digest in checkpoint.identity.items() if key != "part"})
    run = _Run(model, (batches, watched), (recorder, watcher), estimators, checkpoint, team)
    with evaluation_mode(model), ProgressBar(progress and team.leads) as bar:
        measured = run.go(bar)
    options["remarks"] = {key: dict(result.remarks) for key, result in measured.items() if result.remarks}
    if run.residual is not None and run.residual.unseen:
        options["remarks"]["residual_is_experts_input"] = sorted(run.residual.unseen)
    return Profile(
        model=facts,
        source=Source(
            scenarios=tuple(scenarios),
            texts={key: [str(path) for path in paths] for key, paths in (files or {}).items()},
            text_sha256=text_sha256,
            options=options,
            routing_policy=policy_id(model),
            equipoise_version=__version__,
        ),
        counts=recorder.counts,
        gate_mass=recorder.gate_mass,
        tokens=recorder.tokens,
        windows=recorder.windows,
        window_scenario=recorder.window_scenario,
        transitions=recorder.transitions,
        coactivation=recorder.coactivation,
        **_merged(measured, list(scenarios)),
    )


def state_path(resume_path: str | Path | None, team: Team) -> Path | None:
    """The file that keeps the state of this process: none where one process keeps it for all."""
    if resume_path is None or not (team.divides or team.leads):
        return None
    path = Path(resume_path)
    return path.with_name(f"{path.name}{team.part}")


class _Run:
    """One run over all batches, and the estimators' work after it; interruptible between forward passes.

    The load is counted on the batches of the first recorder; where there is calibration text, its batches are run after
    those, under the second recorder, and only they are shown to the estimators. Of a team, each process runs a stretch of
    either's batches and passes over the others; then all take in what each has observed.
    """

    def __init__(
        self,
        model: Any,
        batches: tuple[Sequence[Batch], Sequence[Batch]],
        recorders: tuple[Recorder, Recorder],
        estimators: Mapping[str, Estimator],
        checkpoint: Checkpoint,
        team: Team,
    ) -> None:
        self.model, self.batches, self.recorders = model, batches, recorders
        self.estimators, self.checkpoint, self.team = estimators, checkpoint, team
        self._own: Arrays | None = None
        self._watching = [e for e in estimators.values() if type(e).observe is not Estimator.observe]
        needed = any(estimator.needs_residual for estimator in self._watching)
        self.residual = ResidualStream(model, recorders[0].layers) if needed else None
        self._recorder, self._step = recorders[0], 0
        self._waiting: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]] = []

    def go(self, bar: ProgressBar) -> dict[str, Measured]:
        """Run what is left of the text, then let every estimator finish."""
        self.checkpoint.require_writable()
        done = self._restore()
        total = sum(map(len, self.batches))
        before = 0
        for stage, recorder, batches in zip(("recording", "calibrating"), self.recorders, self.batches, strict=True):
            here = min(max(done - before, 0), len(batches))
            if here < len(batches):
                self._pass(recorder, batches, here, before, bar, stage)
            before += len(batches)
        self.checkpoint.save(total, self._state, force=True)
        self._unite()
        load_LE = self._load()
        measured = {}
        for name, estimator in self.estimators.items():
            bar.stage(name, 1, "experts")
            measured[name] = estimator.finish(load_LE, lambda: self.checkpoint.save(total, self._state), bar.set)
        self.checkpoint.save(total, self._state, force=True)
        return measured

    def _pass(self, recorder: Recorder, batches: Sequence[Batch], done: int, before: int, bar: ProgressBar, stage: str) -> None:
        """Go through the batches of one recorder from `done` on; `before` were gone through under the other."""
        self._recorder = recorder
        sizes = [batch.tokens for batch in batches]
        mine = self.team.stretch(sizes)
        bar.stage(stage, sum(sizes[step] for step in mine), "tokens", sum(sizes[step] for step in mine if step < done))
        with ExitStack() as watching:
            if any(step >= done for step in mine):
                watching.enter_context(recorder)
                if self.residual:
                    watching.enter_context(self.residual)
                if recorder is self.recorders[1] or not self.batches[1]:
                    recorder.add_listener(self._listen)
            for step in range(done, len(batches)):
                self._step, batch = step, batches[step]
                recorder.scenario = batch.scenario
                if step not in mine:
                    recorder.pass_over(batch.last_tokens)
                    continue
                _check_logits(run_batch(self.model, batch, all_logits=False), batch)
                self.checkpoint.save(before + step + 1, self._state)
                bar.advance(sizes[step])

    def _unite(self) -> None:
        """Take in what every process has observed; the state on disk stays this process's own."""
        if not self.team.divides:
            return
        self._own = self._observed()
        for estimator in self.estimators.values():
            estimator.forget()
        for rank, arrays in enumerate(self.team.exchange(self._own)):
            for prefix, recorder in self._used_recorders().items():
                take = recorder.absorb if rank else recorder.load_state_dict
                take(without_prefix(prefix, arrays))
            for name, estimator in self.estimators.items():
                estimator.absorb(without_prefix(f"importance/{name}/", arrays))
        for recorder in self._used_recorders().values():
            recorder.check()

    def _load(self) -> NDArray[Any]:
        """[L, E] selections that the estimators are to weigh experts by.

        With calibration text: the traffic's load, scaled to as many tokens as the estimators have watched (not whole numbers),
        because what they relate it to, such as a layer's energy, is of those tokens.
        """
        load_LE = self.recorders[0].counts.sum((0, 1))
        if not self.batches[1]:
            return np.asarray(load_LE)
        tokens_L, watched_L = (recorder.tokens_by_layer.sum((0, 1)) for recorder in self.recorders)
        return np.asarray(load_LE * (watched_L / np.maximum(tokens_L, 1))[:, None])

    def _listen(
        self, layer: MoELayer, hidden: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, tokens: TokenBatch
    ) -> None:
        """Hand the real tokens of one layer's call to the estimators."""
        residual = None if self.residual is None else self.residual.before(layer, hidden)
        if not tokens.all_real:
            real = tokens.real_T.to(hidden.device)
            hidden, experts, weights = hidden[real], experts[real], weights[real]
            residual = None if residual is None else residual[real]
        # A sum is finite only if every term is; a check of each value would need a mask as large as the tokens.
        if not torch.isfinite(hidden.sum(dtype=torch.float32) + weights.sum(dtype=torch.float32)):
            raise ModelError(
                f"the inputs or gate weights of {layer.path} are not finite numbers (text '{self._recorder.scenario}'); "
                "check the weights, or load the model in another dtype (bf16 has more range than fp16)."
            )
        if layer.events > 1:  # to the estimators, the events of a layer are so many more tokens of one call
            self._waiting.append((hidden, experts, weights, residual))
            if len(self._waiting) < layer.events:
                return
            hidden, experts, weights = (torch.cat([event[part] for event in self._waiting]) for part in range(3))
            residuals = [event[3] for event in self._waiting if event[3] is not None]
            residual = torch.cat(residuals) if residuals else None
            self._waiting.clear()
        seen = Observation(self._step, layer, hidden, experts, weights, residual)
        for estimator in self._watching:
            estimator.observe(seen)

    def _used_recorders(self) -> dict[str, Recorder]:
        """Prefix of its arrays -> recorder, for those that have batches."""
        both = zip(("recorder/", "calibration/"), self.recorders, self.batches, strict=True)
        return {prefix: recorder for prefix, recorder, batches in both if batches}

    def _observed(self) -> Arrays:
        """What this process has recorded and its estimators have observed."""
        arrays: Arrays = {}
        for prefix, recorder in self._used_recorders().items():
            arrays |= with_prefix(prefix, recorder.state_dict())
        for name, estimator in self.estimators.items():
            arrays |= with_prefix(f"importance/{name}/", estimator.observed())
        return arrays

    def _state(self) -> Arrays:
        state = dict(self._observed() if self._own is None else self._own)
        for name, estimator in self.estimators.items():
            state |= with_prefix(f"results/{name}/", estimator.results)
        return state

    def _restore(self) -> int:
        """Forward passes that an earlier run has gone through already."""
        loaded = self.checkpoint.load()
        if self.team.together:  # the state of one is that of all
            known = {} if loaded is None else with_prefix("state/", loaded[1]) | {"done": np.array([loaded[0]])}
            given = self.team.from_leader(known)
            loaded = (int(given["done"].item()), without_prefix("state/", given)) if given else None
        if loaded is None:
            return 0
        done, arrays = loaded
        for prefix, recorder in self._used_recorders().items():
            recorder.load_state_dict(without_prefix(prefix, arrays))
        for name, estimator in self.estimators.items():
            estimator.forget()
            estimator.absorb(without_prefix(f"importance/{name}/", arrays))
            estimator.results = without_prefix(f"results/{name}/", arrays)
        return done


def _check_logits(output: Any, batch: Batch) -> None:
    """Raise `ModelError` when the model predicts something that is not a number."""
    logits = getattr(output, "logits", None)
    if logits is None:
        return
    mask = batch.attention_mask if batch.decoder_attention_mask is None else batch.decoder_attention_mask
    real = torch.from_numpy(mask).to(logits.device).bool()[:, -logits.shape[1] :]
    if not torch.isfinite(logits[real]).all():
        raise ModelError(
            f"the model's logits are not finite numbers (scenario '{batch.scenario}'); check its weights and dtype."
        )


def _merged(measured: Mapping[str, Measured], scenarios: Sequence[str]) -> dict[str, Any]:
    """The profile's fields that estimators fill."""
    fields: dict[str, Any] = {"importance": {}, "output_error": {}, "output_energy": np.zeros(0, np.float64)}
    apart = {name: result.by_scenario for name, result in measured.items() if set(result.by_scenario) == set(scenarios)}
    fields["scenario_importance"] = {name: np.stack([by[s] for s in scenarios]) for name, by in apart.items()}
    for name, result in measured.items():
        if result.importance is not None:
            fields["importance"][name] = result.importance
        fields["output_error"] |= result.output_error
        if result.output_energy is not None:
            fields["output_energy"] = result.output_energy
        if result.sensitivity is not None:
            fields["sensitivity"] = result.sensitivity
    return fields
