from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MixtralConfig, T5Config

from equipoise.errors import TextError
from equipoise.profiling.sequences import IGNORED, Framing, build_rows, fingerprint, make_batches


@pytest.fixture(scope="module")
def framing(tokenizer):
    return Framing.of(tokenizer)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=8),
    tokens=st.integers(1, 500),
    seq_len=st.integers(2, 64),
    seed=st.integers(0, 5),
)
def test_rows_are_disjoint_excerpts_of_documents_that_meet_the_budget(
    tokenizer, framing, make_documents, sizes, tokens, seq_len, seed
):
    documents = [" ".join(make_documents(1, seed=i, words=size)) for i, size in enumerate(sizes)]
    rows = build_rows(documents, tokenizer, framing, tokens=tokens, seq_len=seq_len, seed=seed)
    whole = [tokenizer(document, add_special_tokens=False)["input_ids"] for document in documents]
    assert rows.tokens == min(tokens, sum(map(len, whole)))
    grid = {(d, tuple(ids[i : i + seq_len])) for d, ids in enumerate(whole) for i in range(0, len(ids), seq_len)}
    for position, (document, ids) in enumerate(zip(rows.documents, rows.content, strict=True)):
        cut_short = position == len(rows.content) - 1
        assert any(
            d == document and piece[: ids.size] == tuple(ids) and (cut_short or len(piece) == ids.size) for d, piece in grid
        )
    used = [sum(ids.size for d, ids in zip(rows.documents, rows.content, strict=True) if d == k) for k in range(len(documents))]
    assert all(n <= len(ids) for n, ids in zip(used, whole, strict=True)), "no excerpt is used twice"


def test_a_small_budget_sees_many_documents(tokenizer, framing, make_documents):
    documents = make_documents(10, words=200)
    rows = build_rows(documents, tokenizer, framing, tokens=10 * 16, seq_len=16)
    assert set(rows.documents) == set(range(10))


def test_a_long_document_is_not_tokenized_whole(tokenizer, framing):
    seen = []

    def spy(text, **kwargs):
        seen.append(len(text))
        return tokenizer(text, **kwargs)

    build_rows(["word " * 100_000], spy, framing, tokens=64, seq_len=32)
    assert max(seen) == 1 << 16


def test_packed_rows_are_full_and_hold_the_excerpts_joined_by_the_separator(tokenizer, framing, make_documents):
    documents = make_documents(5)
    apart = build_rows(documents, tokenizer, framing, tokens=10_000, seq_len=16, seed=3)
    packed = build_rows(documents, tokenizer, framing, tokens=10_000, seq_len=16, seed=3, layout="packed")
    assert {ids.size for ids in packed.content[:-1]} == {16}
    stream = [token for ids in apart.content for token in [*ids.tolist(), framing.separator]]
    assert np.concatenate(packed.content).tolist() == stream


def test_order_depends_on_the_seed_and_the_scenario_alone(tokenizer, framing, make_documents):
    documents = make_documents(20)

    def make(scenario="code", seed=0, texts=documents):
        return build_rows(texts, tokenizer, framing, scenario=scenario, tokens=200, seq_len=16, seed=seed)

    assert fingerprint([make()]) == fingerprint([make()])
    assert len({fingerprint([rows]) for rows in (make(), make(seed=1), make("math"), make(texts=documents[:10]))}) == 4
    assert make(seed=1).documents != make().documents


def test_fingerprint_knows_row_boundaries(tokenizer, framing):
    def of(seq_len):
        return fingerprint([build_rows(["the quick brown fox"], tokenizer, framing, tokens=100, seq_len=seq_len)])

    assert of(4) != of(64)


def test_decoder_batches_are_padded_right_and_predict_the_next_token(tokenizer, framing, make_documents):
    rows = build_rows(make_documents(5, words=7), tokenizer, framing, tokens=1000, seq_len=64)
    batches = make_batches(rows, 2)
    assert len(batches) == 3
    assert sum(batch.tokens for batch in batches) == rows.tokens
    contents = iter(rows.content)
    for batch in batches:
        assert set(batch.inputs()) == {"input_ids", "attention_mask"}
        for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True):
            real = next(contents)
            assert ids[mask == 1].tolist() == real.tolist()
            assert mask[: real.size].all()
            assert labels[: real.size - 1].tolist() == real[1:].tolist()
            assert (labels[real.size - 1 :] == IGNORED).all()


