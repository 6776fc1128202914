"""Exported checkpoints in a real vLLM on CPU: plain ones served, quantized ones read by its own loader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from equipoise.artifacts import Plan
from equipoise.execution.apply import apply_plan
from equipoise.execution.checkpoint import load, save_balanced
from equipoise.execution.compressed_tensors import export_compressed
from equipoise.execution.export_checkpoint import export_checkpoint
from equipoise.execution.stock_source import Source
from equipoise.lab import load as shelf
from equipoise.models.layers import model_facts
from execution.export_helpers import layered_plan

pytestmark = pytest.mark.engines
TOKENS = 24
TEXTS = ["The river ran through the old town and", "def add(a, b):\n    return", "In the year 1920 the company was"]
NAMES = {"mixtral-8": "w1,w3,w2", "qwen3-32": "gate_proj,up_proj,down_proj"}


def mixed_plan(name: str) -> Plan:
    """Experts of all kinds side by side, and copies; all copies of an expert alike."""
    model, _ = shelf(name)
    drawn = layered_plan(model_facts(model, name), ["bf16"], extra=4)
    forms = ("bf16", "int8", "int4", "fp8")
    layers = [
        layer.model_copy(update={"precisions": tuple(forms[(e + i) % 4] for e in layer.experts)})
        for i, layer in enumerate(drawn.layers)
    ]
    return drawn.model_copy(update={"layers": tuple(layers), "exactness": "weights"})


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_export_generates_the_same_tokens_in_vllm(name: str, run, tmp_path: Path) -> None:
    model, tokenizer = shelf(name)
    save_balanced(apply_plan(model, mixed_plan(name), int8_activations=False), None, tmp_path / "balanced")
    export_checkpoint(Source(tmp_path / "balanced"), tmp_path / "plain")
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    found = run("vllm_tokens.py", tmp_path / "plain", tmp_path / "prompts.json", TOKENS)
    # Transformers refuses `.float()` of quantized models; slots keep their storage, and compute in the dtype of their inputs.
    balanced = torch.nn.Module.float(load(tmp_path / "balanced")).eval()
    for prompt, tokens in zip(prompts, found["tokens"], strict=True):
        ids = torch.tensor([prompt])
        ours = balanced.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None,
            pad_token_id=1,
        )  # fmt: skip
        assert tokens == ours[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("name", "forms", "by_layer", "methods"),
    [
        ("mixtral-8", ["int4", "int8", "fp8", "bf16"], True, ["WNA16", "WNA16", "W8A8Fp8", "Unquantized"]),
        ("qwen3-32", ["int4", "bf16", "int4", "int4"], False, ["WNA16", "Unquantized", "WNA16", "WNA16"]),
    ],
)
def test_vllm_reads_every_layer_of_a_quantized_export(
    name: str, forms: list[str], by_layer: bool, methods: list[str], run, tmp_path: Path
) -> None:
    model, _ = shelf(name)
    plan = layered_plan(model_facts(model, name), forms)
    save_balanced(apply_plan(model, plan), None, tmp_path / "balanced")
    export_compressed(Source(tmp_path / "balanced"), tmp_path / "packed", by_layer=by_layer)
    layers = list(run("vllm_load.py", tmp_path / "packed", NAMES[name])["layers"].values())
    assert [layer["method"] for layer in layers] == [
        f"{'' if kind == 'Unquantized' else 'CompressedTensors'}{kind}{'FusedMoE' if kind == 'Unquantized' else 'MoE'}Method"
        for kind in methods
    ]
    bits = {"int4": 4, "int8": 8, "fp8": 8, "bf16": None}
    assert [layer["bits"] for layer in layers] == [bits[form] for form in forms]
    for layer in layers:
        assert layer["same"]
        assert all(layer["same"].values()), layer
