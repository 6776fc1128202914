"""A plan that leaves out experts, carried out: a smaller model of the same family, which is a stock model of transformers.

The router loses the rows of the experts that are left out, with their selection bias, so that a token goes to the best of those
that are kept: what it would do if the others' logits were minus infinity.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.artifacts import Plan
from equipoise.artifacts.plan import PLAN_FILE
from equipoise.errors import CheckpointError, ModelError, PlanError
from equipoise.execution.checkpoint import put_in_place
from equipoise.execution.export_checkpoint import Shards
from equipoise.execution.prune_slices import Kept, Pruning, plan_slices
from equipoise.execution.stock_names import stock_state
from equipoise.models.layers import find_moe_layers, model_facts
from equipoise.models.streamed import Streamed, streamed_of
from equipoise.precisions import precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int], None]
PRUNING_FILE = PLAN_FILE.replace("plan", "pruning")
"""The plan, beside the model that it made; the experts' old numbers are in it."""


@dataclass(frozen=True, eq=False)
class Pruned:
    """What pruning wrote.

    Attributes:
        directory: where.
        changed: field of the configuration that has another number.
        experts_before, experts: of each MoE layer.
        expert_bytes_before, expert_bytes: of all experts.
        bytes: of all tensors written.
        left_out: tensors of the checkpoint that the model does not have, such as those of layers that predict further tokens.
    """

    directory: Path
    changed: str
    experts_before: int
    experts: int
    expert_bytes_before: int
    expert_bytes: int
    bytes: int
    left_out: int


def prune_model(model: PreTrainedModel, kept: Plan | Kept) -> PreTrainedModel:
    """The model without some of its experts, as a new model in memory; `save_pretrained` makes it a stock checkpoint.

    Args:
        model: the whole model, in memory; left as it is.
        kept: a plan of class `capacity` for it, or the experts that each MoE layer keeps, in rising order.

    Returns:
        A model of the same class, in evaluation mode, with weights of its own.

    Raises:
        PlanError: the plan is of another model, or keeps all experts or too few.
        ModelError: the family cannot be pruned, or the model is streamed, balanced or quantized.
    """
    if streamed_of(model) is not None:
        raise ModelError("this model is read from its files; use prune_streamed.")
    pruning = _pruning(model, kept)
    # Made with values, so that what is no part of the state (rotary frequencies) is as it should be.
    small: Any = type(model)._from_config(pruning.config)
    for name, tensor in small.state_dict().items():
        found = pruning.taken(name, model.get_parameter_or_buffer)
        assert found.shape == tensor.shape, f"'{name}' of the pruned model is not of its shape"
        small.get_parameter_or_buffer(name).data = found.detach().clone()
    small.tie_weights()
    if model.can_generate():
        small.generation_config = model.generation_config
    moved: PreTrainedModel = small.to(next(model.parameters()).device)
    return moved.eval()