def test_begin_of_text_is_put_before_every_row_and_counted(make_documents, make_tokenizer):
    tokenizer = make_tokenizer(begin=True)
    framing = Framing.of(tokenizer)
    assert framing.prefix == (tokenizer.bos_token_id,)
    rows = build_rows(make_documents(4), tokenizer, framing, tokens=100, seq_len=16)
    batches = make_batches(rows, 8)
    assert (batches[0].input_ids[:, 0] == tokenizer.bos_token_id).all()
    assert sum(batch.tokens for batch in batches) == rows.tokens == 100
    assert batches[0].input_ids.shape[1] == 16


def test_encoder_decoder_rows_are_split_in_halves(tokenizer):
    framing = Framing.of(tokenizer, SimpleNamespace(is_encoder_decoder=True, decoder_start_token_id=7))
    framing = Framing(framing.prefix, (9,), framing.decoder_start, framing.separator, framing.padding)
    rows = build_rows(["the quick brown fox jumps over the lazy dog"], tokenizer, framing, tokens=1000, seq_len=64)
    (batch,) = make_batches(rows, 4)
    ids = rows.content[0].tolist()
    half = (len(ids) + 1) // 2
    assert batch.input_ids[0].tolist() == [*ids[:half], 9]
    assert batch.decoder_input_ids[0].tolist() == [7, *ids[half:]]
    assert batch.labels[0].tolist() == [*ids[half:], IGNORED]
    assert batch.tokens == rows.tokens == len(ids) + 2


def test_a_one_token_text_is_enough_and_less_is_not(tokenizer, framing):
    rows = build_rows(["a"], tokenizer, framing, tokens=100, seq_len=16)
    assert rows.tokens == 1
    nothing = lambda text, **_: {"input_ids": []}  # noqa: E731
    with pytest.raises(TextError, match="shorter than one token"):
        build_rows(["a"], nothing, framing, tokens=100, seq_len=16)


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ("a string", {}, "one string"),
        ([], {}, "no text"),
        (["  "], {}, "no text"),
        (["a"], {"layout": "stacked"}, "unknown layout 'stacked'; known: documents, packed"),
        (["a"], {"seq_len": 1}, "seq_len is 1"),
        (["a"], {"tokens": 0}, "budget is 0"),
    ],
)
def test_unusable_text_and_options_are_refused(tokenizer, framing, documents, options, message):
    with pytest.raises(TextError, match=message):
        build_rows(documents, tokenizer, framing, **{"tokens": 100, "seq_len": 16} | options)


def test_rows_longer_than_the_model_was_made_for_are_refused(tokenizer):
    config = MixtralConfig(max_position_embeddings=64)
    framing = Framing.of(tokenizer, config)
    assert build_rows(["a b c"], tokenizer, framing, tokens=100, seq_len=64).tokens > 0
    with pytest.raises(TextError, match="seq_len is 65; the model was made for 64 positions"):
        build_rows(["a b c"], tokenizer, framing, tokens=100, seq_len=65)
    unlike = Framing.of(tokenizer, T5Config(decoder_start_token_id=0, max_position_embeddings=4))
    assert build_rows(["a b c"], tokenizer, unlike, tokens=100, seq_len=65).tokens > 0, "its two stacks have their own"


def test_packing_needs_a_separator_and_batches_a_row(tokenizer, framing):
    with pytest.raises(TextError, match="no end-of-text token"):
        build_rows(["a"], tokenizer, Framing(), tokens=9, seq_len=9, layout="packed")
    with pytest.raises(TextError, match="batch_size is 0"):
        make_batches(build_rows(["a"], tokenizer, framing, tokens=9, seq_len=9), 0)
