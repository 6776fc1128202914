from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from equipoise.errors import ModelError, ProfileError, TextError
from equipoise.models.recorder import record
from equipoise.profiling import self_sampled as module
from equipoise.profiling.calibrate import profile
from equipoise.profiling.forward import run_batch
from equipoise.profiling.self_sampled import BALANCED, SELF_SAMPLED, cached_self_text, self_sampled, self_texts
from equipoise.profiling.self_sampled_report import compressibility, measure_text
from equipoise.profiling.self_sampled_stream import Stream
from equipoise.profiling.sequences import Framing, Rows, make_batches
from equipoise.profiling.texts import BalancedText, read_documents

SMALL = {"sentences": 5, "length": 20, "batch_size": 2, "progress": False}
FEW = {"sentences": 3, "length": 16, "batch_size": 3, "progress": False}


@pytest.fixture
def mixtral(make_model):
    return make_model("mixtral")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def written(monkeypatch):
    """Token ids of all sentences of the last run, and what the run says they add to the corpus."""
    kept: dict[str, object] = {}
    go = module._Writer._sentences

    def keep(self, *args):
        ids, counts_LE = go(self, *args)
        kept["ids"] = [*kept.get("ids", []), *ids]
        kept["counts"] = kept.get("counts", 0) + counts_LE
        return ids, counts_LE

    monkeypatch.setattr(module._Writer, "_sentences", keep)
    return kept


@pytest.mark.parametrize("sampler", ["balanced", "ebss"])
@pytest.mark.parametrize(("family", "begin"), [("mixtral", False), ("deepseek_v3", True), ("switch", False)])
def test_sentences_are_counted_as_calibration_reads_them(make_model, make_tokenizer, written, family, begin, sampler):
    model, tokenizer = make_model(family), make_tokenizer(begin=begin)
    found = self_sampled(model, tokenizer, sampler=sampler, **SMALL)
    assert found.sampler == sampler
    assert 1 <= len(found.texts) <= 5
    framing = Framing.of(tokenizer, model.config)
    ids = written["ids"]
    assert [len(row) + framing.overhead for row in ids] == [20] * 5
    assert len({int(row[0]) for row in ids}) >= 3, "sentences start differently"
    assert not {token for row in ids for token in row.tolist()} & set(tokenizer.all_special_ids)
    rows = Rows("own", tuple(ids), tuple(range(5)), framing)
    with record(model) as recorder:
        for batch in make_batches(rows, 2):
            run_batch(model, batch, all_logits=False)
    assert np.array_equal(recorder.counts.sum((0, 1)), written["counts"])


def test_plain_documents_fill_the_budget_and_end_where_the_model_ends_them(make_model, tokenizer, written):
    model = make_model("mixtral")
    with torch.no_grad():
        model.lm_head.weight[0] += 0.3 * model.lm_head.weight.std()
    found = self_sampled(model, tokenizer, sampler="plain", sentences=6, length=30, batch_size=4, progress=False)
    ids = written["ids"]
    assert 180 <= sum(map(len, ids)) < 180 + 4 * 30
    assert all(0 not in row[:-1] for row in ids)
    assert not any("<end>" in text for text in found.texts)
    assert not any(isinstance(text, BalancedText) for text in found.texts)


def test_plain_text_of_an_encoder_decoder(make_model, tokenizer, written):
    found = self_sampled(make_model("switch"), tokenizer, sampler="plain", **SMALL)
    assert found.texts
    assert 0 < max(map(len, written["ids"])) <= 20 - Framing.of(tokenizer, make_model("switch").config).overhead


def test_the_same_seed_writes_the_same_and_another_seed_other_text(mixtral, tokenizer):
    for sampler in ("balanced", "ebss", "plain"):
        first = self_sampled(mixtral, tokenizer, sampler=sampler, **FEW)
        again = self_sampled(mixtral, tokenizer, sampler=sampler, **FEW)
        assert again.texts == first.texts
        assert again.report == first.report
        assert self_sampled(mixtral, tokenizer, sampler=sampler, seed=1, **FEW).texts != first.texts


def test_a_run_interrupted_anywhere_writes_the_same(mixtral, tokenizer, tmp_path, monkeypatch):
    whole = self_sampled(mixtral, tokenizer, **SMALL)
    extend, calls = Stream.extend, []

    def failing(self, ids):
        calls.append(1)
        if len(calls) % 29 == 0:  # a batch takes 19 steps, and finding out about the cache takes 2
            raise KeyboardInterrupt
        return extend(self, ids)

    monkeypatch.setattr(Stream, "extend", failing)
    monkeypatch.setattr(module, "SAVE_EVERY", 0.0)
    interruptions = 0
    while True:
        try:
            found = self_sampled(mixtral, tokenizer, **SMALL, resume_path=tmp_path / "state")
            break
        except KeyboardInterrupt:
            interruptions += 1
            assert interruptions < 9, "every attempt gets further than the one before"
    assert interruptions >= 2
    assert found.texts == whole.texts
    monkeypatch.setattr(Stream, "extend", extend)
    with pytest.raises(ProfileError, match="state of another run: options"):
        self_sampled(mixtral, tokenizer, **SMALL, seed=1, resume_path=tmp_path / "state")


