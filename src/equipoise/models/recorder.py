"""Record the experts that each real token was sent to, by the model's own decision.

    with record(model, scenarios=("code", "math")) as recorder:
        model(**batch)
        recorder.scenario = "math"
        model.generate(**prompt)
    recorder.counts  # [S, 2, L, E]

Selections are read from what the router passes to the experts, never derived from logits. Memory does not grow with
tokens unless a trace is asked for.

Shapes: S scenarios, L MoE layers, E experts of the widest layer, T rows or real tokens, K top-k, W windows; 2 phases.
A layer whose block calls its experts C times in one forward pass (a chain of experts) has C routing events;
its K is of all together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equipoise.errors import RecordingError
from equipoise.models.layers import MoELayer, find_moe_layers, observe
from equipoise.models.tally import MASS_UNIT, Ints, PairCounts, Windows, histogram
from equipoise.models.token_trace import TokenTrace, TraceKeeper
from equipoise.models.tokens import TokenBatch, TokenTracker

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Listener = Callable[[MoELayer, Tensor, Tensor, Tensor, TokenBatch], None]
PREFILL, DECODE = 0, 1


@dataclass(frozen=True, eq=False)
class _Pending:
    """What a layer's experts were sent so far in the forward call in progress, one entry a routing event."""

    batch: TokenBatch
    experts: list[Tensor]
    weights: list[Tensor]


