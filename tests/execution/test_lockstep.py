from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from equipoise.errors import ModelError
from equipoise.execution.lockstep import Call, run_in_lockstep
from equipoise.models.blocks import all_blocks, moe_blocks
from equipoise.models.layers import find_moe_layers, observe
from equipoise.models.tokens import TokenTracker
from execution.calibration import Text, outputs, texts
from models.architectures import tiny


def stations_of(model: PreTrainedModel) -> list[nn.Module]:
    return [model.get_submodule(path) for path in all_blocks(model, find_moe_layers(model))]


def lockstep(model: PreTrainedModel, batches: Sequence[Text], visit, stations=None) -> list[torch.Tensor]:
    """Outputs of forwards run in lockstep."""
    found: list[torch.Tensor] = []
    forwards = [lambda batch=batch: found.append(outputs(model, batch)) for batch in batches]
    with TokenTracker(model) as tracker:
        run_in_lockstep(forwards, stations or stations_of(model), visit, tracker)
    return found


@pytest.mark.parametrize("name", ["qwen2_moe", "switch_transformers", "gemma4", "zaya", "nemotron_h", "longcat_flash"])
def test_forwards_side_by_side_compute_what_they_compute_alone(name: str) -> None:
    model = tiny(name)
    batches = texts(model)
    alone = [outputs(model, batch) for batch in batches]
    met: list[nn.Module] = []

    def visit(station: nn.Module, calls: Sequence[Call]) -> bool:
        met.append(station)
        assert len(calls) == len(batches)
        for call in calls:
            call.run()  # a look at what the station does changes nothing
        return True

    assert all(torch.equal(a, b) for a, b in zip(lockstep(model, batches, visit), alone, strict=True))
    assert met == stations_of(model)
    assert all("forward" not in vars(module) for module in model.modules() if isinstance(module, nn.Module))


def test_what_a_visit_changes_is_what_all_forwards_meet() -> None:
    model, batches = tiny("qwen2_moe"), texts(tiny("qwen2_moe"))
    changed = tiny("qwen2_moe")
    for layer in find_moe_layers(changed):
        layer.experts.down_proj.data.mul_(2)

    def visit(station: nn.Module, calls: Sequence[Call]) -> bool:
        station.mlp.experts.down_proj.data.mul_(2)
        return True

    got = lockstep(model, batches, visit)
    assert all(torch.equal(a, outputs(changed, batch)) for a, batch in zip(got, batches, strict=True))


def test_the_tracker_knows_the_tokens_of_the_forward_that_runs() -> None:
    model = tiny("mixtral")
    batches = [Text(0, lengths=(9, 5)), Text(1, lengths=(7, 7, 2))]
    [first, *_] = find_moe_layers(model)
    seen: list[int] = []

    def visit(station: nn.Module, calls: Sequence[Call]) -> bool:
        def count(hidden: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> None:
            seen.append(int(tracker.batch(first.stack, len(experts)).real_T.sum()))

        handle = observe(first, count)
        for call in calls:
            call.run()
        handle.remove()
        return False

    block = model.get_submodule(next(iter(moe_blocks([first]))))
    with TokenTracker(model) as tracker:
        run_in_lockstep([lambda b=b: outputs(model, b) for b in batches], [block], visit, tracker)
        assert seen == [14, 16]
        with pytest.raises(Exception, match="outside a forward call"):
            tracker.batch(first.stack, 16)


def test_what_transformers_collects_on_the_way_is_complete() -> None:
    model, batch = tiny("mixtral"), Text(0)
    inputs = {name: torch.as_tensor(array) for name, array in batch.inputs().items()}
    with torch.no_grad():
        alone = model(**inputs, output_router_logits=True, output_hidden_states=True)
    found = []
    with TokenTracker(model) as tracker:
        run_in_lockstep(
            [lambda: found.append(model(**inputs, output_router_logits=True, output_hidden_states=True))],
            stations_of(model),
            lambda station, calls: True,
            tracker,
        )
    for kind in ("router_logits", "hidden_states"):
        assert len(found[0][kind]) == len(alone[kind])
        assert all(torch.equal(a, b) for a, b in zip(found[0][kind], alone[kind], strict=True))


@pytest.mark.parametrize("where", ["forward", "station", "visit", "stop"])
def test_whatever_goes_wrong_reaches_the_caller_and_ends_all_threads(where: str) -> None:
    model, batches = tiny("qwen2_moe"), texts(tiny("qwen2_moe"))
    before, modes = threading.active_count(), [torch.is_grad_enabled()]

    class BadError(Exception):
        pass

    def bad(*_: object, **__: object) -> None:
        raise BadError

    def visit(station: nn.Module, calls: Sequence[Call]) -> bool:
        if where == "visit":
            raise BadError
        return where != "stop"

    handles = []
    if where == "forward":
        handles = [model.model.norm.register_forward_pre_hook(bad)]
    if where == "station":
        handles = [model.model.layers[1].self_attn.register_forward_pre_hook(bad)]
    if where == "stop":
        assert lockstep(model, batches, visit) == []
    else:
        with pytest.raises(BadError):
            lockstep(model, batches, visit)
    for handle in handles:
        handle.remove()
    assert threading.active_count() == before
    assert [torch.is_grad_enabled()] == modes
    assert torch.isfinite(outputs(model, batches[0])).all()


def test_forwards_that_part_are_refused() -> None:
    model = tiny("qwen2_moe")
    with pytest.raises(ModelError, match="take different ways"), TokenTracker(model) as tracker:
        run_in_lockstep(
            [lambda: outputs(model, Text(0)), lambda: None], stations_of(model), lambda station, calls: True, tracker
        )
