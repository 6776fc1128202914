from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from equipoise.artifacts import Plan
from equipoise.artifacts.plan import PLAN_FILE
from equipoise.errors import CheckpointError, EquipoiseError, ModelError, PlanError
from equipoise.execution.apply import apply_plan
from equipoise.execution.checkpoint import load, save_balanced
from equipoise.execution.layerwise import Calibration, quantize_model
from equipoise.execution.streamed import apply_streamed
from equipoise.models.layers import model_facts
from equipoise.models.streamed import open_streamed
from equipoise.models.tensor_files import TensorFiles
from equipoise.planning.uniform import uniform_plan
from execution.calibration import assert_same_bits, outputs, stored, texts
from execution.helpers import make_plan
from models.architectures import tiny

MIXED = ("fp32", "bf16", "int8", "int4-g16")


def stream(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    return open_streamed(type(model), str(directory))[0]


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "switch_transformers", "jetmoe"])
def test_the_result_is_that_in_memory(name: str, fused: bool, tmp_path: Path) -> None:
    original = tiny(name)
    original.save_pretrained(tmp_path / "source", max_shard_size="60KB", save_original_format=not fused)
    batches = texts(original)
    for method in ("rtn", "agq"):
        wanted = type(original).from_pretrained(tmp_path / "source").eval()
        plan = make_plan(model_facts(wanted, name), precisions=MIXED, extra=2)
        calibration = None if method == "rtn" else Calibration(batches, method)
        apply_plan(wanted, plan, method=method, batches=batches)
        apply_streamed(
            stream(original, tmp_path / "source"), None, plan, tmp_path / method, calibration=calibration, shard_bytes=30_000
        )
        got = load(tmp_path / method)
        assert_same_bits(stored(got), stored(wanted))
        save_balanced(wanted, None, tmp_path / "memory")
        # Bits of outputs also depend on where in memory a file puts the weights: both come from files.
        assert (outputs(got, batches[0]) - outputs(load(tmp_path / "memory"), batches[0])).abs().max() < 1e-5
        configs = [json.loads((tmp_path / d / "config.json").read_text()) for d in (method, "memory")]
        weights = [config["quantization_config"].pop("weights") for config in configs]
        assert configs[0] == configs[1]
        assert weights[0].endswith("index.json")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_does_not_change_keeps_its_name_and_bytes(tmp_path: Path) -> None:
    original = tiny("mixtral")
    original.save_pretrained(tmp_path / "source")
    streamed = stream(original, tmp_path / "source")
    plan = uniform_plan(model_facts(streamed, "x"), "int4-g16")
    seen: list[tuple[int, int]] = []
    apply_streamed(streamed, None, plan, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    before = TensorFiles(sorted((tmp_path / "source").glob("*.safetensors")))
    rest = TensorFiles(sorted((tmp_path / "out").glob("equipoise-rest-*")))
    assert set(rest) == {name for name in before if ".experts." not in name}
    assert all((rest[name] == before[name]).all() for name in rest)
    slots = TensorFiles(sorted((tmp_path / "out").glob("equipoise-moe-*")))
    assert sum(map(slots.nbytes, slots)) == plan.bytes_by_unit().sum()  # predicted = on disk
    assert Plan.load_file(tmp_path / "out" / PLAN_FILE) == plan
    assert seen == [(1, 2), (2, 2)]


def test_reports_are_those_in_memory(fresh: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    fresh().save_pretrained(tmp_path / "source")
    streamed = stream(fresh(), tmp_path / "source")
    plan = uniform_plan(model_facts(streamed, "x"), "int4-g16")
    calibration = Calibration(texts(streamed))
    reports = apply_streamed(streamed, None, plan, tmp_path / "out", calibration=calibration)
    assert [report["path"] for report in reports] == [facts.path for facts in plan.model.layers]
    assert all(report["few"] for report in reports)  # 42 tokens on six experts of width 32
    assert reports == quantize_model(fresh(), plan, calibration)


def test_a_run_that_is_killed_ends_with_the_same_bytes_under_a_memory_limit(tmp_path: Path) -> None:
    """Killed when a layer was finished, while a layer was being written, and while the rest was being copied."""
    code = """
        import itertools, os, resource, signal, sys
        from pathlib import Path
        import torch
        from transformers import MixtralConfig, MixtralForCausalLM
        from equipoise.execution import finished, streamed
        from equipoise.execution.layerwise import Calibration
        from equipoise.models import tensor_files
        from equipoise.models.layers import model_facts
        from equipoise.models.streamed import open_streamed
        from equipoise.planning.uniform import uniform_plan
        from execution.calibration import Text

        here, LIMIT = Path(sys.argv[1]), 48 << 20
        torch.set_num_threads(1)

        def data():
            return next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith("VmData"))

        def make(name, layers):
            config = MixtralConfig(
                vocab_size=64, hidden_size=128, intermediate_size=128, num_local_experts=8, num_hidden_layers=layers,
                num_attention_heads=64, num_key_value_heads=64, head_dim=128, dtype="bfloat16",
            )
            with torch.device("meta"):
                shapes = {n: t.shape for n, t in MixtralForCausalLM(config).state_dict().items()}
            tensors = {n: (torch.randn(s) * 0.1).to(torch.bfloat16) for n, s in shapes.items()}
            (here / name).mkdir()
            tensor_files.write_tensors(here / name / "model.safetensors", tensors)
            config.save_pretrained(here / name)
            print("times", sum(t.nbytes for t in tensors.values()) / LIMIT, flush=True)

        def limited():
            resource.setrlimit(resource.RLIMIT_DATA, (data() + LIMIT,) * 2)

        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)

        def work(out, moment=None, source="source"):
            if source == "source":
                limited()
            model, _ = open_streamed(MixtralForCausalLM, str(here / source))
            plan = uniform_plan(model_facts(model, "x"), "int4-g64")
            progress = lambda done, total: die() if moment == "between" and done == 3 else None
            writes = itertools.count()
            original = tensor_files._write
            def write(file, tensor):
                if moment == "layer" and next(writes) == 37:
                    file.write(b"half"); file.flush(); die()
                if moment == "rest" and file.name.find("rest") > 0:
                    file.write(b"half"); file.flush(); die()
                original(file, tensor)
            tensor_files._write = write
            calibration = Calibration([Text(0), Text(1)])
            streamed.apply_streamed(model, None, plan, here / out, calibration=calibration, progress=progress)

        def whole():
            limited()
            model = MixtralForCausalLM.from_pretrained(here / "source")
            print(sum(float(p.sum()) for p in model.parameters()))

        def forked(function, *arguments):
            pid = os.fork()
            if pid == 0:
                try:
                    function(*arguments)
                except BaseException:
                    import traceback; traceback.print_exc(); os._exit(1)
                os._exit(0)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

        assert forked(make, "small", 2) == 0
        work("small-out", source="small")  # what libraries take once is no part of the limit
        assert forked(make, "source", 23) == 0
        assert forked(whole) == 1, "the limit does not bite"
        assert forked(work, "straight") == 0
        print([forked(work, "killed", moment) for moment in ("between", "layer", "rest", None)])
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1]), "TQDM_DISABLE": "1"}
    environment["MALLOC_ARENA_MAX"] = "1"  # the kernel counts what the allocator has set aside for further threads
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[-9, -9, -9, 0]", done.stderr
    assert float(done.stdout.split("times ")[-1].split()[0]) > 4
    assert files(tmp_path / "killed") == files(tmp_path / "straight")
    assert not list(tmp_path.glob(".*"))


def test_mistakes_are_named(fresh: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    fresh().save_pretrained(tmp_path / "source")

    def streamed() -> PreTrainedModel:
        return stream(fresh(), tmp_path / "source")

    plan = uniform_plan(model_facts(streamed(), "x"), "int4-g16")
    with pytest.raises(ModelError, match="this model is in memory"):
        apply_streamed(fresh(), None, plan, tmp_path / "out")
    with pytest.raises(ModelError, match="carry the plan out with apply_streamed"):
        apply_plan(streamed(), plan)
    with pytest.raises(CheckpointError, match="holds another model's weights"):
        apply_streamed(streamed(), None, plan, tmp_path / "source")
    with pytest.raises(EquipoiseError, match="needs calibration text"):
        apply_streamed(streamed(), None, plan, tmp_path / "out", method="gptq")
    other = plan.model_copy(update={"model": plan.model.model_copy(update={"fingerprint": "0" * 64})})
    with pytest.raises(PlanError, match="the plan was made for"):
        apply_streamed(streamed(), None, other, tmp_path / "out")
    with pytest.raises(EquipoiseError, match="unknown quantization method"):
        apply_streamed(streamed(), None, plan, tmp_path / "out", method="gptk")

    class StopError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise StopError

    with pytest.raises(StopError):
        apply_streamed(streamed(), None, plan, tmp_path / "out", progress=stop)
    with pytest.raises(CheckpointError, match=r"'.*\.out\.part' holds the finished layers of another run: method"):
        apply_streamed(streamed(), None, plan, tmp_path / "out", method="rtn-clip")
    apply_streamed(streamed(), None, plan, tmp_path / "out")
    assert not (tmp_path / ".out.part").exists()
