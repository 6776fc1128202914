from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from equipoise.errors import RecordingError
from equipoise.models.layers import find_moe_layers, observe
from equipoise.models.tokens import TokenBatch, TokenTracker
from models.architectures import tiny
from models.oracle import padded, sequences


@pytest.fixture(scope="module")
def model():
    return tiny("qwen2_moe")


@torch.no_grad()
def batches(model, run, stack="decoder", **watch) -> list[TokenBatch]:
    """The token batches that the first layer of a stack meets while `run` runs."""
    seen = []
    layer = next(layer for layer in find_moe_layers(model) if layer.stack == stack)
    with TokenTracker(model, **watch) as tracker:
        handle = observe(layer, lambda hidden, ids, weights: seen.append(tracker.batch(stack, len(ids))))
        try:
            run()
        finally:
            handle.remove()
    return seen


def rows(batch: TokenBatch) -> list[tuple[int, int]]:
    """(sequence, position) of the real rows, in order."""
    real = batch.real_T
    return list(zip(batch.sequence_T[real].tolist(), batch.position_T[real].tolist(), strict=True))


EXPECTED = [*((0, i) for i in range(7)), *((1, i) for i in range(4))]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_neither_counts_nor_shifts_positions(model, side):
    (batch,) = batches(model, lambda: model(**padded(sequences(), side)))
    assert rows(batch) == EXPECTED
    assert (batch.rows, batch.all_real, batch.decode) == (14, False, False)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_square_mask_says_the_same(model, side, kind):
    flat = padded(sequences(), side)
    width = flat["input_ids"].shape[1]
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    square = causal & flat["attention_mask"].bool()[:, None, None, :]
    if kind == "additive":
        square = torch.zeros(square.shape).masked_fill(~square, torch.finfo(torch.float32).min)
    (batch,) = batches(model, lambda: model(input_ids=flat["input_ids"], attention_mask=square))
    assert rows(batch) == EXPECTED


def test_without_a_mask_every_row_is_real(model):
    ids = torch.stack([sequences((5,))[0]] * 2)
    (batch,) = batches(model, lambda: model(ids))
    assert batch.all_real
    assert rows(batch) == [(s, i) for s in range(2) for i in range(5)]


def test_embeddings_in_place_of_ids(model):
    flat = padded(sequences(), "left")
    embeds = model.get_input_embeddings()(flat["input_ids"])
    (batch,) = batches(model, lambda: model(inputs_embeds=embeds, attention_mask=flat["attention_mask"]))
    assert rows(batch) == EXPECTED


def test_arguments_by_position(model):
    flat = padded(sequences(), "left")
    (batch,) = batches(model, lambda: model.model(flat["input_ids"], flat["attention_mask"]))
    assert rows(batch) == EXPECTED


def test_packed_sequences_are_told_by_their_positions(model):
    ids = torch.cat(sequences((3, 4)))[None]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    (batch,) = batches(model, lambda: model(ids, position_ids=positions))
    assert rows(batch) == [*((0, i) for i in range(3)), *((1, i) for i in range(4))]


def generate(model, batch, **options):
    return lambda: model.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=None, **options)


