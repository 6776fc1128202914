from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from equipoise.artifacts import Profile

SCRIPT = str(Path(__file__).with_name("team_rank.py"))
PYTHON = [sys.executable]
TORCHRUN = [*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
PATIENT = 900
"""Seconds that a command may take on a machine with other work."""
PROMPTLY = 30
"""Seconds after the death of a process within which all others have ended; on an idle machine one or two."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed"),
]


@pytest.fixture(scope="module")
def directory(make_model, tokenizer, make_documents, tmp_path_factory):
    """A model, its tokenizer and two texts; "one" is the profile of a process alone."""
    path = tmp_path_factory.mktemp("team")
    make_model("mixtral").save_pretrained(path)
    tokenizer.save_pretrained(path)
    for seed, name in enumerate("ab"):
        (path / f"{name}.txt").write_text("\n\n".join(make_documents(20, seed=seed)))
    subprocess.run([*PYTHON, SCRIPT, path, path / "one", "-"], env=ENVIRONMENT, check=True, timeout=PATIENT)
    return path


def run(command, *arguments):
    arguments = [*command, SCRIPT, *arguments]
    return subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENT, check=False)


def test_a_killed_process_ends_the_run_and_the_same_command_goes_on(directory):
    out = directory / "two"
    killed = run([*TORCHRUN, "2"], directory, out, "1:5")
    assert time.time() - float(Path(f"{out}.died").read_text()) < PROMPTLY
    assert killed.returncode != 0
    assert "stopped by SIGTERM" in killed.stderr or "another process of this run has ended" in killed.stderr
    assert "Signal 9 (SIGKILL)" in killed.stderr
    assert not out.exists()
    again = run([*TORCHRUN, "2"], directory, out, "-")
    assert again.returncode == 0, again.stderr
    assert out.read_bytes() == (directory / "one").read_bytes()
    passes = sorted(int(line.split()[-1]) for line in again.stdout.splitlines())
    alone = int(run(PYTHON, directory, directory / "again", "-").stdout.split()[-1])
    assert sum(passes) < alone, "what was saved was not run again"


@pytest.mark.parametrize("held", [(), ("--memory", "0.000001")], ids=["in memory", "layer by layer"])
def test_the_command_gives_the_same_file_however_many_processes_run_it(directory, held):
    texts = ["--scenario", f"a={directory / 'a.txt'}", "--scenario", f"b={directory / 'b.txt'}"]
    options = ["--tokens", "400", "--seq-len", "24", "--batch-size", "2", "--quiet", *held]

    def made(command, name):
        done = subprocess.run(
            [*command, "-m", "equipoise", "profile", directory, *texts, *options, "--out", directory / name],
            env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENT, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("written:") == 1
        return (directory / name).read_bytes()

    assert made([*TORCHRUN, "2"], "of-two") == made(PYTHON, "of-one")
    assert not list(directory.glob(".of-*.part*"))


def test_processes_that_share_the_experts_record_what_one_does_and_resume(directory):
    assert run(PYTHON, directory, directory / "alone", "-", "experts").returncode == 0
    killed = run([*TORCHRUN, "2"], directory, directory / "shared", "1:5", "experts")
    assert killed.returncode != 0
    assert "stopped by SIGTERM" in killed.stderr or "another process of this run has ended" in killed.stderr
    again = run([*TORCHRUN, "2"], directory, directory / "shared", "-", "experts")
    assert again.returncode == 0, again.stderr
    one, found = (Profile.load_file(directory / name) for name in ("alone", "shared"))
    assert found.source == one.source
    assert found.model == one.model
    for name, array in one._arrays().items():
        if np.issubdtype(array.dtype, np.integer):
            assert np.array_equal(found._arrays()[name], array), name
        else:  # the experts' outputs are added in another order
            assert found._arrays()[name] == pytest.approx(array, rel=1e-4), name
    assert sorted(path.name for path in directory.glob("shared*")) == ["shared", "shared.died", "shared.part"]


def test_those_who_wait_notice_a_death_without_torchrun(directory):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "3"}
    processes = [
        subprocess.Popen(
            [*PYTHON, SCRIPT, directory, directory / "three", "2:9"],
            env=ENVIRONMENT | group | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(3)
    ]  # fmt: skip
    assert processes[2].wait(PATIENT) == -signal.SIGKILL
    for process in processes[:2]:
        _, said = process.communicate(timeout=PATIENT)
        assert process.returncode == 1
        assert "another process of this run has ended" in said
    assert time.time() - float((directory / "three.died").read_text()) < PROMPTLY
