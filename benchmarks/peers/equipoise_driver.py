"""Equipoise on one model, in a process of its own like the tools it stands beside: quantize and save, or read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from job import Clock, Job, logits_of, main, rows
from safetensors import safe_open
from safetensors.torch import save_file


def quantize(job: Job) -> dict[str, Any]:
    """Round all experts to one precision, calibrated on the job's rows where the method needs text.

    A method that ends in "-asym" is the one without, with a zero point for each scale.
    """
    from equipoise.execution.apply import apply_plan
    from equipoise.execution.checkpoint import save_balanced
    from equipoise.models.layers import model_facts
    from equipoise.planning.uniform import uniform_plan
    from equipoise.profiling.loading import load_model
    from equipoise.profiling.sequences import Batch
    from equipoise.quantization.methods import METHODS

    clock = Clock()
    model = clock.measure("load", lambda: load_model(job["model"]))
    method = job["method"].removesuffix("-asym")
    text: dict[str, Any] = {}
    if METHODS.get(method).needs_hessian:
        ids = np.array(rows(job), np.int64)
        text["batches"] = [
            Batch("calibration", part, np.ones_like(part), part) for part in np.split(ids, range(4, len(ids), 4))
        ]
    name = f"int{job['bits']}" + (f"-g{job['group']}" if job["group"] else "") + job["method"].removeprefix(method)
    plan = uniform_plan(model_facts(model, job["model"]), name)
    clock.measure("quantize", lambda: apply_plan(model, plan, method=method, int8_activations=False, **text))
    clock.measure("save", lambda: save_balanced(model, None, job["out"]))
    return clock.told


def read(job: Job) -> dict[str, Any]:
    """The checkpoint in a fresh process, and its experts as floats, from the file."""
    from equipoise.execution.balanced_config import plan_of
    from equipoise.execution.checkpoint import load
    from equipoise.precisions import precision
    from equipoise.quantization.formats import dequantize

    model = load(job["out"]).eval()
    plan = plan_of(model)
    columns = {"up": plan.model.layers[0].matrices[0][1], "down": plan.model.layers[0].matrices[-1][1]}
    stored, kept = 0, {}
    for file in sorted(Path(job["out"]).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            kept |= {name: opened.get_tensor(name) for name in opened.keys() if ".experts.slots." in name}  # noqa: SIM118
    floats = {}
    for name in [name for name in kept if name.endswith("_packed")]:
        stem, part = name.removesuffix("_packed"), name.removesuffix("_packed").rpartition(".")[2]
        layer = int(name.split("layers.")[1].split(".")[0])
        form = precision(plan.layers[layer].precisions[0])
        matrices = dequantize(kept[name], kept[f"{stem}_scales"], kept.get(f"{stem}_zeros"), columns[part], form, torch.float32)
        for slot, matrix in enumerate(matrices):
            expert = plan.layers[layer].experts[slot]
            if part == "down":
                floats[f"{layer}.{expert}.down"] = matrix.contiguous()
            else:
                gate, up = matrix.chunk(2)
                floats |= {f"{layer}.{expert}.gate": gate.contiguous(), f"{layer}.{expert}.up": up.contiguous()}
    stored = sum(tensor.nbytes for tensor in kept.values())
    save_file(floats, job["floats"])
    save_file({"logits": logits_of(model, job)}, job["logits"])
    return {"expert_bytes": stored, "missing": 0, "unexpected": 0, "mismatched": 0}  # `load` refuses anything else


if __name__ == "__main__":
    main({"quantize": quantize, "read": read}, "equipoise")
