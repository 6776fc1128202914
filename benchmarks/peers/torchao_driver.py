"""torchao on one model: quantize its experts and save, or read back what was saved.

Runs in an environment with `torchao.txt`. Attention, routers, embeddings and head stay as they are.

`quantize_` and transformers' `TorchAoConfig` take linear layers unless parameters are named. Named so, the fused experts of
a stock model can be had in 8 bits, saved and loaded again. `IntxWeightOnlyConfig`, which has the other widths, refuses
tensors of three dimensions (and `Int4WeightOnlyConfig` asks for `mslk`): there each expert matrix is put into a linear
layer of its own, quantized and saved by the tool, without a model that could load it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from job import Clock, Job, experts, logits_of, main

MATRICES = "matrices.safetensors"


def fused(job: Job) -> bool:
    """Whether the tool itself can quantize a stock model's experts to this format."""
    return job["bits"] == 8 and job["group"] is None and job["method"] == "rtn"


def quantize(job: Job) -> dict[str, Any]:
    """Round with the tool's defaults where the job does not say otherwise; "hqq" is its other choice of scales."""
    from transformers import AutoModelForCausalLM

    clock = Clock()
    model = clock.measure("load", lambda: AutoModelForCausalLM.from_pretrained(job["model"]))
    if fused(job):
        del model
        model = clock.measure("quantize", lambda: while_loading(job))
        clock.measure("save", lambda: model.save_pretrained(job["out"]))
    else:
        layers = clock.measure("quantize", lambda: one_by_one(model, job))
        clock.measure("save", lambda: save(layers, Path(job["out"])))
    return clock.told


def while_loading(job: Job) -> Any:
    """A model whose expert parameters are named to the tool; it rounds while it loads."""
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    named = FqnToConfig({r"re:.*experts\.(gate_up_proj|down_proj)": Int8WeightOnlyConfig()})
    return AutoModelForCausalLM.from_pretrained(job["model"], quantization_config=TorchAoConfig(named))


def one_by_one(model: Any, job: Job) -> torch.nn.Module:
    """A linear layer for each expert matrix, quantized."""
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_
    from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

    layers = torch.nn.ModuleDict()
    for name, matrix in experts(model):
        layers[name.replace(".", "-")] = layer = torch.nn.Linear(*reversed(matrix.shape), bias=False, device="meta")
        layer.weight = torch.nn.Parameter(matrix.clone(), requires_grad=False)
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{job['bits']}"),
        granularity=PerGroup(job["group"]) if job["group"] else PerAxis(0),
    )
    if job["method"] == "hqq":
        config.intx_choose_qparams_algorithm = IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY
    quantize_(layers, config)
    return layers


def save(layers: torch.nn.Module, directory: Path) -> None:
    """Write the tool's tensors as it writes them."""
    from safetensors.torch import save_file
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    directory.mkdir(parents=True, exist_ok=True)
    tensors, metadata = flatten_tensor_state_dict(layers.state_dict())
    save_file(tensors, directory / MATRICES, metadata)


def read(job: Job) -> dict[str, Any]:
    """What a fresh process makes of it, as floats by the tool's own arithmetic."""
    from safetensors import safe_open
    from safetensors.torch import save_file
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
    from transformers import AutoModelForCausalLM

    tensors, metadata = {}, {}
    for file in sorted(Path(job["out"]).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            metadata |= opened.metadata()
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    if not fused(job):
        matrices, rest = unflatten_tensor_state_dict(tensors, metadata)
        assert not rest, f"{len(rest)} tensors are of no matrix"
        floats = {
            name.removesuffix(".weight").replace("-", "."): matrix.to(torch.float32).dequantize()
            for name, matrix in matrices.items()
        }
        save_file({name: matrix.contiguous() for name, matrix in floats.items()}, job["floats"])
        return {"expert_bytes": sum(tensor.nbytes for tensor in tensors.values()), "matrices": len(floats)}
    # The other ways to compute experts, the default among them, fail: they use operators that the tool's tensors lack.
    model, info = AutoModelForCausalLM.from_pretrained(job["out"], output_loading_info=True, experts_implementation="eager")
    save_file({"logits": logits_of(model.eval(), job)}, job["logits"])
    for block in model.model.layers:
        for name, parameter in list(block.mlp.experts.named_parameters()):
            setattr(block.mlp.experts, name, torch.nn.Parameter(parameter.dequantize(torch.float32), requires_grad=False))
    save_file({name: matrix.contiguous() for name, matrix in experts(model)}, job["floats"])
    return {
        "expert_bytes": sum(tensor.nbytes for name, tensor in tensors.items() if ".experts." in name),
        "missing": len(info["missing_keys"]),
        "unexpected": len(info["unexpected_keys"]),
        "mismatched": len(info["mismatched_keys"]),
        "only": "experts_implementation='eager'",
    }


if __name__ == "__main__":
    main({"quantize": quantize, "read": read}, "torchao")
