"""Every expert in every format that slots may have, on disk and ready to be copied into a slot.

One file for each layer and format, with the tensors of a slot group that has one slot for each expert. Files are read as views,
so that what is not being copied takes no memory but what the operating system keeps of the file and may drop.
Shapes: E logical experts, D model width, F expert width.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from equipoise.artifacts import LayerPlan, ModelFacts, Plan
from equipoise.artifacts.files import write_atomic
from equipoise.errors import CheckpointError, ModelError, PlanError
from equipoise.execution.hf_quantizer import mark_balanced
from equipoise.execution.install import build_slots, fill_slots, install
from equipoise.execution.slot_group import SlotGroup
from equipoise.execution.slots import canonical, slots_of
from equipoise.models.fingerprint import check_weights
from equipoise.models.layers import find_moe_layers, model_facts
from equipoise.models.tensor_files import TensorFiles, write_tensors
from equipoise.precisions import precision
from equipoise.quantization.formats import FLOAT_DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

META = "equipoise.store.json"
SCHEMA = "equipoise.store/1"
Progress = Callable[[int, int], None]


class ExpertStore:
    """Experts of one model in several formats, in a directory.

    Attributes:
        directory: of the files.
        model: what they are of.
        formats: that slots may have; those not written yet are made from the model's own by rounding to nearest.
        rounding: method by which the others were made.
        rotated: whether they are stored rotated (`quantization.hadamard`).
    """

    def __init__(self, directory: str | Path) -> None:
        """Open a store.

        Args:
            directory: that `create` made.

        Raises:
            CheckpointError: it holds no store.
        """
        self.directory = Path(directory)
        try:
            meta = json.loads((self.directory / META).read_bytes())
            if meta["schema"] != SCHEMA:
                raise ValueError(f"schema is '{meta['schema']}', this version reads '{SCHEMA}'")
            self.model = ModelFacts.model_validate(meta["model"])
            self.formats: tuple[str, ...] = tuple(meta["formats"])
            self.rounding, self.rotated = str(meta["rounding"]), bool(meta["rotated"])
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"'{directory}' holds no store of experts ({error}); make it anew.") from error
        self._files: dict[tuple[int, str], TensorFiles] = {}
        self._making = threading.Lock()

    @classmethod
    def create(
        cls,
        model: PreTrainedModel,
        directory: str | Path,
        formats: Iterable[str],
        *,
        name: str = "",
        ahead: bool = True,
        progress: Progress = lambda done, total: None,
    ) -> ExpertStore:
        """Write a model's experts to a directory; go on where an earlier call of the same was interrupted.

        Args:
            model: as it is, before a plan is applied; it is left alone.
            directory: where to; made if missing.
            formats: that slots may have; the model's own is always among them.
            name: of the model, for messages.
            ahead: write all formats now; else only the model's own, and the others by `make` or as they are needed.
            progress: told after each file.

        Raises:
            CheckpointError: the directory belongs to another model or other formats, or cannot be written.
            ModelError: the model is balanced, or has experts that are not finite numbers.
        """
        if slots_of(model):
            raise ModelError("the model carries a plan already; a store is made from the original.")
        check_weights(model)
        layers = find_moe_layers(model)
        facts = model_facts(model, name or str(model.config.model_type), layers)
        wanted = list(dict.fromkeys([facts.dtype, *(canonical(given) for given in formats)]))
        store = cls._begin(Path(directory), facts, wanted, "rtn")
        todo = [(layer, form) for layer in layers for form in (wanted if ahead else wanted[:1])]
        for done, (layer, form) in enumerate(todo):
            if not store.has(layer.index, form):
                plan = _one_of_each(facts, [form])
                slots = build_slots(layer, plan)
                fill_slots(layer, slots, "rtn")
                store._write(layer.index, form, slots.groups[0])
            progress(done + 1, len(todo))
        return store

    @classmethod
    def keep(cls, model: PreTrainedModel, directory: str | Path, facts: ModelFacts, rounding: str) -> ExpertStore:
        """Write what a model that carries `library_plan` holds: experts rounded by any method, on text.

        Args:
            model: with the plan applied.
            directory: where to.
            facts: of the model, before the plan was applied.
            rounding: name of the method, for the record.

        Raises:
            CheckpointError: as `create`.
            ModelError: the model has no such slots.
        """
        layers = slots_of(model)
        if not layers or any(layer.plan.experts[0] != 0 or layer.plan.num_slots % layer.num_experts for layer in layers):
            raise ModelError("the model does not carry a library plan; apply `library_plan` first.")
        store = cls._begin(
            Path(directory),
            facts,
            [group.form.name for group in layers[0].groups],
            rounding,
            rotated=any(group.rotated for group in layers[0].groups),
        )
        for layer in layers:
            for group in layer.groups:
                store._write(layer.layer, group.form.name, group)
        return store

    @classmethod
    def _begin(
        cls, directory: Path, facts: ModelFacts, formats: Sequence[str], rounding: str, rotated: bool = False
    ) -> ExpertStore:
        path = directory / META
        if path.exists():
            store = cls(directory)
            same = (store.model.fingerprint, store.rounding, store.rotated) == (facts.fingerprint, rounding, rotated)
            if not same or set(formats) - set(store.formats):
                raise CheckpointError(
                    f"'{directory}' holds the experts of '{store.model.name}' as {', '.join(store.formats)} "
                    f"({store.rounding}), not of '{facts.name}' as {', '.join(formats)} ({rounding}); choose another place, "
                    "or delete it."
                )
            return store
        meta = {
            "schema": SCHEMA, "model": facts.model_dump(mode="json"), "formats": list(formats), "rounding": rounding,
            "rotated": rotated,
        }  # fmt: skip
        directory.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(meta, indent=2) + "\n")
        return cls(directory)

    @property
    def native(self) -> torch.dtype:
        """The model's own dtype."""
        return FLOAT_DTYPES[self.model.dtype]

    def has(self, layer: int, form: str) -> bool:
        """Whether the experts of a layer are there in a format."""
        return self._path(layer, form).is_file()

    def missing(self) -> list[tuple[int, str]]:
        """(layer, format) that are not written yet."""
        return [(i, form) for form in self.formats for i in range(len(self.model.layers)) if not self.has(i, form)]

    def make(self, layer: int, form: str) -> None:
        """Write the experts of a layer in a format, from the model's own, by rounding to nearest; one after another.

        Takes the memory of that one file. May be called from any thread.

        Raises:
            CheckpointError: the format is none of the store's, or the file cannot be written.
        """
        if form not in self.formats:
            raise CheckpointError(
                f"'{self.directory}' holds experts as {', '.join(self.formats)}, not as {form}; make a store with that format."
            )
        with self._making:
            if self.has(layer, form):
                return
            native = self._open(layer, self.model.dtype)
            up, down = native["up"], native["down"]
            shapes = [(up.shape[1], up.shape[2]), (down.shape[1], down.shape[2])]
            biases = [name for name in ("up_bias", "down_bias") if name in native]
            group = SlotGroup(
                precision(form), len(up), shapes, native=False, biases=bool(biases), dtype=up.dtype, device=torch.device("cpu")
            )  # fmt: skip
            for expert in range(len(up)):
                group.write(expert, [up[expert], down[expert]], [native[name][expert] for name in biases])
            self._write(layer, form, group)

    def copy_into(self, group: SlotGroup, slot: int, layer: int, expert: int) -> None:
        """Put an expert into a slot; made first where the store does not have it yet.

        Args:
            group: storage of the slot's format.
            slot: index within the group.
            layer: MoE layer.
            expert: logical expert.

        Raises:
            CheckpointError: a file is missing or damaged, or of experts stored otherwise than the group's.
        """
        form = group.form.name
        if not self.has(layer, form):
            self.make(layer, form)
        tensors = self._open(layer, form)
        for name, target in (*group.named_parameters(), *group.named_buffers()):
            if name not in tensors or tensors[name].shape[1:] != target.shape[1:]:
                raise CheckpointError(
                    f"'{self._path(layer, form)}' holds no '{name}' of {tuple(target.shape[1:])}; delete the store and make it "
                    "anew."
                )
            with torch.no_grad():
                target[slot].copy_(tensors[name][expert])

    def check(self, plan: Plan) -> None:
        """Raise `PlanError` when a plan is of another model, `CheckpointError` when it has a format that is not stored."""
        plan.check_model(self.model)
        forms = {canonical(name) for layer in plan.layers for name in layer.precisions}
        if forms - set(self.formats):
            raise CheckpointError(
                f"the plan has slots of {', '.join(sorted(forms - set(self.formats)))}, the store in '{self.directory}' only "
                f"{', '.join(self.formats)}; make a store with these formats."
            )

    def _path(self, layer: int, form: str) -> Path:
        return self.directory / f"layer-{layer:05d}-{form}.safetensors"

    def _open(self, layer: int, form: str) -> TensorFiles:
        if (layer, form) not in self._files:
            self._files[layer, form] = TensorFiles([self._path(layer, form)])
        return self._files[layer, form]

    def _write(self, layer: int, form: str, group: SlotGroup) -> None:
        tensors: dict[str, Tensor] = group.contents()
        write_tensors(self._path(layer, form), tensors)


