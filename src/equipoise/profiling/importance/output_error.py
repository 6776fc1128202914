"""Output error: what storing an expert in fewer bits does to its own output, measured on its own tokens.

Shapes: L MoE layers, E logical experts, T tokens, K top-k, N drawn tokens of one expert, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from equipoise.errors import EquipoiseError
from equipoise.models.layers import MoELayer, expert_matrices, gated_expert
from equipoise.precisions import precision
from equipoise.profiling.importance.base import IMPORTANCE, Context, Floats, Ints, Measured, Observation
from equipoise.profiling.importance.sampling import Draw, SampledEstimator, draw
from equipoise.profiling.importance.sensitivity import first_rows, sensitivity
from equipoise.quantization.formats import round_trip

FEW_TOKENS = 8
"""Fewer drawn tokens than this say too little about an expert; its error per token is taken from its layer."""

MASSIVE = 100.0
"""A token counts in a layer's energy for at most this many tokens of median energy.

A few tokens of a text (the first, as a rule) get outputs thousands to millions of times larger than all others from one
"super expert" (arXiv:2507.23279). Unclipped they would be the layer's whole energy, and rounding any other expert of the
layer would look free; clipped, the others compare with those of other layers, and the super expert stands out.
"""


@IMPORTANCE.register(
    "output_error",
    summary="measured error of the expert's own output at each precision, weighted by the squared gate",
    source="Equipoise",
)
class OutputError(SampledEstimator):
    """`sum_t g_t^2 ||y_q,t - y_t||^2` for each expert and precision, and the energy of the layer's routed output.

    Weights are rounded to each precision and back and the expert is run in float32 with either. With int8 weights the inputs
    of both products are rounded to 8 bits too, as they are where such experts are executed fast. Sums are scaled from the
    sample to all tokens of the run. An expert with fewer than `FEW_TOKENS` drawn tokens is given its layer's error per
    token, for the tokens it has served or for one if it has served none, so that rounding an unseen expert is never free;
    such experts are listed in the remarks. Families that put the gate on an expert's input (Llama 4) are measured as they
    compute.

    The energy is `sum_t ||sum_e g_e,t y_e,t||^2`, with each token clipped at `MASSIVE` times the layer's median.

    The score is the relative error of the coarsest precision: what the layer's output loses if that expert is rounded.

    How much an expert's error matters is measured too if asked for: the KL divergence of the model's predictions for each unit
    of relative squared error that the expert causes in its layer's output, from gradients (`sensitivity`).

    Args:
        max_tokens_per_expert: sample of each expert; None measures all tokens.
        energy_tokens: sample of each layer's tokens for the energy of its routed output; None measures those of all
            passes in which experts are measured.
        int8_activations: count the rounding of activations that fast kernels do beside int8 weights (`apply_plan` does it
            unless told not to).
        sensitivity_tokens: budget of tokens to measure the experts' sensitivity on, taken from all scenarios in turn, one
            forward and one backward pass of them; 0 measures none.
    """

    def __init__(
        self,
        context: Context,
        *,
        max_tokens_per_expert: int | None = 256,
        energy_tokens: int | None = 2048,
        int8_activations: bool = True,
        sensitivity_tokens: int = 0,
    ) -> None:
        super().__init__(context, max_tokens_per_expert)
        if not context.precisions:
            raise EquipoiseError("output_error needs the precisions to measure; give --precisions, for example int8,int4.")
        if energy_tokens is not None and energy_tokens < 1:
            raise EquipoiseError(f"output_error: energy_tokens is {energy_tokens}; it must be at least 1.")
        self.formats = {form.name: form for form in map(precision, context.precisions)}
        if sensitivity_tokens < 0:
            raise EquipoiseError(f"output_error: sensitivity_tokens is {sensitivity_tokens}; it must be at least 0.")
        self.int8_activations, self.sensitivity_tokens = int8_activations, sensitivity_tokens
        self.energy_quota = None if energy_tokens is None else -(-energy_tokens // max(len(self.steps), 1))

    def observe(self, seen: Observation) -> None:
        """Count tokens in every pass; draw and measure in the passes chosen for it."""
        self.sums.setdefault("tokens", np.zeros(self.context.shape[0], np.int64))[seen.layer.index] += seen.hidden.shape[0]
        super().observe(seen)
        if seen.step in self.steps and seen.hidden.shape[0]:
            self._measure_energy(seen)

    def measure(self, seen: Observation, drawn: Draw, hidden_ND: torch.Tensor, gates_N: torch.Tensor) -> None:
        """Add the squared output error of one expert's drawn tokens at each precision."""
        layer, expert = seen.layer, drawn.expert
        # In float32, so that the model's own rounding does not drown that of the stored weights.
        weights = [matrix.detach().float() for matrix in expert_matrices(layer, expert)]
        exact_ND = gated_expert(layer, expert, hidden_ND.to(weights[0].dtype), gates_N, weights)
        for name, form in self.formats.items():
            rounded = [round_trip(matrix, form) for matrix in weights]
            with RoundedInputs() if self.int8_activations and name == "int8" else nullcontext():
                rounded_ND = gated_expert(layer, expert, hidden_ND.to(weights[0].dtype), gates_N, rounded)
            self.put(f"error.{name}", expert, drawn.weight * _energy(rounded_ND - exact_ND))

    def _measure_energy(self, seen: Observation) -> None:
        """Keep ||sum_e g_e y_e||^2 of a sample of the layer's tokens, and how many tokens each of them stands for."""
        total = seen.hidden.shape[0]
        rng = np.random.default_rng([self.context.seed, 3, seen.step, seen.layer.index])
        size = total if self.energy_quota is None else min(self.energy_quota, total)
        picked = torch.from_numpy(np.sort(rng.choice(total, size, replace=False))).to(seen.hidden.device)
        output = routed_output(seen.layer, seen.hidden[picked], seen.experts[picked], seen.weights[picked])
        drawn = np.stack([output.square().sum(-1).cpu().numpy(), np.full(size, total / size)])
        name = f"energy.{seen.layer.index}.{self.steps.index(seen.step)}"
        self.sums[name] = np.concatenate([self.sums.get(name, np.zeros((2, 0))), drawn], axis=1)

    def finish(self, load_LE: Ints, checkpoint: Callable[[], None], advance: Callable[[int, int], None]) -> Measured:
        """[L, E] error by precision, [L] energy, and [L, E] relative error of the coarsest precision as the score."""
        width = np.array([layer.num_experts for layer in self.context.layers])
        present_LE = np.arange(load_LE.shape[1]) < width[:, None]
        few_LE = present_LE & (self.sum("drawn") < FEW_TOKENS)
        errors = {}
        for name in self.formats:
            measured = self.sum(f"error.{name}") * self.scale(load_LE)
            per_token = _mean(measured, load_LE, self.sum("drawn") > 0)
            errors[name] = np.where(few_LE, per_token * np.maximum(load_LE, 1), measured)
        clipped = [self._clipped_energy(layer.index) for layer in self.context.layers]
        energy = np.array([value for value, _ in clipped])
        coarsest = min(self.formats.values(), key=lambda form: form.bits).name
        with np.errstate(divide="ignore", invalid="ignore"):
            score = np.where(energy[:, None] > 0, errors[coarsest] / energy[:, None], 0.0)
        nats_LE = self._sensitivity(coarsest, energy, advance) if self.sensitivity_tokens else None
        few = {str(layer): np.flatnonzero(row).tolist() for layer, row in enumerate(few_LE) if row.any()}
        remarks = {
            "experts_with_few_tokens": few,
            "tokens_drawn": int(self.sum("drawn").sum()),
            "energy_of_massive_tokens": {str(i): round(part, 4) for i, (_, part) in enumerate(clipped) if part > 0.5},
            "int8_activations": self.int8_activations,
        }
        return Measured(score, errors, energy, nats_LE, remarks)

    def _sensitivity(self, form: str, energy_L: Floats, advance: Callable[[int, int], None]) -> Floats:
        """[L, E] nats of divergence a predicted token for each unit of relative squared error."""
        context = self.context
        batches = first_rows(context.batches, self.sensitivity_tokens)
        # Little text: each process of a team runs all of it, and finds the same.
        found = sensitivity(context.model, context.layers, self.formats[form], batches, context.seed, advance)
        tokens_L = self.sums["tokens"]
        # A relative error is of the energy of all the run's tokens; what it costs is spread over the run's predictions.
        scale_L = np.divide(energy_L, tokens_L * found.predicted_L, out=np.zeros_like(energy_L), where=tokens_L > 0)
        return np.asarray(found.nats_LE * scale_L[:, None])

    def _clipped_energy(self, layer: int) -> tuple[float, float]:
        """A layer's energy with massive tokens clipped, for all tokens of the run, and the part that was clipped away."""
        names = (f"energy.{layer}.{n}" for n in range(len(self.steps)))
        energy, weight = np.concatenate([np.zeros((2, 0)), *(self.sums[n] for n in names if n in self.sums)], axis=1)
        if not energy.sum() > 0:
            return 0.0, 0.0
        kept = np.minimum(energy, MASSIVE * np.median(energy))
        part = 1 - float(kept @ weight) / float(energy @ weight)
        return float(kept @ weight / weight.sum() * self.sums["tokens"][layer]), part


