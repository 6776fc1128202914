"""One rank of a model under transformers' own expert parallelism; torchrun starts it, `test_expert_parallel` reads it."""

from __future__ import annotations

import json
import os
import sys

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from equipoise.models.recorder import record
from models.oracle import padded, sequences


def main(directory: str, implementation: str) -> None:
    """Record one batch and write the counts beside the model."""
    torch.set_num_threads(1)
    config = DistributedConfig(tp_size=2, ep_size=2, ep_implementation=implementation)
    model = AutoModelForCausalLM.from_pretrained(directory, distributed_config=config).eval()
    with torch.no_grad(), record(model) as recorder:
        model(**padded(sequences(), "left"))
    with open(f"{directory}/rank{os.environ['RANK']}.json", "w") as file:
        json.dump({"counts": recorder.counts.tolist(), "unrouted": int(recorder.unrouted.sum())}, file)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
