"""Expert parallelism: a plan's units divided among processes, each of which holds its own slots alone.

    torchrun --nproc-per-node 4 script.py

    with start_ranks() as ranks:
        model = parallelize(load_model(name), ranks, plan, dispatch="prefill=quota,decode=metro")
        logits = model(**inputs).logits          # each rank its own inputs

Everything but the experts is on every rank. Layers are called in step: all ranks run equally many forwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal

import torch

from equipoise.artifacts import LayerPlan, Plan
from equipoise.artifacts.routing import require_policy
from equipoise.dispatch.deal import DEALS, check_deal
from equipoise.dispatch.placement import LayerMap, layer_maps
from equipoise.errors import CheckpointError, EquipoiseError, ModelError, PlanError, unknown_name
from equipoise.execution.balanced_config import plan_of
from equipoise.execution.expert_parallel.coherent import make_coherent
from equipoise.execution.expert_parallel.halves import find_halves
from equipoise.execution.expert_parallel.ranks import Ranks
from equipoise.execution.expert_parallel.slots import RankSlots, Rule
from equipoise.execution.expert_parallel.staying import StayingSlots
from equipoise.execution.expert_parallel.wire import GroupForm, tensors_of
from equipoise.execution.families import family_of
from equipoise.execution.install import begin_install, fill_slots, put_slots
from equipoise.execution.slot_group import SlotGroup
from equipoise.execution.slots import ExpertSlots, canonical, slots_of
from equipoise.models.fingerprint import check_weights
from equipoise.models.layers import MoELayer, expert_matrices, expert_vectors, find_moe_layers, model_facts
from equipoise.models.policy_marks import policy_id
from equipoise.models.streamed import streamed_of
from equipoise.precisions import precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Mixed = Literal["refuse", "label"]
Context = Literal["own", "coherent"]
Kind = Callable[..., RankSlots]
"""Makes the slots of one layer."""
POSITIONAL = ("even", "gate_aware")
"""Rules that go by the plan's shares; all others are in `dispatch.deal.DEALS`."""


def parallelize(
    model: PreTrainedModel,
    ranks: Ranks,
    plan: Plan | None = None,
    *,
    dispatch: str = "plan",
    options: Mapping[str, Any] | None = None,
    shared: bool = False,
    context: Context = "own",
    mixed: Mixed = "refuse",
    method: str = "rtn",
    int8_activations: bool = True,
) -> PreTrainedModel:
    """Divide a model's experts among ranks; every rank calls this with the same model and plan.

    Args:
        model: the plan's original model under the plan's routing policy, or a balanced one (of any rounding). Its weights are
            freed layer by layer as slots take their place, so a rank holds all experts once while this begins and its own slots
            alone when it ends.
        ranks: this process among the others.
        plan: whose units are divided among the ranks in equal, consecutive parts; a balanced model brings its own.
        dispatch: which rank serves which token; see `set_rank_dispatch`.
        options: of the rules.
        shared: every rank is given the same batch and gets all outputs, added up over ranks; otherwise each rank has its own
            batch, and tokens travel to the experts and back.
        context: "own": each rank holds the keys and values of its own sequences. "coherent", for models of top-k 1: every
            rank is given the same batch, computes a part of its rows and gets all outputs; keys and values of all rows are on
            all ranks, so that a token in decode stays on the rank of its last expert (`coherent.Coherence`).
        mixed: what to do with rules that choose among unlike copies; see `set_rank_dispatch`.
        method: rounding of quantized slots, of those that need no text; a balanced model is rounded already.
        int8_activations: as for `apply_plan`; a balanced model keeps what it has.

    Returns:
        the same model, changed in place. It cannot be saved.

    Raises:
        PlanError: no plan, a plan of another model, units that the ranks cannot share, or copies that are not alike.
        ModelError: the model is streamed, of a kind that cannot be balanced, or one whose context cannot be coherent.
        EquipoiseError: unknown rule or option.
    """
    if any(isinstance(slots, RankSlots) for slots in slots_of(model)):
        raise ModelError("the model is divided among ranks already; load it again.")
    if streamed_of(model) is not None:
        raise ModelError("the model is read from its files layer by layer; load it whole to divide it among ranks.")
    own = plan_of(model)
    if own is not None and plan is not None and plan.layers != own.layers:
        raise PlanError("the model carries another plan; leave the plan out, or load the original model.")
    plan = own or plan
    if plan is None:
        raise PlanError("a model that is not balanced needs a plan; give one.")
    if context not in ("own", "coherent"):
        raise unknown_name("context", context, ("own", "coherent"))
    coherent = context == "coherent"
    if coherent and shared:
        raise EquipoiseError("context='coherent' divides the rows of the batch that all ranks are given; leave `shared` out.")
    maps = layer_maps(plan, ranks.size)
    rules = _rules(plan.layers, plan.dispatch, dispatch, options or {}, shared, mixed, coherent)
    layers = find_moe_layers(model)
    halves = find_halves(model, layers) if coherent else []
    kind = partial(StayingSlots if coherent else RankSlots, ranks=ranks, shared=shared)
    if own is None:
        require_policy(plan.routing_policy, policy_id(model), "divided among ranks")
        plan.require_all_experts("divided among ranks")
        plan.check_model(model_facts(model, plan.model.name, layers))
        check_weights(model)
        for layer in layers:
            family_of(layer)
        tracker = begin_install(model, layers)
        for layer, place in zip(layers, maps, strict=True):
            slots = _from_weights(layer, plan, ranks, place, kind, int8_activations)
            fill_slots(layer, slots, method)
            put_slots(layer, slots, plan, tracker, int8_activations=int8_activations)
    else:
        for layer, place, whole in zip(layers, maps, slots_of(model), strict=True):
            slots = _from_slots(whole, plan, ranks, place, kind)
            slots.batches = whole.batches
            family_of(layer).rebind(layer, slots)
    if coherent:
        make_coherent(model.get_submodule(layers[0].stack_path), ranks, staying_slots(model), halves)
    _set(model, rules)
    model.save_pretrained = MethodType(_refuse_to_save, model)
    ranks.meet("loading the model")
    return model


