"""The experts: an MLP that sees a node alone, and a GNN that sees its neighbourhood.

Shapes: N nodes, D features, H hidden width, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equipoise.errors import EquipoiseError
from mowst.graphs import Graph
from mowst.matrices import FixedMatrix


class Affine(nn.Module):
    """x W + b, where x is dense or a `FixedMatrix`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(inputs, outputs)))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor | FixedMatrix) -> Tensor:
        """[N, outputs]."""
        return x @ self.weight + self.bias


class Alone(nn.Module):
    """A layer of an MLP."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.own = Affine(inputs, outputs)

    def forward(self, x: Tensor | FixedMatrix, graph: Graph) -> Tensor:
        """[N, outputs]."""
        return self.own(x)


class GcnLayer(nn.Module):
    """Graph convolution: D^-1/2 (A + I) D^-1/2 x W + b. Source: Kipf and Welling (arXiv:1609.02907), equation 2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(inputs, outputs)))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor | FixedMatrix, graph: Graph) -> Tensor:
        """[N, outputs]."""
        return graph.normalized @ (x @ self.weight) + self.bias


class SageLayer(nn.Module):
    """GraphSAGE with the mean: x W_own + mean of neighbours' x W_neighbour + b. Source: arXiv:1706.02216, section 3.3.

    The linear map stands before the mean, which is the same and cheaper: features are wider than what they are mapped to.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.own = Affine(inputs, outputs)
        self.neighbour = nn.Parameter(nn.init.xavier_uniform_(torch.empty(inputs, outputs)))

    def forward(self, x: Tensor | FixedMatrix, graph: Graph) -> Tensor:
        """[N, outputs]."""
        return self.own(x) + graph.mean @ (x @ self.neighbour)


LAYERS: dict[str, type[nn.Module]] = {"mlp": Alone, "gcn": GcnLayer, "sage": SageLayer}


def dropped(x: Tensor, share: float) -> Tensor:
    """Dropout. On a CPU `F.dropout` takes three times as long, and more than the rest of a forward here.

    Args:
        x: of any shape.
        share: of values that become 0; the others grow, so that the expected value stays.
    """
    return x * (torch.rand_like(x) >= share) / (1 - share)


class Expert(nn.Module):
    """Two layers of one kind with batch normalization, ReLU and dropout between them."""

    def __init__(self, kind: str, graph: Graph, hidden: int, dropout: float) -> None:
        """Make an untrained expert.

        Args:
            kind: "mlp", "gcn" or "sage".
            graph: that it is for.
            hidden: width between the layers.
            dropout: share of hidden values that are dropped in training.

        Raises:
            EquipoiseError: there is no such kind.
        """
        super().__init__()
        if kind not in LAYERS:
            raise EquipoiseError(f"there is no expert '{kind}'; there are {', '.join(LAYERS)}.")
        self.first = LAYERS[kind](graph.features.shape[1], hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.second = LAYERS[kind](hidden, graph.classes)
        self.dropout = dropout

    def forward(self, graph: Graph) -> Tensor:
        """[N, C] logits."""
        hidden_NH = F.relu(self.norm(self.first(graph.features, graph)))
        if self.training:
            hidden_NH = dropped(hidden_NH, self.dropout)
        logits_NC: Tensor = self.second(hidden_NH, graph)
        return logits_NC


class WithSkip(nn.Module):
    """A GNN with an MLP beside it whose logits are added: Mowst's two experts without a gate."""

    def __init__(self, kind: str, graph: Graph, hidden: int, dropout: float) -> None:
        super().__init__()
        self.alone = Expert("mlp", graph, hidden, dropout)
        self.neighbours = Expert(kind, graph, hidden, dropout)

    def forward(self, graph: Graph) -> Tensor:
        """[N, C] logits."""
        return self.alone(graph) + self.neighbours(graph)