class RoundedInputs(TorchFunctionMode):  # type: ignore[misc]
    """Within it, every linear layer rounds each row of its input to 8 bits, symmetrically, as int8 kernels do."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Round the first argument of a linear layer; leave all else alone."""
        if func is torch.nn.functional.linear:
            x, *rest = args
            step = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-30) / 127
            args = ((x / step).round().mul(step).to(x.dtype), *rest)
        return func(*args, **(kwargs or {}))


def _mean(error_LE: Floats, load_LE: Ints, drawn_LE: Any) -> Floats:
    """[L, 1] error per token over a layer's drawn experts; 0 where none was drawn."""
    error = (error_LE * drawn_LE).sum(1, keepdims=True)
    tokens = (load_LE * drawn_LE).sum(1, keepdims=True)
    return np.asarray(np.divide(error, tokens, out=np.zeros_like(error), where=tokens > 0))


def routed_output(layer: MoELayer, hidden_TD: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """[T, D] sum over a token's experts of gate weight times output, in float64.

    Args:
        layer: the MoE layer.
        hidden_TD: inputs of the experts.
        experts_TK: chosen experts; ids outside the layer's experts add nothing.
        weights_TK: gate weights.
    """
    total = torch.zeros(hidden_TD.shape, dtype=torch.float64, device=hidden_TD.device)
    rng = np.random.default_rng(0)  # everything is drawn, so the order of the keys changes nothing
    for drawn in draw(experts_TK.cpu().numpy(), layer.num_experts, None, rng):
        rows = torch.from_numpy(drawn.tokens).to(hidden_TD.device)
        columns = torch.from_numpy(drawn.columns).to(hidden_TD.device)
        total.index_add_(
            0, rows, gated_expert(layer, drawn.expert, hidden_TD[rows], weights_TK[rows, columns].double()).double()
        )
    return total


def _energy(output_ND: torch.Tensor) -> float:
    return float(output_ND.double().square().sum())
