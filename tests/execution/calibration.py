"""Calibration batches for tests of rounding on text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from execution.helpers import token_batch


class Text:
    """Random tokens with padding, in both stacks of an encoder-decoder."""

    def __init__(self, seed: int, *, both_stacks: bool = False, lengths: tuple[int, ...] = (9, 5)) -> None:
        self._inputs = {name: tensor.numpy() for name, tensor in token_batch(60, lengths, seed=seed).items()}
        if both_stacks:
            self._inputs |= {f"decoder_{name}": array for name, array in self._inputs.items()}

    def inputs(self) -> Mapping[str, Any]:
        return self._inputs


def texts(model: PreTrainedModel, count: int = 3) -> list[Text]:
    """Batches that a model can read."""
    return [Text(seed, both_stacks=model.config.is_encoder_decoder) for seed in range(count)]


def outputs(model: PreTrainedModel, batch: Text) -> torch.Tensor:
    """Logits, or the last hidden state of a model without a head."""
    with torch.no_grad():
        found = model(**{name: torch.as_tensor(array) for name, array in batch.inputs().items()}, use_cache=False)
    return found.logits if "logits" in found else found.last_hidden_state


def stored(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """All tensors of a model as bytes, so that equality is of bits."""
    return {name: tensor.detach().reshape(-1).view(torch.uint8) for name, tensor in model.state_dict().items()}


def assert_same_bits(got: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """The same names, and the same bits under each."""
    assert set(got) == set(wanted)
    different = [name for name, tensor in wanted.items() if not torch.equal(got[name], tensor)]
    assert not different
