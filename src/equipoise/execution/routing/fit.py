"""A routing policy fitted to a model on text: how each router is read, and the numbers that its scores give.

The text is run through the model and the routers' scores of its real tokens are kept; padding counts for nothing. Where a
policy changes what deeper layers see, the text is run again with the policy in force and the numbers are fitted anew.

Shapes: L MoE layers, E experts, T real tokens, W classes that a router ranks, K top-k.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from equipoise import __version__
from equipoise.artifacts.routing import LayerRouting, RoutingPolicy
from equipoise.errors import EquipoiseError, ModelError
from equipoise.execution.layerwise import Batch
from equipoise.execution.routing.attach import UNREAD, check_layer, detach_policy, here_of, put_hooks, routed
from equipoise.execution.routing.policies import Here, Policy, Seen, make_policy, options_of
from equipoise.models.choice import Choice
from equipoise.models.layers import MoELayer, find_moe_layers, model_facts, name_of, observe
from equipoise.models.policy_marks import policy_of
from equipoise.models.recorder import record
from equipoise.models.tokens import TokenTracker

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int], None]
EXPLAINED = 0.01
"""Largest relative spread of what should be one number, such as the sum of renormalised weights: room for 16-bit weights."""


def fit_policy(
    model: PreTrainedModel,
    name: str,
    batches: Sequence[Batch],
    options: Mapping[str, Any] | None = None,
    *,
    model_name: str = "",
    sweeps: int | None = None,
    progress: Progress = lambda done, total: None,
) -> RoutingPolicy:
    """Fit a policy to a model on text.

    Args:
        model: a model under its own router; it is left as it was.
        name: of the policy, in `execution.routing.policies.POLICIES`.
        batches: the text, such as `profiling.sequences.text_batches` gives. A few thousand tokens suffice; the scores of all
            of them are held: 4 bytes * tokens * MoE layers * experts, twice that for gates with a bias.
        options: of the policy.
        model_name: as the user calls the model.
        sweeps: how often the text is run, the policy in force from the second time on; the policy's own number when None.
        progress: told after each forward pass.

    Returns:
        the policy, for `attach_policy`.

    Raises:
        EquipoiseError: unknown policy or option, an option that does not fit a layer, no text.
        ModelError: routers that cannot be read or changed so; the message says why.
    """
    rule = make_policy(name, options)
    if policy_of(model) is not None:
        raise EquipoiseError("the model runs under a routing policy already; take that off first (detach_policy).")
    if not batches:
        raise EquipoiseError(f"policy '{name}' is fitted on text; give at least one batch.")
    layers = find_moe_layers(model)
    for layer in layers:
        if layer.layout in UNREAD:
            raise ModelError(f"{type(layer.experts).__name__} cannot be given a routing policy: {UNREAD[layer.layout]}.")
    facts = model_facts(model, model_name or name_of(model))
    total = len(batches) * ((sweeps or rule.sweeps) + 1)
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    blank = tuple(LayerRouting(path=layer.path, scores="none", weights="unknown") for layer in layers)
    policy = RoutingPolicy(
        name=name, options=options_of(rule), model=facts.name, fingerprint=facts.fingerprint, text_sha256=_digest(batches),
        equipoise_version=__version__, layers=blank,
    )  # fmt: skip
    for sweep in range(sweeps or rule.sweeps):
        with _explained(model, policy):
            seen = _gather(model, layers, batches, policy if sweep else None, rule, advance)
        fitted = []
        for layer, found in zip(layers, seen, strict=True):
            if found is None:
                fitted.append(policy.layers[layer.index])
                continue
            numbers = policy.layers[layer.index] if sweep else read_layer(layer, found)
            here = Here(layer.index, layer.path, layer.num_experts, layer.top_k, numbers, _none)
            check_layer(rule, layer, here)
            fitted.append(numbers.model_copy(update=rule.fit(found, here)))
        tokens = max(len(found.experts_TK) for found in seen if found is not None)
        policy = policy.model_copy(update={"layers": tuple(fitted), "tokens": tokens})
    return _tried(model, policy, batches, advance)


def _tried(
    model: PreTrainedModel, policy: RoutingPolicy, batches: Sequence[Batch], advance: Callable[[], None]
) -> RoutingPolicy:
    """The policy with the experts of a token that it comes to; running it shows that the model's own code bears it."""
    recorder = record(model, transitions=False, coactivation=False)
    with _explained(model, policy), routed(model, policy, check=False), _evaluating(model), recorder:
        for batch in batches:
            _forward(model, batch)
            advance()
    mean_L = recorder.counts.sum((0, 1, 3)) / recorder.tokens_by_layer.sum((0, 1)).clip(1)
    layers = [numbers.model_copy(update={"mean_k": mean}) for numbers, mean in zip(policy.layers, mean_L.tolist(), strict=True)]
    return policy.model_copy(update={"layers": tuple(layers)})


