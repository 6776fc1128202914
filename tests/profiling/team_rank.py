"""One process of a divided profiling run; torchrun, or `test_torchrun` by hand, starts it.

Arguments: directory with the model, file for the profile, which process is to kill itself before which pass ("-" for none), and
"experts" if the processes are to divide the experts, not the text.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from equipoise.errors import EquipoiseError
from equipoise.profiling import calibrate
from equipoise.profiling.loading import load_model, load_tokenizer
from equipoise.profiling.team import team
from equipoise.profiling.texts import read_documents

OPTIONS: dict[str, Any] = {
    "tokens": 600,
    "seq_len": 24,
    "batch_size": 2,
    "importance": ("wanda", "gate_norm", "leave_one_out"),
    "importance_options": {"leave_one_out": {"tokens": 1}},
    "precisions": ("int4",),
    "progress": False,
}


def main(directory: str, out: str, dying: str, what: str = "text") -> None:
    """Profile, and save what the first process has."""
    torch.set_num_threads(1)
    rank, _, at = dying.partition(":")
    run, calls = calibrate.run_batch, []

    def run_or_die(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if os.environ.get("RANK") == rank and len(calls) == int(at):
            Path(f"{out}.died").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return run(*args, **kwargs)

    calibrate.run_batch = run_or_die
    texts = {"a": read_documents([Path(directory) / "a.txt"]), "b": read_documents([Path(directory) / "b.txt"])}
    together = what == "experts"
    options = OPTIONS | {"importance": ("wanda", "gate_norm"), "importance_options": {}} if together else OPTIONS
    try:
        with team(together=together) as us:
            model = load_model(directory, experts_parallel=together and us.size > 1)
            found = calibrate.profile(
                model, load_tokenizer(directory), texts, **options, team=us, resume_path=f"{out}.part", save_every=0
            )
    except EquipoiseError as error:
        sys.exit(f"error: {error}")
    if us.leads:
        found.save(out)
    print(f"passes run: {len(calls)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