def test_the_report_is_that_of_the_text_as_it_is_read_back(mixtral, tokenizer):
    found = self_sampled(mixtral, tokenizer, **SMALL)
    again = measure_text(mixtral, tokenizer, found.texts, seq_len=20, batch_size=3)
    assert again.as_dict() == pytest.approx(found.report.as_dict(), rel=1e-4)
    measured = profile(mixtral, tokenizer, {"x": [str(text) for text in found.texts]}, tokens=10**6, seq_len=20, importance=())
    assert again.tokens == measured.tokens.sum()
    load_LE = measured.load
    assert again.lis == pytest.approx((4 * load_LE.max(1) / load_LE.sum(1)).mean())
    assert again.sigma == pytest.approx(np.std(load_LE / again.tokens, axis=1, ddof=1).mean())
    assert again.perplexity > 1


def test_repetition_is_seen_in_the_report(mixtral, tokenizer, make_documents):
    loops = measure_text(mixtral, tokenizer, ["the fox " * 60] * 3, seq_len=512)
    prose = measure_text(mixtral, tokenizer, make_documents(3, words=80), seq_len=512)
    assert loops.compressibility < 0.1 < 0.3 < prose.compressibility
    assert (loops.degenerate, prose.degenerate) == (1.0, 0.0)
    assert compressibility("") == 1.0


@pytest.mark.parametrize("family", ["mixtral", "switch"])
@pytest.mark.parametrize("broken", ["weights", "logits"])
def test_a_broken_model_is_refused(make_model, tokenizer, tmp_path, broken, family):
    model = make_model(family)
    with torch.no_grad():
        if broken == "weights":
            next(p for name, p in model.named_parameters() if "experts" in name).view(-1)[3] = float("nan")
        else:
            norm = model.model.norm if family == "mixtral" else model.decoder.final_layer_norm
            norm.weight.fill_(3e38)
    for sampler in ("balanced", "ebss", "plain"):
        with pytest.raises(ModelError, match="NaN" if broken == "weights" else "logits are not finite"):
            self_sampled(model, tokenizer, sampler=sampler, **FEW, resume_path=tmp_path / "state")
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_write_are_refused(mixtral, tokenizer):
    dense = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    with pytest.raises(ModelError, match="dense"):
        self_sampled(LlamaForCausalLM(dense), tokenizer, **FEW)
    with pytest.raises(ModelError, match="no language-model head"):
        self_sampled(mixtral.model, tokenizer, **FEW)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sentences": 0}, "sentences is 0"),
        ({"length": 3}, "length is 3; it must be at least 4"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_arguments_out_of_range_are_named(mixtral, tokenizer, change, message):
    with pytest.raises(TextError, match=message):
        self_sampled(mixtral, tokenizer, **FEW | change)


def test_text_is_written_once_and_kept(mixtral, tokenizer, cache, monkeypatch):
    first = cached_self_text(mixtral, tokenizer, **FEW)
    assert [path.name for path in cache.iterdir() if not path.name.startswith(".")] == [first.path.parent.name]
    assert not list(cache.glob(".*.state")), "the state of a finished run is removed"
    other = cached_self_text(mixtral, tokenizer, **FEW, top=16)
    assert other.path != first.path
    monkeypatch.setattr(module, "self_sampled", None)
    again = cached_self_text(mixtral.bfloat16(), tokenizer, **FEW)  # the same weights as far as bf16 tells
    assert (again.texts, again.report, again.options) == (first.texts, first.report, first.options)
    assert self_texts(mixtral, tokenizer, **FEW) == {BALANCED: list(first.texts)}


def test_the_cache_is_not_taken_for_another_model(make_model, tokenizer, cache):
    paths = {cached_self_text(make_model("mixtral", seed), tokenizer, **FEW).path for seed in (0, 1)}
    assert len(paths) == 2


def test_balanced_text_is_never_traffic(mixtral, tokenizer, cache, tmp_path):
    own = cached_self_text(mixtral, tokenizer, **FEW)
    rows = [json.loads(line) for line in own.path.read_text().splitlines()]
    assert {row["equipoise_sampler"] for row in rows} == {"balanced"}
    own.save(tmp_path / "copy.jsonl")
    for documents in (own.texts, read_documents([own.path]), read_documents([tmp_path / "copy.jsonl"])):
        assert all(isinstance(document, BalancedText) for document in documents)
        with pytest.raises(TextError, match=r"'mine' holds text that was sampled to use all experts.*calibration"):
            profile(mixtral, tokenizer, {"mine": documents}, tokens=60)
    plain = self_texts(mixtral, tokenizer, sampler="plain", **FEW)
    assert list(plain) == [SELF_SAMPLED]
    found = profile(mixtral, tokenizer, plain, tokens=60, seq_len=16, calibration={BALANCED: own.texts}, importance=("wanda",))
    assert found.source.scenarios == (SELF_SAMPLED,)
    assert found.source.options["calibration"]["names"] == [BALANCED]


def test_a_trained_model_balances_its_own_text(shared_data):
    from equipoise.lab import load

    model, tokenizer = load("mixtral-8", dtype="fp32")
    own = self_sampled(model, tokenizer, sentences=8, length=96, batch_size=8, progress=False)
    plain = self_sampled(model, tokenizer, sampler="plain", sentences=8, length=96, batch_size=8, progress=False)
    files = ("prose_en/heldout.jsonl.gz", "code/python_heldout.jsonl.gz", "chat/topicalchat_heldout.jsonl.gz")
    mixed = [document for file in files for document in read_documents([shared_data / file])[:8]]
    real = measure_text(model, tokenizer, mixed, tokens=own.report.tokens, seq_len=96)
    for other in (plain.report, real):
        assert own.report.sigma < 0.9 * other.sigma
        assert own.report.lis < other.lis
    assert own.report.compressibility > 0.3
    assert own.report.degenerate == 0
