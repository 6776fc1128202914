"""What every choice costs: bytes and predicted error of each expert at each precision, and what a unit holds.

Shapes: L MoE layers, E logical experts of the widest layer, Q precisions from most to fewest bytes, U units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from equipoise.artifacts import ModelFacts, Profile
from equipoise.errors import PlanError
from equipoise.precisions import FLOATS, Precision, precision

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MANTISSA = {"fp32": 23, "fp16": 10, "bf16": 7, "fp8": 3}
DEFAULT_PRECISIONS = ("int8", "int4-g32")
"""Formats beside the 16-bit one that slots may have when the profile measured no errors."""


class UnreachableError(PlanError):
    """Bytes and error asked for cannot both be met; other bytes or another error may."""


@dataclass(frozen=True, eq=False)
class Budget:
    """Bytes and error of every (layer, expert, precision), and the bytes of a unit.

    Attributes:
        precisions: the Q formats that a slot may have, from most to fewest bytes.
        sizes: [L, Q] bytes of one expert of each layer in each format, scales counted.
        errors: [L, E, Q] relative squared error of the layer's routed output if that expert alone is stored so, times the
            expert's weight.
        measured: Q booleans: False for an integer format that the profile did not measure, so that its error is assumed
            from its bits. What a float format rounds away is known, and counts as measured.
        units: parallel units U of every layer.
        unit_bytes: what one unit holds at most, over all layers together.
        nats: what a weighted error of 1 adds to the KL divergence of the model's predictions; nan when the
            profile did not measure the experts' sensitivity, and all weights are 1.
    """

    precisions: tuple[Precision, ...]
    sizes: Ints
    errors: Floats
    measured: tuple[bool, ...]
    units: int
    unit_bytes: int
    nats: float = math.nan

    @property
    def total_bytes(self) -> int:
        """Bytes of all units together."""
        return self.units * self.unit_bytes


def sixteen_bit(model: ModelFacts) -> Precision:
    """The format in which an original expert is counted: the model's own, but at most 16 bits (bf16 for an fp32 model)."""
    return precision(model.dtype if FLOATS[model.dtype] <= 16 else "bf16")


def default_units(model: ModelFacts) -> int:
    """U when the user names none: the routed experts of the widest layer, so that a unit is one original expert."""
    return model.max_experts


def unit_capacity(model: ModelFacts, units: int, fraction: float = 1.0, reference: Precision | None = None) -> int:
    """Bytes that one unit holds over all layers together.

    Args:
        model: its layers give the bytes of the original experts.
        units: U; layers of different width share the same units, so the pool is divided evenly.
        fraction: of the original experts' bytes that the plan may use.
        reference: format of the original experts; at most 16 bits when omitted.
    """
    form = reference or sixteen_bit(model)
    return int(fraction * sum(layer.num_experts * layer.expert_bytes(form) for layer in model.layers)) // units


def assumed_error(form: Precision, columns: int) -> float:
    """Relative squared error of an expert's output from rounding its weights to a format, known from the bits alone.

    Weights are taken as Gaussian: the largest of n columns of a group is near sigma * z(1 - 0.28 / n), z the normal
    quantile (within 2 % of the mean of the maximum of n absolute values). A symmetric b-bit step is that over
    2^(b-1) - 1, an asymmetric one twice that over 2^b - 1, and rounding leaves step^2 / 12. Two matrices follow one another
    (up, down), so their errors add. A float of m mantissa bits leaves about 2^(-2m) / 36 per matrix.

    Args:
        form: the storage format.
        columns: inputs of a matrix, the group when the format has none of its own.
    """
    if form.name in MANTISSA:
        return float(2 * 2.0 ** (-2 * MANTISSA[form.name]) / 36)
    group = min(form.group or columns, columns)
    peak_squared = max(float(ndtri(1 - 0.28 / group)), 0.6) ** 2
    steps = 2 ** (form.bits - 1) - 1 if form.symmetric else (2**form.bits - 1) / 2
    return float(2 * peak_squared / (12 * steps**2))


def default_precisions(profile: Profile) -> tuple[str, ...]:
    """Formats that slots may have when none are named: the 16-bit one, and those whose error the profile measured."""
    return (sixteen_bit(profile.model).name, *(profile.output_error or DEFAULT_PRECISIONS))


