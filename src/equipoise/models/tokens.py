"""Which rows of an experts call are real tokens, and where each stands in its own sequence.

Experts are called with all rows of a batch flattened, padding included. A `TokenTracker` watches the forward calls of the
stacks that hold MoE layers and tells, for the call in progress, which rows are real, each one's position among the real
tokens of its own sequence (so that neither padding nor what else is in the batch changes it), and prefill from decode.

Shapes: B sequences, S columns of this call, C columns that an attention mask covers (past and present), T = B * S rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from equipoise.errors import RecordingError
from equipoise.models.adapters.base import forward_names
from equipoise.models.layers import MASK_ARGUMENTS, TOKEN_ARGUMENTS, MoELayer, find_moe_layers, is_stack

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """The rows of one call of a stack, flattened as the experts get them.

    Attributes:
        real_T: [T] bool, False for padding.
        position_T: [T] int64, index among the sequence's own real tokens, those in the key-value cache counted;
            unspecified for padding.
        sequence_T: [T] int64, which sequence of the batch.
        decode: a non-empty cache and one new token per sequence.
        all_real: no row is padding.
    """

    real_T: Tensor
    position_T: Tensor
    sequence_T: Tensor
    decode: bool
    all_real: bool

    @property
    def rows(self) -> int:
        """T, padding counted."""
        return len(self.real_T)


EndListener = Callable[[str, TokenBatch], None]
CallsInProgress = tuple[dict[str, TokenBatch], dict[str, dict[str, Any]]]
"""Tokens by stack, and arguments of the models around them."""


class TokenTracker:
    """Context manager that knows the tokens of the forward call in progress.

    What counts as real: the 2-D attention mask given to the stack or to a model around it; else the diagonal of a 4-D
    mask; else every row. With neither mask nor cache, 2-D `position_ids` that start anew mark packed sequences.

    Args:
        model: the model to watch.
        layers: its MoE layers, when they have been listed already.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[MoELayer] | None = None) -> None:
        self._model = model
        layers = find_moe_layers(model) if layers is None else layers
        self._stacks = {layer.stack: layer.stack_path for layer in layers}
        self._batches: dict[str, TokenBatch] = {}
        self._calls: dict[str, dict[str, Any]] = {}
        self._handles: list[Any] = []
        self._end_listeners: list[EndListener] = []
        self._depth = 0

    def __enter__(self) -> TokenTracker:
        self._depth += 1
        if self._depth == 1:
            for stack, path in self._stacks.items():
                self._watch(stack, path)
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            self._batches.clear()
            self._calls.clear()

    def batch(self, stack: str, rows: int) -> TokenBatch:
        """The tokens of the call in progress.

        Args:
            stack: `MoELayer.stack` of the layer that is being called.
            rows: rows that its experts were given.

        Raises:
            RecordingError: no call of this stack is in progress, or its rows are others than the stack's tokens.
        """
        if stack not in self._batches:
            raise RecordingError(
                f"experts of the {stack} were called outside a forward call of their stack, so it is unknown which tokens "
                "they serve; call the whole model, and turn gradient checkpointing off."
            )
        batch = self._batches[stack]
        if batch.rows != rows:
            raise RecordingError(f"experts of the {stack} were given {rows} rows, but the call has {batch.rows} tokens.")
        return batch

    def exchange(self, calls: CallsInProgress | None) -> CallsInProgress:
        """Turn to another forward call while one is in progress, as when several are run in turn.

        Args:
            calls: what an earlier `exchange` returned for the forward that goes on; None for one that begins.

        Returns:
            what is known of the calls that were in progress until now.
        """
        mine = self._batches, self._calls
        self._batches, self._calls = calls or ({}, {})
        return mine

    def add_end_listener(self, listener: EndListener) -> None:
        """Call `listener(stack, batch)` after each completed forward call of a stack that holds MoE layers."""
        self._end_listeners.append(listener)

    def _watch(self, stack: str, path: str) -> None:
        """Hook the stack and, unless they are encoder-decoders, the models around it, whose masks may be plainer."""
        inner = self._model.get_submodule(path)
        parts = path.split(".") if path else []
        for depth in range(len(parts)):
            outer_path = ".".join(parts[:depth])
            outer = self._model.get_submodule(outer_path)
            if is_stack(outer) and not getattr(getattr(outer, "config", None), "is_encoder_decoder", False):
                self._hook_call(outer, f"{stack}:{depth}")

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            around = [self._calls.get(f"{stack}:{depth}") for depth in reversed(range(len(parts)))]
            self._batches[stack] = _read_batch(stack, _arguments(module, args, kwargs), [call for call in around if call])

        def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            batch = self._batches.pop(stack, None)
            if output is not None and batch is not None:
                for listener in self._end_listeners:
                    listener(stack, batch)

        self._handles.append(inner.register_forward_pre_hook(begin, with_kwargs=True))
        self._handles.append(inner.register_forward_hook(end, always_call=True))

    def _hook_call(self, module: nn.Module, key: str) -> None:
        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._calls[key] = _arguments(module, args, kwargs)

        def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._calls.pop(key, None)

        self._handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
        self._handles.append(module.register_forward_hook(end, always_call=True))


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(forward_names(module), args, strict=False)) | kwargs


