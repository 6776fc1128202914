"""All experts of one MoE layer rounded on the tokens that each of them serves.

An expert's matrices are rounded in the order in which a token meets them. The last one then gets other activations than it
was trained for: before it is rounded, it is fitted to them by least squares, so that it makes up for what the rounding of
the others did (`hessian.refitted`), and its Hessian is that of these activations.

Experts are taken in chunks, small enough for a budget of memory and the same for any number of workers; the chunks are
independent, so workers do not change the result.

Shapes: E experts, T tokens of a call, K top-k, N tokens of an expert, D model width, F expert width, B experts of a chunk.
`up` is [gate; up] in gated experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from equipoise.errors import EquipoiseError
from equipoise.models.layers import MoELayer, expert_hidden, expert_matrices, run_expert
from equipoise.precisions import Precision
from equipoise.quantization import hadamard
from equipoise.quantization.formats import QuantizedMatrix, require_finite, store
from equipoise.quantization.hessian import DAMP, gate_weights, refitted, second_moment
from equipoise.quantization.layer_report import ExpertReport, LayerReport
from equipoise.quantization.layer_tokens import Call, LayerTokens
from equipoise.quantization.methods import METHODS, Method
from equipoise.quantization.rtn import Rounded

SHRINK = 32
"""Tokens of the layer's mean that are mixed into every expert's Hessian."""
LAYER_TOKENS = 4096
"""Tokens of the layer, evenly spaced, that stand for its mean."""
SENT_TOKENS = 512
"""Of these, tokens that are sent through an expert for the mean of its last matrix's inputs."""
CHECKED_TOKENS = 128
"""Tokens of an expert on which its output error is measured, for the report."""
REFIT_DAMP = 0.1
"""Least damping of that fit, as a part of the mean of a Hessian's diagonal: it has far more freedom than rounding has."""
CHUNK_BYTES = 256 << 20
CHUNK_EXPERTS = 8

Matrices = tuple[QuantizedMatrix, QuantizedMatrix]
Through = Callable[[Tensor], Tensor]
Item = TypeVar("Item")
Result = TypeVar("Result")


def quantize_experts(
    layer: MoELayer,
    calls: Sequence[Call],
    wanted: Sequence[tuple[int, Precision]],
    method: str,
    *,
    damp: float = DAMP,
    shrink: float = SHRINK,
    workers: int = 1,
    refit: bool = True,
    rotate: bool = False,
) -> tuple[dict[tuple[int, str], Matrices], LayerReport]:
    """Round experts of a layer with the Hessians of the tokens that each of them serves.

    An expert's Hessian is mixed with `shrink` tokens of the layer's mean, which matters where it served few tokens: for its
    last matrix, these are tokens of the whole layer sent through this expert.

    Args:
        layer: the layer, with its original weights.
        calls: everything that reached its experts on the calibration text, without padding.
        wanted: experts and the quantized formats to round them to.
        method: a name of `quantization.methods.METHODS`. Its power of the gate weighs the tokens, except in families that
            put the gate on the expert's input, where the inputs carry it already.
        damp: part of the mean of a Hessian's diagonal that is added to it.
        shrink: tokens of the layer's mean in every Hessian; 0 keeps each expert to its own.
        workers: chunks of experts that are rounded at the same time, on one core each.
        refit: fit the last matrix to the activations behind the rounded ones before; of methods that need a Hessian.
        rotate: store the last matrix rotated (`quantization.hadamard`), for activations that are rotated likewise.

    Returns:
        (expert, name of the precision) -> (up, down), and the report.

    Raises:
        EquipoiseError: unknown method or expert, a float precision, an option out of range, no calls.
        ModelError: the layer is balanced already, or its weights or inputs are NaN or infinite.
    """
    chosen = METHODS.get(method)
    wanted = list(dict.fromkeys(wanted))
    _check(layer, calls, wanted, shrink, workers, rotate)
    tokens = LayerTokens(layer, calls)
    (task,) = _in_threads(lambda kind: _Task(layer, tokens, kind, damp, shrink, refit, rotate), [chosen], 1)
    forms: dict[int, list[Precision]] = {}
    for expert, form in wanted:
        forms.setdefault(expert, []).append(form)
    parts = _in_threads(task.round_chunk, _chunks(layer, forms), workers)
    done = {key: value for part in parts for key, value in part.items()}
    reports = tuple(done[expert, form.name][1] for expert, form in wanted)
    matrices = {key: value for key, (value, _) in done.items()}
    return matrices, LayerReport(layer.path, method, tokens.total, layer.matrices[0][1], reports)


