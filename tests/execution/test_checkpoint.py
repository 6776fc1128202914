from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from equipoise.artifacts import ModelFacts, Plan
from equipoise.artifacts.plan import PLAN_FILE
from equipoise.errors import CheckpointError
from equipoise.execution import checkpoint
from equipoise.execution.apply import apply_plan, expert_bytes, set_dispatch, set_int8_activations
from equipoise.execution.balanced_config import WEIGHTS, WEIGHTS_INDEX, plan_of
from equipoise.execution.checkpoint import load, save_balanced
from equipoise.execution.slots import slots_of
from equipoise.models.layers import model_facts
from execution.helpers import make_plan, token_batch
from models.architectures import tiny

Fresh = Callable[[], PreTrainedModel]
MIXED = ("fp32", "bf16", "int8", "int4")


def logits(model: PreTrainedModel) -> torch.Tensor:
    batch = token_batch(64)
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"]
    with torch.no_grad():
        return model(**batch).logits


@pytest.fixture
def balanced(fresh: Fresh, facts: ModelFacts) -> PreTrainedModel:
    return apply_plan(fresh(), make_plan(facts, precisions=MIXED))


def assert_same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal up to the last bits, which depend on how the weights happen to be aligned in memory."""
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A fresh process."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_a_fresh_process_that_imports_equipoise_loads_what_was_saved(balanced: PreTrainedModel, tmp_path: Path) -> None:
    save_balanced(balanced, None, tmp_path / "model")
    torch.save(logits(balanced), tmp_path / "logits.pt")
    torch.save(token_batch(64), tmp_path / "batch.pt")
    done = python(
        """
        import sys
        import equipoise
        assert not {"torch", "transformers"} & set(sys.modules), "importing equipoise must stay light"
        import torch
        from transformers import AutoModelForCausalLM
        from pathlib import Path
        here = Path(sys.argv[1])
        model, info = AutoModelForCausalLM.from_pretrained(here / "model", output_loading_info=True)
        assert not any(info.values()), info
        batch = torch.load(here / "batch.pt", weights_only=True)
        with torch.no_grad():
            wanted = torch.load(here / "logits.pt", weights_only=True)
            torch.testing.assert_close(model(**batch).logits, wanted, rtol=1e-5, atol=1e-6)
        assert model.generate(**batch, max_new_tokens=3).shape[1] == batch["input_ids"].shape[1] + 3
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_a_process_without_equipoise_refuses(balanced: PreTrainedModel, tmp_path: Path) -> None:
    """However it is loaded: no stock way may end in a model with random experts."""
    save_balanced(balanced, None, tmp_path / "model")
    done = python(
        """
        import sys
        import transformers
        directory = sys.argv[1]
        ways = {
            "auto": lambda: transformers.AutoModelForCausalLM.from_pretrained(directory),
            "headless": lambda: transformers.AutoModel.from_pretrained(directory),
            "concrete": lambda: transformers.Qwen2MoeForCausalLM.from_pretrained(directory),
            "remote code": lambda: transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True),
            "safetensors": lambda: transformers.AutoModelForCausalLM.from_pretrained(directory, use_safetensors=True),
            "mismatched": lambda: transformers.AutoModelForCausalLM.from_pretrained(directory, ignore_mismatched_sizes=True),
            "quantizer": lambda: transformers.quantizers.AutoHfQuantizer.from_pretrained(directory),
        }
        for name, load in ways.items():
            try:
                load()
            except (OSError, ValueError) as error:
                print(name, "refused:", str(error).splitlines()[0][:90])
            else:
                sys.exit(f"{name} loaded a model")
        assert "equipoise" not in sys.modules
        """,
        tmp_path / "model",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused:") == 7


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["", ",trust_remote_code=True"])
def test_the_lm_eval_command_line_refuses(balanced: PreTrainedModel, tmp_path: Path, arguments: str) -> None:
    pytest.importorskip("lm_eval")
    save_balanced(balanced, None, tmp_path / "model")
    command = ["-m", "lm_eval", "run", "--model", "hf", "--tasks", "piqa", "--device", "cpu"]
    command += ["--model_args", f"pretrained={tmp_path / 'model'}{arguments}"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert "Unknown quantization type, got equipoise" in done.stderr


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "nemotron_h", "olmoe", "qwen3_vl_moe", "dbrx", "jetmoe"])
def test_every_family_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    apply_plan(model, make_plan(model_facts(model, name), precisions=MIXED, extra=1))
    before = logits(model)
    model.save_pretrained(tmp_path / "one")
    again = load(tmp_path / "one")
    assert_same(logits(again), before)
    again.save_pretrained(tmp_path / "two")
    assert_same(logits(load(tmp_path / "two")), before)
    assert plan_of(again) == plan_of(model)
    assert expert_bytes(again) == expert_bytes(model)


