"""The graphs: features, propagation, labels, ten splits each.

Cora and CiteSeer come through torch-geometric's `Planetoid`; Actor and Minesweeper from the repository of "A critical look at
the evaluation of GNNs under heterophily" (arXiv:2302.11640), from which torch-geometric takes its heterophilous graphs too.
Files that are already on the machine (`--data`) are used instead of a download.

Shapes: N nodes, D features.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch_geometric.data import Data, download_url
from torch_geometric.datasets import HeterophilousGraphDataset, Planetoid
from torch_geometric.nn.conv.gcn_conv import gcn_norm
from torch_geometric.transforms import NormalizeFeatures
from torch_geometric.utils import homophily, to_torch_coo_tensor, to_undirected

from equipoise.errors import EquipoiseError
from mowst.matrices import FixedMatrix

SPLITS = 10
SHARES = (0.48, 0.32, 0.20)
"""Train, validation and test shares of the random splits: those that the literature on heterophily uses for these graphs."""


@dataclass(frozen=True, eq=False)
class Split:
    """Node numbers of one split."""

    train: Tensor
    validation: Tensor
    test: Tensor


@dataclass(frozen=True, eq=False)
class Graph:
    """A graph whose nodes are to be classified.

    Attributes:
        name: for people and for file names.
        features: [N, D].
        normalized: [N, N] adjacency with self-loops, D^-1/2 (A + I) D^-1/2, as GCN propagates.
        mean: [N, N] adjacency whose rows sum to 1 (0 for a node without neighbours), as GraphSAGE propagates.
        labels_N: class of each node.
        splits: of the nodes; ten, except in tests.
        metric: "accuracy", or "auc" for two classes of unequal size.
        homophily: by measure, "edge" and "edge_insensitive" (0 when neighbours are no more alike than chance).
        edges: undirected ones.
    """

    name: str
    features: FixedMatrix
    normalized: FixedMatrix
    mean: FixedMatrix
    labels_N: Tensor
    splits: tuple[Split, ...]
    metric: str
    homophily: dict[str, float]
    edges: int

    @property
    def nodes(self) -> int:
        """How many nodes there are."""
        return len(self.labels_N)

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return int(self.labels_N.max()) + 1

    def facts(self) -> dict[str, Any]:
        """What a reader of results wants to know of the graph."""
        first = self.splits[0]
        return {
            "name": self.name,
            "nodes": self.nodes,
            "edges": self.edges,
            "features": self.features.shape[1],
            "classes": self.classes,
            "metric": self.metric,
            "homophily": self.homophily,
            "train": len(first.train),
            "validation": len(first.validation),
            "test": len(first.test),
        }


def build(name: str, data: Data, splits: tuple[Split, ...], metric: str) -> Graph:
    """A graph from torch-geometric's form.

    Args:
        name: of the graph.
        data: x [N, D], undirected edge_index [2, edges], y [N].
        splits: of the nodes.
        metric: "accuracy" or "auc".
    """
    size = (data.num_nodes, data.num_nodes)
    edges, weights = gcn_norm(data.edge_index, num_nodes=data.num_nodes)
    degree_N = torch.bincount(data.edge_index[1], minlength=data.num_nodes).float()
    # An edge (source, target) is entry [target, source], so that a row of the product gathers a node's neighbours.
    inward = data.edge_index.flip(0)
    return Graph(
        name=name,
        features=FixedMatrix(data.x),
        normalized=FixedMatrix(to_torch_coo_tensor(edges.flip(0), weights, size=size)),
        mean=FixedMatrix(to_torch_coo_tensor(inward, (1 / degree_N)[inward[0]], size=size)),
        labels_N=data.y,
        splits=splits,
        metric=metric,
        homophily={how: float(homophily(data.edge_index, data.y, method=how)) for how in ("edge", "edge_insensitive")},
        edges=data.edge_index.shape[1] // 2,
    )


def random_splits(nodes: int, count: int = SPLITS, shares: tuple[float, float, float] = SHARES) -> tuple[Split, ...]:
    """Fixed random splits: the order of split i is drawn with seed i.

    Args:
        nodes: how many there are.
        count: of splits.
        shares: of train, validation and test nodes; they sum to 1.
    """
    first, second = round(nodes * shares[0]), round(nodes * (shares[0] + shares[1]))
    orders = (torch.from_numpy(np.random.default_rng(seed).permutation(nodes)) for seed in range(count))
    return tuple(Split(order[:first], order[first:second], order[second:]) for order in orders)


def _planetoid(name: str, given: Path | None, root: Path) -> Graph:
    raw = root / name / "raw"
    if given is not None:
        raw.mkdir(parents=True, exist_ok=True)
        for file in (given / "planetoid").glob(f"ind.{name.lower()}.*"):
            shutil.copyfile(file, raw / file.name)
    data = Planetoid(str(root), name, transform=NormalizeFeatures())[0]
    return build(name.lower(), data, random_splits(data.num_nodes), "accuracy")


def _heterophilous(name: str, given: Path | None, root: Path, metric: str) -> Graph:
    file = given / "heterophilous" / f"{name}.npz" if given is not None else None
    if file is None or not file.exists():
        file = Path(download_url(f"{HeterophilousGraphDataset.url}/{name}.npz", str(root / "heterophilous")))
    arrays = np.load(file)

    def nodes(masks: NDArray[np.bool_], split: int) -> Tensor:
        return torch.from_numpy(np.flatnonzero(masks[split]))

    masks = [arrays[f"{part}_masks"] for part in ("train", "val", "test")]
    splits = tuple(Split(*(nodes(part, i) for part in masks)) for i in range(len(masks[0])))
    data = Data(
        x=torch.from_numpy(arrays["node_features"]).float(),
        edge_index=to_undirected(torch.from_numpy(arrays["edges"].T).long(), num_nodes=len(arrays["node_labels"])),
        y=torch.from_numpy(arrays["node_labels"]).long(),
    )
    return build(name, data, splits, metric)


def planted(nodes: int, seed: int = 0, classes: int = 4) -> tuple[Data, Tensor]:
    """A made graph on which a mixture must win: half of the nodes tell their class by their features, half by their neighbours.

    Features are noise, but for the telling half, which has a large value at its class. The silent half has neighbours of its
    own kind and class, the telling half random ones.

    Args:
        nodes: how many.
        seed: of everything drawn.
        classes: how many, at most 16.

    Returns:
        The graph, and [N] which nodes tell their class by their features.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=nodes)
    telling = rng.random(nodes) < 0.5
    features = rng.normal(size=(nodes, 16))
    features[telling, labels[telling]] += 4.0
    silent = np.flatnonzero(~telling)
    pairs = [(a, rng.choice(silent[labels[silent] == labels[a]])) for a in silent for _ in range(4)]
    pairs += [(a, rng.integers(nodes)) for a in np.flatnonzero(telling) for _ in range(4)]
    edges = to_undirected(torch.tensor([(a, b) for a, b in pairs if a != b]).T, num_nodes=nodes)
    return Data(torch.tensor(features).float(), edges, y=torch.tensor(labels)), torch.tensor(telling)


