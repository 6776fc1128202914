"""Experts rounded on calibration text, one MoE layer after the other: later layers see what earlier ones have become.

All text is brought to the entry of a transformer layer (`execution.lockstep`). There the layer is run up to its experts
once, to see what each of them is sent; the experts are rounded on it (`quantization.layer`) and become slots; and the layer
is run again with them. So nothing is held but the text at the entry of one layer, and what its experts are sent.

Shapes: T real tokens of a batch, K top-k, D model width.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from equipoise.artifacts import Plan
from equipoise.errors import EquipoiseError, ModelError
from equipoise.execution.finished import FinishedLayers, Kept, Nowhere, Report
from equipoise.execution.install import begin_install, build_slots, fill_slots, put_slots, set_int8_activations
from equipoise.execution.lockstep import Call, run_in_lockstep
from equipoise.execution.slots import ExpertSlots
from equipoise.execution.spill import Spill
from equipoise.models.blocks import moe_blocks
from equipoise.models.layers import MoELayer, find_moe_layers, observe
from equipoise.models.tokens import TokenTracker
from equipoise.precisions import precision
from equipoise.quantization.layer import quantize_experts
from equipoise.quantization.methods import METHODS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OPTIONS = ("damp", "shrink", "refit", "rotate")

Progress = Callable[[int, int], None]
"""Called with the MoE layers that are done, and how many there are."""


class Batch(Protocol):
    """Text of one forward pass; `profiling.sequences.Batch` is one."""

    def inputs(self) -> Mapping[str, Any]:
        """The model's keyword arguments as arrays: input_ids, attention_mask, ..."""
        ...


@dataclass(frozen=True)
class Calibration:
    """How experts are rounded, and on what text.

    Attributes:
        batches: the text.
        method: a name of `quantization.methods.METHODS`.
        options: of `quantization.layer.quantize_experts`: damp, shrink, refit, rotate.
        workers: groups of experts that are rounded at the same time; no effect on the result.
        spill: directory for activations that wait; in memory when None.
    """

    batches: Sequence[Batch]
    method: str = "gptq"
    options: Mapping[str, Any] = field(default_factory=dict)
    workers: int = 1
    spill: str | Path | None = None

    @property
    def tokens(self) -> int:
        """Real tokens of the text, in both stacks of an encoder-decoder."""
        masks = [array for batch in self.batches for name, array in batch.inputs().items() if name.endswith("attention_mask")]
        return int(sum(np.asarray(mask).sum() for mask in masks))

    def record(self) -> dict[str, Any]:
        """Everything that the result depends on, as JSON."""
        digest = hashlib.sha256()
        for batch in self.batches:
            for name, array in sorted(batch.inputs().items()):
                digest.update(f"{name}{tuple(array.shape)}".encode())
                digest.update(np.ascontiguousarray(array, "<i8").tobytes())
        return {
            "method": self.method,
            "text_sha256": digest.hexdigest(),
            "tokens": self.tokens,
            "options": dict(self.options),
        }


def quantize_model(
    model: PreTrainedModel,
    plan: Plan,
    calibration: Calibration,
    *,
    resume_dir: str | Path | None = None,
    int8_activations: bool = True,
    progress: Progress = lambda done, total: None,
) -> list[Report]:
    """Put a plan on a model in memory, its experts rounded on calibration text, layer by layer.

    The same model, plan, text and options give the same slots, bit for bit, also when the run was interrupted. The text is
    run without rounding of activations, which is a matter of the machine that the model will serve on.

    Args:
        model: the model that the plan was made for, unquantized; changed in place.
        plan: its slots.
        calibration: text and method.
        resume_dir: directory of finished layers, which an interrupted run goes on from; stays for the caller to delete.
        int8_activations: as for `apply.apply_plan`.
        progress: told after each layer.

    Returns:
        What is known of each layer's rounding.

    Raises:
        EquipoiseError: no text, unknown method or option, or a `resume_dir` of another run.
        ModelError: what the text makes of the model is not finite, or the batches are of different kinds.
    """
    layers = find_moe_layers(model)
    check_calibration(calibration)
    kept: Kept = Nowhere()
    if resume_dir is not None:
        kept = FinishedLayers(resume_dir, {"plan": plan.to_json(), **calibration.record()})
    return round_layers(model, plan, layers, calibration, kept, int8_activations=int8_activations, progress=progress)


def check_calibration(calibration: Calibration) -> None:
    """Raise `EquipoiseError` for an unknown method, an option that rounding does not have, or no text."""
    METHODS.get(calibration.method)
    unknown = sorted(set(calibration.options) - set(OPTIONS))
    if unknown:
        raise EquipoiseError(f"rounding has no option '{unknown[0]}'; it has: {', '.join(OPTIONS)}.")
    if not calibration.batches:
        raise EquipoiseError(f"method '{calibration.method}' rounds on calibration text; give at least one batch.")


