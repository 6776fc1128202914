"""How alike the experts of a layer are in what they do: all of them are run on the same tokens, routed there or not.

Shapes: L MoE layers, E experts, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equipoise.models.layers import MoELayer, run_expert
from equipoise.models.recorder import record
from equipoise.models.tokens import TokenBatch
from equipoise.profiling.forward import evaluation_mode, run_batch
from equipoise.profiling.sequences import Batch


def pairwise_similarity(outputs_ETD: Tensor) -> Tensor:
    """[T] mean cosine over all pairs of experts of what they make of each token.

    Args:
        outputs_ETD: [E, T, D] outputs, E at least 2. An output of length 0 has cosine 0 with all others.

    Source: PES of SimBal (arXiv:2506.14038): C(x) = 2 / (E (E - 1)) * sum_{i<j} cos(f_i(x), f_j(x)). With unit vectors u_i that
    sum is (|sum_i u_i|^2 - sum_i |u_i|^2) / 2, so that no pair is formed.
    """
    unit_ETD = torch.nn.functional.normalize(outputs_ETD.double(), dim=-1)
    experts = len(unit_ETD)
    own_T = unit_ETD.square().sum((0, 2))
    return (unit_ETD.sum(0).square().sum(-1) - own_T) / (experts * (experts - 1))


def expert_similarity(model: Any, batches: Sequence[Batch]) -> NDArray[np.float64]:
    """Pairwise expert similarity (PES) of each layer: low where experts have parted ways, 1 where they are copies.

    Every expert is computed on every real token, so this costs E / K times a forward pass's experts; a few hundred tokens do.
    The gate weight plays no part. A layer of several routing events is measured on the inputs of all of them.

    Args:
        model: a transformers MoE model that is not balanced.
        batches: the text.

    Returns:
        [L] means over tokens; nan for a layer of one expert.

    Raises:
        ModelError: no MoE layers, or a balanced model.
    """
    with evaluation_mode(model), record(model, transitions=False, coactivation=False) as recorder:
        sums_L = np.zeros(len(recorder.layers))
        tokens_L = np.zeros(len(recorder.layers), np.int64)

        def listen(layer: MoELayer, hidden_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, tokens: TokenBatch) -> None:
            if layer.num_experts < 2:
                return
            real_TD = hidden_TD[tokens.real_T.to(hidden_TD.device)]
            with torch.no_grad():
                outputs_ETD = torch.stack([run_expert(layer, expert, real_TD) for expert in range(layer.num_experts)])
            sums_L[layer.index] += float(pairwise_similarity(outputs_ETD).sum())
            tokens_L[layer.index] += len(real_TD)

        recorder.add_listener(listen)
        for batch in batches:
            run_batch(model, batch, all_logits=False)
    with np.errstate(invalid="ignore"):
        return np.asarray(sums_L / tokens_L)