def test_an_encoder_decoder_loads_with_its_own_auto_class(tmp_path: Path) -> None:
    model = tiny("switch_transformers")
    apply_plan(model, make_plan(model_facts(model, "switch"), precisions=("fp32", "fp16")))
    model.save_pretrained(tmp_path / "switch")
    again, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "switch", output_loading_info=True)
    assert not any(info.values())
    assert_same(logits(again), logits(model))
    assert again.generate(input_ids=token_batch(64)["input_ids"], max_new_tokens=3, decoder_start_token_id=0).shape[0] == 2


def test_the_headless_class_loads_too(balanced: PreTrainedModel, tmp_path: Path) -> None:
    balanced.save_pretrained(tmp_path / "model")
    headless = AutoModel.from_pretrained(tmp_path / "model")
    batch = token_batch(64)
    with torch.no_grad():
        assert_same(headless(**batch).last_hidden_state, balanced.model(**batch).last_hidden_state)


def test_storage_survives_loading_in_another_dtype(balanced: PreTrainedModel, tmp_path: Path) -> None:
    balanced.save_pretrained(tmp_path / "model")
    stored = {name: t.dtype for name, t in balanced.state_dict().items() if ".slots." in name}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    for name, tensor in loaded.state_dict().items():
        if ".slots." in name:
            assert tensor.dtype is (torch.bfloat16 if ".slots.fp32." in name else stored[name])
    assert logits(loaded).dtype is torch.bfloat16


def test_a_plan_within_the_bytes_makes_no_larger_file(fresh: Fresh, facts: ModelFacts, tmp_path: Path) -> None:
    original = fresh()
    original.save_pretrained(tmp_path / "original")
    # Two copies in 8 bits beside experts in 8 and 32 bits: fewer bytes of experts than the original.
    model = apply_plan(original, make_plan(facts, precisions=("fp32", "int8", "int8"), extra=2))
    save_balanced(model, None, tmp_path / "balanced")
    size = {name: sum(f.stat().st_size for f in (tmp_path / name).glob("*.safetensors")) for name in ("original", "balanced")}
    assert size["balanced"] <= size["original"]


def test_shards_are_found_again(balanced: PreTrainedModel, tmp_path: Path) -> None:
    balanced.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert WEIGHTS_INDEX in names
    assert sum(name.startswith("equipoise-0") for name in names) > 2
    assert not any(name.startswith("model") for name in names)
    assert_same(logits(load(tmp_path / "model")), logits(balanced))
    balanced.save_pretrained(tmp_path / "model")  # in one file now: no shard of the earlier save stays behind
    assert {path.name for path in (tmp_path / "model").glob("equipoise*")} == {WEIGHTS, PLAN_FILE}


def test_the_plan_lies_beside_the_weights_for_reading(balanced: PreTrainedModel, tmp_path: Path) -> None:
    balanced.save_pretrained(tmp_path / "model")
    assert Plan.load_file(tmp_path / "model" / PLAN_FILE) == plan_of(balanced)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == "qwen2_moe"
    assert "transformers_weights" not in config


