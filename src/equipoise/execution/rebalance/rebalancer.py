"""Streaming: a balanced model is watched while it serves, and its slots change when a policy says so.

    with Rebalancer(model, make_policy("adaptive", profile, plan), store) as rebalancer:
        model.generate(...)               # every forward runs under one plan
        with rebalancer.request():
            model.generate(...)           # all of this request runs under one plan

A change of slots does not touch the key-value cache, so a request that is under way goes on with it. By default every forward
is what the old or the new plan gives for the cache it is given; a request that is pinned is so as a whole.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from equipoise.artifacts import Plan
from equipoise.errors import ModelError, PlanError
from equipoise.execution.balanced_config import plan_of
from equipoise.execution.rebalance.gate import Gate, SwapPostponedError
from equipoise.execution.rebalance.store import ExpertStore
from equipoise.execution.rebalance.swap import check_change, commit, largest_layer, restage, rounds, stage
from equipoise.execution.rebalance.watch import Served, Watch
from equipoise.execution.slots import slots_of
from equipoise.metrics import lis
from equipoise.models.layers import find_moe_layers
from equipoise.planning.streaming.decision import Costs, Decision, Entry, Ledger, Policy, mean_lis

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOG = logging.getLogger(__name__)
FORGET = 0.9
"""Weight of what was measured before beside the latest, so that costs follow a machine whose other work comes and goes."""
REPORTS = 1024
"""Reports that are kept."""
MOST_SKIPPED = 64
"""Steps, at most, for which no plan is made after failures in a row."""
TRIAL_SLOTS = 4
"""Slots that are made ready at the start to measure what a byte costs."""


@dataclass(frozen=True, slots=True)
class Report:
    """What became of one step.

    Attributes:
        step: number, from 1.
        tokens: real tokens of the step.
        lis: over units, of what the step's units served; mean over layers.
        cumulative_lis: of all steps so far.
        drift: as `Decision.drift`.
        outcome: "kept", "swapped", "postponed" or "failed"; the plan before stays in force unless it is "swapped".
        reason: why.
        predicted: seconds that the change is to win.
        slots: that got another expert.
        moved_bytes: of those slots.
        staged_bytes: most that were held beside the plan's own.
        planning: seconds spent on deciding.
        staging: seconds spent on making slots ready.
        paused: seconds for which forwards were held back.
    """

    step: int
    tokens: int
    lis: float
    cumulative_lis: float
    drift: float
    outcome: str
    reason: str
    predicted: float = 0.0
    slots: int = 0
    moved_bytes: int = 0
    staged_bytes: int = 0
    planning: float = 0.0
    staging: float = 0.0
    paused: float = 0.0

    def row(self) -> dict[str, Any]:
        """For JSON; a drift that was not looked at is null."""
        return {key: None if value != value else value for key, value in asdict(self).items()}


@dataclass
class _Sums:
    """What was measured so far."""

    seconds: float = 0.0
    selections: float = 0.0
    copying: float = 0.0
    moved: float = 0.0
    fixed: float = 0.0
    swaps: float = 0.0
    unit_LU: Any = field(default=None)


class Rebalancer:
    """Watches a balanced model and changes its slots while it serves; a context manager.

    Attributes:
        plan: in force.
        reports: of the latest steps.
        ledger: what each change has won on the load that came.
        steps: closed so far.
        last_lis: [L] LIS over units of the last step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        store: ExpertStore,
        *,
        step_tokens: int = 4096,
        staging_bytes: int | None = None,
        patience: float = 5.0,
        costs: Costs | None = None,
        background: bool = True,
        on_report: Callable[[Report], None] | None = None,
    ) -> None:
        """A rebalancer that does not watch yet.

        Args:
            model: carries a plan.
            policy: decides after each step.
            store: of the model's experts.
            step_tokens: real tokens of a step, at least; a forward is never divided.
            staging_bytes: most that new slots may take beside the plan's own bytes while a change is made ready; those of
                the largest layer, before or after, when omitted. A change that needs more is made in rounds.
            patience: seconds that a change waits for pinned requests to end before it is put off.
            costs: of a deployment that this process stands for; measured on this model and machine when omitted.
            background: plan and stage in a thread of its own; else only when `advance` is called.
            on_report: called with each report, in the thread that made it.

        Raises:
            ModelError: the model carries no plan, or is spread over devices by accelerate.
            PlanError: an option out of range, or a store of another model.
        """
        plan = plan_of(model)
        self._slots = slots_of(model)
        if plan is None or not self._slots:
            raise ModelError("the model is not balanced; apply a plan first.")
        if any(hasattr(module, "_hf_hook") for slots in self._slots for module in slots.modules()):
            raise ModelError("accelerate moves this model's weights about; load it on one device to change its slots.")
        if step_tokens < 1 or patience < 0 or (staging_bytes is not None and staging_bytes < 1):
            raise PlanError(
                f"step_tokens {step_tokens}, patience {patience}, staging_bytes {staging_bytes} given; allowed are at least "
                "one token and one byte, and a patience from 0."
            )
        store.check(plan)
        if any(group.rotated != store.rotated for slots in self._slots for group in slots.groups if not group.form.is_float):
            raise PlanError(
                "the model's experts were rounded rotated and the store's were not, or the other way round; make a store from "
                "experts that were rounded alike (`ExpertStore.keep`)."
            )
        self.plan, self.reports, self.steps = plan, deque[Report](maxlen=REPORTS), 0
        self.ledger = Ledger()
        self.last_lis = np.full(len(self._slots), np.nan)
        self._limit = staging_bytes
        self._model, self._policy, self._store = model, policy, store
        self._step_tokens, self._patience, self._given = step_tokens, patience, costs
        self._background, self._on_report = background, on_report
        self._gate = Gate()
        self._watch = Watch(model, find_moe_layers(model), self._slots, self._gate, self._served)
        self._sums = _Sums()
        self._failures = self._skip = 0
        self._wake = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Rebalancer:
        if self._given is None:
            self._trial()
        self._watch.__enter__()
        if self._background:
            self._stopping = False
            self._thread = threading.Thread(target=self._run, name="equipoise-rebalancer", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            with self._wake:
                self._stopping = True
                self._wake.notify_all()
            self._thread.join()
            self._thread = None
        self._watch.__exit__()

    @property
    def staging_bytes(self) -> int:
        """Most that new slots may take beside the plan's own bytes."""
        return largest_layer(self.plan) if self._limit is None else self._limit

    def request(self) -> AbstractContextManager[None]:
        """A request that runs under one plan as a whole: a change waits for its end, and new requests for the change."""
        return self._gate.request()

    @property
    def costs(self) -> Costs:
        """What imbalance and changes cost: as given, else as measured so far."""
        if self._given is not None:
            return self._given
        s = self._sums
        return Costs(
            per_selection=s.seconds / max(s.selections, 1.0),
            per_byte=s.copying / max(s.moved, 1.0),
            per_swap=s.fixed / max(s.swaps, 1.0),
            measured=s.selections > 0,
        )

    def advance(self, *, close: bool = False) -> Report | None:
        """Close the step if it is full, decide, and carry the decision out, in this thread.

        Args:
            close: also close a step that is not full, if anything was served.

        Returns:
            what became of it; None when no step was closed.

        Raises:
            EquipoiseError: the rebalancer works in the background, or this was called from within a request or forward.
        """
        if self._thread is not None:
            raise PlanError("this rebalancer works in the background; make it with background=False to advance it by hand.")
        full = self._watch.tokens >= (1 if close else self._step_tokens)
        return self._step(self._watch.take()) if full else None

    def _served(self) -> None:
        """After a forward: wake the thread when a step is full."""
        if self._thread is not None and self._watch.tokens >= self._step_tokens:
            with self._wake:
                self._wake.notify_all()

    def _run(self) -> None:
        """The thread: a step when one is full; while none is, formats that the store lacks are made ahead."""
        missing = self._store.missing()
        while True:
            with self._wake:
                self._wake.wait_for(
                    lambda: self._stopping or self._watch.tokens >= self._step_tokens, 0.0 if missing else None
                )  # fmt: skip
                if self._stopping:
                    return
            if self._watch.tokens >= self._step_tokens:
                self._step(self._watch.take())
            elif missing:
                layer, form = missing.pop(0)
                try:
                    self._store.make(layer, form)
                except Exception:  # nothing depends on it yet: it is made again, or complained of, when it is needed
                    LOG.warning("could not make the %s experts of layer %d ahead", form, layer, exc_info=True)

    def _step(self, served: Served) -> Report:
        self.steps += 1
        s = self._sums
        s.seconds, s.selections = FORGET * s.seconds + served.seconds, FORGET * s.selections + served.timed
        s.unit_LU = served.unit_LU if s.unit_LU is None else s.unit_LU + served.unit_LU
        self.last_lis = lis(served.unit_LU)
        costs = self.costs
        self.ledger.serve(served.load_LE, costs.per_selection)
        head = (self.steps, served.tokens, mean_lis(served.unit_LU), mean_lis(s.unit_LU))
        if self._skip > 0:
            self._skip -= 1
            return self._report(Report(*head, float("nan"), "kept", f"no plan is made for {self._skip} more steps: failures"))
        begun = time.perf_counter()
        try:
            decided = self._policy.decide(served.load_LE, self.plan, costs)
            if decided.plan is not None:
                check_change(self.plan, decided.plan)
        except Exception as error:  # whatever a planner raises, serving goes on with the plan in force, and it is said
            return self._failed(head, float("nan"), "planning", error, time.perf_counter() - begun)
        if decided.plan is None:
            return self._report(
                Report(*head, decided.drift, "kept", decided.reason, decided.pays, planning=decided.seconds)
            )  # fmt: skip
        return self._change(head, decided, decided.plan)

    def _change(self, head: tuple[int, int, float, float], decided: Decision, target: Plan) -> Report:
        """Carry a decision out, round by round."""
        before, s = self.plan, self._sums
        most = moved = 0
        staging = paused = 0.0
        what = "staging"
        try:
            limit = max(self.staging_bytes, largest_layer(target)) if self._limit is None else self._limit
            for number, plan in enumerate(rounds(self.plan, target, limit), start=1):
                what = f"staging (round {number})"
                staged = stage(self._slots, self.plan, plan, self._store)
                staging += staged.seconds
                if staged.moved_bytes:
                    s.copying = FORGET * s.copying + staged.copying
                    s.moved = FORGET * s.moved + staged.moved_bytes
                what = f"the swap (round {number})"
                pause = commit(self._model, self._slots, staged, self._gate, self._patience)
                self.plan = plan
                most, moved = max(most, staged.staged_bytes), moved + staged.moved_bytes
                s.fixed = FORGET * s.fixed + staged.seconds - staged.copying + pause
                s.swaps, paused = FORGET * s.swaps + 1, paused + pause
                del staged  # and with it the old slots
        except SwapPostponedError as error:
            return self._report(
                Report(*head, decided.drift, "postponed", str(error), planning=decided.seconds, staging=staging)
            )  # fmt: skip
        except Exception as error:  # as above: whatever it is, the plan in force serves on
            return self._failed(head, decided.drift, what, error, decided.seconds, staging)
        finally:
            if self.plan is not before:
                spent = staging + paused
                self.ledger.change(
                    Entry(self.steps, decided.pays, spent, decided.slots, moved), before, self.plan
                )  # fmt: skip
        self._failures = 0
        return self._report(
            Report(
                *head, decided.drift, "swapped", decided.reason, decided.pays, decided.slots, moved, most, decided.seconds,
                staging, paused,
            )
        )  # fmt: skip

    def _failed(
        self,
        head: tuple[int, int, float, float],
        drift: float,
        what: str,
        error: Exception,
        planning: float,
        staging: float = 0.0,
    ) -> Report:
        self._failures += 1
        self._skip = min(2**self._failures - 2, MOST_SKIPPED)
        LOG.warning("%s failed, the plan in force stays: %s", what, error, exc_info=True)
        reason = f"{what} failed ({type(error).__name__}: {error}); the plan in force stays"
        return self._report(Report(*head, drift, "failed", reason, planning=planning, staging=staging))

    def _report(self, report: Report) -> Report:
        self.reports.append(report)
        if self._on_report is not None:
            self._on_report(report)
        return report

    def _trial(self) -> None:
        """Measure what a swap and a byte of a moved slot cost before there were any, on slots that are thrown away."""
        begun = time.perf_counter()
        restage(self._slots, self.plan)
        self._sums.fixed, self._sums.swaps = time.perf_counter() - begun, 1.0
        begun, size = time.perf_counter(), 0
        for group in self._slots[0].groups:
            trial = group.like(min(len(group), TRIAL_SLOTS))
            for index in range(len(trial)):
                self._store.copy_into(trial, index, self._slots[0].layer, index % self._slots[0].num_experts)
            size += trial.nbytes
        self._sums.copying, self._sums.moved = time.perf_counter() - begun, float(size)


def summary(reports: Sequence[Report], ledger: Ledger) -> dict[str, Any]:
    """A stream in figures, for JSON and tables: time-averaged LIS, changes, what they cost and what they won."""
    swapped = [r for r in reports if r.outcome == "swapped"]
    return {
        "steps": len(reports),
        "tokens": sum(r.tokens for r in reports),
        "mean_instantaneous_lis": float(np.mean([r.lis for r in reports])) if reports else None,
        "cumulative_lis": reports[-1].cumulative_lis if reports else None,
        "swapped": len(swapped),
        "failed": sum(r.outcome == "failed" for r in reports),
        "postponed": sum(r.outcome == "postponed" for r in reports),
        "moved_bytes": sum(r.moved_bytes for r in swapped),
        "most_staged_bytes": max((r.staged_bytes for r in swapped), default=0),
        "seconds_planning": sum(r.planning for r in reports),
        "seconds_staging": sum(r.staging for r in reports),
        "seconds_paused": sum(r.paused for r in reports),
        "changes": [asdict(entry) | {"paid": entry.paid} for entry in ledger.entries],
    }