def set_rank_dispatch(
    model: PreTrainedModel, dispatch: str, options: Mapping[str, Any] | None = None, *, mixed: Mixed = "refuse"
) -> None:
    """Choose which rank serves which token; all ranks alike.

    Args:
        model: a model that `parallelize` divided.
        dispatch: "plan" (the plan's own), "even", "gate_aware" (shared batches only), a rule of `dispatch.deal.DEALS`
            ("least_loaded", "llep", "quota", "metro", ...), or one for each phase: "prefill=quota,decode=metro". Decode is
            when all ranks add one token to each of their sequences.
        options: of the rules; each takes those that it has.
        mixed: copies of one expert in different precisions compute different outputs, and under rules that go by the batch's
            counts the batch decides which one a token gets. "refuse" refuses such plans; "label" runs them, as class
            `weights` whose outputs depend on the batch.

    Raises:
        EquipoiseError: unknown rule or option.
        PlanError: copies that are not alike.
        ModelError: the model is not divided among ranks.
    """
    slots = rank_slots(model)
    layers = [one.plan for one in slots]
    coherent = isinstance(slots[0], StayingSlots)
    _set(model, _rules(layers, slots[0].plan_dispatch, dispatch, options or {}, slots[0].shared, mixed, coherent))


def rank_slots(model: Any) -> list[RankSlots]:
    """The slots of this rank, layer by layer.

    Raises:
        ModelError: the model is not divided among ranks.
    """
    found = [slots for slots in slots_of(model) if isinstance(slots, RankSlots)]
    if not found:
        raise ModelError("the model is not divided among ranks; call parallelize first.")
    return found


def staying_slots(model: Any) -> list[StayingSlots]:
    """As `rank_slots`, of a model with a coherent context; empty for others."""
    return [slots for slots in slots_of(model) if isinstance(slots, StayingSlots)]


def parse_rules(planned: str, dispatch: str, options: Mapping[str, Any], shared: bool) -> tuple[Rule, Rule]:
    """The rules for prefill and for decode that a text names.

    Args:
        planned: the plan's own dispatch.
        dispatch: as for `set_rank_dispatch`.
        options: of the rules.
        shared: every rank holds the whole batch.

    Raises:
        EquipoiseError: unknown rule, phase or option, or a rule that these ranks cannot carry out.
    """
    named = dict.fromkeys(("prefill", "decode"), dispatch)
    if "=" in dispatch:
        parts = [part.partition("=") for part in dispatch.split(",")]
        named = {phase.strip(): name.strip() for phase, _, name in parts}
        if set(named) != {"prefill", "decode"}:
            raise EquipoiseError(f"dispatch '{dispatch}' given; name a rule, or both: prefill=NAME,decode=NAME.")
    named = {phase: planned if name == "plan" else name for phase, name in named.items()}
    known = {}
    for name in named.values():
        if name not in DEALS and name not in POSITIONAL:
            raise unknown_name("dispatch", name, ["plan", *POSITIONAL, *DEALS.names()])
        if name == "gate_aware" and not shared:
            raise EquipoiseError(
                "gate_aware ranks an expert's tokens among all of the batch, of which a rank here sees its own alone; "
                "use even, or give every rank the same batch (shared)."
            )
        known[name] = list(inspect.signature(DEALS.get(name)).parameters)[2:] if name in DEALS else []
    for option in options:
        if not any(option in allowed for allowed in known.values()):
            some = sorted({one for allowed in known.values() for one in allowed})
            raise EquipoiseError(f"dispatch '{dispatch}' has no option '{option}'; it has: {', '.join(some) or 'none'}.")
    rules = [Rule(name, {o: v for o, v in options.items() if o in known[name]}) for name in (named["prefill"], named["decode"])]
    for rule in rules:
        if rule.counts:
            check_deal(rule.name, rule.options)
    return rules[0], rules[1]


