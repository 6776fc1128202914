"""A real vLLM builds the model of a compressed-tensors checkpoint and loads its weights: answer.json MODEL NAMES.

vLLM's CPU build has no kernel for quantized experts and says so when a layer is built. That answer is replaced here, so that
all else is vLLM's own: it reads the configuration, picks each layer's scheme, makes its parameters and maps the tensors onto
them. The parameters are then held against the checkpoint. NAMES: gate, up and down of the family, separated by commas.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main() -> None:
    answer, directory, names = sys.argv[1:]
    import torch
    from safetensors import safe_open
    from vllm import EngineArgs
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w8a8_fp8 as fp8,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as wna16,
    )
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.utils.network_utils import get_open_port
    from vllm.utils.torch_utils import set_default_torch_dtype

    wna16.select_wna16_moe_backend = lambda **_: (WNA16MoEBackend.MARLIN, None)
    fp8.select_fp8_moe_backend = lambda **_: (None, None)
    config = EngineArgs(
        model=directory, skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, max_model_len=128
    ).create_engine_config()  # fmt: skip
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        parallel_state.init_distributed_environment(1, 0, f"tcp://127.0.0.1:{get_open_port()}", 0, "gloo")
        parallel_state.initialize_model_parallel(1, backend="gloo")
        loader = get_model_loader(config.load_config)
        model = loader.create_model(config, config.model_config)
        loader.load_weights(model, config.model_config)
    found: dict[str, Any] = {}
    with safe_open(f"{directory}/model.safetensors", "pt") as file:
        for path, module in model.named_modules():
            if isinstance(module, RoutedExperts):
                prefix = path.removesuffix(".routed_experts")
                found[prefix] = layer(module, file, prefix, names.split(","))
    with open(answer, "w", encoding="utf-8") as out:
        json.dump({"layers": found}, out)
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def layer(module: Any, file: Any, prefix: str, names: list[str]) -> dict[str, Any]:
    """What vLLM made of a layer, and whether each of its parameters holds what the checkpoint does."""
    import torch

    held = set(file.keys())
    parameters = dict(module.named_parameters(recurse=False))
    same = {}
    for name, parameter in parameters.items():
        which, _, rest = name.partition("_")
        if rest.endswith("_shape"):
            continue
        parts = names[:2] if which == "w13" else names[2:]
        fused = f"{prefix}.{'gate_up_proj' if which == 'w13' else 'down_proj'}"
        if fused in held:
            same[name] = bool(torch.equal(parameter, file.get_tensor(fused)))
            continue
        same[name] = all(
            torch.equal(
                parameter[expert].view(-1).contiguous().view(torch.uint8),
                torch.cat([file.get_tensor(f"{prefix}.{expert}.{part}.{rest}").to(parameter.dtype) for part in parts])
                .view(-1).view(torch.uint8),
            )
            for expert in range(len(parameter))
        )  # fmt: skip
    method = module.quant_method
    quantization = getattr(method, "weight_quant", None)
    return {
        "method": type(method).__name__,
        "bits": getattr(quantization, "num_bits", None),
        "group": getattr(quantization, "group_size", None),
        "same": same,
    }


if __name__ == "__main__":
    main()
