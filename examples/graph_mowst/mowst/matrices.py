"""Products with matrices that never change: a graph's features and its propagation.

Shapes: N nodes, D features, H any width.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor


class FixedMatrix:
    """A sparse matrix that is not trained, and its transpose, so that a product's gradient is one sparse product too.

    Autograd through torch's own sparse product transposes the matrix at every step and is several times slower.
    """

    def __init__(self, matrix: Tensor) -> None:
        """Keep a matrix.

        Args:
            matrix: [N, D], dense or sparse in any layout.
        """
        coordinates = matrix if matrix.layout == torch.sparse_coo else matrix.to_sparse_coo()
        coordinates = coordinates.coalesce()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(Sparse CSR|invariant checks).*")
            self.matrix_ND = coordinates.to_sparse_csr()
            self.transposed_DN = coordinates.t().coalesce().to_sparse_csr()

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self.matrix_ND.shape
        return rows, columns

    def __matmul__(self, dense_DH: Tensor) -> Tensor:
        """[N, H] product with a dense [D, H]; differentiable in the dense one."""
        product: Tensor = _Product.apply(dense_DH, self)
        return product


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dense_DH: Tensor, matrix: FixedMatrix) -> Tensor:
        ctx.matrix = matrix
        return matrix.matrix_ND @ dense_DH

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.matrix.transposed_DN @ gradients[0], None
