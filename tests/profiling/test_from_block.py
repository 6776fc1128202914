"""Passes that begin at a block have the loss of whole ones, with and without an expert, on models that bear it and others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from equipoise.models.layers import find_moe_layers
from equipoise.profiling.forward import negative_log_likelihood
from equipoise.profiling.importance.from_block import Start
from equipoise.profiling.importance.leave_one_out import removed
from equipoise.profiling.sequences import IGNORED, Batch
from models.architectures import VOCABULARY, tiny


def batches_for(model: Any) -> list[Batch]:
    """Two batches of other lengths."""
    draw = np.random.default_rng(0)
    made = []
    for length in (12, 9):
        ids = draw.integers(3, VOCABULARY, (2, length))
        labels = np.concatenate([ids[:, 1:], np.full((2, 1), IGNORED)], axis=1)
        both = (ids, np.ones_like(ids)) if model.config.is_encoder_decoder else ()
        made.append(Batch("text", ids, np.ones_like(ids), labels, *both))
    return made


def patched(model: Any) -> list[str]:
    """Modules whose forward is not their class's own, or that have hooks."""
    return [name for name, module in model.named_modules() if "forward" in module.__dict__ or module._forward_pre_hooks]


# Blocks that are skipped at each MoE layer. Switch's and Zaya's blocks put out more than one tensor; nothing is skipped there.
@pytest.mark.parametrize(
    ("name", "skipped"),
    [
        ("mixtral", [0, 1]),
        ("deepseek_v3", [0, 1]),
        ("llama4", [0, 1]),
        ("gpt_oss", [0, 1]),
        ("jamba", [0, 1]),
        ("nemotron_h", [1, 3]),
        ("nllb_moe", [0, 1, 0, 1]),
        ("switch_transformers", [0, 0, 0, 0]),
        ("zaya", [0, 0]),
    ],
)
def test_the_loss_is_that_of_a_whole_pass(name: str, skipped: list[int]) -> None:
    model = tiny(name).eval()
    batches = batches_for(model)
    before = patched(model)
    ran: list[int] = []

    def loss(batch: Batch) -> float:
        ran.append(1)
        return negative_log_likelihood(model, batch)[0]

    base = [loss(batch) for batch in batches]
    start = None
    for layer, number in zip(find_moe_layers(model), skipped, strict=True):
        start = Start.at(layer, batches, loss, base, start)
        assert len(start.skipped) == number
        for expert in range(layer.num_experts):
            with removed(layer, expert):
                assert [start.loss(n) for n in range(2)] == [loss(batch) for batch in batches]
        assert [start.loss(n) for n in range(2)] == base
    assert patched(model) == before, "nothing stays behind"


def test_skipped_blocks_are_not_run_and_an_error_leaves_nothing_behind() -> None:
    model = tiny("mixtral").eval()
    batches = batches_for(model)[:1]
    loss = lambda batch: negative_log_likelihood(model, batch)[0]  # noqa: E731
    first, last = find_moe_layers(model)
    start = Start.at(last, batches, loss, [loss(batches[0])], None)
    calls: list[str] = []
    for layer in (first, last):
        layer.experts.register_forward_hook(lambda *_, path=layer.path: calls.append(path))
    start.loss(0)
    assert calls == [last.path]

    def fails(*_: Any) -> None:
        raise RuntimeError("no")

    handle = last.experts.register_forward_hook(fails)
    with pytest.raises(RuntimeError, match="no"):
        start.loss(0)
    handle.remove()
    assert patched(model) == []


def test_a_model_that_looks_back_past_the_block_is_run_whole() -> None:
    """A later block that uses what an earlier one computed would compute something else."""
    model = tiny("mixtral").eval()
    batches = batches_for(model)[:1]
    first, last = find_moe_layers(model)
    told: dict[str, Any] = {"sum": 0.0}
    first.experts.register_forward_hook(lambda module, args, output: told.update(sum=output.sum()))
    last.experts.register_forward_hook(lambda module, args, output: output + told.pop("sum", 0.0))
    loss = lambda batch: negative_log_likelihood(model, batch)[0]  # noqa: E731
    assert Start.at(last, batches, loss, [loss(batches[0])], None).skipped == []
