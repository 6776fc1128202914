from __future__ import annotations

import pytest
import torch

from equipoise.precisions import precision
from equipoise.quantization.hadamard import block_size, rotate
from equipoise.quantization.rtn import rtn


@pytest.mark.parametrize(("width", "block"), [(1, 1), (24, 8), (48, 16), (1408, 128), (4096, 128), (7, 1)])
def test_blocks_divide_the_width(width: int, block: int) -> None:
    assert block_size(width) == block
    assert width % block == 0


@pytest.mark.parametrize("width", [7, 24, 64, 384])
def test_a_rotation_keeps_norms_and_undoes_itself(width: int) -> None:
    x = torch.randn(5, 3, width, dtype=torch.float64)
    turned = rotate(x)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotate(turned), x)
    assert torch.equal(turned, x) == (block_size(width) == 1)


def test_rotated_weights_times_rotated_inputs_are_the_product() -> None:
    weight, x = torch.randn(9, 96, dtype=torch.float64), torch.randn(4, 96, dtype=torch.float64)
    torch.testing.assert_close(rotate(x) @ rotate(weight).T, x @ weight.T)


def test_outliers_are_spread() -> None:
    weight = torch.randn(16, 128)
    weight[:, 5] *= 30
    form = precision("int4-g128")
    plain = (rtn(weight, form).values(form) - weight).norm()
    turned = (rotate(rtn(rotate(weight), form).values(form)) - weight).norm()
    assert turned < 0.7 * plain
