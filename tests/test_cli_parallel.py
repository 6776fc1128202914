"""The command that runs a plan over processes: alone, over two ranks as torchrun starts them, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from equipoise.artifacts import Plan
from equipoise.cli import app
from equipoise.errors import EquipoiseError, ModelError
from equipoise.models.layers import model_facts
from equipoise.profiling.loading import load_model
from execution.helpers import make_plan
from support import corpus

RUN = CliRunner()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in corpus(3, 20)))
    return path


@pytest.fixture(scope="module")
def plan(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies on two ranks."""
    made = make_plan(model_facts(load_model(str(tiny_model_dir)), "tiny"), extra=4)
    layers = tuple(layer.model_copy(update={"units": tuple(u % 2 for u in layer.units)}) for layer in made.layers)
    path = tmp_path_factory.mktemp("plan") / "x.plan.json"
    Plan(**{**made.model_dump(by_alias=True), "units": 2, "layers": layers, "allows_duplicates": True}).save(path)
    return path


@pytest.fixture(scope="module")
def top_one_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights with one expert a token."""
    path = tmp_path_factory.mktemp("one") / "model"
    shutil.copytree(tiny_model_dir, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 1}))
    return path


def told(*arguments: Any) -> dict[str, Any]:
    done = RUN.invoke(app, ["parallel", *map(str, arguments), "--json", "-q"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_alone_it_tells_the_models_own_loss(tiny_model_dir: Path, plan: Path, text: Path):
    given = (tiny_model_dir, "--text", text, "--tokens", 600, "--seq-len", 64)
    without, with_plan = told(*given), told(*given, "--plan", plan, "--generate", 3)
    assert (without["plan"], without["ranks"], without["exactness"]) == ("contiguous", 1, "exact")
    assert with_plan["loss"] == pytest.approx(without["loss"], abs=1e-4)
    assert without["decode"] is None
    assert with_plan["decode"]["calls"] == 3
    assert with_plan["prefill"]["imbalance"] == 1.0  # one rank
    assert sum(with_plan["expert_bytes_by_rank"]) == Plan.load_file(plan).bytes_by_unit().sum()


def test_tables_tell_what_was_measured(tiny_model_dir: Path, plan: Path, text: Path):
    words = ["parallel", str(tiny_model_dir), "--plan", str(plan), "--text", str(text), "--tokens", "300", "-q"]
    done = RUN.invoke(app, words, catch_exceptions=False)
    assert "1 rank, by hand, even: a MoE layer in a forward (measured)" in " ".join(done.stdout.split())
    assert "class exact, does not depend on the batch" in " ".join(done.stdout.split())


def test_a_coherent_context_is_told_of_and_changes_no_loss(tiny_model_dir: Path, top_one_dir: Path, text: Path):
    given = (top_one_dir, "--text", text, "--tokens", 600, "--seq-len", 64, "--generate", 3)
    own, coherent = told(*given), told(*given, "--context", "coherent")
    assert (own["context"], coherent["context"]) == ("own", "coherent")
    assert coherent["loss"] == pytest.approx(own["loss"], abs=1e-4)
    assert coherent["tokens"] == own["tokens"]
    assert coherent["decode"]["calls"] == 3
    assert coherent["decode"]["context_bytes_moved"] == 0  # one rank
    shown = RUN.invoke(app, ["parallel", *map(str, given), "--context", "coherent", "-q"], catch_exceptions=False)
    assert "coherent context: a MoE layer in a forward (measured)" in " ".join(shown.stdout.split())
    assert "bytes of context sent between ranks" in shown.stdout
    with pytest.raises(ModelError, match=r"It takes top-k 1\. Use context='own'"):
        told(tiny_model_dir, "--text", text, "--context", "coherent")


def test_mistakes_are_told(tiny_model_dir: Path, plan: Path, text: Path):
    with pytest.raises(EquipoiseError, match="unknown dispatch 'metros'"):
        told(tiny_model_dir, "--plan", plan, "--text", text, "--dispatch", "metros")
    with pytest.raises(EquipoiseError, match="has no option 'gamma'"):
        told(tiny_model_dir, "--plan", plan, "--text", text, "--dispatch", "llep", "--set", "gamma=1")


@pytest.mark.slow
def test_two_ranks_by_torchrun(tiny_model_dir: Path, plan: Path, text: Path, tmp_path: Path):
    given = [str(tiny_model_dir), "--text", str(text), "--tokens", "600", "--seq-len", "64", "--plan", str(plan)]
    alone = told(*given)
    out = tmp_path / "figures.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "equipoise"]
    rules = ["--dispatch", "prefill=quota,decode=metro", "--generate", "4"]
    subprocess.run([*command, "parallel", *given, *rules, "--out", str(out), "-q"], check=True, timeout=300)
    both = json.loads(out.read_text())
    assert both["ranks"] == 2
    assert both["tokens"] == alone["tokens"]
    assert both["loss"] == pytest.approx(alone["loss"], abs=1e-4)
    assert both["prefill"]["imbalance"] < 1.2
    assert both["prefill"]["token_bytes_moved"] > 0
    assert len(both["expert_bytes_by_rank"]) == 2
    assert both["decode"]["weight_bytes_moved"] == 0


@pytest.mark.slow
def test_two_ranks_with_one_context_by_torchrun(top_one_dir: Path, text: Path, tmp_path: Path):
    given = [str(top_one_dir), "--text", str(text), "--tokens", "600", "--seq-len", "64"]
    alone = told(*given)
    out = tmp_path / "figures.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "equipoise"]
    more = ["--context", "coherent", "--generate", "4", "--out", str(out), "-q"]
    subprocess.run([*command, "parallel", *given, *more], check=True, timeout=300)
    both = json.loads(out.read_text())
    assert both["tokens"] == alone["tokens"]
    assert both["loss"] == pytest.approx(alone["loss"], abs=1e-4)
    assert both["decode"]["rows_moved"] > 0
    assert both["decode"]["token_bytes_moved"] < both["prefill"]["token_bytes_moved"]
    assert both["decode"]["context_bytes_moved"] > 0