@contextmanager
def _explained(model: Any, policy: RoutingPolicy) -> Iterator[None]:
    """What the model's own code raises when it is sent other numbers of experts, as an error of the user."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # no fault of the policy
    except (RuntimeError, IndexError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot run under policy '{policy.name}' with these options: its own code fails with "
            f"'{str(error).splitlines()[0]}'; use bias, which changes no number of experts."
        ) from error


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """No dropout; the model's own mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _none(rows: int) -> Any:
    raise AssertionError("nothing is fitted by position")


@dataclass
class _Heap:
    """What was seen of one layer, batch by batch."""

    choice: Choice | None = None
    ranked: list[Tensor] = field(default_factory=list)
    score: list[Tensor] = field(default_factory=list)
    experts: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    kind: str = ""

    def seen(self) -> Seen:
        """All batches together."""
        score_TW = torch.cat(self.score) if self.score else None
        return Seen(torch.cat(self.ranked), score_TW, self.kind, torch.cat(self.experts), torch.cat(self.weights))


def _gather(
    model: PreTrainedModel,
    layers: tuple[MoELayer, ...],
    batches: Sequence[Batch],
    policy: RoutingPolicy | None,
    rule: Policy,
    advance: Callable[[], None],
) -> list[Seen | None]:
    """What the routers do with the text, before the policy changes it; under a policy, in the layers behind those it changed.

    None for a router that does not go by scores.
    """
    heaps = [_Heap() for _ in layers]

    def listen(index: int, choice: Choice) -> None:
        heaps[index].choice = choice

    def arrived(layer: MoELayer) -> Callable[[Tensor, Tensor, Tensor], None]:
        def seen(hidden: Tensor, experts: Tensor, weights: Tensor) -> None:
            heap = heaps[layer.index]
            if heap.choice is None:
                return  # a router that does not go by scores
            real = tracker.batch(layer.stack, len(experts)).real_T.to(experts.device)
            choice = heap.choice
            heap.kind = choice.kind
            heap.ranked.append(choice.ranked_TW[real].float().cpu())
            if choice.score_TW is not None and choice.score_TW.data_ptr() != choice.ranked_TW.data_ptr():
                heap.score.append(choice.score_TW[real].float().cpu())
            heap.experts.append((experts if policy is None or not rule.picks else choice.experts_TK)[real].cpu())
            heap.weights.append(weights[real].float().cpu())

        return seen

    heres = [here_of(layer, policy, None) for layer in layers] if policy else [_silent(layer) for layer in layers]
    with TokenTracker(model, layers) as tracker, _evaluating(model):
        handles = [observe(layer, arrived(layer)) for layer in layers]  # before the hooks that drop
        try:
            put_hooks(model, layers, rule if policy else None, heres, listen)
            for batch in batches:
                _forward(model, batch)
                advance()
        finally:
            detach_policy(model)
            for handle in handles:
                handle.remove()
    if not any(heap.ranked for heap in heaps):
        raise ModelError(
            f"no router of {type(model).__name__} ranks its experts by scores in a call of topk (they may go by token ids, or "
            "sample), so no policy can answer for them."
        )
    return [_complete(heap) if heap.ranked else None for heap in heaps]


