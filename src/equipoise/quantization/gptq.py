"""GPTQ (arXiv:2210.17323): columns are rounded one after the other, and those not rounded yet make up for the errors so far.

With the factor H + damping = M diag(p) M^T (`hessian.factor`; M upper triangular, unit diagonal), the objective of a row is

    (w - q) (H + damping) (w - q)^T = sum_k p_k (t_k - q_k)^2,    t_k = w_k + sum_{j<k} (w_j - q_j) M_jk

so that each q_k is best as the point of the grid nearest to t_k. That is GPTQ's rule without the inverse of H (the two are
equal: QuIP, arXiv:2307.13304, theorem 6), and needs one Cholesky decomposition in place of two and an inverse. The pivots p
say what an error in each column costs once later columns have made up for it, so the search of the grids weighs with them.

What is left to gain with the grids as they are, a sweep over the columns takes: each code becomes the best one given all
others, so that the objective never rises (cyclic coordinate descent, as in QuantEase, arXiv:2309.01885).

All matrices of a batch and all their rows go through the columns together, in blocks: what other blocks contribute is one
matrix product, so that only the columns of a block are a loop.

Shapes: B matrices of a batch, R rows, C columns, N columns of a block. Weights lie transposed, so that a column is contiguous.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from equipoise.errors import EquipoiseError
from equipoise.precisions import Precision
from equipoise.quantization.hessian import DAMP, Factor, factor
from equipoise.quantization.rtn import Grid, Rounded, grids, nearest, on_grid, rtn

BLOCK = 128
SWEEPS = 1
"""One takes most of what sweeps gain."""
ORDERS = ("activation", "natural")


def gptq(
    weight: Tensor,
    precision: Precision,
    hessian: Tensor | None = None,
    *,
    damp: float = DAMP,
    order: str = "activation",
    search: bool = True,
    sweeps: int = SWEEPS,
) -> Rounded:
    """Round so that the outputs on the calibration tokens change least.

    No row is worse than rounded to nearest on tr((W - Q) H (W - Q)^T): a row that would be is rounded to nearest. Columns
    that no token has used have nothing to make up for, and are rounded to nearest too.

    Args:
        weight: [..., R, C] finite weights of any float type.
        precision: any quantized format.
        hessian: [..., C, C] second moments of the inputs (`hessian.second_moment`).
        damp: part of the mean of the Hessian's diagonal that is added to it.
        order: "activation" rounds the columns of the largest energy first, "natural" as they stand; grids are chosen before
            the first column either way, so that groups stay groups of neighbours.
        search: look for the grids with the least error; otherwise take those that hold every weight.
        sweeps: passes of coordinate descent after the last column.

    Raises:
        EquipoiseError: no Hessian, one of another shape or not finite, or an unknown order.
    """
    lead, (rows, columns) = weight.shape[:-2], weight.shape[-2:]
    if hessian is None or hessian.shape != (*lead, columns, columns):
        given = "none" if hessian is None else f"one of shape {list(hessian.shape)}"
        raise EquipoiseError(f"gptq needs a Hessian of shape {[*lead, columns, columns]} for these weights, but got {given}.")
    if order not in ORDERS:
        raise EquipoiseError(f"order of columns is '{order}'; allowed: {', '.join(ORDERS)}.")
    weight_BRC = weight.float().reshape(-1, rows, columns)
    hessian_BCC = hessian.float().reshape(-1, columns, columns)
    mean_B = hessian_BCC.diagonal(dim1=-2, dim2=-1).mean(-1)
    at_BC = _order(hessian_BCC, order)
    hessian_BCC = _permuted(hessian_BCC, at_BC)
    factors = factor(hessian_BCC, damp)
    pivots_BC = torch.empty_like(factors.pivots).scatter_(1, at_BC, factors.pivots)
    grid = grids(weight_BRC, precision, search=search, importance=pivots_BC)
    weight_BCR, grid_BCR = _columns(weight_BRC, at_BC), _each_column(grid, at_BC, precision)
    code_BCR, error_BCR, loss_BR = _feed_back(weight_BCR, grid_BCR, factors, precision)
    for _ in range(sweeps):
        loss_BR += _sweep(code_BCR, error_BCR, weight_BCR, grid_BCR, hessian_BCC, factors.damping, precision)
    plain = rtn(weight_BRC, precision)
    plain_error_BCR = weight_BCR.sub_(_columns(plain.values(precision), at_BC))
    worse_BR = _undamped(loss_BR, error_BCR, factors) > _undamped(_losses(plain_error_BCR, factors), plain_error_BCR, factors)
    code_BRC = torch.empty_like(code_BCR).scatter_(1, at_BC[..., None].expand_as(code_BCR), code_BCR).transpose(1, 2)
    rounded = Rounded.of(code_BRC, grid, precision)
    damping_B = torch.where(mean_B > 0, factors.damping / mean_B, 1.0)
    chosen = replace(rounded.replaced(worse_BR[..., None], plain), damping=damping_B)
    return chosen.mapped(lambda part: part.reshape((*lead, *part.shape[1:])))


def _order(hessian_BCC: Tensor, order: str) -> Tensor:
    """[B, C] the column that is rounded first, second, and so on."""
    energy_BC = hessian_BCC.diagonal(dim1=-2, dim2=-1)
    if order == "activation":
        return energy_BC.argsort(dim=-1, descending=True, stable=True)
    return torch.arange(energy_BC.shape[1], device=energy_BC.device).expand_as(energy_BC)


def _permuted(hessian_BCC: Tensor, at_BC: Tensor) -> Tensor:
    rows_BCC = hessian_BCC.gather(1, at_BC[..., None].expand_as(hessian_BCC))
    return rows_BCC.gather(2, at_BC[:, None].expand_as(hessian_BCC))


def _columns(matrix_BRC: Tensor, at_BC: Tensor) -> Tensor:
    """[B, C, R] the columns of matrices, in order."""
    matrix_BCR = matrix_BRC.transpose(1, 2)
    return matrix_BCR.gather(1, at_BC[..., None].expand_as(matrix_BCR))


def _each_column(grid: Grid, at_BC: Tensor, precision: Precision) -> Grid:
    """Grids [B, R, G] of groups as grids [B, C, R] of ordered columns; [B, 1, R] where one serves a whole row."""
    if grid.scale.shape[-1] == 1:
        return grid.mapped(lambda part: part.transpose(1, 2))
    return grid.spread(at_BC.shape[1], precision).mapped(lambda part: _columns(part, at_BC))


def _feed_back(weight_BCR: Tensor, grid: Grid, factors: Factor, precision: Precision) -> tuple[Tensor, Tensor, Tensor]:
    """Round columns, each where the errors before it have moved it.

    Returns:
        codes [B, C, R], errors w - q [B, C, R], and the damped objective of each row [B, R].
    """
    code_BCR, error_BCR = torch.empty_like(weight_BCR), torch.empty_like(weight_BCR)
    loss_B1R = torch.zeros_like(weight_BCR[:, :1])
    for start in range(0, weight_BCR.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        lower_BNN, error_BNR = factors.transposed[:, block, block], error_BCR[:, block]
        target_BNR = torch.baddbmm(weight_BCR[:, block], factors.transposed[:, block, :start], error_BCR[:, :start])
        for i in range(target_BNR.shape[1]):
            k = slice(start + i, start + i + 1)
            target_B1R = torch.baddbmm(target_BNR[:, i : i + 1], lower_BNN[:, i : i + 1, :i], error_BNR[:, :i])
            own = grid.column(k)
            code_B1R = nearest(target_B1R, own, precision)
            rounded_B1R = on_grid(code_B1R, own)
            code_BCR[:, k] = code_B1R
            error_BCR[:, k] = weight_BCR[:, k] - rounded_B1R
            loss_B1R.add_(target_B1R.sub_(rounded_B1R).square_().mul_(factors.pivots[:, k, None]))
    return code_BCR, error_BCR, loss_B1R.squeeze(1)


def _sweep(
    code_BCR: Tensor,
    error_BCR: Tensor,
    weight_BCR: Tensor,
    grid: Grid,
    hessian_BCC: Tensor,
    damping_B: Tensor,
    precision: Precision,
) -> Tensor:
    """Make each code, in place, the best one given all others.

    Returns:
        [B, R] what that adds to the damped objective of each row; never more than rounding errors.
    """
    gain_B1R = torch.zeros_like(weight_BCR[:, :1])
    diagonal_BC1 = (hessian_BCC.diagonal(dim1=-2, dim2=-1) + damping_B[:, None])[..., None]
    for start in range(0, weight_BCR.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        inner_BNN, error_BNR = hessian_BCC[:, block, block], error_BCR[:, block]
        slope_BNR = (hessian_BCC[:, block] @ error_BCR).add_(damping_B[:, None, None] * error_BNR)
        change_BNR = torch.empty_like(slope_BNR)
        for i in range(slope_BNR.shape[1]):
            k = slice(start + i, start + i + 1)
            slope_B1R = torch.baddbmm(slope_BNR[:, i : i + 1], inner_BNN[:, i : i + 1, :i], change_BNR[:, :i])
            own = grid.column(k)
            # Where the error of this column would be best, given the others.
            best_B1R = error_BCR[:, k] - slope_B1R / diagonal_BC1[:, k]
            code_B1R = nearest(weight_BCR[:, k] - best_B1R, own, precision)
            error_B1R = weight_BCR[:, k] - on_grid(code_B1R, own)
            gain_B1R += diagonal_BC1[:, k] * ((error_B1R - best_B1R).square() - (error_BCR[:, k] - best_B1R).square())
            change_BNR[:, i : i + 1] = error_B1R - error_BCR[:, k]
            code_BCR[:, k], error_BCR[:, k] = code_B1R, error_B1R
    return gain_B1R.squeeze(1)


def _losses(error_BCR: Tensor, factors: Factor) -> Tensor:
    """[B, R] the damped objective of each row for given errors."""
    loss_BR = torch.zeros_like(error_BCR[:, 0])
    for start in range(0, error_BCR.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        part_BNR = factors.transposed[:, block, : block.stop] @ error_BCR[:, : block.stop]
        loss_BR += (part_BNR.square_() * factors.pivots[:, block, None]).sum(1)
    return loss_BR


def _undamped(loss_BR: Tensor, error_BCR: Tensor, factors: Factor) -> Tensor:
    """[B, R] the objective itself, from the damped one."""
    return loss_BR - factors.damping[:, None] * torch.linalg.vector_norm(error_BCR, dim=1).square()
