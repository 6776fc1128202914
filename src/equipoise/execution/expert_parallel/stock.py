"""Our dispatch within transformers' own expert parallelism, which knows contiguous, equal shards of experts without copies.

    register_stock()
    config = DistributedConfig(tp_size=n, ep_size=n, ep_implementation="equipoise-llep")
    model = AutoModelForCausalLM.from_pretrained(name, distributed_config=config)

Rules that send weights (`llep`, `quota`) need no more than that placement; plans with copies, other placements or quantized
slots are carried out by `expert_parallel.parallelize`. Here a rank reads its own shard of the checkpoint alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

from equipoise.artifacts import LayerPlan
from equipoise.dispatch.placement import LayerMap
from equipoise.errors import ModelError
from equipoise.execution.expert_parallel.ranks import TIMEOUT_S, Ranks
from equipoise.execution.expert_parallel.slots import RankSlots, Rule
from equipoise.execution.expert_parallel.wire import GroupForm
from equipoise.execution.families import Between
from equipoise.execution.slot_group import SlotGroup
from equipoise.precisions import precision
from equipoise.quantization.formats import FLOAT_DTYPES

RULES = {"equipoise": Rule("even"), "equipoise-llep": Rule("llep"), "equipoise-quota": Rule("quota")}
"""Names for `ep_implementation`: experts where they live, and with what a rank cannot take spilled by either rule."""
FORMS = {dtype: name for name, dtype in FLOAT_DTYPES.items()}


@dataclass(frozen=True, eq=False)
class AllReal:
    """Tokens of which nothing is known: none is padding, and prefill and decode are not told apart."""

    real_T: Tensor
    position_T: Tensor
    decode: bool = False


class SlotsEP(EPImplementation):  # type: ignore[misc]
    """Brings the shard of one experts module its tokens, and other ranks' tokens its weights.

    Attributes:
        rule: which rank serves which token.
        slots: the shard as slots, which share its storage; made at the first call, when weights are there.
    """

    rule = Rule("even")

    def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        if not self.shares_batch and tp_mesh.size() > 1:
            raise ModelError(
                f"ep_size {ep_mesh.size()} and tp_size {tp_mesh.size()} given; this dispatch needs them equal (all ranks hold "
                "one batch) or tp_size 1 (each rank its own)."
            )
        self.experts = experts
        self.slots: RankSlots | None = None
        self.ranks = Ranks(ep_mesh.get_local_rank(), ep_mesh.size(), TIMEOUT_S, str(ep_mesh.device_type), ep_mesh.get_group())

    def __call__(self, hidden_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """[T, D] the weighted output of the experts for this rank's tokens."""
        experts: Any = self.experts
        if self.slots is None:
            self.slots = self._make_slots(experts)
        after = experts.post_expert_norm if getattr(experts, "has_post_expert_norm", False) else None
        self.slots.batches = all_real
        with torch.no_grad():
            return self.slots(hidden_TD, expert_TK, weight_TK, Between(experts), after)

    def _make_slots(self, experts: Any) -> RankSlots:
        transposed = getattr(experts, "is_transposed", False)
        name = "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"
        stacks = [getattr(experts, part).detach() for part in (name, "down_proj")]
        up, down = (stack.transpose(1, 2) if transposed else stack for stack in stacks)
        count, total = len(up), len(up) * self.ranks.size
        form = GroupForm(
            form=precision(FORMS[up.dtype]), shapes=((up.shape[1], up.shape[2]), (down.shape[1], down.shape[2])), native=True,
            biases=bool(getattr(experts, "has_bias", False)), dtype=up.dtype, rotated=False, int8_activations=False,
        )  # fmt: skip
        held = {"up": up, "down": down}
        if form.biases:
            held |= {
                f"{part}_bias": getattr(experts, f"{of}_bias").detach() for part, of in (("up", name), ("down", "down_proj"))
            }
        slots = RankSlots(
            LayerPlan(
                experts=tuple(range(total)),
                precisions=(form.form.name,) * total,
                units=tuple(e // count for e in range(total)),
                shares=(1.0,) * total,
            ),
            0,
            "decoder",
            self.ranks.size,
            {form.form.name: group_of(form, held)},
            ranks=self.ranks,
            place=contiguous(total, self.ranks.size, form.slot_bytes),
            forms={form.form.name: form},
            input_dtype=form.dtype,
            shared=self.shares_batch,
        )
        slots.prefill = slots.decode = self.rule
        return slots


def all_real(stack: str, rows: int) -> AllReal:
    """What is known of the tokens of a call."""
    return AllReal(torch.ones(rows, dtype=torch.bool), torch.zeros(rows, dtype=torch.long))


def group_of(form: GroupForm, held: dict[str, Tensor]) -> SlotGroup:
    """A group whose slots are tensors that exist already."""
    group = form.empty(len(held["up"]), "meta")
    for name, tensor in held.items():
        group._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    return group


def contiguous(experts: int, ranks: int, slot_bytes: int) -> LayerMap:
    """Experts in order, equally many on each rank."""
    return LayerMap(
        index=0,
        experts=experts,
        ranks=ranks,
        nodes=1,
        expert_P=np.arange(experts),
        rank_P=np.arange(experts) * ranks // experts,
        share_P=np.ones(experts),
        bytes_P=np.full(experts, slot_bytes),
        copy_bytes=slot_bytes,
    )


def register_stock(**options: Any) -> None:
    """Make "equipoise", "equipoise-llep" and "equipoise-quota" known to transformers as `ep_implementation`.

    Args:
        options: of the rules `llep` and `quota`, such as alpha, least, gate, spare; each takes those that it has.

    Raises:
        EquipoiseError: an option that neither has.
    """
    from equipoise.execution.expert_parallel.runtime import parse_rules

    llep, quota = parse_rules("even", "prefill=llep,decode=quota", options, False)
    rules = RULES | {"equipoise-llep": llep, "equipoise-quota": quota}
    for name, rule in rules.items():
        EPImplementationInterface.register(name, type("SlotsEP", (SlotsEP,), {"rule": rule, "__doc__": SlotsEP.__doc__}))