class _Task:
    """What all chunks of a layer have in common."""

    def __init__(
        self,
        layer: MoELayer,
        tokens: LayerTokens,
        method: Method,
        damp: float,
        shrink: float,
        refit: bool,
        rotate: bool,
    ) -> None:
        self.layer, self.tokens, self.method, self.damp, self.shrink = layer, tokens, method, damp, shrink
        self.refit = refit and method.needs_hessian
        self.turn: Through = hadamard.rotate if rotate else _unchanged
        # A gate on the input is in the input already, and weighs the output's error through it.
        self.power = 0 if layer.adapter.gate_on_input else method.gate_power
        layer_ND = tokens.of_layer(LAYER_TOKENS if method.reads_hessian and shrink else 0)
        self.mean_up = _mean(layer_ND)
        self.sent_ND = layer_ND[:: max(1, len(layer_ND) // SENT_TOKENS)]

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def round_chunk(self, chunk: dict[int, list[Precision]]) -> dict[tuple[int, str], tuple[Matrices, ExpertReport]]:
        """Round some experts to all formats that are wanted of each."""
        originals = [_Original(self, expert) for expert in chunk]
        done = {}
        for form in dict.fromkeys(form for forms in chunk.values() for form in forms):
            mine = [original for original in originals if form in chunk[original.expert]]
            up = self._round(torch.stack([original.up for original in mine]), form, [original.hessian for original in mine])
            ups = [original.split(values) for original, values in zip(mine, up.values(form), strict=True)]
            inner = [self.inner(original, parts) for original, parts in zip(mine, ups, strict=True)]
            down = self._round(torch.stack([weight for weight, _ in inner]), form, [hessian for _, hessian in inner])
            for n, original in enumerate(mine):
                stored = store(up.at(n), original.up.shape[1], form), store(down.at(n), original.down.shape[1], form)
                rounded = [*ups[n], self.turn(stored[1].dequantize())]
                done[original.expert, form.name] = stored, self._report(original, form, rounded, (up.at(n), down.at(n)))
        return done

    def _round(self, weight: Tensor, form: Precision, hessians: Sequence[Tensor | None]) -> Rounded:
        known = [hessian for hessian in hessians if hessian is not None]
        return self.method.round(weight, form, torch.stack(known) if known else None, damp=self.damp)

    def outer(self, expert: int, weights_N: Tensor) -> Tensor | None:
        """The Hessian of an expert's first matrices; None for methods that read none."""
        if not self.method.reads_hessian:
            return None
        return self._moment(expert, weights_N, _unchanged, _unchanged, self.mean_up)

    def inner(self, original: _Original, ups: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """An expert's last matrix, made up for the rounding of those before it, and its Hessian behind them."""
        if not self.method.reads_hessian:
            return original.down, None

        def exact(x_ND: Tensor) -> Tensor:
            return self.turn(expert_hidden(self.layer, original.expert, x_ND, original.matrices[:-1]))

        def rounded(x_ND: Tensor) -> Tensor:
            return self.turn(expert_hidden(self.layer, original.expert, x_ND, ups))

        whose, sent_NF = (original.expert, original.weights_N), rounded(self.sent_ND)
        hessian = self._moment(*whose, rounded, rounded, _mean(sent_NF))
        if not self.refit:
            return original.down, hessian
        cross = self._moment(*whose, exact, rounded, _mean(exact(self.sent_ND), sent_NF))
        return refitted(original.down, cross, hessian, max(self.damp, REFIT_DAMP)), hessian

    def _moment(self, expert: int, weights_N: Tensor, left: Through, right: Through, layer_mean: Tensor) -> Tensor:
        """Weighted mean of x y^T over an expert's tokens and `shrink` of the layer's."""
        total, first = self.shrink * layer_mean, 0
        for x_ND in self.tokens.inputs(expert):
            last = first + len(x_ND)
            total += second_moment(left(x_ND), weights_N[first:last], None if left is right else right(x_ND))
            first = last
        return total / max(len(weights_N) + self.shrink, 1)

    def _report(
        self, original: _Original, form: Precision, rounded: Sequence[Tensor], parts: Sequence[Rounded]
    ) -> ExpertReport:
        count = len(original.gates_N)
        return ExpertReport(
            expert=original.expert,
            precision=form.name,
            tokens=count,
            layer_part=self.shrink / (count + self.shrink) if count + self.shrink else 1.0,
            damping=max((float(part.damping) for part in parts if part.damping is not None), default=0.0),
            output_error=self._output_error(original.expert, original.gates_N, original.matrices, rounded),
        )

    def _output_error(self, expert: int, gates_N: Tensor, exact: Sequence[Tensor], rounded: Sequence[Tensor]) -> float | None:
        x_ND = next(self.tokens.inputs(expert), None)
        if x_ND is None:
            return None
        picked = torch.linspace(0, len(x_ND) - 1, min(CHECKED_TOKENS, len(x_ND))).round().long()
        y_ND = run_expert(self.layer, expert, x_ND[picked], exact)
        error_ND = run_expert(self.layer, expert, x_ND[picked], rounded) - y_ND
        square_N = 1.0 if self.layer.adapter.gate_on_input else gates_N[picked].square()
        energy = float((square_N * y_ND.square().sum(-1)).sum())
        return float((square_N * error_ND.square().sum(-1)).sum()) / energy if energy > 0 else None


class _Original:
    """An expert as it is: its matrices in float32, and what is known of its tokens."""

    def __init__(self, task: _Task, expert: int) -> None:
        self.expert = expert
        self.matrices = [part.detach().float() for part in expert_matrices(task.layer, expert)]
        self.up, self.down = torch.cat(self.matrices[:-1]), task.turn(self.matrices[-1])
        require_finite(self.up)
        require_finite(self.down)
        self.gates_N = task.tokens.gates(expert)
        self.weights_N = gate_weights(self.gates_N, task.power)
        self.hessian = task.outer(expert, self.weights_N)

    def split(self, up: Tensor) -> list[Tensor]:
        """Rows of `up` as the expert's own matrices."""
        return list(up.split([len(part) for part in self.matrices[:-1]]))


def _check(
    layer: MoELayer, calls: Sequence[Call], wanted: Sequence[tuple[int, Precision]], shrink: float, workers: int, rotate: bool
) -> None:
    for expert, form in wanted:
        if not 0 <= expert < layer.num_experts:
            raise EquipoiseError(f"{layer.path} has experts 0 to {layer.num_experts - 1}; expert {expert} was to be quantized.")
        if form.is_float:
            raise EquipoiseError(
                f"expert {expert} of {layer.path} was to be quantized to '{form.name}', which is a float format."
            )
    if not calls:
        raise EquipoiseError(f"no calibration text reached {layer.path}; quantize with text that does, or by method 'rtn'.")
    if shrink < 0 or workers < 1:
        raise EquipoiseError(f"shrink is {shrink} and workers is {workers}; shrink must be at least 0, workers at least 1.")
    width = layer.matrices[-1][1]
    if rotate and hadamard.block_size(width) == 1:
        raise EquipoiseError(
            f"the experts of {layer.path} cannot be rotated: their inner width {width} is odd; quantize without."
        )


def _chunks(layer: MoELayer, forms: dict[int, list[Precision]]) -> list[dict[int, list[Precision]]]:
    """Experts that are rounded together, by what the Hessians and weights of one take in memory."""
    width, inner = layer.matrices[0][1], layer.matrices[-1][1]
    elements = sum(rows * columns for rows, columns in layer.matrices)
    # Float32 copies that live at the same time, as measured: of Hessian and factor; of weights, codes, errors and grids.
    bytes_each = 4 * (8 * max(width, inner) ** 2 + 20 * elements)
    size = max(1, min(CHUNK_EXPERTS, CHUNK_BYTES // bytes_each))
    experts = list(forms)
    return [{expert: forms[expert] for expert in experts[i : i + size]} for i in range(0, len(experts), size)]


def _in_threads(work: Callable[[Item], Result], items: Sequence[Item], workers: int) -> list[Result]:
    """Results in order. Each thread uses one core, so that no result depends on how many cores another operation takes."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, items))
    finally:
        # The setting of a thread becomes the default of threads started later.
        torch.set_num_threads(threads)


def _mean(x_ND: Tensor, y_ND: Tensor | None = None) -> Tensor:
    return second_moment(x_ND, None, y_ND) / max(len(x_ND), 1)


def _unchanged(x: Tensor) -> Tensor:
    return x