def _read_batch(stack: str, own: Mapping[str, Any], around: Sequence[Mapping[str, Any]]) -> TokenBatch:
    """The tokens of a call from its own arguments and those of the models around it, innermost first."""
    name = next((name for name in TOKEN_ARGUMENTS if own.get(name) is not None), None)
    if name is None:
        raise RecordingError(f"the {stack} was called with neither input_ids nor inputs_embeds, so its tokens are unknown.")
    tokens = own[name]
    size_B, size_S = tokens.shape[:2] if tokens.dim() > 1 else (1, tokens.shape[0])
    if name == "decoder_input_ids":
        around = []  # the model around it holds the mask of its encoder
    calls = [own, *(call for call in around if _shape(call) in (None, (size_B, size_S)))]
    past = _cached_tokens(calls)
    decode = past > 0 and size_S == 1
    masks = [m for call in calls for name in MASK_ARGUMENTS for m in _masks(call.get(name)) if m.shape[0] in (1, size_B)]
    flat = next((m for m in masks if m.dim() == 2 and m.shape[1] >= size_S), None)
    square = next((m for m in masks if m.dim() == 4 and m.shape[2] == size_S), None)
    sequence = torch.arange(size_B, device=tokens.device)[:, None].expand(size_B, size_S)
    if flat is not None or square is not None:
        if flat is not None:
            known_BC = (flat != 0).expand(size_B, -1)
            if past == 0:
                past = flat.shape[1] - size_S  # a model without a cache object of its own length
                decode = past > 0 and size_S == 1
        else:
            assert square is not None
            known_BC = _keys_of(square, past).expand(size_B, -1)
        real, position = _place(stack, known_BC, past, size_S)
        all_real = bool(real.all())
    else:
        real = torch.ones(size_B, size_S, dtype=torch.bool, device=tokens.device)
        position, sequence = _unmasked(own.get("position_ids"), past, sequence)
        all_real = True
    return TokenBatch(real.reshape(-1), position.reshape(-1), sequence.reshape(-1), decode, all_real)


def _shape(call: Mapping[str, Any]) -> tuple[int, ...] | None:
    tokens = next((call[name] for name in TOKEN_ARGUMENTS if call.get(name) is not None), None)
    return None if tokens is None else tuple(tokens.shape[:2])


def _place(stack: str, known_BC: Tensor, past: int, size_S: int) -> tuple[Tensor, Tensor]:
    """Real and position [B, S] of the newest S columns, from a mask over the present alone or over past and present."""
    columns = known_BC.shape[1]
    if columns == size_S:
        return known_BC, past + known_BC.long().cumsum(1) - 1
    if columns < past + size_S:
        raise RecordingError(
            f"the attention mask of the {stack} covers {columns} columns, but the cache holds {past} tokens and {size_S} are "
            "new; give a mask over all of them, or over the new ones alone."
        )
    new = slice(past, past + size_S)
    return known_BC[:, new], (known_BC.long().cumsum(1) - 1)[:, new]


def _unmasked(position_ids: Any, past: int, sequence_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Position and sequence [B, S] where no mask is given: all rows are real."""
    size_B, size_S = sequence_BS.shape
    if isinstance(position_ids, Tensor) and position_ids.dim() == 2 and position_ids.shape[1] == size_S and past == 0:
        position_BS = position_ids.expand(size_B, -1).to(torch.int64)
        starts_BS = torch.ones_like(position_BS, dtype=torch.bool)
        starts_BS[:, 1:] = position_BS[:, 1:] != position_BS[:, :-1] + 1
        return position_BS, (starts_BS.reshape(-1).cumsum(0) - 1).view(size_B, size_S)
    return (past + torch.arange(size_S, device=sequence_BS.device)).expand(size_B, -1), sequence_BS


def _cached_tokens(calls: Sequence[Mapping[str, Any]]) -> int:
    for call in calls:
        cache = call.get("past_key_values")
        if cache is not None and hasattr(cache, "get_seq_length"):
            try:
                return int(cache.get_seq_length())
            except ValueError:  # transformers raises it for a cache of linear attention alone, which has no length
                return 0
    return 0


def _masks(mask: Any) -> list[Tensor]:
    """The tensors of an attention mask argument: itself, or those of a mapping, full attention first."""
    if isinstance(mask, Mapping):
        values = [mask["full_attention"], *mask.values()] if "full_attention" in mask else list(mask.values())
        return [value for value in values if isinstance(value, Tensor)]
    return [mask] if isinstance(mask, Tensor) else []


def _keys_of(mask_B1SC: Tensor, past: int) -> Tensor:
    """Which columns of a 4-D mask are real tokens [B, C]: the last query sees all real keys, each token sees itself."""
    allowed_BSC = mask_B1SC[:, 0] if mask_B1SC.dtype == torch.bool else mask_B1SC[:, 0] > torch.finfo(mask_B1SC.dtype).min / 2
    known_BC = allowed_BSC[:, -1].clone()
    size_S = allowed_BSC.shape[1]
    if known_BC.shape[1] >= past + size_S:
        known_BC[:, past : past + size_S] = allowed_BSC[:, :, past : past + size_S].diagonal(dim1=1, dim2=2)
    return known_BC
