"""Hessians of calibration: the weighted second moments of a matrix's inputs, and their factors.

The error of rounding W to Q on tokens x_t with weights c_t is sum_t c_t ||(W - Q) x_t||^2 = tr((W - Q) H (W - Q)^T) with
H = sum_t c_t x_t x_t^T. With c = 1 that is GPTQ's objective (arXiv:2210.17323), with c the gate weight that of affinity-guided
quantization (MoEQuant, arXiv:2505.03804, eq. 18-19); a token's squared output error carries the gate squared.

Shapes: N tokens, C columns of the matrix = elements of an input; any leading axes of matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from equipoise.errors import EquipoiseError

DAMP = 0.01
"""Part of the mean of a Hessian's diagonal that is added to it (GPTQ, section 3.3)."""
TOKENS_AT_ONCE = 4096
"""Rows that are scaled at once, so that no second copy of all inputs is held."""
STEPS = 12
"""Times that damping is raised tenfold before a matrix is given up; the last is far above any rounding error."""


@dataclass(frozen=True, eq=False, slots=True)
class Factor:
    """H + damping * 1 = M diag(pivots) M^T with M upper triangular, ones on its diagonal.

    Attributes:
        transposed: M^T [..., C, C], lower triangular.
        pivots: [..., C], positive: what an error in a column costs once the columns after it have made up for it.
        damping: [...] what was added to the diagonal.
    """

    transposed: Tensor
    pivots: Tensor
    damping: Tensor


def gate_weights(gates_N: Tensor, power: int) -> Tensor:
    """Weights of an expert's tokens from its gates, 1 on average.

    Args:
        gates_N: gate weights of the tokens.
        power: 0 counts all tokens alike; 1 weighs by the gate (MoEQuant); 2 by its square, as the squared output error does.

    Returns:
        [N] float32; exactly 1 where all gates are equal, whatever they are.
    """
    if power == 0 or not gates_N.numel():
        return torch.ones(gates_N.shape, device=gates_N.device)
    # Through the largest gate first: its ratio to itself is exactly one, and so is the mean of ones.
    largest = gates_N.double().abs().amax()
    if largest == 0:
        return torch.ones(gates_N.shape, device=gates_N.device)
    weight = (gates_N.double().abs() / largest) ** power
    return (weight / weight.mean()).float()


def second_moment(x_NC: Tensor, weights_N: Tensor | None = None, other_NC: Tensor | None = None) -> Tensor:
    """H = sum_t c_t x_t x_t^T, or sum_t c_t x_t y_t^T.

    Args:
        x_NC: inputs of a matrix, any float type.
        weights_N: c of each; 1 when omitted.
        other_NC: y; x itself when omitted.

    Returns:
        [C, C] float32, symmetric without y; zero for no tokens.
    """
    total = torch.zeros(x_NC.shape[-1], x_NC.shape[-1], device=x_NC.device)
    for start in range(0, len(x_NC), TOKENS_AT_ONCE):
        stop = start + TOKENS_AT_ONCE
        # The root of the weight on either side, so that one scaled copy is both.
        root = None if weights_N is None else weights_N[start:stop, None].sqrt()
        left = _scaled(x_NC[start:stop], root)
        total.addmm_(left.T, left if other_NC is None else _scaled(other_NC[start:stop], root))
    return total


def refitted(weight: Tensor, cross: Tensor, hessian: Tensor, damp: float) -> Tensor:
    """Weights that make up for a change of their inputs, by least squares.

    The W' that minimizes sum_t c_t ||W x_t - W' y_t||^2 + damping ||W - W'||^2 is W (C + damping) (H + damping)^-1 with
    C = sum_t c_t x_t y_t^T and H = sum_t c_t y_t y_t^T. (GPTAQ, arXiv:2504.02692, has the same objective for rounding.)

    Args:
        weight: W [R, C].
        cross: C [C, C], from the inputs as they were and as they are.
        hessian: H [C, C], of the inputs as they are.
        damp: damping, as a part of the mean of H's diagonal.

    Returns:
        [R, C] float32; the weights themselves where no input was seen.
    """
    damping = damp * hessian.diagonal().mean()
    left, failed = torch.linalg.cholesky_ex(_on_diagonal(hessian, damping))
    if failed or not damping > 0:
        return weight
    return torch.cholesky_solve((weight @ _on_diagonal(cross, damping)).T, left).T


def factor(hessian: Tensor, damp: float) -> Factor:
    """Decompose damped Hessians, raising the damping of those that are not positive definite in float32.

    Args:
        hessian: [..., C, C] symmetric, positive semi-definite.
        damp: part of the mean of the diagonal that is added to it; 0.01 is customary.

    Returns:
        the factors. A Hessian of zeros, from no tokens at all, becomes the identity: rounding to nearest.

    Raises:
        EquipoiseError: a Hessian is not finite, or cannot be made positive definite.
    """
    if damp < 0:
        raise EquipoiseError(f"damp is {damp}; it must not be negative. 0.01 is customary.")
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)
    if not torch.isfinite(mean).all():
        raise EquipoiseError("calibration met inputs of an expert that are NaN or infinite; check the model and its dtype.")
    mean = torch.where(mean > 0, mean, 1.0)
    unseen = hessian.diagonal(dim1=-2, dim2=-1).amax(-1) == 0
    damping = torch.where(unseen, mean, damp * mean)
    # The columns are eliminated from the last to the first: what is left of the first is what all others cannot make up for.
    backwards = hessian.flip(-2, -1)
    for _ in range(STEPS):
        lower, failed = torch.linalg.cholesky_ex(_on_diagonal(backwards, damping))
        if not failed.any():
            break
        damping = torch.where(failed > 0, torch.maximum(damping * 10, 1e-6 * mean), damping)
    else:
        raise EquipoiseError("a Hessian of calibration cannot be factored at any damping; check the model's weights and dtype.")
    upper = lower.flip(-2, -1)
    diagonal = upper.diagonal(dim1=-2, dim2=-1)
    return Factor((upper / diagonal.unsqueeze(-2)).transpose(-2, -1).contiguous(), diagonal.square(), damping)


def quadratic_loss(error: Tensor, hessian: Tensor) -> Tensor:
    """(W - Q) H (W - Q)^T row by row.

    Args:
        error: W - Q [..., R, C].
        hessian: [..., C, C].

    Returns:
        [..., R] the calibration objective of each row.
    """
    return ((error @ hessian) * error).sum(-1)


def _scaled(x_NC: Tensor, root_N1: Tensor | None) -> Tensor:
    return x_NC.float() if root_N1 is None else x_NC.float() * root_N1


def _on_diagonal(hessian: Tensor, value: Tensor) -> Tensor:
    damped = hessian.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(value.unsqueeze(-1))
    return damped
