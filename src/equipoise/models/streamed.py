"""Models larger than memory: a transformer layer's weights are read from the checkpoint's files when it is used.

Everything outside the transformer layers stays, as a view of the files where it is stored as it is used. Of the layers, one is
held at a time. Names and weights are converted by transformers' own rules, one layer after the other, so every
architecture that transformers loads can be streamed, from fused experts and from single ones, in one file or many.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from equipoise.errors import ModelError
from equipoise.models.adapters.access import STREAMED
from equipoise.models.blocks import all_blocks
from equipoise.models.layers import find_moe_layers
from equipoise.models.tensor_files import TensorFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel


MMAP_THRESHOLD = -3
"""M_MMAP_THRESHOLD of glibc's mallopt: blocks from this size on are mapped on their own; setting it also pins it."""
LARGE_BLOCK = 1 << 20
LIBC = ctypes.CDLL(None)


class Streamed:
    """The weights of a model whose transformer layers are read when they are used.

    Attributes:
        model: its skeleton: the tensors of layers that are not held are on the meta device.
        files: the checkpoint.
        blocks: module path of each transformer layer -> names of its tensors in the files.
        states: module path of each transformer layer -> names of its tensors in the model's state dict.
        targets: name in the files -> name in the model's state dict (the first, where one is made into several).
        on_demand: whether a layer that is run is read first; otherwise by `load` alone.
        digest: the model's fingerprint, once it is known; all weights are read for it.
    """

    def __init__(self, model: PreTrainedModel, paths: Sequence[str], load_config: Any) -> None:
        """Find out which tensors belong to which layer; read nothing.

        Args:
            model: on the meta device.
            paths: its safetensors files.
            load_config: what transformers loads it with.
        """
        self.model, self.files, self._load_config = model, TensorFiles(paths), load_config
        self.on_demand, self.digest = True, ""
        self._loaded: str | None = None
        state = model.state_dict()
        self.targets = {name: target for name in self.files if (target := self._target(name, state)) in state}
        tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
        self.states: dict[str, list[str]] = {path: [] for path in all_blocks(model, find_moe_layers(model))}
        for name in state:
            if name not in tied and (path := self._block_of(name)) is not None:
                self.states[path].append(name)
        self.blocks: dict[str, list[str]] = {path: [] for path in self.states}
        mine = {name: path for path, names in self.states.items() for name in names}
        self._resident: list[str] = []
        for name in self.files:
            self.blocks.get(mine.get(self.targets.get(name, ""), ""), self._resident).append(name)

    def load(self, path: str) -> None:
        """Hold the weights of a transformer layer, and no longer those of the layer before.

        Raises:
            ModelError: the files lack some of them.
        """
        if self._loaded == path:
            return
        self.drop()
        info = self._convert(self.blocks[path])
        problems = [*info.conversion_errors, *(key for key, *_ in info.mismatched_keys)]
        missing = sorted(info.missing_keys & {*self.states[path]})
        if problems or missing:
            raise ModelError(
                f"'{self.model.config.name_or_path}' lacks weights of {path}, such as '{[*problems, *missing][0]}'; copy the "
                "checkpoint again."
            )
        self._loaded = path

    def drop(self) -> None:
        """Hold no transformer layer's weights."""
        if self._loaded is None:
            return
        for module in self.model.get_submodule(self._loaded).modules():
            for name, tensor in module._parameters.items():
                if tensor is not None:
                    module._parameters[name] = nn.Parameter(_hollow(tensor), requires_grad=False)
            for name, tensor in module._buffers.items():
                if tensor is not None and name not in module._non_persistent_buffers_set:
                    module._buffers[name] = _hollow(tensor)
        self._loaded = None
        _trim()

    def fetch(self, path: str) -> None:
        """Hold the weights of the transformer layer that a module or tensor of this path lies in, if it lies in one."""
        block = self._block_of(path)
        if block is not None:
            self.load(block)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All of the model's tensors in the order of their names, a layer being read when its first one comes."""
        for name in sorted(self.model.state_dict()):
            self.fetch(name)
            yield name, self.model.get_parameter_or_buffer(name)

    def stored_name(self, name: str) -> str:
        """The name that a new tensor must have in a file to become `name` in the model when transformers loads it.

        Raises:
            ModelError: there is none.
        """
        from transformers.core_model_loading import WeightRenaming, apply_renamings

        reverse = [rule.reverse_transform() for rule in reversed(self._rules(WeightRenaming))]
        for stored in (name, apply_renamings(name, reverse)):
            if self._target(stored, {name: None}) == name:
                return stored
        raise ModelError(f"transformers' renaming of {type(self.model).__name__} leaves no name for '{name}'.")

    @contextmanager
    def by_hand(self) -> Iterator[None]:
        """Layers are read by `load` alone."""
        self.on_demand = False
        try:
            yield
        finally:
            self.on_demand = True

    def load_resident(self) -> Any:
        """Read what is always held, and mark the rest, so that transformers does not fill it with random numbers."""
        info = self._convert(self._resident)
        for path, names in self.states.items():
            info.missing_keys -= {*names}
            for name in names:
                self.model.get_parameter_or_buffer(name)._is_hf_initialized = True
            self.model.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: self._load_on_demand(path))
        return info

    def _load_on_demand(self, path: str) -> None:
        if self.on_demand:
            self.load(path)

    def _block_of(self, name: str) -> str | None:
        parts = name.split(".")
        return next((path for depth in range(len(parts), 0, -1) if (path := ".".join(parts[:depth])) in self.states), None)

    def _convert(self, names: Sequence[str]) -> Any:
        """Bring some tensors of the files into the model by transformers' own rules."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        with _in_turn():
            info, _ = convert_and_load_state_dict_in_model(
                model=self.model, state_dict={name: self.files[name] for name in names}, load_config=self._load_config
            )
        return info

    def _target(self, name: str, state: dict[str, Any]) -> str:
        """The name that transformers gives to a tensor of the files."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        prefix = self.model.base_model_prefix
        target: str
        target, _ = rename_source_key(name, self._rules(WeightRenaming), self._rules(WeightConverter), prefix, state)
        if target not in state and name in state:
            target, _ = rename_source_key(name, [], [], prefix, state)
        return target

    def _rules(self, kind: type) -> list[Any]:
        return [rule for rule in self._load_config.weight_mapping or [] if isinstance(rule, kind)]