def prune_streamed(
    model: PreTrainedModel,
    tokenizer: Any | None,
    plan: Plan,
    out: str | Path,
    *,
    progress: Progress = lambda done, total: None,
) -> Pruned:
    """Write the pruned model of a checkpoint, holding one transformer layer at a time; whole or not at all.

    Args:
        model: what `models.streamed.open_streamed` opened (`load_model(..., memory=0)`).
        tokenizer: saved beside it, if given.
        plan: of class `capacity`, for this model.
        out: a new or empty directory.
        progress: told (transformer layers done, in all).

    Returns:
        What was written; the model is used up by this.

    Raises:
        PlanError: the plan is of another model, or keeps all experts or too few.
        ModelError: the family cannot be pruned, or the model is not streamed, or balanced, or quantized.
        CheckpointError: the destination is not empty or cannot be written.
    """
    streamed = streamed_of(model)
    if streamed is None:
        raise ModelError("this model is in memory; use prune_model and save_pretrained, or open it with open_streamed.")
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"'{out}' is not an empty directory; choose a new one.")
    pruning = _pruning(model, plan)
    small: Any = pruning.skeleton
    small._weight_conversions = getattr(model, "_weight_conversions", None)
    blocks = _blocks(streamed, pruning)
    inside = {name for path in blocks for name in streamed.blocks[path]}
    state = set(model.state_dict())
    resident = [name for name in streamed.files if name not in inside]
    kept_names = [name for name in resident if streamed.targets.get(name) in state]
    temporary: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        shards = Shards(temporary)
        for name in kept_names:
            shards.add(name, streamed.files[name])
        with streamed.by_hand():
            for done, (path, names) in enumerate(blocks.items()):
                streamed.load(path)
                taken = {name: pruning.taken(name, model.get_parameter_or_buffer) for name in names}
                for name, tensor in stock_state(small, taken).items():
                    shards.add(name, tensor.detach())
                progress(done + 1, len(blocks))
            streamed.drop()
        shards.finish()
        _write_config(model, pruning, tokenizer, plan, temporary)
        put_in_place(temporary, out)
    except OSError as error:
        raise CheckpointError(f"cannot write '{out}': {error.strerror or error}. Choose a place with enough room.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    before, after = _expert_bytes(plan)
    return Pruned(
        directory=out,
        changed=pruning.changed,
        experts_before=plan.model.max_experts,
        experts=len(plan.layers[0].experts),
        expert_bytes_before=before,
        expert_bytes=after,
        bytes=shards.total,
        left_out=len(resident) - len(kept_names),
    )


def _pruning(model: PreTrainedModel, plan: Plan | Kept) -> Pruning:
    """What a plan makes of a model that it suits."""
    layers = find_moe_layers(model)
    if getattr(model, "hf_quantizer", None) is not None or any(layer.balanced for layer in layers):
        raise ModelError(
            "the model is quantized or balanced already; prune the 16- or 32-bit model, then quantize or balance it."
        )
    if not isinstance(plan, Plan):
        return plan_slices(model, layers, plan)
    if plan.kept is None or not plan.prunes:
        raise PlanError(
            "the plan leaves out no experts; make one that does with `equipoise plan PROFILE --prune easy-ep --keep 0.5`."
        )
    if plan.routing_policy != "native":
        raise PlanError(
            f"the plan was made under routing policy '{plan.routing_policy}', which a stock model does not have; profile the "
            "model under its own routing and plan again."
        )
    plan.check_model(model_facts(model, plan.model.name, layers))
    return plan_slices(model, layers, plan.kept)


def _blocks(streamed: Streamed, pruning: Pruning) -> dict[str, list[str]]:
    """Transformer layers that change -> names of their tensors in the pruned model, tied ones left out.

    Raises:
        ModelError: something changes that is in no transformer layer.
    """
    found: dict[str, list[str]] = {}
    names = [*pruning.skeleton.state_dict()]
    for path, held in streamed.states.items():
        mine = {*held}
        here = [name for name in names if name.startswith(f"{path}.") and pruning.source(name) in mine]
        if any(name in pruning.slices for name in here):
            found[path] = here
    outside = {*pruning.slices} - {name for here in found.values() for name in here}
    if outside:
        raise ModelError(
            f"'{min(outside)}' changes with the experts and lies in no transformer layer; use prune_model instead."
        )
    return found


def _write_config(model: Any, pruning: Pruning, tokenizer: Any | None, plan: Plan, directory: Path) -> None:
    """Everything beside the weights, as `save_pretrained` writes it, and the plan."""
    config = pruning.config
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    plan.save(directory / PRUNING_FILE)


def _expert_bytes(plan: Plan) -> tuple[int, int]:
    """Bytes of all experts before and after."""
    native = precision(plan.model.dtype)
    sizes = [facts.expert_bytes(native) for facts in plan.model.layers]
    before = sum(facts.num_experts * size for facts, size in zip(plan.model.layers, sizes, strict=True))
    return before, sum(layer.num_slots * size for layer, size in zip(plan.layers, sizes, strict=True))