def test_generation_is_one_prefill_and_decode_steps(model):
    seen = batches(model, generate(model, padded(sequences(), "left")))
    assert [batch.decode for batch in seen] == [False, True, True, True]
    assert rows(seen[0]) == EXPECTED
    for step, batch in enumerate(seen[1:]):
        assert rows(batch) == [(0, 7 + step), (1, 4 + step)]  # padding in the cache does not count


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"num_beams": 2}, {"use_cache": False}])
def test_other_ways_to_generate_give_the_same_positions(model, options):
    seen = batches(model, generate(model, padded(sequences(), "left"), **options))
    beams = options.get("num_beams", 1)
    if not options.get("use_cache", True):  # each step runs the whole text again, and is prefill
        assert not any(batch.decode for batch in seen)
        assert rows(seen[-1]) == [*((0, i) for i in range(10)), *((1, i) for i in range(7))]
        return
    assert [batch.decode for batch in seen] == [False] + [True] * (len(seen) - 1)
    for step, batch in enumerate(seen[1:]):
        assert batch.position_T.tolist() == [7 + step] * beams + [4 + step] * beams


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_text_in_chunks_has_the_positions_of_the_whole(model, masked, cache):
    ids = torch.stack(sequences((6, 6)))
    past = DynamicCache() if cache == "dynamic" else StaticCache(config=model.config, max_cache_len=16)

    def run():
        for start, end in ((0, 3), (3, 5), (5, 6)):
            mask = torch.ones(2, end, dtype=torch.long) if masked else None
            model(ids[:, start:end], attention_mask=mask, past_key_values=past)

    seen = batches(model, run)
    assert [rows(batch) for batch in seen] == [
        [(s, i) for s in range(2) for i in range(start, end)] for start, end in ((0, 3), (3, 5), (5, 6))
    ]
    assert [batch.decode for batch in seen] == [False, False, True]


def test_a_mask_over_the_new_tokens_alone():
    call = {"input_ids": torch.zeros(1, 3), "attention_mask": torch.tensor([[0, 1, 1]]), "past_key_values": Lengths(4)}
    assert rows(read(call)) == [(0, 4), (0, 5)]


class Lengths:
    """A cache that knows its length and nothing else."""

    def __init__(self, length: int) -> None:
        self.length = length

    def get_seq_length(self) -> int:
        return self.length


def read(call) -> TokenBatch:
    from equipoise.models.tokens import _read_batch

    return _read_batch("decoder", call, [])


def test_masks_in_a_mapping_prefer_full_attention():
    full = torch.ones(4, 4, dtype=torch.bool).tril()[None, None].clone()
    full[..., 0] = False  # the first column is padding
    sliding = torch.eye(4, dtype=torch.bool)[None, None]
    call = {"input_ids": torch.zeros(1, 4), "attention_mask": {"sliding_attention": sliding, "full_attention": full}}
    assert rows(read(call)) == [(0, 0), (0, 1), (0, 2)]


def test_a_mask_that_covers_neither_past_nor_present_is_refused():
    call = {"input_ids": torch.zeros(1, 2), "attention_mask": torch.ones(1, 5), "past_key_values": Lengths(6)}
    with pytest.raises(RecordingError, match="covers 5 columns, but the cache holds 6 tokens and 2 are new"):
        read(call)


def test_encoder_and_decoder_have_tokens_of_their_own():
    model = tiny("switch_transformers")
    text, target = padded(sequences((7, 4)), "right"), padded(sequences((2, 5)), "right")

    def run():
        model(
            input_ids=text["input_ids"],
            attention_mask=text["attention_mask"],
            decoder_input_ids=target["input_ids"],
            decoder_attention_mask=target["attention_mask"],
        )

    assert rows(batches(model, run, "encoder")[0]) == EXPECTED
    assert rows(batches(model, run, "decoder")[0]) == [*((0, i) for i in range(2)), *((1, i) for i in range(5))]


def test_experts_called_alone_are_refused(model):
    layer = find_moe_layers(model)[0]
    call = (torch.randn(3, 32), torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2))
    with pytest.raises(RecordingError, match="outside a forward call of their stack"):
        batches(model, lambda: layer.experts(*call))


def test_other_rows_than_tokens_are_refused(model):
    def run():
        with TokenTracker(model) as tracker:
            handle = observe(find_moe_layers(model)[0], lambda hidden, ids, weights: tracker.batch("decoder", 3))
            try:
                model(torch.zeros(1, 4, dtype=torch.long))
            finally:
                handle.remove()

    with torch.no_grad(), pytest.raises(RecordingError, match="given 3 rows, but the call has 4 tokens"):
        run()


def test_no_hooks_remain(model):
    before = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    batches(model, lambda: model(torch.zeros(1, 4, dtype=torch.long)))
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()) == before