def _complete(heap: _Heap) -> Seen:
    """A heap as it is read: scores that are also the ranks were kept once."""
    seen = heap.seen()
    return seen if seen.score_TW is not None or not seen.kind else Seen(
        seen.ranked_TW, seen.ranked_TW, seen.kind, seen.experts_TK, seen.weights_TK
    )  # fmt: skip


def _silent(layer: MoELayer) -> Here:
    numbers = LayerRouting(path=layer.path, scores="none", weights="unknown")
    return Here(layer.index, layer.path, layer.num_experts, layer.top_k, numbers, _none)


def _forward(model: Any, batch: Batch) -> None:
    device = next(model.parameters()).device
    inputs = {name: torch.as_tensor(array).to(device) for name, array in batch.inputs().items()}
    accepted = inspect.signature(model.forward).parameters
    options = {"use_cache": False, "logits_to_keep": 1}
    with torch.no_grad():
        model(**inputs, **{name: value for name, value in options.items() if name in accepted})


def read_layer(layer: MoELayer, seen: Seen) -> LayerRouting:
    """How a router's scores and gate weights are read, from what it did: nothing is asked of its configuration.

    Scores are the softmax or sigmoid that it computed; where it computed none over all experts, the ranks themselves when they
    are not negative, else the softmax of the ranks. Weights are renormalised when their sum over the chosen is one number for
    all tokens, or when each expert has a factor of its own over score / (sum of the chosen scores); raw when it has one over
    its score.

    Args:
        layer: the layer.
        seen: what it did.
    """
    scores: Any = seen.kind or ("choice" if bool((seen.ranked_TW[seen.ranked_TW.isfinite()] >= 0).all()) else "logits")
    score_TW = seen.score_TW if seen.kind else seen.ranked_TW if scores == "choice" else seen.ranked_TW.softmax(-1)
    assert score_TW is not None, "a router that computed scores was seen with them"
    told = {"path": layer.path, "scores": scores}
    inside_T = (seen.experts_TK < score_TW.shape[1]).all(-1) & (seen.weights_TK > 0).all(-1)
    if not bool(inside_T.any()):
        return LayerRouting(weights="unknown", **told)
    experts_TK, weights_TK = seen.experts_TK[inside_T], seen.weights_TK[inside_T]
    chosen_TK = score_TW[inside_T].gather(1, experts_TK)
    sum_T = weights_TK.sum(-1)
    if float(sum_T.std(unbiased=False) / sum_T.mean()) < EXPLAINED:
        return LayerRouting(weights="renormalised", **told)
    share_TK = chosen_TK / chosen_TK.sum(-1, keepdim=True)
    if _one_factor_each(weights_TK / share_TK, experts_TK):
        return LayerRouting(weights="renormalised", mass="scores", **told)
    if _one_factor_each(weights_TK / chosen_TK, experts_TK):
        return LayerRouting(weights="raw", mass="scores", **told)
    return LayerRouting(weights="unknown", **told)


def _one_factor_each(ratio_TK: Tensor, experts_TK: Tensor) -> bool:
    """Whether a ratio is one number for each expert, over its tokens."""
    ratio, expert = ratio_TK.reshape(-1).double().numpy(), experts_TK.reshape(-1).numpy()
    count = np.bincount(expert)
    often = count[expert] > 1
    if not often.any():
        return False
    mean = np.bincount(expert, ratio) / np.maximum(count, 1)
    return bool(np.sqrt(np.mean((ratio[often] / mean[expert[often]] - 1) ** 2)) < EXPLAINED)


def _digest(batches: Sequence[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name, array in sorted(batch.inputs().items()):
            digest.update(f"{name}{tuple(array.shape)}".encode())
            digest.update(np.ascontiguousarray(array, "<i8").tobytes())
    return digest.hexdigest()
