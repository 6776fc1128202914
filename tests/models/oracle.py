"""Brute force: routing read from the routers' own outputs and counted with plain loops, padding and all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from equipoise.models.layers import MoELayer, find_moe_layers, gated_expert, observe

Batch = dict[str, Tensor]


def sequences(lengths: tuple[int, ...] = (7, 4), seed: int = 1) -> list[Tensor]:
    """Token sequences of different lengths, free of special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 60, (n,), generator=generator) for n in lengths]


def padded(texts: list[Tensor], side: str, pad: int = 0) -> Batch:
    """A batch of sequences, padded on one side, as a tokenizer would give it."""
    width = max(map(len, texts))
    ids = torch.full((len(texts), width), pad)
    mask = torch.zeros((len(texts), width), dtype=torch.long)
    for row, text in enumerate(texts):
        where = slice(width - len(text), width) if side == "left" else slice(0, len(text))
        ids[row, where], mask[row, where] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


def inputs_for(model: nn.Module, batch: Batch) -> Batch:
    """A batch as the model's forward takes it.

    Encoder-decoders read the same text with the decoder; where text and vision have experts of their own, odd token ids
    pass for vision.
    """
    if model.config.is_encoder_decoder:
        return {**batch, "decoder_input_ids": batch["input_ids"], "decoder_attention_mask": batch["attention_mask"]}
    if model.config.model_type.startswith("ernie4_5_vl_moe"):
        return {**batch, "moe_mm_token_type_ids": batch["input_ids"] % 2}
    return batch


@contextmanager
def watch_routers(model: nn.Module) -> Iterator[list[list[list[int]]]]:
    """Yields, for each MoE layer, the chosen experts of each row that its router was given, in order of the rows."""
    layers = find_moe_layers(model)
    chosen: list[list[list[int]]] = [[] for _ in layers]
    handles = [_watch(model, layer, chosen[layer.index]) for layer in layers]
    try:
        yield chosen
    finally:
        for handle in handles:
            handle.remove()


def _watch(model: nn.Module, layer: MoELayer, rows: list[list[int]]) -> Any:
    router = layer.experts.router if layer.router_path is None else model.get_submodule(layer.router_path)
    block = layer.ancestors[-1]

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if layer.layout == "dbrx":  # its router gives logits; the block chooses
            rows.extend(block.route_tokens_to_experts(output)[1].tolist())
        else:
            rows.extend(_read(layer, output))

    return router.register_forward_hook(hook)


def _read(layer: MoELayer, output: tuple[Tensor, ...]) -> list[list[int]]:
    """The experts of each row from a router's output, by what each family's router returns."""
    k = layer.top_k
    if layer.layout == "llama4":
        return [[e for e, score in enumerate(row) if score > 0] for row in output[0].tolist()]
    if layer.layout == "switch":
        return [[e for e, on in enumerate(row) if on] for row in output[0].reshape(-1, layer.num_experts).tolist()]
    if layer.layout == "nllb_moe":
        return [[e for e, weight in enumerate(row) if weight > 0] for row in output[1].tolist()]
    if layer.layout == "jetmoe":
        return output[4].topk(k, dim=1).indices.tolist()
    indices = [t for t in output if isinstance(t, Tensor) and not t.is_floating_point() and t.shape[-1] == k]
    rows = indices[-1].reshape(-1, k).tolist()
    if layer.layout == "fused-skip":  # a skipped token shows as expert 0 with probability 0
        weights = output[1].reshape(-1, k).tolist()
        return [[e for e, w in zip(r, ws, strict=True) if e != 0 or w != 0] for r, ws in zip(rows, weights, strict=True)]
    return [[e for e in row if e < layer.num_experts] for row in rows]


def count(layers: tuple[MoELayer, ...], chosen: list[list[list[int]]], batch: Batch) -> np.ndarray:
    """[L, E] selections by real tokens, one at a time."""
    counts = np.zeros((len(layers), max(layer.num_experts for layer in layers)), np.int64)
    for layer, rows in zip(layers, chosen, strict=True):
        real = batch["attention_mask"].reshape(-1).tolist()
        if layer.layout == "fused-modality":
            vision = (batch["input_ids"] % 2).reshape(-1).tolist()
            mine = int(".vision_moe." in layer.path)
            real = [r for r, v in zip(real, vision, strict=True) if v == mine]
        assert len(rows) == len(real), f"{layer.path}: {len(rows)} rows were routed, {len(real)} expected"
        for experts, is_real in zip(rows, real, strict=True):
            for expert in experts if is_real else ():
                counts[layer.index, expert] += 1
    return counts


def recomputed(layer: MoELayer, seen: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What the experts returned and what `gated_expert` makes of the same selections, both [T, D]."""
    x_TD, ids_TK, weights_TK, output = (seen[key] for key in ("hidden", "ids", "weights", "output"))
    y_TD = torch.zeros_like(x_TD)
    for expert in range(layer.num_experts):
        token, which = torch.where(ids_TK == expert)
        y_TD.index_add_(0, token, gated_expert(layer, expert, x_TD[token], weights_TK[token, which]).to(y_TD.dtype))
    if layer.layout == "llama4":  # one block of rows per expert, summed outside
        output = output.reshape(layer.num_experts, -1, output.shape[-1]).sum(0)
    if layer.layout == "jetmoe":  # the block's own bias
        output = output - layer.experts.bias
    if layer.layout == "fused-identity":
        y_TD += x_TD * (weights_TK * (ids_TK >= layer.num_experts)).sum(1, keepdim=True)
    if layer.layout == "fused-modality":  # its experts return the rows of their modality alone
        y_TD = y_TD[(ids_TK < layer.num_experts).any(1)]
    return output.reshape(-1, output.shape[-1]), y_TD


@contextmanager
def watch_experts(layer: MoELayer) -> Iterator[dict[str, Tensor]]:
    """Yields a dictionary that holds, after a forward, what a layer's experts were given and what they returned."""
    seen: dict[str, Tensor] = {}

    def before(hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        seen.update(hidden=hidden.clone(), ids=ids.clone(), weights=weights.clone())

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen["output"] = output.clone()

    handles = [observe(layer, before), layer.experts.register_forward_hook(after)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
