"""Training is repeatable bit for bit, goes on after a stop as if there had been none, and learns."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from equipoise.errors import EquipoiseError
from equipoise.lab.extensions import EXTENSIONS, Extension
from equipoise.lab.recipe import RecipeError
from equipoise.lab.training import learning_rate, train


@pytest.mark.parametrize("model_type", ["qwen3_moe", "switch_transformers", "llama"])
def test_a_stopped_run_goes_on_to_the_same_losses_and_weights(model_type, make_recipe, lab_data, tmp_path):
    recipe = make_recipe(model_type)
    whole = train(recipe, lab_data, tmp_path / "whole", progress=False)
    train(recipe, lab_data, tmp_path / "parts", until=5, progress=False)
    train(recipe, lab_data, tmp_path / "parts", until=8, progress=False)
    parts = train(recipe, lab_data, tmp_path / "parts", progress=False)
    assert parts == whole
    assert (tmp_path / "parts/model/model.safetensors").read_bytes() == (
        tmp_path / "whole/model/model.safetensors"
    ).read_bytes()
    watched = [(tmp_path / run / "watch.jsonl").read_text() for run in ("parts", "whole")]
    assert watched[0] == watched[1]


def test_a_killed_run_goes_on_to_the_same_losses(make_recipe, lab_data, tmp_path):
    recipe = make_recipe(steps=14, checkpoint_every=3)
    whole = train(recipe, lab_data, tmp_path / "whole", progress=False)
    code = (
        "import os, sys\nfrom pathlib import Path\nimport equipoise.lab.training as t\n"
        "from equipoise.lab.recipe import read_recipe\n"
        "real = t._step\n"
        "def step(number, *rest):\n    if number == 7: os._exit(9)\n    return real(number, *rest)\n"
        "t._step = step\nt.train(read_recipe(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), progress=False)\n"
    )
    path = next(p for p in lab_data.glob("*.toml") if "steps = 14" in p.read_text())
    done = subprocess.run([sys.executable, "-c", code, str(path), str(lab_data), str(tmp_path / "killed")], check=False)
    assert done.returncode == 9
    assert (tmp_path / "killed/checkpoint.safetensors").is_file()
    assert train(recipe, lab_data, tmp_path / "killed", progress=False) == whole


def test_it_learns_and_leaves_a_model_that_transformers_loads(make_recipe, lab_data, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    losses = train(make_recipe(steps=60, learning_rate=0.01), lab_data, tmp_path / "run", progress=False)
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.5
    assert json.loads((tmp_path / "run/losses.json").read_text()) == losses
    assert not (tmp_path / "run/checkpoint.safetensors").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "run/model"))
    last = json.loads((tmp_path / "run/watch.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 60
    assert len(last["lis"]) == 2
    assert last["experts_per_token"] == {"up": 2.0, "down": 2.0}
    assert min(last["lis"]) >= 1


def test_torch_s_settings_are_put_back(make_recipe, lab_data, tmp_path):
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    train(make_recipe(threads=before[0] + 1), lab_data, tmp_path / "run", until=1, progress=False)
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


def test_bf16_products_train_too(make_recipe, lab_data, tmp_path):
    exact = train(make_recipe(), lab_data, tmp_path / "a", until=3, progress=False)
    rounded = train(make_recipe(precision="bf16"), lab_data, tmp_path / "b", until=3, progress=False)
    assert rounded != exact
    assert rounded == pytest.approx(exact, abs=0.05)


def test_a_checkpoint_of_another_recipe_is_refused(make_recipe, lab_data, tmp_path):
    train(make_recipe(), lab_data, tmp_path / "run", until=2, progress=False)
    with pytest.raises(RecipeError, match="another recipe"):
        train(make_recipe(learning_rate=0.5), lab_data, tmp_path / "run", progress=False)
    (tmp_path / "run/checkpoint.safetensors").write_bytes(b"torn")
    with pytest.raises(RecipeError, match="cannot read checkpoint"):
        train(make_recipe(), lab_data, tmp_path / "run", progress=False)


def test_a_finished_run_is_not_overwritten(make_recipe, lab_data, tmp_path):
    train(make_recipe(steps=2), lab_data, tmp_path / "run", progress=False)
    with pytest.raises(RecipeError, match="is done"):
        train(make_recipe(steps=2), lab_data, tmp_path / "run", progress=False)


def test_a_loss_that_is_not_a_number_ends_the_run(make_recipe, lab_data, tmp_path):
    with pytest.raises(EquipoiseError, match="lower learning_rate"):
        train(make_recipe(learning_rate=1e30, warmup=0), lab_data, tmp_path / "run", progress=False)


def test_the_learning_rate_warms_up_and_falls_to_its_fraction(make_recipe):
    recipe = make_recipe(steps=100, warmup=10, learning_rate=1.0, final_fraction=0.1)
    rates = [learning_rate(recipe, number) for number in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.1 < rates[-1] < 0.102


@pytest.mark.parametrize("relative", [False, True])
def test_named_tensors_have_a_rate_of_their_own_and_need_not_decay(relative, make_recipe, lab_data, tmp_path, monkeypatch):
    seen = {}

    class Spy(torch.optim.AdamW):
        def __init__(self, groups, **options):
            for group in groups:
                for weight in group["params"]:
                    seen[tuple(weight.shape), weight.data_ptr()] = group["scale"], group["weight_decay"]
            super().__init__(groups, **options)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    recipe = make_recipe(
        "switch_transformers",
        steps=1,
        relative=relative,
        weight_decay=0.5,
        rates={"shared": 7.0},
        undecayed=["shared", "router"],
    )
    train(recipe, lab_data, tmp_path / "run", progress=False)
    told = {}
    for (shape, _), rate_and_decay in seen.items():
        told.setdefault(shape, set()).add(rate_and_decay)
    (embeddings,) = [shape for shape in told if shape[0] > 64]
    assert told.pop(embeddings) == {(7.0, 0.0)}
    assert {decay for _, decay in told.pop((4, 32))} == {0.0}  # the routers
    assert {decay for shape, found in told.items() if len(shape) == 2 for _, decay in found} == {0.5}
    assert 7.0 not in {scale for found in told.values() for scale, _ in found}


@pytest.mark.parametrize("wrong", [{"rates": {"embedings": 2.0}}, {"undecayed": ["embedings"]}])
def test_a_name_that_no_tensor_has_is_refused(wrong, make_recipe, lab_data, tmp_path):
    with pytest.raises(RecipeError, match="'embedings', and no tensor"):
        train(make_recipe(**wrong), lab_data, tmp_path / "run", progress=False)


class Shift(Extension):
    """Adds the size of the first weight to the loss, and counts steps; its state must survive a stop."""

    def __init__(self, scale: float) -> None:
        self.scale, self.seen = scale, torch.zeros(1)

    def attach(self, model):
        self.weight = next(model.parameters())

    def loss(self, step):
        assert step.output.logits.requires_grad
        return self.scale * (1 + self.seen[0]) * self.weight.square().mean()

    def after_step(self, step):
        assert step.output is None
        self.seen += 1

    def state(self):
        return {"seen": self.seen}

    def load_state(self, state):
        self.seen = state["seen"].clone()


@pytest.fixture
def _shift():
    EXTENSIONS.register("shift", summary="for tests", source="here")(Shift)
    yield
    del EXTENSIONS._entries["shift"]


@pytest.mark.usefixtures("_shift")
def test_an_extension_adds_to_the_loss_acts_after_steps_and_is_resumed(make_recipe, lab_data, tmp_path):
    plain = make_recipe()
    recipe = plain.model_copy(update={"extensions": {"shift": {"scale": 5.0}}})
    whole = train(recipe, lab_data, tmp_path / "whole", progress=False)
    train(recipe, lab_data, tmp_path / "parts", until=7, progress=False)
    assert train(recipe, lab_data, tmp_path / "parts", progress=False) == whole
    assert whole[0] == train(plain, lab_data, tmp_path / "plain", progress=False)[0]  # the term is not part of the told loss
    assert whole[1:] != train(plain, lab_data, tmp_path / "again", progress=False)[1:]
    with pytest.raises(EquipoiseError, match="unknown extension 'shoft'"):
        train(plain.model_copy(update={"extensions": {"shoft": {}}}), lab_data, tmp_path / "none", progress=False)
