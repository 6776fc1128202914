"""How much the model's predictions suffer when an expert's output is wrong: one forward and one backward pass over little text.

To second order, an error d_t in what a layer adds to each token t moves the model's predictions away from themselves by

    KL = 1/2 E_y (sum_t d_t . g_t)^2

nats, where the labels y are drawn from those predictions and g_t is the gradient of their negative log-likelihood (the KL
divergence between nearby distributions is half the quadratic form of the Fisher information: Kullback, Information Theory
and Statistics, 1959, section 2.6). Errors of different tokens are taken as independent, so that each expert and token has a
term of its own. A term is estimated as ||d_t||^2 ||g_t||^2, which varies less than (d_t . g_t)^2; the ratio of the two over the
whole model gives the scale. Gradients do not see that an error may change which experts later layers choose, so the
sensitivity of early layers is understated.

Shapes: L MoE layers, E logical experts, T tokens of a call, K top-k, N drawn tokens of one expert, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from equipoise.errors import EquipoiseError, ModelError
from equipoise.models.layers import MoELayer, expert_matrices, gated_expert
from equipoise.models.recorder import record
from equipoise.models.streamed import streamed_of
from equipoise.models.tokens import TokenBatch
from equipoise.precisions import Precision
from equipoise.profiling.forward import run_batch
from equipoise.profiling.importance.base import Floats
from equipoise.profiling.importance.sampling import draw, spread_budget
from equipoise.profiling.sequences import IGNORED, Batch
from equipoise.quantization.formats import round_trip

TOKENS_PER_EXPERT = 256
"""Drawn at most."""
PRIOR_TOKENS = 8
"""An expert's gradients count beside as many tokens of its layer's mean, so that two or three tokens do not decide."""


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Measured on some text.

    Attributes:
        nats_LE: [L, E] KL divergence in nats, summed over predictions, for each unit of squared error of the expert's output,
            summed over its tokens; the layer's mean for an expert without any, 0 for a layer without any.
        predicted_L: [L] predictions for each token that passed the layer; below 1 in an encoder, say.
    """

    nats_LE: Floats
    predicted_L: Floats