def test_options_travel(balanced: PreTrainedModel, tmp_path: Path) -> None:
    for on, dispatch in ((True, "least_loaded"), (False, "even")):
        set_int8_activations(balanced, on)
        set_dispatch(balanced, dispatch)
        balanced.save_pretrained(tmp_path / "model")
        again = load(tmp_path / "model")
        assert all(slots.dispatch == dispatch for slots in slots_of(again))
        assert all(group.int8_activations is on for slots in slots_of(again) for group in slots.groups)
        assert plan_of(again).dispatch == dispatch


def test_incomplete_weights_are_refused_by_both_loaders(balanced: PreTrainedModel, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    balanced.save_pretrained(directory)
    tensors = load_file(directory / WEIGHTS)
    slot_tensor = next(name for name in tensors if ".slots." in name)
    for lost in (slot_tensor, "model.norm.weight"):
        rest = {name: t for name, t in tensors.items() if name != lost}
        save_file(rest, directory / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match="missing"):
            load(directory)
    save_file({n: t for n, t in tensors.items() if n != slot_tensor}, directory / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="not whole"):
        AutoModelForCausalLM.from_pretrained(directory)
    (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="cannot load"):
        load(directory)
    (directory / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="cannot load"):
        load(directory)


def test_damaged_configurations_are_refused(balanced: PreTrainedModel, fresh: Fresh, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    balanced.save_pretrained(directory)
    text = (directory / "config.json").read_text()
    config = json.loads(text)
    config["quantization_config"]["plan"] = config["quantization_config"]["plan"][:-40]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no whole plan"):
        load(directory)
    (directory / "config.json").write_text(text[:100])
    with pytest.raises(CheckpointError, match="not JSON"):
        load(directory)
    (directory / "config.json").write_text(text.replace('"decoder_sparse_step": 1', '"decoder_sparse_step": 2'))
    with pytest.raises(CheckpointError, match="are not those of this model"):
        load(directory)
    fresh().save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="holds no balanced model"):
        load(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="give the directory of a model that"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="carries no plan"):
        save_balanced(fresh(), None, tmp_path / "x")


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("step", ["_write", "keep_others", "put_in_place"])
def test_a_failed_save_leaves_the_old_directory_or_none(
    balanced: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool, step: str
) -> None:
    directory = tmp_path / "model"
    if existing:
        balanced.save_pretrained(directory)
    before = {path.name: path.read_bytes() for path in directory.iterdir()} if existing else None

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, step, fail)
    with pytest.raises(CheckpointError, match="No space left on device"):
        balanced.save_pretrained(directory)
    assert [path.name for path in tmp_path.iterdir()] == (["model"] if existing else [])
    if before is not None:
        assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_a_killed_save_leaves_the_old_directory(balanced: PreTrainedModel, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    balanced.save_pretrained(directory)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    done = python(
        """
        import os, signal, sys
        import equipoise
        from equipoise.execution import checkpoint
        model = checkpoint.load(sys.argv[1])
        checkpoint.put_in_place = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # all is written, nothing is in place
        model.save_pretrained(sys.argv[1])
        """,
        directory,
    )
    assert done.returncode == -9, done.stderr
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert_same(logits(load(directory)), logits(balanced))


def test_unwritable_places_are_named(balanced: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/equipoise/model")):
        with pytest.raises(CheckpointError, match="Choose a"):
            balanced.save_pretrained(place)
    assert (tmp_path / "file").read_text() == "x"


def test_other_weights_are_never_joined(balanced: PreTrainedModel, fresh: Fresh, tmp_path: Path) -> None:
    fresh().save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="holds another model's weights"):
        balanced.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="does not take 'push_to_hub'"):
        balanced.save_pretrained(tmp_path / "other", push_to_hub=True)


def test_a_tokenizer_is_saved_and_kept(balanced: PreTrainedModel, tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, directory: Path) -> None:
            (Path(directory) / "tokenizer.json").write_text("{}")

    save_balanced(balanced, Tokenizer(), tmp_path / "model")
    assert (tmp_path / "model" / "tokenizer.json").exists()
    balanced.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "tokenizer.json").exists()
