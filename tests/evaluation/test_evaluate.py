from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from equipoise.artifacts import Evaluation, LayerPlan, Plan
from equipoise.errors import EquipoiseError, ModelError, PlanError, TextError
from equipoise.evaluation.evaluate import evaluate
from equipoise.execution.apply import apply_plan
from equipoise.models.layers import model_facts
from equipoise.models.recorder import record

EXPERTS, UNITS = 8, 8


def plan_for(model: Any, *, precision: str, method: str) -> Plan:
    """Expert 0 of each layer has a second copy, beside expert 7."""
    facts = model_facts(model, "tiny")
    layer = LayerPlan(
        experts=(*range(EXPERTS), 0),
        precisions=("fp32",) * (EXPERTS - 1) + (precision, precision),
        units=(*range(EXPERTS), EXPERTS - 1),
        shares=(0.5,) + (1.0,) * (EXPERTS - 1) + (0.5,),
    )
    return Plan(
        method=method,
        model=facts,
        units=UNITS,
        unit_bytes=1 << 20,
        exactness="exact" if precision == "fp32" else "weights",
        layers=(layer,) * len(facts.layers),
    )


def balanced(model: Any, precision: str, method: str) -> Any:
    return apply_plan(copy.deepcopy(model), plan_for(model, precision=precision, method=method))


@pytest.fixture(scope="module")
def contenders(model: Any) -> dict[str, Any]:
    return {"copies": balanced(model, "fp32", "copies"), "int8": balanced(model, "int8", "rq"), "same": copy.deepcopy(model)}


