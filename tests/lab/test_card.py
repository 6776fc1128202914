"""A finished run goes on a shelf, is judged there, and loads; its first steps can be repeated."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

from equipoise import lab
from equipoise.cli import app
from equipoise.errors import EquipoiseError
from equipoise.lab.card import add_dense, read_facts, shelve
from equipoise.lab.judge import _trigram_loss, in_percent
from equipoise.lab.recipe import RecipeError
from equipoise.lab.rows import heldout_rows
from equipoise.lab.text import load_or_train_tokenizer, streams
from equipoise.lab.training import train
from equipoise.lab.verify import repeat
from equipoise.lab.watch import measure
from equipoise.profiling.sequences import Framing


@pytest.fixture(scope="module")
def stocked(make_recipe, lab_data, tmp_path_factory):
    place = tmp_path_factory.mktemp("shelf")
    recipe = make_recipe(steps=40, learning_rate=0.01, rates={"embed_tokens": 2.0}, text_tokens=2048)
    train(recipe, lab_data, place / "runs/moe", progress=False)
    train(make_recipe("llama", steps=40, learning_rate=0.01), lab_data, place / "runs/dense", progress=False)
    found = shelve(recipe, place / "runs/moe", lab_data, place / "shelf/tiny", dense_run=place / "runs/dense", progress=False)
    return recipe, place, found


def test_the_judgement_is_measured_on_what_is_stored(stocked, monkeypatch):
    recipe, place, found = stocked
    monkeypatch.setenv("EQUIPOISE_SHELF", str(place / "shelf"))
    model, tokenizer = lab.load("tiny")
    assert model.dtype == torch.bfloat16
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.active_parameters < found.parameters - model.get_input_embeddings().weight.numel()
    assert found.perplexity < len(tokenizer) / 2, "it learned something"
    assert set(found.domain_perplexity) == {"up", "down"} == set(found.trigram_domain_perplexity)
    assert found.divergence_max >= found.divergence > 0
    assert set(found.divergence_pair) == {"up", "down"}
    assert -1 <= found.importance_correlation <= 1
    assert found.beside_trigram.value == pytest.approx(found.perplexity / found.trigram_perplexity - 1)
    assert found.beside_trigram.low < found.beside_trigram.value < found.beside_trigram.high
    assert found.dense_perplexity is not None
    card = (place / "shelf/tiny/README.md").read_text()
    for wanted in (
        f"{found.perplexity:.1f}",
        "made up",
        "configs/tiny.toml",
        "40 steps, 5,120 tokens of 2,048 distinct ones,",
        "0.01, 2 times that for `embed_tokens`,",
        "Dense model beside it",
    ):
        assert wanted in card
    kept = json.loads((place / "shelf/tiny/card.json").read_text())
    assert kept["judgement"] == found.model_dump(mode="json")
    assert kept["recipe"] == recipe.fingerprint()


def test_a_dense_model_put_beside_later_is_judged_as_one_given_at_once(stocked, lab_data):
    recipe, place, found = stocked
    shelve(recipe, place / "runs/moe", lab_data, place / "later", progress=False)
    assert "Dense model beside it" not in (place / "later/README.md").read_text()
    added = add_dense(recipe, lab_data, place / "later", place / "runs/dense")
    assert added.dense_perplexity == found.dense_perplexity
    assert added.dense_parameters == found.dense_parameters
    assert (place / "later/README.md").read_text() == (place / "shelf/tiny/README.md").read_text()
    with pytest.raises(RecipeError, match="on the shelf first"):
        add_dense(recipe, lab_data, place / "nowhere", place / "runs/dense")


def test_the_first_steps_repeat_bit_for_bit_and_a_difference_is_found(stocked, lab_data, monkeypatch, tmp_path):
    recipe, place, _ = stocked
    monkeypatch.setenv("EQUIPOISE_SHELF", str(place / "shelf"))
    again = repeat(recipe, lab_data, steps=10, progress=False)
    assert again.equal
    assert again.steps == 10
    losses = json.loads((place / "shelf/tiny/losses.json").read_text())
    losses[3] += 1e-9
    (tmp_path / "other.json").write_text(json.dumps(losses))
    other = repeat(recipe, lab_data, steps=10, against=tmp_path / "other.json", progress=False)
    assert other.first_difference == 4
    assert other.largest_difference == pytest.approx(1e-9, rel=1e-3)


def test_the_command_lists_the_shelf(stocked, monkeypatch):
    _, place, found = stocked
    monkeypatch.setenv("EQUIPOISE_SHELF", str(place / "shelf"))
    told = CliRunner().invoke(app, ["lab", "list", "--json"])
    rows = json.loads(told.stdout)["shelf"]
    assert [row["name"] for row in rows] == ["tiny"]
    assert rows[0]["perplexity"] == found.perplexity
    assert rows[0]["beside_trigram"] == found.beside_trigram.model_dump()
    monkeypatch.setenv("COLUMNS", "240")
    assert in_percent(found.beside_trigram) in CliRunner().invoke(app, ["lab", "list"]).stdout


def test_what_is_not_there_is_said(stocked, monkeypatch, tmp_path, lab_data):
    recipe, place, _ = stocked
    monkeypatch.setenv("EQUIPOISE_SHELF", str(place / "shelf"))
    with pytest.raises(EquipoiseError, match="there are: tiny"):
        lab.load("huge")
    facts = json.loads((place / "shelf/tiny/card.json").read_text())
    del facts["judgement"]["beside_trigram"]
    (tmp_path / "card.json").write_text(json.dumps(facts))
    with pytest.raises(RecipeError, match=r"(?s)not of this version.*beside_trigram.*shelve"):
        read_facts(tmp_path)
    (tmp_path / "card.json").write_text("{")
    with pytest.raises(RecipeError, match="not of this version"):
        add_dense(recipe, lab_data, tmp_path, place / "runs/dense")
    with pytest.raises(RecipeError, match="is not done"):
        shelve(recipe, tmp_path, lab_data, tmp_path / "out")
    with pytest.raises(RecipeError, match="losses to compare with"):
        repeat(recipe, lab_data, steps=2, against=tmp_path / "none.json")
    monkeypatch.setenv("EQUIPOISE_SHELF", str(tmp_path / "nowhere"))
    with pytest.raises(EquipoiseError, match="not in the wheel"):
        lab.names()


def test_the_trigram_counts_a_row_once_however_often_it_was_read(make_recipe, lab_data):
    def loss(steps):
        recipe = make_recipe(steps=steps, text_tokens=512)
        tokenizer = load_or_train_tokenizer(recipe.mix, recipe.tokenizer_directory, lab_data)
        framing = Framing.of(tokenizer, AutoConfig.for_model("llama"))
        chosen = heldout_rows(streams(recipe.mix, lab_data, tokenizer, "heldout"), framing, seq_len=32, rows=4)
        return _trigram_loss(recipe, streams(recipe.mix, lab_data, tokenizer, "train"), framing, chosen, len(tokenizer))

    once = loss(8)
    for again in (loss(16), loss(24)):
        assert all(np.array_equal(again[name], once[name]) for name in once)
    assert any(not np.array_equal(part, once[name]) for name, part in loss(2).items())


def test_passes_of_one_row_stand_in_the_order_of_the_rows(stocked, lab_data, monkeypatch):
    recipe, place, _ = stocked  # the interval beside the trigram pairs the two models' losses row by row
    monkeypatch.setenv("EQUIPOISE_SHELF", str(place / "shelf"))
    model, tokenizer = lab.load("tiny", dtype="fp32")
    framing = Framing.of(tokenizer, model.config)
    rows = heldout_rows(streams(recipe.mix, lab_data, tokenizer, "heldout"), framing, seq_len=32, rows=4)["up"]
    together = measure(model, {"up": rows}, batch_size=1).passes_D["up"]
    assert len(set(together[:, 0])) == len(rows.content) > 1
    for place_of, content in enumerate(rows.content):
        alone = replace(rows, content=(content,), documents=(0,))
        assert measure(model, {"up": alone}).passes_D["up"] == pytest.approx(together[place_of : place_of + 1])
