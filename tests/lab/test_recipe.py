"""Recipes: what is wrong is named; the fingerprint follows what decides the computation."""

from __future__ import annotations

from pathlib import Path

import pytest

from equipoise.errors import EquipoiseError, TextError
from equipoise.lab.model import build_model
from equipoise.lab.recipe import RecipeError, read_mix, read_recipe
from equipoise.lab.text import data_directory, load_or_train_tokenizer, streams

CONFIGS = sorted(path for path in (Path(__file__).parents[2] / "configs").glob("*.toml") if path.name != "mix.toml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_shelf_s_recipes_are_valid(path):
    recipe = read_recipe(path)
    assert recipe.name == path.stem
    assert recipe.dense is None or (path.parent / f"{recipe.dense}.toml").is_file()
    assert recipe.tokenizer_directory.is_dir()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = 3", "name"),
        ('name = "x"\n[model]\nmodel_type = "llama"\n[training]\nsteps = 0', r"training\.steps"),
        ('name = "x"\n[model]\nmodel_type = "llama"\n[training]\nsteps = 2\nlearnig_rate = 1', r"training\.learnig_rate"),
        ('name = "x"\n[model]\nhidden_size = 3\n[training]\nsteps = 2', "model_type"),
        ('name = "../x"\n[model]\nmodel_type = "llama"\n[training]\nsteps = 2', "name"),
        ("= =", "as TOML"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_named(text, message, lab_data):
    path = lab_data / "wrong.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_recipe(path)


def test_missing_files_are_named(lab_data, tmp_path):
    with pytest.raises(RecipeError, match=r"nowhere\.toml' does not exist"):
        read_recipe(tmp_path / "nowhere.toml")
    with pytest.raises(RecipeError, match="--data"):
        data_directory(None)
    with pytest.raises(RecipeError, match="is not a directory"):
        data_directory(tmp_path / "nowhere")
    mix = read_mix(lab_data / "mix.toml")
    with pytest.raises(TextError, match="does not exist"):
        load_or_train_tokenizer(mix, tmp_path / "tokenizer", tmp_path)
    with pytest.raises(RecipeError, match="no tokenizer"):
        load_or_train_tokenizer(mix, tmp_path / "tokenizer", None)


def test_the_fingerprint_follows_the_computation_alone(make_recipe):
    recipe = make_recipe()
    assert make_recipe(watch_every=3, checkpoint_every=2).fingerprint() == recipe.fingerprint()
    assert recipe.model_copy(update={"name": "other"}).fingerprint() == recipe.fingerprint()
    for change in ({"seed": 1}, {"learning_rate": 0.1}, {"precision": "bf16"}):
        assert make_recipe(**change).fingerprint() != recipe.fingerprint()


def test_tokens_are_kept_until_text_or_vocabulary_change(lab_data, tmp_path):
    mix = read_mix(lab_data / "mix.toml")
    tokenizer = load_or_train_tokenizer(mix, lab_data / "tokenizer", lab_data)
    first = streams(mix, lab_data, tokenizer, "train", cache=tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = streams(mix, lab_data, tokenizer, "train", cache=tmp_path)
    assert kept == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert all((first[name] == again[name]).all() for name in first)
    text = (lab_data / "up_train.txt").read_text().strip()
    assert tokenizer.decode(first["up"][:-1]) == text
    assert first["up"][-1] == tokenizer.eos_token_id
    assert len(streams(mix, lab_data, tokenizer, "heldout", cache=tmp_path)["up"]) < len(first["up"])
    assert len(list(tmp_path.iterdir())) == 2 * len(kept)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"model_type": "no_such_thing"}, "unknown model_type"),
        ({"model_type": "llama", "hiden_size": 3}, "no field 'hiden_size'"),
        ({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}, "transformers refuses"),
    ],
)
def test_an_architecture_that_cannot_be_is_refused(model, message, make_recipe, lab_data):
    recipe = make_recipe()
    tokenizer = load_or_train_tokenizer(recipe.mix, recipe.tokenizer_directory, lab_data)
    with pytest.raises(EquipoiseError, match=message):
        build_model(recipe.model_copy(update={"model": model}), tokenizer)
