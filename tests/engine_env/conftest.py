"""Tests inside real engines; `make test-engines` makes their environment, without vLLM they are not collected."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]

Run = Callable[..., Any]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a script of this directory in a process of its own; its answer is the JSON that it writes."""

    def call(script: str, *args: object, ok: bool = True, **environment: str) -> Any:
        answer = tmp_path_factory.mktemp("answer") / "answer.json"
        mine = {k: v for k, v in os.environ.items() if not k.startswith("EQUIPOISE_")}
        paths = [str(HERE / "triton_cpu"), str(HERE), *filter(None, [mine.get("PYTHONPATH")])]
        settings = {
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_USE_V2_MODEL_RUNNER": "1",  # the one that returns routed experts
        }
        done = subprocess.run(
            [sys.executable, str(HERE / script), str(answer), *map(str, args)],
            env=mine | settings | environment,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        log = done.stdout + done.stderr
        if ok:
            assert done.returncode == 0, log[-6000:]
            return json.loads(answer.read_text()) | {"log": log}
        assert done.returncode != 0, f"{script} succeeded:\n{log[-3000:]}"
        return log

    return call


@pytest.fixture(scope="session")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random OLMoE of 3 layers, 8 experts, top-2, whose routing is as uneven as that of a trained model."""
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
        num_experts=8, num_experts_per_tok=2, max_position_embeddings=256, eos_token_id=1, pad_token_id=0, bos_token_id=2,
    )  # fmt: skip
    model = OlmoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.mul_(8.0)
    directory = tmp_path_factory.mktemp("model") / "tiny-olmoe"
    model.save_pretrained(directory)
    return directory
