"""The orthogonality loss is zero where it should be, has the gradient of its formula, and its controls see only their part."""

from __future__ import annotations

import pytest
import torch

from equipoise.errors import EquipoiseError
from equipoise.lab.extensions import Step
from equipoise.lab.recipes.simbal import SimBal, orthogonality_loss


def orthonormal(rows=6, width=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, rows, generator=generator, dtype=torch.float64)).Q.T


def test_the_formula_by_hand():
    """arXiv:2506.14038: sum of |W W^T - I| over all entries."""
    weight = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    assert orthogonality_loss(weight) == 3 + 2 + 2 + 1
    assert orthogonality_loss(weight, "scale") == 3 + 1
    torch.testing.assert_close(orthogonality_loss(weight, "unit"), torch.tensor(2 / 2**0.5))


def test_it_is_zero_for_orthonormal_rows_and_the_controls_see_their_part_alone():
    rows = orthonormal()
    assert orthogonality_loss(rows) < 1e-12
    assert orthogonality_loss(3 * rows, "unit") < 1e-12 < 1 < orthogonality_loss(3 * rows)
    same = torch.ones(6, 10, dtype=torch.float64) / 10**0.5
    assert orthogonality_loss(same, "scale") < 1e-12 < 1 < orthogonality_loss(same)


@pytest.mark.parametrize("form", ["gram", "scale", "unit"])
def test_its_gradient_is_that_of_finite_differences(form):
    weight = torch.randn(4, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: orthogonality_loss(w, form), (weight,), eps=1e-6, atol=1e-6)


def test_an_optimizer_on_it_alone_reaches_orthonormal_rows():
    weight = torch.nn.Parameter(0.02 * torch.randn(8, 32, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.Adam([weight], lr=1e-2)
    for step in range(1200):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 1200)
        optimizer.zero_grad()
        orthogonality_loss(weight).backward()
        optimizer.step()
    assert (weight @ weight.T - torch.eye(8)).abs().max() < 1e-2


def test_what_a_usual_start_costs():
    weight = 0.02 * torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    assert float(orthogonality_loss(weight)) == pytest.approx(34, abs=1.5)


def test_the_extension_starts_orthonormal_and_adds_the_loss_of_every_router(tiny):
    model = tiny("qwen3_moe")
    extension = SimBal(0.1)
    extension.attach(model)
    gates = [p for name, p in model.named_parameters() if name.endswith("gate.weight")]
    assert len(gates) == 2
    assert all(torch.allclose(w @ w.T, torch.eye(8), atol=1e-5) for w in gates)
    with torch.no_grad():
        for number, gate in enumerate(gates):
            gate.mul_(2 + number)
    expected = 0.1 * sum(orthogonality_loss(gate) for gate in gates)
    torch.testing.assert_close(extension.loss(Step(0, model, None, None)), expected)
    assert SimBal(0.0).loss(Step(0, model, None, None)) is None


def test_more_experts_than_width_and_unknown_forms_are_refused(tiny):
    with pytest.raises(EquipoiseError, match="width 4"):
        SimBal().attach(tiny("qwen3_moe", hidden_size=4, num_attention_heads=2, head_dim=4))
    with pytest.raises(EquipoiseError, match="gram, scale, unit"):
        SimBal(form="qr")
