"""What a model's experts and routers were fed so far, and which changes of their weights that text would feel.

For an update dW of a matrix whose inputs so far have the second moment C, the outputs on that text move by tr(dW C dW^T) on
average. SAME (arXiv:2602.01990) damps updates along the directions that C is large in: of experts by a damped inverse of C, of
routers direction by direction. Formulas after the paper's; what the paper leaves open is said where it is decided.

Shapes: L MoE layers, E experts, T tokens, D model width, F expert width, N rows of a sample, I inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equipoise.models.layers import MoELayer, expert_hidden, expert_matrices
from equipoise.models.recorder import record
from equipoise.models.tokens import TokenBatch
from equipoise.profiling.forward import evaluation_mode, run_batch
from equipoise.profiling.sequences import Batch


@dataclass
class LayerHistory:
    """Sums over all text so far, of one MoE layer.

    Attributes:
        router_DD: sum of x x^T over tokens.
        inputs_E: for each matrix of an expert, [E, I, I] sum of x x^T over the expert's tokens.
        mass_E: [E] sum of gate weight times |x|^2 over the expert's tokens.
    """

    router_DD: Tensor
    inputs_E: list[Tensor]
    mass_E: Tensor

    def __add__(self, other: LayerHistory) -> LayerHistory:
        """Text of both: the sums over the two texts together, as in C^t = (a C^{t-1} + n C) / (a + n), not divided."""
        inputs = [mine + yours for mine, yours in zip(self.inputs_E, other.inputs_E, strict=True)]
        return LayerHistory(self.router_DD + other.router_DD, inputs, self.mass_E + other.mass_E)


def gather(model: Any, batches: Sequence[Batch]) -> list[LayerHistory]:
    """Sum up what a model's routers and experts are fed by a text.

    Args:
        model: a transformers MoE model that is not balanced; left as it was.
        batches: the text, such as that of the domain that was just trained on.

    Returns:
        [L] sums in float64; add those of earlier domains to them.
    """
    found: dict[int, LayerHistory] = {}

    def listen(layer: MoELayer, hidden_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, tokens: TokenBatch) -> None:
        real = tokens.real_T.to(hidden_TD.device)
        history = _of_call(layer, hidden_TD[real], experts_TK[real], weights_TK[real])
        found[layer.index] = found[layer.index] + history if layer.index in found else history

    with evaluation_mode(model), torch.no_grad(), record(model, transitions=False, coactivation=False) as recorder:
        recorder.add_listener(listen)
        for batch in batches:
            run_batch(model, batch, all_logits=False)
    return [found[index] for index in sorted(found)]


def _of_call(layer: MoELayer, hidden_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> LayerHistory:
    moments: list[list[Tensor]] = [[] for _ in layer.matrices]
    mass_E = torch.zeros(layer.num_experts, dtype=torch.float64)
    for expert in range(layer.num_experts):
        rows_N, columns_N = (experts_TK == expert).nonzero(as_tuple=True)
        x_ND = hidden_TD[rows_N]
        inner_NF = expert_hidden(layer, expert, x_ND, expert_matrices(layer, expert)[:-1])
        for place, moment in enumerate(moments):  # all matrices but the last read the layer's input
            moment.append(_moment(inner_NF if place == len(moments) - 1 else x_ND))
        mass_E[expert] = float((weights_TK[rows_N, columns_N].double() * x_ND.double().square().sum(1)).sum())
    return LayerHistory(_moment(hidden_TD), [torch.stack(moment) for moment in moments], mass_E)


def _moment(x_NI: Tensor) -> Tensor:
    x_NI = x_NI.double()
    return x_NI.T @ x_NI


def principal(moment_II: Tensor, energy: float, most: int) -> tuple[Tensor, Tensor]:
    """The directions that inputs lie in, and how strongly.

    Args:
        moment_II: second moment of the inputs, at any scale.
        energy: share of sum sigma_i^2 that the directions kept must reach.
        most: directions kept at most.

    Returns:
        V [I, k] and sigma [k], descending; sigma is relative to the mean over all directions, so that what is made of it does
        not depend on the scale of the inputs. k is 0 when there were no inputs.
    """
    trace = moment_II.trace()
    if trace <= 0:
        return moment_II.new_zeros(len(moment_II), 0), moment_II.new_zeros(0)
    sigma, vectors_II = torch.linalg.eigh(moment_II * (len(moment_II) / trace))
    sigma, vectors_II = sigma.flip(0).clamp(min=0), vectors_II.flip(1)
    share = sigma.square().cumsum(0) / sigma.square().sum()
    k = min(int((share < energy).sum()) + 1, most)
    return vectors_II[:, :k], sigma[:k]


def expert_filter(moment_II: Tensor, *, mu: float, energy: float = 0.9, most: int = 64) -> Tensor:
    """[I, I] what an expert's update is multiplied by from the right.

    SAME: dW = -eta * gradient * C^-1 with C^-1 ~ V (S + mu I)^-1 V^T + (I - V V^T) / mu. Times mu here, so that directions that
    no earlier text used pass unchanged and the learning rate keeps its meaning.

    Args:
        moment_II: second moment of the matrix's inputs so far.
        mu: damping, relative to the mean eigenvalue.
        energy: share of the inputs' energy that counts as used directions.
        most: used directions at most.
    """
    vectors_Ik, sigma = principal(moment_II, energy, most)
    return _through(vectors_Ik, mu / (sigma + mu))


def router_filter(
    moment_DD: Tensor, *, energy: float = 0.9, most: int = 64, window: int = 3, clamp: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """[D, D] what a router's update is multiplied by from the right.

    SAME: dW V_par g V_par^T + dW V_perp V_perp^T, g the inverse of the sliding average of the singular values. Relative to
    their mean, and never above 1: no direction is sped up.

    Args:
        moment_DD: second moment of the router's inputs so far.
        energy: share of the inputs' energy that counts as used directions.
        most: used directions at most.
        window: singular values that are averaged, centred.
        clamp: range of g; the published code holds it within (0.8, 1), which leaves it next to no effect.
    """
    vectors_Dk, sigma = principal(moment_DD, energy, most)
    half = window // 2
    smooth = torch.stack([sigma[max(i - half, 0) : i + half + 1].mean() for i in range(len(sigma))]) if len(sigma) else sigma
    return _through(vectors_Dk, (1 / smooth).clamp(*clamp))


def _through(vectors_Ik: Tensor, gain: Tensor) -> Tensor:
    """Gains along some directions, 1 along all others."""
    identity = torch.eye(len(vectors_Ik), dtype=vectors_Ik.dtype)
    return identity + (vectors_Ik * (gain - 1)) @ vectors_Ik.T
