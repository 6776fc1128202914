"""A tiny mix of text and recipes on it, made in code."""

from __future__ import annotations

import random

import pytest

from equipoise.lab.recipe import read_recipe

MODELS = {
    "qwen3_moe": "hidden_size = 32\nintermediate_size = 32\nmoe_intermediate_size = 16\nnum_hidden_layers = 2\n"
    "num_attention_heads = 2\nnum_key_value_heads = 2\nnum_experts = 4\nnum_experts_per_tok = 2\ntie_word_embeddings = true",
    "switch_transformers": "d_model = 32\nd_kv = 16\nd_ff = 32\nnum_heads = 2\nnum_layers = 2\nnum_decoder_layers = 2\n"
    "num_sparse_encoder_layers = 1\nnum_sparse_decoder_layers = 1\nnum_experts = 4\nexpert_capacity = 4096\ndropout_rate = 0.0",
    "llama": "hidden_size = 32\nintermediate_size = 32\nnum_hidden_layers = 2\nnum_attention_heads = 2\n"
    "num_key_value_heads = 2",
}


def words(seed, vocabulary, count):
    """Text whose words follow each other by habit, so that there is something to learn."""
    rng = random.Random(seed)
    habit = {word: rng.sample(vocabulary, 3) for word in vocabulary}
    word, told = vocabulary[0], []
    for _ in range(count):
        word = rng.choice(habit[word]) if rng.random() < 0.9 else rng.choice(vocabulary)
        told.append(word)
    return " ".join(told)


@pytest.fixture(scope="session")
def lab_data(tmp_path_factory):
    place = tmp_path_factory.mktemp("lab")
    letters = {"up": "ABCDEFGH", "down": "stuvwxyz"}
    for domain, alphabet in letters.items():
        vocabulary = [a + b + c for a in alphabet for b in alphabet[:3] for c in alphabet[:2]]
        for split, count in (("train", 3000), ("heldout", 600)):
            text = "\n\n".join(words(f"{domain}{split}{i}", vocabulary, count) for i in range(2))
            (place / f"{domain}_{split}.txt").write_text(text)
    mix = 'tokenizer = "tokenizer"\nvocabulary = 512\n' + "".join(
        f'[domains.{name}]\ntrain = ["{name}_train.txt"]\nheldout = ["{name}_heldout.txt"]\nlicence = "made up"\n'
        for name in letters
    )
    (place / "mix.toml").write_text(mix)
    return place


def _toml(value):
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(one)}" for key, one in value.items()) + " }"
    return str(value).lower() if isinstance(value, bool) else repr(value)


@pytest.fixture(scope="session")
def make_recipe(lab_data):
    def make(model_type="qwen3_moe", **training):
        told = {
            "steps": 12,
            "batch_size": 4,
            "seq_len": 32,
            "warmup": 2,
            "watch_every": 6,
            "watch_rows": 2,
            "checkpoint_every": 5,
        }
        lines = [f"{key} = {_toml(value)}" for key, value in (told | training).items()]
        text = (
            f'name = "tiny"\n[model]\nmodel_type = "{model_type}"\n{MODELS[model_type]}\n[training]\n' + "\n".join(lines) + "\n"
        )
        path = lab_data / f"{model_type}-{abs(hash(text))}.toml"
        path.write_text(text)
        return read_recipe(path)

    return make


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EQUIPOISE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