def library_plan(facts: ModelFacts, formats: Iterable[str]) -> Plan:
    """A plan that holds every expert in every format, the model's own serving: what a store is filled from after rounding.

    It is no plan to serve with: it takes the bytes of all formats together.

    Args:
        facts: the model.
        formats: beside the model's own.
    """
    return _one_of_each(facts, list(dict.fromkeys([facts.dtype, *(canonical(name) for name in formats)])))


def apply_from_store(model: PreTrainedModel, plan: Plan, store: ExpertStore, *, int8_activations: bool = True) -> None:
    """Balance a model with the experts of a store, so that a slot holds the same bits whenever it gets an expert.

    Args:
        model: the original, as the store was made from it; changed in place.
        plan: its slots.
        store: of the model.
        int8_activations: as for `apply.apply_plan`.

    Raises:
        PlanError: the plan or the store is of another model, or the model carries a plan already.
        CheckpointError: the store lacks a format.
    """
    if slots_of(model):
        raise PlanError("this model carries a plan already; load the original again to apply another.")
    layers = find_moe_layers(model)
    plan.check_model(model_facts(model, plan.model.name, layers))
    store.check(plan)
    install(model, plan, layers, method=None, int8_activations=int8_activations, rotated=store.rotated)
    mark_balanced(model, plan, int8_activations, {"method": store.rounding})
    for slots in slots_of(model):
        places = iter(slots.order)
        for group in slots.groups:
            for index in range(len(group)):
                store.copy_into(group, index, slots.layer, slots.plan.experts[next(places)])


def _one_of_each(facts: ModelFacts, formats: Sequence[str]) -> Plan:
    layers = []
    for layer in facts.layers:
        width = layer.num_experts
        layers.append(
            LayerPlan(
                experts=tuple(range(width)) * len(formats),
                precisions=tuple(name for name in formats for _ in range(width)),
                units=tuple(range(width)) * len(formats),
                shares=tuple(float(index == 0) for index, _ in enumerate(formats) for _ in range(width)),
            )
        )
    own: dict[str, Any] = {"exactness": "exact" if set(formats) == {facts.dtype} else "weights"}
    return Plan(
        method="library", model=facts, units=facts.max_experts, unit_bytes=1 << 62, allows_duplicates=True,
        layers=tuple(layers), **own,
    )  # fmt: skip