class Recorder:
    """Sums of routing decisions while its context is open; `record` makes one.

    Attributes:
        layers: the model's MoE layers, the rows of all arrays.
        scenarios: names of the traffics kept apart.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        scenarios: Sequence[str],
        window_tokens: int,
        max_windows: int,
        trace: bool,
        transitions: bool,
        coactivation: bool,
    ) -> None:
        self.layers: tuple[MoELayer, ...] = find_moe_layers(model)
        self.scenarios = tuple(scenarios)
        if not self.scenarios or window_tokens < 1 or max_windows < 1:
            raise RecordingError("a recorder needs at least one scenario, one token per window and one window.")
        self._scenario = 0
        self._stacks = list(dict.fromkeys(layer.stack for layer in self.layers))
        self._rows = {s: [layer for layer in self.layers if layer.stack == s] for s in self._stacks}
        size_S, size_L = len(self.scenarios), len(self.layers)
        self._size_E = max(layer.num_experts for layer in self.layers)
        self._counts = np.zeros((size_S, 2, size_L, self._size_E + 1), np.int64)
        self._gate_mass = np.zeros((size_S, size_L, self._size_E + 1), np.int64)
        self._tokens = np.zeros((size_S, 2, len(self._stacks)), np.int64)
        self._windows = Windows(window_tokens, max_windows, size_S, (size_L, self._size_E))
        self._transitions = PairCounts(size_L - 1, self._size_E) if transitions and size_L > 1 else None
        self._coactivation = PairCounts(size_L, self._size_E) if coactivation else None
        self._trace = {s: TraceKeeper(self._rows[s], self._size_E) for s in self._stacks} if trace else None
        self._listeners: list[Listener] = []
        self._pending: dict[int, _Pending] = {}
        self._tracker = TokenTracker(model, self.layers)
        self._tracker.add_end_listener(self._flush)
        self._handles: list[Any] = []

    def __enter__(self) -> Recorder:
        self._tracker.__enter__()
        self._handles = [observe(layer, self._observer(layer)) for layer in self.layers]
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._pending.clear()
        self._tracker.__exit__()
        if kind is None:
            self.check()

    @property
    def scenario(self) -> str:
        """The traffic to which the next forward calls belong; assign one of `scenarios` to switch."""
        return self.scenarios[self._scenario]

    @scenario.setter
    def scenario(self, name: str) -> None:
        """Switch the traffic."""
        if name not in self.scenarios:
            raise RecordingError(f"unknown scenario '{name}'; this recorder was made for: {', '.join(self.scenarios)}.")
        self._scenario = self.scenarios.index(name)

    def add_listener(self, listener: Listener) -> None:
        """Call `listener(layer, hidden_TD, experts_TK, weights_TK, token_batch)` at each experts call, padding included."""
        self._listeners.append(listener)

    @property
    def counts(self) -> Ints:
        """[S, 2, L, E] selections of each routed expert by real tokens, by phase (prefill, decode)."""
        return self._counts[..., :-1].copy()

    @property
    def gate_mass(self) -> NDArray[np.float64]:
        """[S, L, E] sum of the gate weights of the selections, each rounded to a multiple of `MASS_UNIT`."""
        return np.asarray(self._gate_mass[..., :-1] * MASS_UNIT)

    @property
    def unrouted(self) -> Ints:
        """[S, L] selections that reached no routed expert: over capacity, identity, skip, other modality, policy."""
        return np.asarray(self._counts[..., -1].sum(1))

    @property
    def tokens(self) -> Ints:
        """[S] real tokens of the last stack (the decoder, where there is one)."""
        return np.asarray(self._tokens[..., -1].sum(1))

    @property
    def tokens_by_layer(self) -> Ints:
        """[S, 2, L] real tokens that passed each layer, by phase."""
        return np.asarray(self._tokens[..., [self._stacks.index(layer.stack) for layer in self.layers]])

    @property
    def windows(self) -> Ints:
        """[W, L, E] selections in consecutive stretches of real tokens of one scenario."""
        return self._windows.arrays()[0]

    @property
    def window_scenario(self) -> Ints:
        """[W] scenario of each window."""
        return self._windows.arrays()[1]

    @property
    def transitions(self) -> Ints:
        """[L-1, E, E] a token's pairs (expert in layer l, in layer l+1); zero between stacks; empty if not recorded.

        Of a layer of several routing events, the last counts towards the next layer, the first from the layer before.
        """
        return np.zeros((0, 0, 0), np.int64) if self._transitions is None else self._transitions.numpy()

    @property
    def coactivation(self) -> Ints:
        """[L, E, E] tokens that chose both experts in one routing event; the diagonal is the load; empty if not recorded."""
        return np.zeros((0, 0, 0), np.int64) if self._coactivation is None else self._coactivation.numpy()

    @property
    def trace(self) -> dict[str, TokenTrace]:
        """Every selection by stack.

        Raises:
            RecordingError: no trace was asked for.
        """
        if self._trace is None:
            raise RecordingError("no trace was kept; record with trace=True (its memory grows with the tokens).")
        return {stack: keeper.trace() for stack, keeper in self._trace.items() if keeper}

    def pass_over(self, tokens: int) -> None:
        """Leave a forward call to another process: only the windows of the current scenario move on.

        The sums of processes that have divided all forward calls so among themselves, in the same order, make those of one
        process that runs them all (`absorb`).

        Args:
            tokens: real tokens of the call's last stack.
        """
        self._windows.advance(self._scenario, tokens)

    def check(self) -> None:
        """Compare what was recorded with what must have been.

        Raises:
            RecordingError: no token was seen, or a layer's selections are not real tokens times top-k.
        """
        if not self._tokens.sum():
            raise RecordingError(
                "the recorder saw no tokens; run the model inside its context (`with record(model): model(...)`)."
            )
        tokens_L = self.tokens_by_layer.sum((0, 1))
        for layer, seen_E, tokens in zip(self.layers, self._counts.sum((0, 1)), tokens_L, strict=True):
            if seen_E.sum() != tokens * layer.sent.columns:
                raise RecordingError(
                    f"{layer.path} was sent {seen_E.sum()} selections, but {tokens} real tokens x top-{layer.sent.columns} "
                    f"= {tokens * layer.sent.columns}."
                )
            if seen_E[-1] and not self._may_be_unrouted(layer):
                raise RecordingError(f"{layer.path} was sent {seen_E[-1]} expert ids outside 0..{layer.num_experts - 1}.")

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """All sums as numpy arrays, to go on later with `load_state_dict`; a trace is not part of it."""
        state: dict[str, NDArray[Any]] = {
            "counts": self._counts.copy(),
            "gate_mass": self._gate_mass.copy(),
            "tokens": self._tokens.copy(),
            "transitions": self.transitions,
            "coactivation": self.coactivation,
        }
        return state | self._windows.state()

    def load_state_dict(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from sums of an earlier recorder of the same model, scenarios and options.

        Raises:
            RecordingError: the sums are of another shape.
        """
        for name, mine in self.state_dict().items():
            if name not in state or (state[name].shape != mine.shape and not name.startswith("window_closed")):
                raise RecordingError(f"cannot resume: '{name}' is missing or of another shape; start the recording anew.")
        self._counts, self._gate_mass, self._tokens = (state[k].copy() for k in ("counts", "gate_mass", "tokens"))
        self._windows.load(dict(state))
        for name, pairs in (("transitions", self._transitions), ("coactivation", self._coactivation)):
            if pairs is not None:
                pairs.load(state[name])

    def absorb(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Add the `state_dict` of another process that ran the forward calls which this one passed over.

        Raises:
            RecordingError: the sums are of another shape, or the processes did not go through the same calls.
        """
        mine = self.state_dict()
        for name in Windows.COURSE:
            if not np.array_equal(mine[name], state[name]):
                raise RecordingError(f"cannot join two recordings: their '{name}' differ, so they are not of the same calls.")
        self.load_state_dict({name: array if name in Windows.COURSE else array + state[name] for name, array in mine.items()})

    def _observer(self, layer: MoELayer) -> Callable[[Tensor, Tensor, Tensor], None]:
        def seen(hidden_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> None:
            batch = self._tracker.batch(layer.stack, experts_TK.shape[0])
            width = layer.sent.columns // layer.events
            if experts_TK.shape[1] != width:
                raise RecordingError(f"{layer.path} was sent {experts_TK.shape[1]} experts a token, expected top-{width}.")
            experts_TK, weights_TK = experts_TK.detach(), weights_TK.detach()
            pending = self._pending.get(layer.index)
            if pending is None or pending.batch is not batch:  # the first event, or what a call that failed left over
                pending = self._pending[layer.index] = _Pending(batch, [], [])
            if len(pending.experts) == layer.events:
                often = "twice" if layer.events == 1 else f"more than {layer.events} times"
                raise RecordingError(f"{layer.path} was called {often} in one forward call; looped layers are not supported.")
            pending.experts.append(experts_TK)
            pending.weights.append(weights_TK)
            for listener in self._listeners:
                listener(layer, hidden_TD.detach(), experts_TK, weights_TK, batch)

        return seen

    def _flush(self, stack: str, batch: TokenBatch) -> None:
        """Add the selections of a completed forward call, all layers of a stack at once."""
        layers = self._rows[stack]
        ids_LTK, weights_LTK = self._gather(layers, batch)
        tokens = ids_LTK.shape[1]
        scenario, phase, first = self._scenario, DECODE if batch.decode else PREFILL, layers[0].index
        rows = slice(first, first + len(layers))
        counts_LE = histogram(ids_LTK, self._size_E + 1).cpu().numpy()
        counts_LE[:, -1] -= tokens * (ids_LTK.shape[2] - np.array([layer.sent.columns for layer in layers]))  # what filled K up
        self._counts[scenario, phase, rows] += counts_LE
        self._gate_mass[scenario, rows] += histogram(ids_LTK, self._size_E + 1, weights_LTK).cpu().numpy()
        self._tokens[scenario, phase, self._stacks.index(stack)] += tokens
        if self._transitions is not None and len(layers) > 1:
            self._transitions.add(self._event(ids_LTK, layers, -1)[:-1], self._event(ids_LTK, layers, 0)[1:], first)
        if self._coactivation is not None:
            for event in range(max(layer.events for layer in layers)):
                together = self._event(ids_LTK, layers, event)
                self._coactivation.add(together, together, first)
        self._windows.add(scenario, first, counts_LE[:, :-1])
        if stack == self._stacks[-1]:
            self._windows.advance(scenario, tokens)
        if self._trace is not None:
            self._trace[stack].add(ids_LTK, weights_LTK, scenario, batch)

    def _gather(self, layers: Sequence[MoELayer], batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Pending selections of real tokens as ids_LTK (E = none) and weights_LTK, layers of smaller top-k filled up."""
        left = {layer.index: self._pending.pop(layer.index, None) for layer in layers}
        parts = {index: part for index, part in left.items() if part is not None and part.batch is batch}
        if not parts:
            raise RecordingError(f"no MoE layer of the {layers[0].stack} was called; was a part of the model replaced?")
        device = next(iter(parts.values())).experts[0].device
        rows, size_K = batch.rows, max(layer.sent.columns for layer in layers)
        ids_LTK = torch.full((len(layers), rows, size_K), self._size_E, dtype=torch.int64, device=device)
        weights_LTK = torch.zeros((len(layers), rows, size_K), dtype=torch.float32, device=device)
        for row, layer in enumerate(layers):
            part = parts.get(layer.index)
            if part is None or len(part.experts) < layer.events:
                if not self._may_be_unrouted(layer):
                    raise RecordingError(f"{layer.path} was not called in a forward call of its stack.")
                continue
            ids_TK = torch.cat(part.experts, dim=1).to(device)
            absent_TK = (ids_TK < 0) | (ids_TK >= layer.num_experts)
            ids_LTK[row, :, : ids_TK.shape[1]] = ids_TK.masked_fill(absent_TK, self._size_E)
            weights_LTK[row, :, : ids_TK.shape[1]] = torch.cat(part.weights, dim=1)
        if batch.all_real:
            return ids_LTK, weights_LTK
        real = batch.real_T.to(device).nonzero().squeeze(1)
        return ids_LTK[:, real], weights_LTK[:, real]

    def _event(self, ids_LTK: Tensor, layers: Sequence[MoELayer], event: int) -> Tensor:
        """The selections of one routing event of each layer, from the last if negative; E in the columns of the others."""
        if all(layer.events == 1 for layer in layers):
            return ids_LTK if event in (0, -1) else torch.full_like(ids_LTK, self._size_E)
        others_LK = torch.ones(len(layers), ids_LTK.shape[2], dtype=torch.bool, device=ids_LTK.device)
        for row, layer in enumerate(layers):
            width, number = layer.sent.columns // layer.events, event % layer.events if event < 0 else event
            if number < layer.events:
                others_LK[row, number * width : (number + 1) * width] = False
        return ids_LTK.masked_fill(others_LK[:, None], self._size_E)

    @staticmethod
    def _may_be_unrouted(layer: MoELayer) -> bool:
        """Some families and routing policies drop or skip selections; expert parallelism marks those of other ranks."""
        return bool(layer.adapter.partial) or layer.sent.drops or bool(getattr(layer.experts, "_is_expert_parallel", False))


def record(
    model: PreTrainedModel,
    *,
    scenarios: Sequence[str] = ("default",),
    window_tokens: int = 2048,
    max_windows: int = 256,
    trace: bool = False,
    transitions: bool = True,
    coactivation: bool = True,
) -> Recorder:
    """A recorder of a model's routing, to be used as a context.

    Args:
        model: any transformers MoE model; its weights and outputs are left alone.
        scenarios: names of the traffics kept apart; the first is current at the start.
        window_tokens: real tokens after which a window is closed.
        max_windows: windows kept; beyond it, neighbours are merged.
        trace: keep every selection (memory grows with tokens).
        transitions: count pairs of experts in consecutive MoE layers.
        coactivation: count pairs of experts chosen together.

    Returns:
        the recorder; leaving its context checks what it saw.

    Raises:
        ModelError: the model has no MoE layers that can be read.
        RecordingError: on leaving, when it saw no tokens or other than real tokens x top-k selections.
    """
    return Recorder(
        model,
        scenarios=scenarios,
        window_tokens=window_tokens,
        max_windows=max_windows,
        trace=trace,
        transitions=transitions,
        coactivation=coactivation,
    )