def make_budget(profile: Profile, units: int, names: Sequence[str], fraction: float, reference: str | None = None) -> Budget:
    """Sizes and predicted errors of all choices for a profile's model.

    Errors are the profile's measured `output_error` where it has them, else `assumed_error` shared among experts by
    their part of the gate mass (or of the load when no gate mass was recorded). An expert that was never seen is
    treated as if seen once, so that it is not thought free to damage. Experts whose measured sensitivity is higher weigh
    more; the mean over layers of what a unit of error weighs there is 1.

    Args:
        profile: loads, and measured errors and sensitivity when it has them.
        units: U.
        names: formats that slots may have.
        fraction: of the original experts' bytes that the plan may use.
        reference: format in which the original experts are counted; the model's own, at most 16 bits, when omitted.

    Raises:
        PlanError: no format given, a fraction out of range, or a model whose experts' sizes are not known.
        UnreachableError: not even the smallest format of every expert fits.
    """
    if not names:
        raise PlanError("precisions: none given; allowed are fp16, bf16, int8, int4-gN; give at least one.")
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 64:
        raise PlanError(f"bytes_fraction: {fraction!r} given; allowed is above 0, at most 64; 1.0 keeps the memory as it was.")
    model = profile.model
    if not model.sized:
        raise PlanError(
            f"this profile of '{model.name}' does not know the sizes of its experts, which choosing bits needs; read the "
            "records again with the model's config.json (--config), or plan with a method that only places (robust, eplb)."
        )
    forms = sorted({precision(name) for name in names}, key=lambda p: (-model.layers[0].expert_bytes(p), p.name))
    bytes_LQ = np.array([[layer.expert_bytes(p) for p in forms] for layer in model.layers], np.int64)
    errors, measured = zip(*(_error(profile, form) for form in forms), strict=True)
    capacity = unit_capacity(model, units, fraction, precision(reference) if reference else None)
    weight_LE, nats = _weights(profile, errors[-1])
    weighted = weight_LE[:, :, None] * np.stack(errors, -1)
    budget = Budget(tuple(forms), bytes_LQ, weighted, tuple(measured), units, capacity, nats)
    least = int((profile.widths * bytes_LQ.min(1)).sum())
    if least > budget.total_bytes:
        smallest = min(forms, key=lambda p: model.layers[0].expert_bytes(p)).name
        raise UnreachableError(
            f"bytes_fraction: {fraction} allows {budget.total_bytes} bytes, but one copy of every expert in {smallest} "
            f"needs {least}; allow more bytes or formats with fewer bits."
        )
    return budget


def _weights(profile: Profile, error_LE: Floats) -> tuple[Floats, float]:
    """[L, E] weight of each expert's error, and the nats of KL divergence that a weighted error of 1 stands for.

    Args:
        profile: with sensitivity or without.
        error_LE: how a layer's error is spread over its experts.
    """
    nats_LE = profile.sensitivity
    if not nats_LE.size or not nats_LE.sum() > 0:
        return np.ones(error_LE.shape), math.nan
    nats_L = (nats_LE * error_LE).sum(1) / np.maximum(error_LE.sum(1), 1e-300)
    return nats_LE / nats_L.mean(), float(nats_L.mean())


def _error(profile: Profile, form: Precision) -> tuple[Floats, bool]:
    """[L, E] error of one format, and whether it was measured (or is known from the format)."""
    load = profile.load.astype(np.float64)
    if form.name == profile.model.dtype:
        return np.zeros_like(load), True
    assumed = _assumed(profile, form, load)
    if form.name not in profile.output_error:
        return assumed, form.is_float
    with np.errstate(divide="ignore", invalid="ignore"):
        error = profile.relative_error(form.name)
    # One token's worth of the layer's mean error for everybody: an expert that was not seen is not free of error.
    error = error + error.sum(1, keepdims=True) / np.maximum(load.sum(1, keepdims=True), 1.0)
    # A layer that served nothing has nothing measured either.
    return np.asarray(np.where(np.isfinite(error).all(1, keepdims=True), error, assumed)), True


def _assumed(profile: Profile, form: Precision, load: Floats) -> Floats:
    """[L, E] error of one format from its bits, shared among experts by gate mass, or by load where none was recorded."""
    mass = profile.gate_mass.sum(0)
    weight = np.where(mass.sum(1, keepdims=True) > 0, mass, load)
    total = weight.sum(1, keepdims=True)
    weight = weight + np.where(total > 0, total / np.maximum(load.sum(1, keepdims=True), 1.0), 1.0)
    weight = np.where(np.arange(load.shape[1]) < profile.widths[:, None], weight, 0.0)
    of_layer = np.array([assumed_error(form, layer.matrices[0][1]) for layer in profile.model.layers])
    return np.asarray(of_layer[:, None] * weight / weight.sum(1, keepdims=True))
