"""The recipe files of training-time systems are valid, small, and build what they name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from equipoise.lab.extensions import ARCHITECTURES, EXTENSIONS
from equipoise.lab.model import build_model
from equipoise.lab.recipe import read_mix, read_recipe
from equipoise.models.layers import find_moe_layers

FOLDER = Path(__file__).parents[3] / "configs" / "recipes"
MIXES = ("mix", "other")
RECIPES = sorted(path for path in FOLDER.glob("*.toml") if path.stem not in MIXES)


class Tokenizer(SimpleNamespace):
    def __len__(self):
        return 2048


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_builds_its_model_and_its_extensions(path):
    recipe = read_recipe(path)
    assert recipe.name == path.stem
    model = build_model(recipe, Tokenizer(bos_token_id=0, eos_token_id=0, pad_token_id=1)).train()
    assert {layer.num_experts for layer in find_moe_layers(model)} == {16}
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    extensions = [EXTENSIONS.get(name)(**options) for name, options in recipe.extensions.items()]
    for extension in extensions:
        extension.attach(model)
    output = model(torch.randint(2, 2048, (1, 8)))
    terms = [term for one in extensions if (term := one.loss(SimpleNamespace(output=output))) is not None]
    assert len(terms) == len(extensions)
    assert all(torch.isfinite(term) for term in terms)


def test_there_are_recipes_and_what_they_name_says_where_it_is_from():
    assert len(RECIPES) == 4
    wanted = {"aux-loss", "loss-free", "simbal", "dynamic-moe"}
    assert wanted <= set(EXTENSIONS.names())
    assert {"chain_of_experts", "dynamic_moe"} <= set(ARCHITECTURES.names())
    for entry in (*EXTENSIONS, *ARCHITECTURES):
        assert entry.summary
        assert entry.source


def test_the_text_to_judge_on_was_not_trained_on():
    trained, other = (read_mix(FOLDER / f"{name}.toml") for name in MIXES)
    assert trained.tokenizer == other.tokenizer
    assert not set(trained.domains) & set(other.domains)
    files = [{file for domain in mix.domains.values() for file in domain.train} for mix in (trained, other)]
    assert not files[0] & files[1]
