"""Rounding each weight on its own: the grid of a group of weights, the nearest code on it, and the search for a better grid.

A grid is a scale and, in asymmetric formats, a zero point: code c stands for (c - zero) * scale. Scales are rounded to
bf16, as they are stored, before any code is chosen, so that codes make up for their rounding.

Shapes: R rows, C columns, G groups of columns, N columns of one group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from equipoise.precisions import Precision
from equipoise.quantization.codes import FP8, code_range, group_columns, largest_code, spread_scales

SHRINKS = {2: 16, 3: 12, 4: 10, 8: 6}
"""Sizes of the grid that the clip search tries, by bits."""
SMALLEST = {2: 0.3, 3: 0.5, 4: 0.65, 8: 0.9}
"""The smallest of them, as a part of the grid that holds every weight."""


@dataclass(frozen=True, eq=False, slots=True)
class Grid:
    """Grids of many groups: `scale` [...], float32 that bf16 holds exactly, and `zero` [...] or None."""

    scale: Tensor
    zero: Tensor | None = None

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Grid:
        """The same change to scales and zero points."""
        return Grid(change(self.scale), None if self.zero is None else change(self.zero))

    def column(self, which: slice) -> Grid:
        """Of grids [B, C, R], those of some columns; of [B, 1, R], the one that serves all."""
        if self.scale.shape[1] == 1:
            return self
        return Grid(self.scale[:, which], None if self.zero is None else self.zero[:, which])

    def spread(self, columns: int, precision: Precision) -> Grid:
        """Grids [..., R, G] of groups as grids [..., R, C] of single weights."""
        return self.mapped(lambda part: spread_scales(part, columns, precision))


@dataclass(frozen=True, eq=False, slots=True)
class Rounded:
    """Matrices as codes, not packed yet.

    Attributes:
        codes: int8 [..., R, C]; float8_e4m3fn for fp8.
        scales: bf16 [..., R, G].
        zeros: int8 [..., R, G]; None in symmetric formats.
        damping: [...] what was added to the diagonal of each Hessian, as a part of its mean; None where none was factored.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    damping: Tensor | None = None

    @classmethod
    def of(cls, codes: Tensor, grid: Grid, precision: Precision) -> Rounded:
        """Codes [..., R, C] in float32 and their grids [..., R, G], in the types in which they are stored."""
        zeros = None if grid.zero is None else grid.zero.to(torch.int8)
        return cls(codes.to(FP8 if precision.is_fp8 else torch.int8), grid.scale.to(torch.bfloat16), zeros)

    def replaced(self, where: Tensor, other: Rounded) -> Rounded:
        """Rows of another rounding to the same format, where `where` [..., R, 1] is true; the others as here."""

        def choose(mine: Tensor, others: Tensor) -> Tensor:
            return torch.where(where, others.float(), mine.float()).to(mine.dtype)  # float8 knows no `where`

        zeros = None if self.zeros is None or other.zeros is None else choose(self.zeros, other.zeros)
        return replace(self, codes=choose(self.codes, other.codes), scales=choose(self.scales, other.scales), zeros=zeros)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Rounded:
        """The same change of the leading axes in all parts."""
        parts = (self.codes, self.scales, self.zeros, self.damping)
        return Rounded(*(None if part is None else change(part) for part in parts))  # type: ignore[arg-type]

    def at(self, index: int) -> Rounded:
        """One matrix of the first axis."""
        return self.mapped(lambda part: part[index])

    def values(self, precision: Precision) -> Tensor:
        """The matrices [..., R, C] that the codes stand for, in float32."""
        zero = None if self.zeros is None else self.zeros.float()
        return on_grid(self.codes.float(), Grid(self.scales.float(), zero).spread(self.codes.shape[-1], precision))


def nearest(weight: Tensor, grid: Grid, precision: Precision) -> Tensor:
    """The codes of the points nearest to weights, in float32.

    Args:
        weight: [...] float32.
        grid: of each weight, broadcastable to it.
        precision: a quantized format.
    """
    # A scale of zero stands for a group of zeros; its inverse must not make NaN of them.
    code = weight * torch.where(grid.scale != 0, grid.scale, torch.inf).reciprocal()
    if precision.is_fp8:
        top = largest_code(precision)
        return code.clamp_(-top, top).to(FP8).float()
    low, high = code_range(precision)
    if grid.zero is not None:
        code += grid.zero
    return code.round_().clamp_(low, high)


def on_grid(code: Tensor, grid: Grid) -> Tensor:
    """The weights that codes stand for."""
    return (code if grid.zero is None else code - grid.zero) * grid.scale


def widest_grid(group: Tensor, precision: Precision) -> Grid:
    """The grid that holds every weight of a group, from its largest magnitude or from its two ends and zero.

    Args:
        group: [..., N] float32.
        precision: a quantized format.

    Returns:
        grids [...].
    """
    if precision.symmetric:
        return Grid(_stored(group.abs().amax(-1) / largest_code(precision)))
    return _between(group.amin(-1).clamp_max(0), group.amax(-1).clamp_min(0), precision)