def unlike_copies(plan: Plan) -> list[tuple[int, int]]:
    """(layer, expert) of the experts that have copies in different precisions."""
    return [(index, expert) for index, layer in enumerate(plan.layers) for expert in _unlike(layer)]


def _rules(
    layers: Sequence[LayerPlan],
    planned: str,
    dispatch: str,
    options: Mapping[str, Any],
    shared: bool,
    mixed: Mixed,
    coherent: bool,
) -> tuple[Rule, Rule]:
    rules = parse_rules(planned, dispatch, options, shared)
    if coherent:
        if dispatch != "plan" and rules[1].name != "even":
            raise EquipoiseError(
                f"dispatch '{dispatch}' given; under context='coherent' a token in decode goes to the nearest copy of its "
                "expert, so only prefill has a choice: prefill=NAME,decode=even."
            )
        rules = rules[0], Rule("even")
    if mixed not in ("refuse", "label"):
        raise unknown_name("mixed", mixed, ("refuse", "label"))
    if mixed == "refuse":
        _refuse_mixed(layers, rules)
    return rules


def _refuse_mixed(layers: Sequence[LayerPlan], rules: tuple[Rule, Rule]) -> None:
    by_counts = next((rule.name for rule in rules if rule.counts), None)
    if by_counts is None:
        return
    for index, layer in enumerate(layers):
        if unlike := _unlike(layer):
            names = sorted({layer.precisions[s] for s in range(layer.num_slots) if layer.experts[s] == unlike[0]})
            raise PlanError(
                f"expert {unlike[0]} of MoE layer {index} has copies in {' and '.join(names)}, which are not interchangeable: "
                f"under '{by_counts}' the batch decides which of them a token gets. Use dispatch even, a plan with one "
                "precision per expert, or mixed='label' to run it as class weights whose outputs depend on the batch."
            )


def _unlike(layer: LayerPlan) -> list[int]:
    seen: dict[int, set[str]] = {}
    for expert, name in zip(layer.experts, layer.precisions, strict=True):
        seen.setdefault(expert, set()).add(canonical(name))
    return sorted(expert for expert, names in seen.items() if len(names) > 1)


def _set(model: Any, rules: tuple[Rule, Rule]) -> None:
    for slots in rank_slots(model):
        slots.prefill, slots.decode = rules


def _from_weights(layer: MoELayer, plan: Plan, ranks: Ranks, place: LayerMap, kind: Kind, int8_activations: bool) -> RankSlots:
    """Empty slots of this rank."""
    sample = expert_matrices(layer, 0)
    columns = plan.layers[layer.index]
    forms = {
        name: GroupForm(
            form=precision(name),
            shapes=((sum(m.shape[0] for m in sample[:-1]), sample[0].shape[1]), (sample[-1].shape[0], sample[-1].shape[1])),
            native=name == plan.model.dtype,
            biases=bool(expert_vectors(layer, 0)),
            dtype=sample[0].dtype,
            rotated=False,
            int8_activations=int8_activations,
        )
        for name in dict.fromkeys(canonical(p) for p in columns.precisions)
    }
    groups = {
        name: form.empty(n, sample[0].device) for name, form in forms.items() if (n := _held(columns, place, ranks, name))
    }
    return _slots(columns, layer.index, layer.stack, plan, place, forms, groups, kind)


def _from_slots(whole: ExpertSlots, plan: Plan, ranks: Ranks, place: LayerMap, kind: Kind) -> RankSlots:
    """The rank's part of a balanced layer's slots, as they are stored."""
    forms = {group.form.name: GroupForm.of(group) for group in whole.groups}
    groups: dict[str, SlotGroup] = {}
    first = 0
    for group in whole.groups:
        at = [i for i, slot in enumerate(whole.order[first : first + len(group)]) if place.rank_P[slot] == ranks.rank]
        first += len(group)
        if not at:
            continue
        stored = tensors_of(group)
        part = forms[group.form.name].empty(len(at), next(iter(stored.values())).device)
        for name, tensor in tensors_of(part).items():
            tensor.detach().copy_(stored[name].detach()[torch.tensor(at)])
        groups[group.form.name] = part
    return _slots(plan.layers[whole.layer], whole.layer, whole.stack, plan, place, forms, groups, kind)


def _slots(
    columns: Any,
    index: int,
    stack: str,
    plan: Plan,
    place: LayerMap,
    forms: Mapping[str, GroupForm],
    groups: Mapping[str, SlotGroup],
    kind: Kind,
) -> RankSlots:
    native = next((form.dtype for form in forms.values() if form.native), None)
    slots = kind(columns, index, stack, plan.units, groups, place=place, forms=forms, input_dtype=native)
    slots.plan_dispatch = plan.dispatch
    return slots


def _held(columns: Any, place: LayerMap, ranks: Ranks, name: str) -> int:
    return sum(canonical(columns.precisions[s]) == name and place.rank_P[s] == ranks.rank for s in range(columns.num_slots))


def _refuse_to_save(model: PreTrainedModel, *_: Any, **__: Any) -> None:
    raise CheckpointError("a model that is divided among ranks has no rank that holds all of it; save it before it is divided.")
