"""Our dispatch under transformers' own expert parallelism: the same logits as its own implementations and as one process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from equipoise.execution.expert_parallel.ranks import Ranks
from execution.helpers import token_batch
from execution.on_ranks import on_ranks
from models.architectures import tiny

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
IMPLEMENTATIONS = ("all_to_all", "equipoise", "equipoise-llep", "equipoise-quota")
ARCHITECTURES = ("olmoe", "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss")


def load_and_run(ranks: Ranks, directories: dict[str, str], batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logits under every implementation, and the rows that each rank served under ours."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    from equipoise.execution.expert_parallel.stock import register_stock

    os.environ |= {"RANK": str(ranks.rank), "LOCAL_RANK": str(ranks.rank), "WORLD_SIZE": str(ranks.size)}
    register_stock(least=1, gate=1.0)
    out = {}
    for name, directory in directories.items():
        for implementation in IMPLEMENTATIONS:
            config = DistributedConfig(tp_size=ranks.size, ep_size=ranks.size, ep_implementation=implementation)
            model = AutoModelForCausalLM.from_pretrained(directory, distributed_config=config).eval()
            with torch.no_grad():
                out[f"{name} {implementation}"] = model(**batch).logits
    return out


def test_dispatch_of_ours_under_stock_expert_parallelism(tmp_path: Path):
    batch = token_batch(60, (9, 5, 7, 8))
    directories, expected = {}, {}
    for name in ARCHITECTURES:
        model = tiny(name)
        directories[name] = str(tmp_path / name)
        model.save_pretrained(directories[name])
        with torch.no_grad():
            expected[name] = model(**batch).logits
    found = on_ranks(2, tmp_path, load_and_run, directories, batch)
    real = batch["attention_mask"].bool()
    for name, implementation in ((n, i) for n in ARCHITECTURES for i in IMPLEMENTATIONS):
        for one in found:
            assert float((one[f"{name} {implementation}"] - expected[name])[real].abs().max()) < 1e-5, (
                f"{name} {implementation}"
            )