def searched_grid(group: Tensor, precision: Precision, importance: Tensor | None = None) -> Grid:
    """The grid with the smallest sum of importance times squared rounding error, among several that clip the largest weights.

    Symmetric integer formats have one code more below zero than above; scales of both signs are tried, so that it can serve
    the longer tail of a group. The best grid's scale is fitted to its codes once more by least squares.

    Args:
        group: [..., N] float32.
        precision: a quantized format.
        importance: of each weight, >= 0, broadcastable to `group`; all alike when omitted.

    Returns:
        grids [...].
    """
    best = widest_grid(group, precision)
    code = nearest(group, _column(best), precision)
    least = _loss(group, code, _column(best), importance)
    for grid in _candidates(group, precision):
        tried = nearest(group, _column(grid), precision)
        best, code, least = _better(group, (best, code, least), (grid, tried), importance)
    points = code if best.zero is None else code - best.zero[..., None]
    weighted = points if importance is None else points * importance
    energy = (weighted * points).sum(-1)
    fitted = Grid(_stored(torch.where(energy > 0, (weighted * group).sum(-1) / energy, best.scale)), best.zero)
    return _better(group, (best, code, least), (fitted, nearest(group, _column(fitted), precision)), importance)[0]


def grids(weight: Tensor, precision: Precision, *, search: bool = False, importance: Tensor | None = None) -> Grid:
    """Grids of all groups of matrices.

    Args:
        weight: [..., R, C] float32.
        precision: a quantized format.
        search: look for the grid with the least error, instead of the one that holds every weight.
        importance: [..., C] of each column, for the search.

    Returns:
        grids [..., R, G].
    """
    group = _grouped(weight, precision)
    if not search:
        return widest_grid(group, precision)
    return searched_grid(group, precision, None if importance is None else _grouped(importance, precision).unsqueeze(-3))


def rtn(weight: Tensor, precision: Precision, hessian: Tensor | None = None, *, damp: float = 0.0) -> Rounded:
    """Round to nearest, on grids that hold every weight.

    Args:
        weight: [..., R, C] finite weights of any float type.
        precision: a quantized format.
        hessian: not used.
        damp: not used.
    """
    weight = weight.float()
    grid = grids(weight, precision)
    return Rounded.of(nearest(weight, grid.spread(weight.shape[-1], precision), precision), grid, precision)


def rtn_clip(weight: Tensor, precision: Precision, hessian: Tensor | None = None, *, damp: float = 0.0) -> Rounded:
    """Round to nearest, on the grids that a search finds best.

    Args:
        weight: [..., R, C] finite weights of any float type.
        precision: a quantized format.
        hessian: [..., C, C]; its diagonal, the energy of each input, weighs the error of each column. All alike without it.
        damp: added to the diagonal, as a part of its mean, so that an input that was never seen still counts.
    """
    weight = weight.float()
    importance = None
    if hessian is not None:
        energy = hessian.diagonal(dim1=-2, dim2=-1).float()
        importance = energy + (damp * energy.mean(-1, keepdim=True)).clamp_min(torch.finfo(torch.float32).tiny)
    grid = grids(weight, precision, search=True, importance=importance)
    return Rounded.of(nearest(weight, grid.spread(weight.shape[-1], precision), precision), grid, precision)


def _grouped(weight: Tensor, precision: Precision) -> Tensor:
    """[..., C] as [..., G, N]; a last group that is shorter is filled with zeros, which cost nothing on any grid."""
    columns = weight.shape[-1]
    size = group_columns(columns, precision)
    return F.pad(weight, (0, -columns % size)).unflatten(-1, (-1, size))


def _candidates(group: Tensor, precision: Precision) -> list[Grid]:
    """Grids that leave out more and more of a group's largest weights."""
    bits = precision.bits
    parts = torch.linspace(1.0, SMALLEST[bits], SHRINKS[bits]).tolist()
    if not precision.symmetric:
        low, high = group.amin(-1).clamp_max(0), group.amax(-1).clamp_min(0)
        return [_between(low * part, high * part, precision) for part in parts[1:]]
    largest = group.abs().amax(-1)
    if precision.is_fp8:
        return [Grid(_stored(largest * part / largest_code(precision))) for part in parts[1:]]
    widest = largest / -code_range(precision)[0]
    return [Grid(_stored(widest * (sign * part))) for part in parts for sign in (1, -1)]


def _between(low: Tensor, high: Tensor, precision: Precision) -> Grid:
    """The asymmetric grid from `low` <= 0 to `high` >= 0; zero is one of its points."""
    first, last = code_range(precision)
    scale = _stored((high - low) / (last - first))
    zero = first - low * torch.where(scale > 0, scale, torch.inf).reciprocal()
    return Grid(scale, zero.round_().clamp_(first, last))


def _stored(scale: Tensor) -> Tensor:
    return scale.to(torch.bfloat16).float()


def _column(grid: Grid) -> Grid:
    """Grids [...] as grids [..., 1] of all weights of their groups."""
    return grid.mapped(lambda part: part.unsqueeze(-1))


def _loss(group: Tensor, code: Tensor, grid: Grid, importance: Tensor | None) -> Tensor:
    error = on_grid(code, grid).sub_(group).square_()
    return error.sum(-1) if importance is None else error.mul_(importance).sum(-1)


def _better(
    group: Tensor, best: tuple[Grid, Tensor, Tensor], tried: tuple[Grid, Tensor], importance: Tensor | None
) -> tuple[Grid, Tensor, Tensor]:
    """Group by group, the grid, codes and loss that are better."""
    (grid, code), loss = tried, _loss(group, tried[1], _column(tried[0]), importance)
    wins = loss < best[2]
    zero = None if grid.zero is None or best[0].zero is None else torch.where(wins, grid.zero, best[0].zero)
    chosen = Grid(torch.where(wins, grid.scale, best[0].scale), zero)
    return chosen, torch.where(wins[..., None], code, best[1]), torch.minimum(loss, best[2])
