"""llm-compressor on one model: quantize its experts and save, or read a saved checkpoint back.

Runs in an environment with `llmcompressor.txt`. Attention, routers, embeddings and head stay as they are.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from job import Clock, Job, logits_of, main, rows

EXPERT = re.compile(r"layers\.(\d+)\..*experts\.(\d+)\.(\w+)\.weight(_packed)?$")
PARTS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}


def quantize(job: Job) -> dict[str, Any]:
    """Calibrate and round as the tool's own MoE examples do, with its defaults where the job does not say otherwise."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    clock = Clock()

    model = clock.measure("load", lambda: AutoModelForCausalLM.from_pretrained(job["model"]))
    # The other way, unfusing while loading, needs torchvision for Qwen3-MoE and rounds and saves the same.
    clock.measure("linearize", lambda: linearize_moe(model))
    group = job["group"]
    weights = QuantizationArgs(num_bits=job["bits"], strategy="group" if group else "channel", group_size=group, symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    kind = {"rtn": QuantizationModifier, "gptq": GPTQModifier}[job["method"]]
    recipe = kind(config_groups={"experts": scheme}, ignore=["lm_head", "re:.*self_attn.*", r"re:.*\.gate$"])
    text: dict[str, Any] = {}
    if job["method"] != "rtn":
        ids = rows(job)
        data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
        text = {
            "dataset": data,
            "num_calibration_samples": len(ids),
            "max_seq_length": max(map(len, ids)),
            "shuffle_calibration_samples": False,
        }
    clock.measure("quantize", lambda: oneshot(model=model, recipe=recipe, **text))
    clock.measure("save", lambda: model.save_pretrained(job["out"], save_compressed=True))
    return clock.told


def read(job: Job) -> dict[str, Any]:
    """What a fresh process makes of the checkpoint, and its experts as floats by the tool's own arithmetic."""
    from compressed_tensors.compressors.pack_quantized.base import unpack_from_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from safetensors import safe_open
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    directory = Path(job["out"])
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    weights = QuantizationArgs.model_validate(next(iter(config["config_groups"].values()))["weights"])
    floats, stored = {}, 0
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                if "experts." in name:
                    stored += opened.get_tensor(name).nbytes
                match = EXPERT.search(name)
                if not match:
                    continue
                layer, expert, part, packed = match.groups()
                stem = name[: -len("_packed")] if packed else name
                codes = opened.get_tensor(name)
                if packed:
                    codes = unpack_from_int32(codes, weights.num_bits, torch.Size(opened.get_tensor(f"{stem}_shape").tolist()))
                matrix = dequantize(codes, opened.get_tensor(f"{stem}_scale").float(), args=weights)
                floats[f"{layer}.{expert}.{PARTS[part]}"] = matrix.float().contiguous()
    save_file(floats, job["floats"])
    result: dict[str, Any] = {"expert_bytes": stored}
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    result["missing"], result["unexpected"] = len(info["missing_keys"]), len(info["unexpected_keys"])
    result["mismatched"] = len(info["mismatched_keys"])
    save_file({"logits": logits_of(model.eval(), job)}, job["logits"])
    return result


if __name__ == "__main__":
    main({"quantize": quantize, "read": read}, "llmcompressor", "compressed-tensors")
