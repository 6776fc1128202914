"""How weights are rounded to few bits: one registry, so that a better rounding is one more entry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from equipoise.precisions import Precision
from equipoise.quantization.gptq import gptq
from equipoise.quantization.rtn import Rounded, rtn, rtn_clip
from equipoise.registry import Registry

__all__ = ["METHODS", "Method", "Rounded", "Rounding"]


class Rounding(Protocol):
    """A function from weights to codes."""

    def __call__(self, weight: Tensor, precision: Precision, hessian: Tensor | None = None, *, damp: float = ...) -> Rounded:
        """Round weights [..., R, C] to a format, with the second moments [..., C, C] of their inputs where they are known."""
        ...


@dataclass(frozen=True, slots=True)
class Method:
    """A rounding method.

    Attributes:
        round: weights, format and Hessian -> codes and scales.
        needs_hessian: whether it cannot do without a Hessian.
        gate_power: power of the gate weight in that Hessian.
        reads_hessian: whether it makes use of one at all.
    """

    round: Rounding
    needs_hessian: bool = False
    gate_power: int = 0
    reads_hessian: bool = True

    def __call__(self, weight: Tensor, precision: Precision, hessian: Tensor | None = None) -> Rounded:
        """Round weights [..., R, C]."""
        return self.round(weight, precision, hessian)


METHODS: Registry[Method] = Registry("quantization method")

_GPTQ, _MOEQUANT = "GPTQ, arXiv:2210.17323", "MoEQuant, arXiv:2505.03804, eq. 18-19"

METHODS.register("rtn", summary="round each weight to the nearest code of its group's largest magnitude", source="Equipoise")(
    Method(rtn, reads_hessian=False)
)
METHODS.register("rtn-clip", summary="rtn with each group's scale chosen for the least squared error", source="Equipoise")(
    Method(rtn_clip)
)
METHODS.register("gptq", summary="round column by column, later columns making up for earlier ones' errors", source=_GPTQ)(
    Method(gptq, needs_hessian=True)
)
METHODS.register("agq", summary="gptq with each token weighted by its gate", source=_MOEQUANT)(
    Method(gptq, needs_hessian=True, gate_power=1)
)
METHODS.register("agq2", summary="gptq with each token weighted by its squared gate, as output error is", source="Equipoise")(
    Method(gptq, needs_hessian=True, gate_power=2)
)