GRAPHS: dict[str, Callable[[Path | None, Path], Graph]] = {
    "cora": lambda given, root: _planetoid("Cora", given, root),
    "citeseer": lambda given, root: _planetoid("CiteSeer", given, root),
    "actor": lambda given, root: _heterophilous("actor", given, root, "accuracy"),
    "minesweeper": lambda given, root: _heterophilous("minesweeper", given, root, "auc"),
    "planted": lambda given, root: build("planted", planted(2000)[0], random_splits(2000), "accuracy"),
}
"""The graphs by name: two homophilous, two heterophilous, and a made one as positive control. Minesweeper is judged by ROC AUC,
as its authors do: 80 % of its nodes are of one class."""


def load(name: str, given: Path | None, root: Path) -> Graph:
    """A graph by name.

    Args:
        name: one of `GRAPHS`.
        given: directory with `planetoid/` and `heterophilous/`, when the files are already here.
        root: where torch-geometric keeps what it downloads and prepares.

    Raises:
        EquipoiseError: there is no graph of this name, or it is not here and cannot be downloaded.
    """
    if name not in GRAPHS:
        raise EquipoiseError(f"there is no graph '{name}'; there are {', '.join(GRAPHS)}.")
    try:
        return GRAPHS[name](given, root)
    except OSError as error:
        where = "it was not given" if given is None else f"'{given}' does not have all of it"
        raise EquipoiseError(
            f"graph '{name}' cannot be had: {where}, and its download failed ({error}). "
            "Give a directory with planetoid/ and heterophilous/ as --data."
        ) from error