def streamed_of(model: Any) -> Streamed | None:
    """The weights of a model that is streamed; None for any other."""
    return getattr(model, STREAMED, None)


def open_streamed(kind: type[PreTrainedModel], name: str, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model so that its transformer layers are read when they are run.

    Args:
        kind: its class.
        name: directory or hub name of a checkpoint in safetensors.
        options: of `from_pretrained`.

    Returns:
        the model in evaluation mode, and what `from_pretrained` says of its loading.

    Raises:
        ModelError: the weights are not in safetensors files, or the model has no MoE layers.
    """

    def load(model: Any, state_dict: Any, paths: Any, load_config: Any, expected_keys: Any = None) -> tuple[Any, None]:
        if not paths or not all(str(path).endswith(".safetensors") for path in paths):
            raise ModelError(f"'{name}' has no weights in safetensors files, which alone can be read layer by layer.")
        streamed = Streamed(model, paths, load_config)
        setattr(model, STREAMED, streamed)
        return streamed.load_resident(), None

    _map_large_blocks()
    # The one step of `from_pretrained` that is not transformers' own: which of the tensors it finds are loaded now.
    body = {"__module__": kind.__module__, "_load_pretrained_model": staticmethod(load)}
    streaming: Any = type(kind.__name__, (kind,), body)
    model, info = streaming.from_pretrained(name, output_loading_info=True, **options)
    model.__class__ = kind
    return model.eval(), info


def _map_large_blocks() -> None:
    """Have freed tensors leave the process at once.

    The C library would keep blocks of up to 32 MB for later once it has seen some freed, and layer after layer leaves holes
    among them that no next layer fits: memory would grow as if nothing were dropped.
    """
    if hasattr(LIBC, "mallopt"):  # glibc
        LIBC.mallopt(MMAP_THRESHOLD, LARGE_BLOCK)


def _trim() -> None:
    """Give back what freed small blocks have left."""
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


def _hollow(tensor: Tensor) -> Tensor:
    hollow = torch.empty_like(tensor, device="meta")
    hollow._is_hf_initialized = True  # type: ignore[attr-defined]
    return hollow


@contextmanager
def _in_turn() -> Iterator[None]:
    """Transformers' loader without its threads, which hold many tensors at once, and without its bar for every layer."""
    from transformers.utils import logging

    given, bar = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD"), logging.is_progress_bar_enabled()
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if given is None:
            del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
        else:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = given
        if bar:
            logging.enable_progress_bar()