@pytest.fixture(scope="module")
def found(model: Any, contenders: dict[str, Any], tokenizer: Any, documents: list[str], tmp_path_factory: Any) -> Evaluation:
    pytest.importorskip("lm_eval", reason="tasks need the extra equipoise[eval]")
    directory = tmp_path_factory.mktemp("tasks")
    rows = [{"context": f"{i} water", "choices": ["flows down", "is dry and hot"], "label": i % 2} for i in range(9)]
    (directory / "piqa_val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = {"prose": documents, "again": documents[:3]}
    return evaluate(
        model, contenders, tokenizer, texts=texts, tasks=["piqa"], task_dir=directory, batch_size=2, seq_len=40, progress=False
    )


def by_name(found: Evaluation) -> dict[str, Any]:
    return {contender.name: contender for contender in found.contenders}


def test_an_exact_plan_changes_nothing_but_balance(found: Evaluation) -> None:
    contender = by_name(found)["copies"]
    for text in contender.texts:
        assert text.kl.value < 1e-6
        assert text.top1_agreement.value == 1.0
        assert abs(text.perplexity_change.value) < 1e-5
    assert contender.tasks[0].score == contender.tasks[0].score_base
    assert (contender.plan_method, contender.exactness, contender.promise_kept) == ("copies", "exact", True)


def test_a_broken_promise_is_told(model: Any, tokenizer: Any, documents: list[str]) -> None:
    broken = balanced(model, "fp32", "copies")
    with torch.no_grad():
        broken.lm_head.weight *= 1.1
    found = evaluate(model, {"broken": broken}, tokenizer, texts={"t": documents}, seq_len=40, progress=False)
    assert found.contenders[0].promise_kept is False


def test_a_plain_copy_is_a_contender_without_a_plan(found: Evaluation) -> None:
    contender = by_name(found)["same"]
    assert (contender.plan_method, contender.exactness) == ("none", "none")
    assert contender.texts[0].kl.value == 0.0
    assert contender.texts[0].lis == contender.texts[0].lis_base
    assert contender.expert_bytes == found.base_expert_bytes
    difference = contender.tasks[0].difference
    assert difference.value == 0.0
    assert difference.high - difference.low > 0.1  # nine items prove little


def test_quantized_slots_change_a_little(found: Evaluation) -> None:
    text = by_name(found)["int8"].texts[0]
    assert 0 < text.kl.value < 0.1
    assert text.kl.low <= text.kl.value <= text.kl.high
    assert text.perplexity_change.low < text.perplexity_change.value < text.perplexity_change.high
    assert text.perplexity == pytest.approx(text.perplexity_base * (1 + text.perplexity_change.value))


def test_balance_is_that_of_the_slots_that_served(found: Evaluation, model: Any, tokenizer: Any, documents: list[str]) -> None:
    from equipoise.evaluation.language import cut
    from equipoise.profiling.sequences import make_batches

    rows = cut(tokenizer, model.config, documents, name="prose", seq_len=40, tokens=None, seed=0)
    with record(model) as recorder:
        for batch in make_batches(rows, 1):
            model(**{name: torch.from_numpy(value) for name, value in batch.inputs().items()})
    load_LE = recorder.counts.sum((0, 1)).astype(float)
    unit_LU = load_LE.copy()
    unit_LU[:, 0] /= 2
    unit_LU[:, 7] += load_LE[:, 0] / 2
    text = by_name(found)["int8"].texts[0]
    assert text.lis_base == pytest.approx(np.mean(EXPERTS * load_LE.max(1) / load_LE.sum(1)))
    # Dispatch splits whole tokens, in each sequence anew: the shares are met but for a few tokens.
    assert text.lis == pytest.approx(np.mean(EXPERTS * unit_LU.max(1) / unit_LU.sum(1)), rel=0.1)
    assert text.lis_paper <= text.lis + 1e-9


def test_bytes_are_those_of_the_tensors(found: Evaluation, model: Any) -> None:
    experts = model.model.layers[0].mlp.experts
    one = 4 * (experts.gate_up_proj[0].numel() + experts.down_proj[0].numel())
    assert found.base_expert_bytes == 2 * EXPERTS * one
    sizes = {name: contender.expert_bytes for name, contender in by_name(found).items()}
    assert sizes["copies"] == 2 * (EXPERTS + 1) * one
    assert sizes["int8"] < found.base_expert_bytes


def test_it_is_written_and_read_back(found: Evaluation, tmp_path: Path) -> None:
    found.save(tmp_path / "x.eval.json")
    assert Evaluation.load_file(tmp_path / "x.eval.json") == found
    assert found.options["texts"] == {"prose": 5, "again": 3}
    assert all(contender.seconds > 0 for contender in found.contenders)


def test_the_same_run_gives_the_same_numbers(
    model: Any, contenders: dict[str, Any], tokenizer: Any, documents: list[str]
) -> None:
    runs = [
        evaluate(model, contenders, tokenizer, texts={"t": documents}, seq_len=40, batch_size=size, progress=False)
        for size in (2, 2, 5)
    ]
    one, two, other = ([c.texts[0] for c in run.contenders] for run in runs)
    assert one == two
    for a, b in zip(one, other, strict=True):
        assert (a.lis, a.lis_base) == (pytest.approx(b.lis), pytest.approx(b.lis_base))
        assert a.perplexity == pytest.approx(b.perplexity, rel=1e-5)


def test_encoder_decoder_models_are_evaluated(encoder_decoder: Any, tokenizer: Any, documents: list[str]) -> None:
    found = evaluate(
        encoder_decoder, {"same": copy.deepcopy(encoder_decoder)}, tokenizer, texts={"t": documents}, seq_len=40, progress=False
    )
    text = found.contenders[0].texts[0]
    assert text.kl.value == 0.0
    assert found.units == 4
    assert text.lis == text.lis_base >= 1


def test_mistakes_are_named_before_anything_runs(
    model: Any, contenders: dict[str, Any], tokenizer: Any, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_forward(*_: Any, **__: Any) -> None:
        raise AssertionError("a forward pass was run")

    monkeypatch.setattr("equipoise.evaluation.language.run_batch", no_forward)
    texts = {"t": documents}
    with pytest.raises(EquipoiseError, match="no balanced model to compare"):
        evaluate(model, {}, tokenizer, texts=texts)
    with pytest.raises(EquipoiseError, match="nothing to evaluate on"):
        evaluate(model, contenders, tokenizer)
    with pytest.raises(TextError, match="no text"):
        evaluate(model, contenders, tokenizer, texts={"t": []})
    with pytest.raises(PlanError, match="balance over 4 units was asked for"):
        evaluate(model, contenders, tokenizer, texts=texts, units=4)
    with pytest.raises(ModelError, match="base is itself a balanced model"):
        evaluate(contenders["int8"], contenders, tokenizer, texts=texts)
    with pytest.raises(EquipoiseError, match="unknown task"):
        evaluate(model, contenders, tokenizer, texts=texts, tasks=["pica"], task_dir="here")


def test_a_plan_of_another_model_is_refused(model: Any, perturb: Any, contenders: dict[str, Any], tokenizer: Any) -> None:
    with pytest.raises(PlanError, match="the plan was made for"):
        evaluate(perturb(model, noise=0.3), contenders, tokenizer, texts={"t": ["some text", "more text"]})


def test_a_dense_model_is_refused(contenders: dict[str, Any], tokenizer: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=258, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ModelError):
        evaluate(dense, contenders, tokenizer, texts={"t": ["some text", "more text"]})


def test_models_keep_their_mode(model: Any, tokenizer: Any, documents: list[str]) -> None:
    base, other = copy.deepcopy(model), copy.deepcopy(model).train()
    evaluate(base, {"o": other}, tokenizer, texts={"t": documents}, seq_len=40, progress=False)
    assert not base.training
    assert other.training


def test_several_texts_are_also_reported_together(found: Evaluation) -> None:
    for contender in found.contenders:
        *parts, whole = contender.texts
        assert [text.name for text in contender.texts] == ["prose", "again", "all texts"]
        tokens = np.array([text.tokens for text in parts])
        assert whole.tokens == tokens.sum()
        for name in ("perplexity", "perplexity_base"):
            nll = (tokens * np.log([getattr(text, name) for text in parts])).sum() / tokens.sum()
            assert np.log(getattr(whole, name)) == pytest.approx(nll)
        assert whole.kl.value == pytest.approx((tokens * [text.kl.value for text in parts]).sum() / tokens.sum())
        assert whole.lis_base <= max(text.lis_base for text in parts) + 1e-9
        assert 1.0 <= whole.lis <= max(text.lis for text in parts) + 1e-9
