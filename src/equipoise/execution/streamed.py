"""A plan carried out on a model that does not fit in memory: read, rounded and written layer by layer.

The result is what `apply.apply_plan` and `checkpoint.save_balanced` make of the same model in memory: the same tensors, in
files of their own division. A run that is killed at any moment goes on from the layers that it has finished, and ends with
the same bytes. Finished layers are not rounded again, but the text is run through them.

The work directory is a hidden neighbour of the result, which is renamed when everything is there:

    .NAME.part/equipoise.run.json                  what run it belongs to
    .NAME.part/equipoise-moe-00003.safetensors     the slots of one MoE layer, as they stay
    .NAME.part/equipoise-rest-00001.safetensors    tensors that do not change, copied from the source under their names
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.artifacts import Plan
from equipoise.artifacts.files import write_atomic
from equipoise.artifacts.plan import PLAN_FILE
from equipoise.artifacts.routing import require_policy
from equipoise.errors import EquipoiseError, ModelError
from equipoise.execution.balanced_config import WEIGHTS_INDEX
from equipoise.execution.checkpoint import keep_others, put_in_place, refuse_other_model, work_directory
from equipoise.execution.families import family_of
from equipoise.execution.finished import RUN_FILE, FinishedLayers, Report
from equipoise.execution.hf_quantizer import mark_balanced
from equipoise.execution.install import begin_install, build_slots, fill_slots, put_slots
from equipoise.execution.layerwise import Calibration, Progress, check_calibration, round_layers
from equipoise.models.blocks import moe_blocks
from equipoise.models.layers import MoELayer, find_moe_layers, model_facts, name_of
from equipoise.models.policy_marks import policy_id
from equipoise.models.streamed import Streamed, streamed_of
from equipoise.models.tensor_files import TensorFiles, write_tensors
from equipoise.quantization.methods import METHODS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARD_BYTES = 4 << 30


def apply_streamed(
    model: PreTrainedModel,
    tokenizer: Any | None,
    plan: Plan,
    out: str | Path,
    *,
    method: str = "rtn",
    calibration: Calibration | None = None,
    int8_activations: bool = True,
    progress: Progress = lambda done, total: None,
    shard_bytes: int = SHARD_BYTES,
) -> list[Report]:
    """Balance a streamed model and save it, holding one transformer layer at a time.

    Args:
        model: what `models.streamed.open_streamed` opened, under the plan's routing policy; used up by this.
        tokenizer: saved beside it, if given.
        plan: what to do; of this model.
        out: directory of the balanced model, for `checkpoint.load` and `from_pretrained`.
        method: rounding of the quantized formats without text; the calibration's own with it.
        calibration: text to round on, and how.
        int8_activations: as for `apply.apply_plan`.
        progress: told after each MoE layer.
        shard_bytes: most bytes of one file of tensors that do not change.

    Returns:
        What is known of the rounding of each MoE layer; nothing without text.

    Raises:
        PlanError: the plan belongs to another model.
        ModelError: not a streamed model, weights that are missing, NaN or infinite, or a family that cannot be balanced.
        CheckpointError: `out` holds another model, or its work directory another run.
        EquipoiseError: no room, an unknown method or option, or a method that needs text and got none.
    """
    streamed = streamed_of(model)
    if streamed is None:
        raise ModelError("this model is in memory; use apply_plan and save_balanced, or open it with open_streamed.")
    out = Path(out).absolute()
    layers = find_moe_layers(model)
    record = _check(model, plan, layers, out, method, calibration)
    identity = {"plan": plan.to_json(), "dtype": str(model.dtype), "shard_bytes": shard_bytes, **record}
    work = FinishedLayers(work_directory(out), identity, streamed.stored_name)
    before = set(model.state_dict())
    with streamed.by_hand():
        if calibration is None:
            reports: list[Report] = []
            _without_text(model, plan, layers, streamed, work, method, progress)
        else:
            paths = {model.get_submodule(path): path for path in streamed.blocks}
            reports = round_layers(
                model, plan, layers, calibration, work, int8_activations=False, progress=progress, blocks=list(paths),
                enter=lambda block: streamed.load(paths[block]),
            )  # fmt: skip
        streamed.drop()
    mark_balanced(model, plan, int8_activations, record)
    _copy_rest(streamed, before & set(model.state_dict()), work.directory, shard_bytes)
    _write_config(model, tokenizer, plan, work.directory)
    keep_others(out, work.directory)
    put_in_place(work.directory, out)
    (out / RUN_FILE).unlink()
    return reports


def _check(
    model: PreTrainedModel, plan: Plan, layers: Iterable[MoELayer], out: Path, method: str, calibration: Calibration | None
) -> dict[str, Any]:
    """Everything that could stop the run, before hours are spent on it; the record of the rounding."""
    refuse_other_model(out)
    for layer in layers:
        family_of(layer)
    if calibration is not None:
        check_calibration(calibration)
    elif METHODS.get(method).needs_hessian:
        raise EquipoiseError(f"quantization method '{method}' needs calibration text; give some, or use 'rtn'.")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ModelError("the model is quantized already; plans are applied to 16- or 32-bit models.")
    require_policy(plan.routing_policy, policy_id(model), "applied")
    plan.require_all_experts("carried out by slots")
    plan.check_model(model_facts(model, name_of(model)))  # reads all weights, and finds those that are not numbers
    return {"method": method} if calibration is None else calibration.record()


def _without_text(
    model: PreTrainedModel,
    plan: Plan,
    layers: Iterable[MoELayer],
    streamed: Streamed,
    work: FinishedLayers,
    method: str,
    progress: Progress,
) -> None:
    """Round layer by layer to what the weights alone say."""
    layers = list(layers)
    tracker = begin_install(model, layers)
    for path, held in moe_blocks(layers).items():
        streamed.load(path)
        for layer in held:
            slots = build_slots(layer, plan)
            if work.read(layer, slots) is None:
                fill_slots(layer, slots, method)
                work.write(layer, slots, {})
            put_slots(layer, slots, plan, tracker, int8_activations=False)
            progress(layer.index + 1, len(layers))


def _copy_rest(streamed: Streamed, kept: set[str], directory: Path, shard_bytes: int) -> None:
    """Copy the tensors that stay in the model from the source, under their names there, in files of bounded size."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in streamed.files:
        if streamed.targets.get(name) not in kept:
            continue
        if shards[-1] and size + streamed.files.nbytes(name) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += streamed.files.nbytes(name)
    state = streamed.model.state_dict()
    for number, names in enumerate(shards, 1):
        path = directory / f"equipoise-rest-{number:05d}.safetensors"
        if names and not path.exists():
            dtypes = {name: state[streamed.targets[name]].dtype for name in names}
            write_tensors(path, {name: streamed.files[name].to(dtypes[name]) for name in names})


def _write_config(model: Any, tokenizer: Any | None, plan: Plan, directory: Path) -> None:
    """Everything beside the weights, as `save_pretrained` writes it."""
    config = model.config
    config.quantization_config.weights = WEIGHTS_INDEX
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    plan.save(directory / PLAN_FILE)
    files = sorted(directory.glob("*.safetensors"))
    tensors = {path.name: TensorFiles([path]) for path in files}
    index = {
        "metadata": {"total_size": sum(held.nbytes(name) for held in tensors.values() for name in held)},
        "weight_map": {name: file for file, held in tensors.items() for name in held},
    }
    write_atomic(directory / WEIGHTS_INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
