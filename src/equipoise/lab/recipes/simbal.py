"""SimBal: routers with orthonormal rows, so that like tokens go to like experts; balance is hoped for, not asked for.

For making models whose experts resemble each other little (measured by `evaluation.similarity`). arXiv:2506.14038:
loss = coefficient * || W W^T - I ||_1, entry by entry, W the E x D router matrix; coefficient 0.1; routers start orthonormal.
The terms of all layers are added up. It depends on weights alone: no data, no batch size.

Two controls part what the loss does (neither is the paper's):

    scale    the diagonal alone, |(W W^T)_ii - 1|: rows of unit length, at any angle
    unit     the rows are scaled to length 1 first: right angles, at any length

Shapes: E experts, D model width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from equipoise.lab.extensions import EXTENSIONS, Extension, Step
from equipoise.lab.recipe import RecipeError
from equipoise.lab.recipes.routers import routers
from equipoise.models.layers import find_moe_layers

Form = Literal["gram", "scale", "unit"]
FORMS = ("gram", "scale", "unit")


def orthogonality_loss(weight_ED: Tensor, form: Form = "gram") -> Tensor:
    """Distance of a router's rows from an orthonormal set: the sum of |W W^T - I|.

    Args:
        weight_ED: [E, D] router matrix, E <= D.
        form: "gram" (the paper's), "scale" (row lengths alone) or "unit" (angles alone).
    """
    weight_ED = weight_ED.to(torch.promote_types(weight_ED.dtype, torch.float32))
    if form == "scale":
        return (weight_ED.square().sum(1) - 1).abs().sum()
    if form == "unit":
        weight_ED = torch.nn.functional.normalize(weight_ED, dim=1)
    gram_EE = weight_ED @ weight_ED.T
    return (gram_EE - torch.eye(len(gram_EE), dtype=gram_EE.dtype, device=gram_EE.device)).abs().sum()


@EXTENSIONS.register(
    "simbal",
    summary="loss that keeps router rows orthonormal, from an orthonormal start: like tokens to like experts",
    source="SimBal (arXiv:2506.14038)",
)
class SimBal(Extension):
    """Adds the orthogonality loss of every router.

    Args:
        coefficient: of the loss; 0 leaves the orthonormal start alone.
        form: "gram", or one of the controls "scale" and "unit".
        orthogonal_start: routers start orthonormal.
    """

    def __init__(self, coefficient: float = 0.1, form: Form = "gram", orthogonal_start: bool = True) -> None:
        if form not in FORMS:
            raise RecipeError(f"simbal: unknown form '{form}'; known: {', '.join(FORMS)}.")
        self.coefficient, self.form, self.orthogonal_start = coefficient, form, orthogonal_start

    def attach(self, model: Any) -> None:
        """Find the routers' matrices and start them orthonormal.

        Raises:
            RecipeError: more experts than the model is wide; no such set of rows exists.
        """
        self._weights: list[Tensor] = [router.weight for layer in find_moe_layers(model) for router in routers(layer)]
        experts, width = self._weights[0].shape
        if experts > width:
            raise RecipeError(
                f"simbal: {experts} experts in a model of width {width}; at most {width} rows can be orthonormal."
            )
        if self.orthogonal_start:
            for weight in self._weights:
                torch.nn.init.orthogonal_(weight)

    def loss(self, step: Step) -> Tensor | None:
        """The term of this step."""
        if not self.coefficient:
            return None
        return self.coefficient * torch.stack([orthogonality_loss(weight, self.form) for weight in self._weights]).sum()
