from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from equipoise.models.recorder import record
from models.architectures import tiny
from models.oracle import padded, sequences

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("implementation", ["all_to_all", "all_reduce"])
def test_every_rank_records_global_expert_ids(implementation, tmp_path):
    model = tiny("olmoe")
    model.save_pretrained(tmp_path)
    with torch.no_grad(), record(model) as recorder:
        model(**padded(sequences(), "left"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*command, str(HERE / "expert_parallel_rank.py"), str(tmp_path), implementation],
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )
    for rank in range(2):
        seen = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert seen == {"counts": recorder.counts.tolist(), "unrouted": 0}
