"""Which rows a step sees: a function of the step alone, in proportion to the weights, each stretch once an epoch."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from equipoise.lab.recipe import RecipeError
from equipoise.lab.rows import RowOrder, heldout_rows
from equipoise.profiling.sequences import IGNORED, Framing

STREAMS = {"a": np.arange(0, 400, dtype=np.uint16), "b": np.arange(1000, 1090, dtype=np.uint16)}
DECODER = Framing(separator=0)
ENCODER_DECODER = Framing(decoder_start=7)


def order(framing=DECODER, weights=(3, 1), **options):
    told = {"seq_len": 11, "batch_size": 4, "seed": 1} | options
    return RowOrder(STREAMS, dict(zip("ab", weights, strict=True)), framing, **told)


def test_a_step_sees_the_same_rows_in_any_order_of_asking():
    forward, backward = order(), order()
    first = [forward.content(step) for step in range(12)]
    last = [backward.content(step) for step in reversed(range(12))][::-1]
    assert all(np.array_equal(one, other) for one, other in zip(first, last, strict=True))
    assert not np.array_equal(order(seed=2).content(0), first[0])


def test_domains_appear_by_weight_and_each_stretch_once_an_epoch():
    rows = order()
    domains = np.concatenate([rows.step_domains(step) for step in range(100)])
    assert abs((domains == 0).mean() - 0.75) < 0.01
    assert max(abs((domains[i : i + 40] == 0).sum() - 30) for i in range(0, 360)) <= 2
    starts = [int(row[0]) for step in range(48 // 4 + 40) for row in rows.content(step) if row[0] < 1000]
    assert set(Counter(starts[:36]).values()) == {1}, "36 whole stretches of 11 tokens: all before any again"
    assert sorted(starts[36:72]) == sorted(starts[:36])
    assert starts[36:72] != starts[:36]


def test_limited_text_is_the_beginning_of_all_of_it_and_is_read_again():
    rows, whole = order(text_tokens=160), order()
    limited = [int(row[0]) for step in range(30) for row in rows.content(step) if row[0] < 1000]
    free = [int(row[0]) for step in range(30) for row in whole.content(step) if row[0] < 1000]
    used = -(-120 // 11)
    assert limited[:used] == free[:used], "three quarters of the rows"
    assert sorted(limited[used : 2 * used]) == sorted(limited[:used])
    assert limited[used : 2 * used] != limited[:used]
    assert len(set(limited)) == used < len(set(free))
    again = order(text_tokens=160)
    assert np.array_equal(again.content(25), rows.content(25))


def test_rows_are_stretches_of_one_domain():
    for step in range(20):
        for row in order().content(step):
            assert np.array_equal(row, np.arange(row[0], row[0] + 11))


def test_decoder_rows_predict_the_next_token():
    batch = order().batch(0)
    assert np.array_equal(batch.labels[:, :-1], batch.input_ids[:, 1:])
    assert (batch.labels[:, -1] == IGNORED).all()
    assert batch.attention_mask.all()


def test_encoder_decoder_rows_are_divided_by_the_fractions_in_turn():
    rows = order(ENCODER_DECODER, encoder_fractions=(0.2, 0.5))
    for step, cut in enumerate((2, 5, 2)):
        batch, content = rows.batch(step), rows.content(step)
        assert content.shape == (4, 10), "the decoder's start token counts against the row"
        assert np.array_equal(batch.input_ids, content[:, :cut])
        assert (batch.decoder_input_ids[:, 0] == 7).all()
        assert np.array_equal(batch.decoder_input_ids[:, 1:], content[:, cut:])
        assert np.array_equal(batch.labels[:, :-1], content[:, cut:])


def test_held_out_rows_spread_over_the_stream():
    rows = heldout_rows(STREAMS, DECODER, seq_len=10, rows=4)
    assert [int(row[0]) for row in rows["a"].content] == [0, 130, 260, 390]
    assert len(heldout_rows(STREAMS, DECODER, seq_len=10, rows=None)["b"].content) == 9


def test_too_little_text_is_refused():
    with pytest.raises(RecipeError, match="domain 'b' has fewer than the 200 tokens"):
        order(seq_len=200)
    with pytest.raises(RecipeError, match="held-out domain 'b'"):
        heldout_rows(STREAMS, DECODER, seq_len=200, rows=1)