def round_layers(
    model: PreTrainedModel,
    plan: Plan,
    layers: Sequence[MoELayer],
    calibration: Calibration,
    kept: Kept,
    *,
    int8_activations: bool,
    progress: Progress,
    blocks: Sequence[nn.Module] = (),
    enter: Callable[[nn.Module], None] = lambda block: None,
) -> list[Report]:
    """The work of `quantize_model`, for a model whose layers may have to be fetched first.

    Args:
        model: the model.
        plan: its slots.
        layers: its MoE layers.
        calibration: text and method, checked.
        kept: where finished layers are kept.
        int8_activations: as for `apply.apply_plan`.
        progress: told after each layer.
        blocks: further transformer layers to halt at, because they have to be entered.
        enter: called with each transformer layer before anything is run in it.

    Returns:
        A report for each MoE layer.
    """
    inside = {model.get_submodule(path): held for path, held in moe_blocks(layers).items()}
    reports: dict[int, Report] = {}
    spill = Spill(calibration.spill)
    tracker = begin_install(model, layers)
    every_slots: list[ExpertSlots] = []

    def visit(block: nn.Module, calls: Sequence[Call]) -> bool:
        enter(block)
        for layer in inside.get(block, ()):
            slots = build_slots(layer, plan, bool(calibration.options.get("rotate")))
            report = kept.read(layer, slots)
            if report is None:
                report = _round(layer, slots, calls, calibration, tracker, spill)
                kept.write(layer, slots, report)
            put_slots(layer, slots, plan, tracker, int8_activations=False)
            every_slots.append(slots)
            reports[layer.index] = report
            progress(len(reports), len(layers))
        return len(reports) < len(layers)  # what follows the last MoE layer is of no interest

    forwards = [_forward(model, batch) for batch in calibration.batches]
    stations = dict.fromkeys([*inside, *blocks])
    with _evaluating(model):
        run_in_lockstep(forwards, list(stations), visit, tracker, lambda call: spill.move_all((call.args, call.kwargs)))
    missed = next((layer.path for layer in layers if layer.index not in reports), None)
    if missed is not None:
        raise ModelError(f"the calibration text never came to {missed}; give batches that use all of the model.")
    set_int8_activations(every_slots, int8_activations)
    return [reports[layer.index] for layer in layers]


def _round(
    layer: MoELayer,
    slots: ExpertSlots,
    calls: Sequence[Call],
    calibration: Calibration,
    tracker: TokenTracker,
    spill: Spill,
) -> Report:
    """Fill a layer's slots with its experts, rounded on what the calls send them."""
    forms = [precision(name) for name in slots.plan.precisions]
    wanted = [(e, form) for e, form in zip(slots.plan.experts, forms, strict=True) if not form.is_float]
    seen = [_sent(layer, call, tracker, spill) for call in calls]
    ready, report = quantize_experts(
        layer, seen, wanted, calibration.method, workers=calibration.workers, **calibration.options
    )
    fill_slots(layer, slots, calibration.method, ready)
    as_kept: Report = json.loads(json.dumps(report.to_dict()))  # the same whether it was kept on disk meanwhile or not
    return as_kept


class _SeenError(Exception):
    """Leaves a transformer layer as soon as it is known what its experts are sent."""


def _sent(layer: MoELayer, call: Call, tracker: TokenTracker, spill: Spill) -> tuple[Tensor, Tensor, Tensor]:
    """hidden_TD, experts_TK and weights_TK that one batch sends to the experts of a layer, without padding."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(hidden: Tensor, experts: Tensor, weights: Tensor) -> None:
        real = tracker.batch(layer.stack, len(experts)).real_T.to(hidden.device)
        if not torch.isfinite(hidden.sum(dtype=torch.float32) + weights.sum(dtype=torch.float32)):
            raise ModelError(
                f"the inputs or gate weights of {layer.path} are not finite numbers; check the weights, or load the model in "
                "another dtype (bf16 has more range than fp16)."
            )
        found.append((spill.move(hidden[real]), experts[real], weights[real]))
        if len(found) == layer.events:
            raise _SeenError

    handle = observe(layer, keep)
    try:
        call.run()
    except _SeenError:
        if layer.events == 1:
            return found[0]
        hidden, experts, weights = (torch.cat(part) for part in zip(*found, strict=True))
        return hidden, experts, weights
    finally:
        handle.remove()
    raise ModelError(f"the calibration text passes {layer.path} by; give batches that use all of the model.")


def _forward(model: PreTrainedModel, batch: Batch) -> Callable[[], object]:
    """The forward pass of a batch, without a cache, and with the logits of the last position alone where that can be had."""

    def forward() -> object:
        torch.set_num_threads(1)  # only embeddings and masks are computed in this thread; a team of its own is not worth it
        device = next(tensor.device for tensor in model.parameters() if not tensor.is_meta)
        inputs = {name: torch.as_tensor(array).to(device) for name, array in batch.inputs().items()}
        accepted = inspect.signature(model.forward).parameters
        options = {"use_cache": False, "logits_to_keep": 1}
        return model(**inputs, **{name: value for name, value in options.items() if name in accepted})

    return forward


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """No dropout, and no cache, which would hold the keys of every run of a layer; all as before afterwards."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    caching = [(config, config.use_cache) for config in configs.values() if hasattr(config, "use_cache")]
    training, threads = model.training, torch.get_num_threads()
    model.eval()
    for config, _ in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config, use_cache in caching:
            config.use_cache = use_cache
        model.train(training)
        torch.set_num_threads(threads)
