"""What is known of the rounded experts of a layer: how many tokens spoke for each, and what rounding did to its output."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ExpertReport:
    """What is known of one rounded expert.

    Attributes:
        expert: its id.
        precision: the format it was rounded to.
        tokens: calibration tokens that it served.
        layer_part: part of its Hessians that is the layer's mean; 1 when it served no token at all.
        damping: added to the diagonals of its Hessians, as a part of their mean; the larger of the two.
        output_error: squared error of its gated output on a sample of its tokens, as a part of the squared output; None for
            an expert without tokens.
    """

    expert: int
    precision: str
    tokens: int
    layer_part: float
    damping: float
    output_error: float | None


@dataclass(frozen=True, slots=True)
class LayerReport:
    """What is known of the rounded experts of one layer.

    Attributes:
        path: module path of the experts.
        method: how they were rounded.
        tokens: calibration tokens of the layer.
        width: elements of an expert's input, the tokens that a Hessian of full rank takes at least.
        experts: one for each expert and precision, in the order in which they were asked for.
    """

    path: str
    method: str
    tokens: int
    width: int
    experts: tuple[ExpertReport, ...]

    @property
    def few(self) -> tuple[int, ...]:
        """Experts with fewer tokens than the elements of their input: their own Hessian cannot have full rank."""
        return tuple(dict.fromkeys(report.expert for report in self.experts if report.tokens < self.width))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        return {**asdict(self), "few": list(self.few)}