def first_rows(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """The first row of some batches, of all scenarios in turn, until they hold a budget of tokens; at least one of each."""
    names = ("input_ids", "attention_mask", "labels", "decoder_input_ids", "decoder_attention_mask")
    rows = [replace(b, **{n: getattr(b, n)[:1] for n in names if getattr(b, n) is not None}) for b in batches]
    return [rows[step] for step in spread_budget(rows, tokens)]


def sensitivity(
    model: Any,
    layers: Sequence[MoELayer],
    form: Precision,
    batches: Sequence[Batch],
    seed: int,
    advance: Callable[[int, int], None],
) -> Sensitivity:
    """How much errors of each expert's output matter.

    Args:
        model: in evaluation mode; it is left as it was.
        layers: its MoE layers.
        form: whose rounding gives the errors that gradients are weighed by; which one hardly matters.
        batches: text to predict.
        seed: of the labels and of the tokens drawn.
        advance: takes (done, total) units of work.

    Raises:
        EquipoiseError: the text has nothing to predict, or the model is read from its files, which gradients cannot be.
        ModelError: no language-model head, gradients that are not numbers, or an architecture that has none.
    """
    if streamed_of(model) is not None:
        raise EquipoiseError(
            "sensitivity_tokens needs gradients, which a model that is read from its files layer by layer does not give; "
            "set output_error.sensitivity_tokens to 0."
        )
    calls: list[list[_Call]] = [[] for _ in layers]
    generator = torch.Generator().manual_seed(seed)
    work, predictions = len(batches) + len(layers), 0
    with _frozen(model):
        for done, batch in enumerate(batches, start=1):
            predictions += _differentiate(model, layers, batch, generator, calls)
            advance(done, work)
    if not predictions:
        raise EquipoiseError("output_error: the text has no second token to predict; give more text, or sensitivity_tokens 0.")
    found_LE = np.zeros((len(layers), max(layer.num_experts for layer in layers)))
    predicted_L, directed, isotropic = np.ones(len(layers)), 0.0, 0.0
    for layer in layers:
        if mine := calls[layer.index]:
            predicted_L[layer.index] = predictions / sum(call.hidden_TD.shape[0] for call in mine)
            found_LE[layer.index, : layer.num_experts], *sums = _of_layer(layer, form, _join(mine), seed)
            directed, isotropic = directed + sums[0], isotropic + sums[1]
        advance(len(batches) + layer.index + 1, work)
    nats_LE = 0.5 * (directed / isotropic if isotropic > 0 else 1.0) * found_LE
    return Sensitivity(nats_LE, predicted_L)


@dataclass(frozen=True, eq=False)
class _Call:
    """What one call sent to a layer's experts, real tokens alone, and the gradient of the loss by what came out."""

    hidden_TD: Tensor
    experts_TK: Tensor
    weights_TK: Tensor
    gradient_TD: Tensor


@torch.no_grad()  # type: ignore[untyped-decorator]
def _of_layer(layer: MoELayer, form: Precision, call: _Call, seed: int) -> tuple[Floats, float, float]:
    """[E] mean of ||g||^2 weighted by ||d||^2, and the sums over the layer of (d . g)^2 and of ||d||^2 ||g||^2."""
    isotropic_E, error_E, drawn_E = (np.zeros(layer.num_experts) for _ in range(3))
    directed = 0.0
    rng = np.random.default_rng([seed, 4, layer.index])
    for drawn in draw(call.experts_TK.cpu().numpy(), layer.num_experts, TOKENS_PER_EXPERT, rng):
        rows, columns = (torch.from_numpy(i).to(call.hidden_TD.device) for i in (drawn.tokens, drawn.columns))
        weights = [matrix.detach().float() for matrix in expert_matrices(layer, drawn.expert)]
        rounded = [round_trip(matrix, form) for matrix in weights]
        hidden_ND, gates_N = call.hidden_TD[rows].to(weights[0].dtype), call.weights_TK[rows, columns].double()
        exact_ND = gated_expert(layer, drawn.expert, hidden_ND, gates_N, weights)
        error_ND = (gated_expert(layer, drawn.expert, hidden_ND, gates_N, rounded) - exact_ND).double()
        gradient_ND = call.gradient_TD[rows].double()
        squared_N = error_ND.square().sum(-1)
        isotropic_E[drawn.expert] = drawn.weight * float((squared_N * gradient_ND.square().sum(-1)).sum())
        error_E[drawn.expert] = drawn.weight * float(squared_N.sum())
        drawn_E[drawn.expert] = drawn.weight * drawn.tokens.size
        directed += drawn.weight * float((error_ND * gradient_ND).sum(-1).square().sum())
    if not isotropic_E.sum() > 0:
        return np.zeros(layer.num_experts), 0.0, 0.0
    prior = PRIOR_TOKENS * error_E.sum() / drawn_E.sum()
    mean = isotropic_E.sum() / error_E.sum()
    return (isotropic_E + prior * mean) / (error_E + prior), directed, float(isotropic_E.sum())


def _differentiate(
    model: Any, layers: Sequence[MoELayer], batch: Batch, generator: torch.Generator, calls: list[list[_Call]]
) -> int:
    """Run one batch forward and backward, add what each layer's experts got and their gradients; how many predictions."""
    sent: list[tuple[int, Tensor, Tensor, Tensor, TokenBatch]] = []
    probes: dict[int, list[Tensor]] = {layer.index: [] for layer in layers}

    def listen(layer: MoELayer, hidden: Tensor, experts: Tensor, weights: Tensor, tokens: TokenBatch) -> None:
        sent.append((layer.index, hidden, experts, weights, tokens))

    with ExitStack() as stack:
        recorder = stack.enter_context(record(model, transitions=False, coactivation=False))
        recorder.add_listener(listen)
        for layer in layers:
            stack.enter_context(_probed(layer, probes[layer.index]))
        logits = getattr(run_batch(model, batch, all_logits=True, gradients=True), "logits", None)
    if logits is None or logits.ndim != 3:
        raise ModelError(f"{type(model).__name__} has no language-model head, so its experts' sensitivity cannot be measured.")
    logits_NV = logits[torch.from_numpy(batch.labels != IGNORED).to(logits.device)].float()
    if not len(logits_NV):
        return 0
    drawn_N = torch.multinomial(logits_NV.detach().softmax(-1).cpu(), 1, generator=generator).squeeze(1)
    loss = torch.nn.functional.cross_entropy(logits_NV, drawn_N.to(logits_NV.device), reduction="sum")
    flat = [probe for layer in layers for probe in probes[layer.index]]
    gradients = dict(zip(map(id, flat), _gradients(loss, flat), strict=True))
    for index, hidden_TD, experts_TK, weights_TK, tokens in sent:
        gradient = gradients[id(probes[index].pop(0))]
        gradient_TD = torch.zeros_like(hidden_TD) if gradient is None else gradient.reshape(hidden_TD.shape[0], -1)
        if not torch.isfinite(gradient_TD.sum(dtype=torch.float32)):
            raise ModelError(f"the gradients at {layers[index].path} are not finite numbers; load the model in bf16 or fp32.")
        real = tokens.real_T.to(hidden_TD.device)
        calls[index].append(_Call(hidden_TD[real], experts_TK[real], weights_TK[real], gradient_TD[real]))
    return len(logits_NV)


def _gradients(loss: Tensor, probes: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Of a loss by what was added to each layer's output; None for a layer that it does not depend on."""
    try:
        found: Sequence[Tensor | None] = torch.autograd.grad(loss, list(probes), allow_unused=True)
        return found
    except torch.OutOfMemoryError:
        raise  # says nothing of the architecture
    except RuntimeError as error:
        raise ModelError(
            f"the model cannot be differentiated ({str(error).splitlines()[0]}); set output_error.sensitivity_tokens to 0."
        ) from error


@contextmanager
def _probed(layer: MoELayer, probes: list[Tensor]) -> Iterator[None]:
    """Add a zero that gradients are taken by to what the layer's experts put out, for a while, and list it.

    A family whose experts module does not put out one row a token is probed at its block, where what the experts put out is
    one of the terms.
    """
    rows: list[tuple[int, int]] = []
    taken = [False]

    def before(hidden: Tensor, experts: Tensor, weights: Tensor) -> None:
        rows.append((hidden.shape[0], hidden.shape[-1]))
        taken[0] = False

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        first, *rest = output if isinstance(output, tuple) else (output,)
        if taken[0] or not rows or not torch.is_tensor(first) or first.numel() != rows[-1][0] * rows[-1][1]:
            return None
        taken[0] = True
        probe = torch.zeros_like(first, requires_grad=True)
        probes.append(probe)
        return (first + probe, *rest) if isinstance(output, tuple) else first + probe

    handles = [
        layer.adapter.observe(layer, before),
        *(m.register_forward_hook(after) for m in (layer.experts, layer.ancestors[-1])),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients of weights, for a while: they are as large as the model and nobody asks for them."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)


def _join(calls: Sequence[_Call]) -> _Call:
    names = ("hidden_TD", "experts_TK", "weights_TK", "gradient_TD")
    return _Call(*(torch.cat([getattr(call, name) for call in calls]) for name in names))
