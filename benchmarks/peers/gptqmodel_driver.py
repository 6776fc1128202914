"""GPTQModel on one model: quantize its experts and save, or read a saved checkpoint back.

Runs in an environment with `gptqmodel.txt`. Attention, routers, embeddings and head stay as they are.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from job import Clock, Job, logits_of, main, rows

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with one, its default on two cores, it does not start

EXPERT = re.compile(r"layers\.(\d+)\..*experts\.(\d+)\.(\w+)$")
PARTS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}


def quantize(job: Job) -> dict[str, Any]:
    """Calibrate and round with the tool's defaults where the job does not say otherwise."""
    from gptqmodel import GPTQModel, QuantizeConfig

    clock = Clock()
    config = QuantizeConfig(
        bits=job["bits"],
        group_size=job["group"] or -1,
        sym=True,
        act_group_aware=job["group"] is not None,  # its default, which one scale per row refuses
        dynamic={r"-:.*self_attn.*": {}},
        device="cpu",
    )
    model = clock.measure("load", lambda: GPTQModel.load(job["model"], config))
    text = [
        {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)} for ids in rows(job)
    ]
    clock.measure("quantize", lambda: model.quantize(text, batch_size=4))
    clock.measure("save", lambda: model.save(job["out"]))
    return clock.told


def read(job: Job) -> dict[str, Any]:
    """What a fresh process makes of the checkpoint, and its experts as floats by the tool's own arithmetic."""
    from gptqmodel import BACKEND, GPTQModel
    from safetensors import safe_open
    from safetensors.torch import save_file

    stored = 0
    for file in sorted(Path(job["out"]).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            stored += sum(opened.get_tensor(name).nbytes for name in opened.keys() if "experts." in name)  # noqa: SIM118
    result: dict[str, Any] = {"expert_bytes": stored, "missing": 0, "unexpected": 0, "mismatched": 0}
    model = GPTQModel.load(job["out"], device="cpu", backend=BACKEND.GPTQ_TORCH)
    floats = {}
    for name, module in model.model.named_modules():
        match = EXPERT.search(name)
        if match and hasattr(module, "dequantize_weight"):
            layer, expert, part = match.groups()
            floats[f"{layer}.{expert}.{PARTS[part]}"] = module.dequantize_weight().T.float().contiguous()
    save_file(floats, job["floats"])
    save_file({"logits": logits_of(model.model.eval(), job)}, job["logits"])
    return result


if __name__ == "__main__":
    main({"quantize": quantize, "read": read}, "gptqmodel")
