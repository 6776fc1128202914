"""HQQ on one model: quantize its experts and save, or read back what was saved.

Runs in an environment with `hqq.txt`. Attention, routers, embeddings and head stay as they are.

HQQ replaces linear layers: its own `AutoHQQHFModel` leaves the fused experts of a stock model as they are, and transformers'
`HqqConfig` is refused by transformers 5. Each expert matrix is therefore put into a linear layer of its own, quantized by the
tool and saved as its layers are, without a model that could load it. Codes have a zero point for each group.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from job import Clock, Job, experts, main

MATRICES = "matrices.safetensors"


def quantize(job: Job) -> dict[str, Any]:
    """Round with the tool's defaults where the job does not say otherwise, groups along the input."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    clock = Clock()
    model = clock.measure("load", lambda: AutoModelForCausalLM.from_pretrained(job["model"]))
    config = BaseQuantizeConfig(nbits=job["bits"], group_size=job["group"], axis=1)

    def rounded(matrix: torch.Tensor) -> HQQLinear:
        return HQQLinear.from_weights(matrix, None, config, device="cpu")

    layers = clock.measure("quantize", lambda: {name: rounded(matrix) for name, matrix in experts(model)})
    tensors = {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.state_dict().items()}
    Path(job["out"]).mkdir(parents=True, exist_ok=True)
    clock.measure("save", lambda: save_file(tensors, Path(job["out"]) / MATRICES))
    return clock.told


def read(job: Job) -> dict[str, Any]:
    """The saved layers in a fresh process, as floats by the tool's own arithmetic."""
    from hqq.core.quantize import HQQLinear, Quantizer
    from safetensors.torch import load_file, save_file

    tensors = load_file(Path(job["out"]) / MATRICES)
    states: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        matrix, _, key = name.rpartition(".")
        states.setdefault(matrix, {})[key] = tensor
    floats = {}
    for name, state in states.items():
        layer = HQQLinear(None, None, device="cpu", initialize=False)
        layer.load_state_dict(state)
        # Codes, scales and zeros are as saved; float32 only keeps their product from being rounded again.
        floats[name] = Quantizer.dequantize(layer.W_q, {**layer.meta, "compute_dtype": torch.float32}).contiguous()
    save_file(floats, job["floats"])
    return {"expert_bytes": sum(tensor.nbytes for tensor in tensors.values()), "matrices": len(floats)}


if __name__ == "__main__":
    main({"quantize": quantize, "read": read}, "hqq")
