"""A routing policy put on a model, and taken off: hooks on its routers and experts, and marks for those who watch.

Shapes: T rows, C experts that were picked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

import equipoise.execution.routing.drop
import equipoise.execution.routing.pick  # noqa: F401  # both register their policies
from equipoise.artifacts.routing import RoutingPolicy
from equipoise.errors import EquipoiseError, ModelError, PlanError
from equipoise.execution.balanced_config import plan_of
from equipoise.execution.install import shared_tracker
from equipoise.execution.routing.policies import POLICIES, Here, Policy, make_policy, scores_of
from equipoise.models.adapters.base import call_arguments, forward_names
from equipoise.models.choice import Choice, ChoiceTap
from equipoise.models.layers import MoELayer, find_moe_layers, model_facts, name_of, observe
from equipoise.models.policy_marks import MARK, POLICY, RoutingMark, policy_of
from equipoise.models.tokens import TokenBatch, TokenTracker

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["POLICIES", "attach_policy", "detach_policy", "routed"]

HOOKS = "_equipoise_policy_hooks"
DROPPING = ("fused", "fused-identity")
"""Families that can be sent fewer experts than the router chose, as id E with weight 0."""
RESIZING = ("fused", "dbrx")
"""Families whose router may pick another number of experts; others count on their top-k later on."""
UNREAD = {
    "fused-modality": "text and vision tokens are routed apart, so it is unknown which token a row is",
    "nllb_moe": "transformers computes its experts wrongly",
}
ChoiceListener = Callable[[int, Choice], None]
"""Called as listener(layer, choice) at each choice of a router, before the policy answers it."""


def attach_policy(model: PreTrainedModel, policy: RoutingPolicy, *, check: bool = True) -> PreTrainedModel:
    """Have a model run under a routing policy, until `detach_policy`.

    Args:
        model: the model that the policy was fitted for, balanced or not.
        policy: what decides.
        check: make sure that it is the same model, which reads samples of all weights.

    Returns:
        the same model.

    Raises:
        PlanError: the policy was fitted for another model.
        EquipoiseError: the model runs under a policy already, or an option does not fit a layer.
        ModelError: a family that cannot be routed so; the message says why.
    """
    if policy_of(model) is not None:
        raise EquipoiseError("the model runs under a routing policy already; take that off first (detach_policy).")
    layers = find_moe_layers(model)
    if check:
        plan = plan_of(model)
        policy.check_model(model_facts(model, name_of(model)) if plan is None else plan.model)
    if len(layers) != len(policy.layers):
        raise PlanError(f"the policy has {len(policy.layers)} MoE layers, the model {len(layers)}; fit it on this model.")
    rule = make_policy(policy.name, policy.options)
    heres = [here_of(layer, policy, None) for layer in layers]
    for layer, here in zip(layers, heres, strict=True):
        check_layer(rule, layer, here)
    try:
        put_hooks(model, layers, rule, heres)
    except BaseException:
        detach_policy(model)  # or the layers that were hooked already would stay so
        raise
    setattr(model, POLICY, policy)
    return model


def detach_policy(model: PreTrainedModel) -> None:
    """Have a model decide by its own router again; nothing happens when it does."""
    hooks: list[_LayerHooks] = model.__dict__.pop(HOOKS, [])
    for hook in hooks:
        hook.remove()
    model.__dict__.pop(POLICY, None)


@contextmanager
def routed(model: PreTrainedModel, policy: RoutingPolicy | None, *, check: bool = True) -> Iterator[PreTrainedModel]:
    """Run a model under a policy inside the `with` block, as `attach_policy` does; under its own router for None."""
    if policy is None:
        yield model
        return
    attach_policy(model, policy, check=check)
    try:
        yield model
    finally:
        detach_policy(model)


def check_layer(rule: Policy, layer: MoELayer, here: Here) -> None:
    """Everything about a layer that a policy cannot do, before it is put on.

    Raises:
        ModelError: a family that cannot be routed so.
        EquipoiseError: an option that does not fit.
    """
    kind = type(layer.experts).__name__
    if layer.layout in UNREAD:
        raise ModelError(f"{kind} cannot be given a routing policy: {UNREAD[layer.layout]}.")
    if here.numbers.scores == "none":
        return
    rule.check(here)
    if rule.drops and not rule.identity and (layer.layout not in DROPPING or layer.top_k == 1):
        why = "a token has one expert" if layer.top_k == 1 else "transformers' code for its experts has no id for none"
        raise ModelError(f"{kind} (layout '{layer.layout}', top-{layer.top_k}) cannot be sent fewer experts: {why}.")
    if rule.columns(layer.top_k) != layer.top_k and layer.layout not in RESIZING:
        raise ModelError(f"{kind} (layout '{layer.layout}') counts on its top-{layer.top_k}, which cannot be changed.")
    if rule.drops and not rule.identity and here.numbers.weights == "unknown":
        raise ModelError(
            f"the gate weights of {layer.path} follow from its scores by no rule known here (they may be normalised together "
            "with shared experts), so what fewer experts should weigh is unknown; use bias or static_k."
        )


def here_of(layer: MoELayer, policy: RoutingPolicy, tokens: Callable[[int], TokenBatch] | None) -> Here:
    """A layer as a policy sees it."""
    return Here(layer.index, layer.path, layer.num_experts, layer.top_k, policy.layers[layer.index], tokens or _no_tokens)


def put_hooks(
    model: PreTrainedModel,
    layers: tuple[MoELayer, ...],
    rule: Policy | None,
    heres: list[Here],
    listener: ChoiceListener | None = None,
) -> None:
    """Hook all layers; what is hooked already on experts sees them before any is dropped.

    Args:
        model: the model.
        layers: its MoE layers.
        rule: what decides; None leaves the routers alone and only listens.
        heres: the layers as the rule sees them.
        listener: told of each choice.
    """
    tracker = shared_tracker(model, layers) if rule is not None and rule.needs_tokens else None
    hooks: list[_LayerHooks] = []
    setattr(model, HOOKS, hooks)
    for layer, here in zip(layers, heres, strict=True):
        if tracker is not None:
            here.tokens = _Tokens(tracker, layer.stack)
        hooks.append(_LayerHooks(layer, rule, here, listener))


@dataclass(frozen=True)
class _Tokens:
    """The rows of the call in progress of one stack."""

    tracker: TokenTracker
    stack: str

    def __call__(self, rows: int) -> TokenBatch:
        return self.tracker.batch(self.stack, rows)


def _no_tokens(rows: int) -> TokenBatch:
    raise AssertionError("a policy that needs tokens was hooked without them")


class _LayerHooks:
    """The hooks of one layer."""

    def __init__(self, layer: MoELayer, rule: Policy | None, here: Here, listener: ChoiceListener | None) -> None:
        self.rule, self.here, self.listener, self.experts = rule, here, listener, layer.experts
        self._choice: Choice | None = None
        self._handles: list[Any] = []
        self._was_parallel = getattr(layer.experts, "_is_expert_parallel", None)
        if here.numbers.scores == "none" and listener is None:
            return  # this router does not go by scores
        drops = rule is not None and rule.drops and not rule.identity and here.numbers.scores != "none"
        self._by_scores = drops and (here.numbers.mass == "scores" or getattr(rule, "mass", "") == "full")
        if listener is not None or self._by_scores or (rule is not None and rule.picks):
            self._handles.append(ChoiceTap(layer, self._answer, required=listener is None))
        if drops:
            self._handles.append(layer.experts.register_forward_pre_hook(self._drop, with_kwargs=True))
            if self._was_parallel is not None:
                layer.experts._is_expert_parallel = True  # id E is no expert: transformers' kernels then leave it out
        if rule is not None and here.numbers.scores != "none":
            self._columns = rule.columns(layer.top_k)
            setattr(layer.experts, MARK, RoutingMark(self._columns, drops))
            if self._columns != layer.top_k:
                self._handles.append(observe(layer, self._count))

    def remove(self) -> None:
        """Take them out."""
        for handle in self._handles:
            handle.remove()
        self.experts.__dict__.pop(MARK, None)
        if self._was_parallel is not None:
            self.experts._is_expert_parallel = self._was_parallel

    def _count(self, hidden: Tensor, experts_TC: Tensor, weights_TC: Tensor) -> None:
        """Make sure that the model passed on as many experts as were picked."""
        if experts_TC.shape != weights_TC.shape or experts_TC.shape[1] != self._columns:
            raise ModelError(
                f"{self.here.path} was picked {self._columns} experts a token and was sent {experts_TC.shape[1]} with "
                f"{weights_TC.shape[1]} weights: its code counts on top-{self.here.top_k}. Use bias or top_p with mass topk."
            )

    def _answer(self, choice: Choice) -> Tensor | None:
        if self.listener is not None:
            self.listener(self.here.index, choice)
        if self._by_scores:
            self._choice = choice
        return None if self.rule is None else self.rule.pick(choice, self.here)

    def _drop(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Leave out the experts that the policy does not keep: id E, weight 0."""
        assert self.rule is not None, "only a policy drops"
        _, experts, weights = call_arguments(module, args, kwargs, 3)
        experts_TC, weights_TC = experts.reshape(-1, experts.shape[-1]), weights.reshape(-1, weights.shape[-1])
        mass_TC, total_T = weights_TC.float(), None
        if self._by_scores:
            assert self._choice is not None, "the router runs before its experts"
            score_TW = scores_of(self._choice, self.here)
            mass_TC = score_TW.gather(1, experts_TC)
            total_T = score_TW.sum(-1) if getattr(self.rule, "mass", "") == "full" else None
            self._choice = None
        keep_TC = self.rule.keep(mass_TC, total_T, self.here)
        if keep_TC is None:
            return None
        keep_TC = keep_TC & (weights_TC != 0)
        new_TC = weights_TC.masked_fill(~keep_TC, 0)
        if self.here.numbers.weights == "renormalised":
            rest_T1 = (mass_TC * keep_TC).sum(-1, keepdim=True)
            scaled_TC = (new_TC.float() * (mass_TC.sum(-1, keepdim=True) / rest_T1)).to(weights_TC.dtype)
            new_TC = scaled_TC.where((~keep_TC).any(-1, keepdim=True), new_TC)
        new = {
            1: experts_TC.masked_fill(~keep_TC, self.here.num_experts).view(experts.shape),
            2: new_TC.view(weights.shape),
        }
        names = forward_names(module)
        positional = tuple(new.get(place, value) for place, value in enumerate(args))
        named = {key: new[names.index(key)] if key in names[1:3] else value for key, value in kwargs.items()}
        return positional, named
