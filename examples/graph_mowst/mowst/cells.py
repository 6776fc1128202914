"""One cell of the comparison: a model trained on one split with one recipe, judged on its test nodes and kept in a file.

A cell is made anew only when its file is missing or was made with another recipe, so that a stopped comparison goes on.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equipoise.artifacts.files import write_atomic
from mowst.experts import Expert, WithSkip
from mowst.gating import Gate, GivenConfidence
from mowst.graphs import Graph
from mowst.mixture import Mowst, MowstStar, Parts
from mowst.predictions import Prediction, plain, score
from mowst.routing import balance, record
from mowst.training import Judgement, Recipe, fit, fit_in_turns, fit_jointly

Cell = dict[str, Any]

MLP, MOWST, STAR = "mlp", "mowst", "mowst-star"
RANDOM = {MOWST: "mowst-random", STAR: "mowst-star-random"}
"""Trained control of each mixture: confidence drawn once per node, uniform in (0, 1), and never learned."""


def models(strong: str) -> tuple[str, ...]:
    """The models that are tuned, each with the same budget: both experts alone, their sum, and the two mixtures."""
    return (MLP, strong, f"{strong}+mlp", f"{MOWST}-{strong}", f"{STAR}-{strong}")


def controls(strong: str) -> dict[str, str]:
    """The trained controls, and the model whose tuned recipe each of them takes."""
    return {f"{control}-{strong}": f"{mixture}-{strong}" for mixture, control in RANDOM.items()}


@dataclass
class Bench:
    """Trains and judges models on one graph.

    Attributes:
        graph: the graph.
        strong: kind of the strong expert, "gcn" or "sage".
        folder: where cells are kept.
        pretrained: strong experts by recipe and split, with which Mowst starts.
    """

    graph: Graph
    strong: str
    folder: Path
    pretrained: dict[tuple[Recipe, int], dict[str, Tensor]] = field(default_factory=dict)

    def file(self, model: str, recipe: Recipe, split: int) -> Path:
        """The file of a cell."""
        return self.folder / self.graph.name / model / recipe.tuned / f"split-{split}.json"

    def known(self, model: str, recipe: Recipe, split: int) -> Cell | None:
        """A cell that was made before with this recipe."""
        file = self.file(model, recipe, split)
        if not file.exists():
            return None
        cell: Cell = json.loads(file.read_text())
        return cell if cell["recipe"] == recipe.as_json() else None

    def cell(self, model: str, recipe: Recipe, split: int) -> Cell:
        """Train and judge a model, or read what was found before.

        Args:
            model: a name of `models` or `controls`.
            recipe: options of training.
            split: number of the split; also the seed.
        """
        known = self.known(model, recipe, split)
        if known is not None:
            return known
        begun = time.process_time()
        torch.manual_seed(split)
        cell = self._mixture(model, recipe, split) if model.startswith(MOWST) else self._plain(model, recipe, split)
        cell |= {"model": model, "split": split, "recipe": recipe.as_json(), "cpu_seconds": time.process_time() - begun}
        write_atomic(self.file(model, recipe, split), json.dumps(cell, indent=1) + "\n")
        return cell

    def _plain(self, model: str, recipe: Recipe, split: int) -> Cell:
        if model == f"{self.strong}+mlp":
            network: torch.nn.Module = WithSkip(self.strong, self.graph, recipe.hidden, recipe.dropout)
        else:
            network = Expert(model, self.graph, recipe.hidden, recipe.dropout)
        best = fit(network, self.graph, self.graph.splits[split], recipe)
        if model == self.strong:
            self.pretrained[recipe, split] = network.state_dict()
        with torch.no_grad():
            return {"validation": best[0], "test": self._score(plain(network(self.graph)), split)}

    def _mixture(self, model: str, recipe: Recipe, split: int) -> Cell:
        network, best = self.trained_mixture(model, recipe, split)
        with torch.no_grad():
            parts = network.parts(self.graph)
        nodes = self.graph.splits[split].test
        name = f"{model} on {self.graph.name}, split {split}"
        profile = record(name, network, parts, self.graph, nodes, seed=split)
        file = self.file(model, recipe, split).with_suffix(".profile.safetensors")
        profile.save(file)
        return {
            "validation": best[0],
            "test": self._score(network.combine(parts), split),
            "confidence": float(parts.confidence_N[nodes].mean()),
            "instead": {
                how: self._score(network.combine(parts.with_confidence(other)), split)
                for how, other in _other_confidences(parts, nodes, seed=split).items()
            },
            "profile": str(file.relative_to(self.folder)),
            "balance": balance(profile),
        }

    def trained_mixture(self, model: str, recipe: Recipe, split: int) -> tuple[Mowst, Judgement]:
        """A mixture, trained.

        Mowst's strong expert starts where that expert alone ended. Mowst-star starts anew altogether: beside a finished strong
        expert its validation score peaks before the weak one has learned anything, and the mixture is that strong expert again.

        Args:
            model: a mixture or its control.
            recipe: options of training.
            split: number of the split; also the seed.
        """
        graph = self.graph
        weak = Expert("mlp", graph, recipe.hidden, recipe.dropout)
        strong = Expert(self.strong, graph, recipe.hidden, recipe.dropout)
        gate = GivenConfidence(torch.rand(graph.nodes)) if model.startswith(tuple(RANDOM.values())) else Gate()
        if model.startswith(STAR):
            star = MowstStar(weak, gate, strong)
            return star, fit_jointly(star, graph, graph.splits[split], recipe)
        if (recipe, split) not in self.pretrained:  # a stopped run goes on: the same seed gives the same expert
            torch.manual_seed(split)
            self._plain(self.strong, recipe, split)
        strong.load_state_dict(self.pretrained[recipe, split])
        torch.manual_seed(split)
        mowst = Mowst(weak, gate, strong)
        return mowst, fit_in_turns(mowst, graph, graph.splits[split], recipe)

    def _score(self, predictions: list[Prediction], split: int) -> float:
        return score(predictions, self.graph.labels_N, self.graph.splits[split].test, self.graph.metric)


def _other_confidences(parts: Parts, nodes: Tensor, seed: int) -> dict[str, Tensor]:
    """What is put in place of the learned confidences.

    The rounded ones, and four that say nothing of a node: all weak, all strong, the mean for all, those of other test nodes.
    """
    given_N = parts.confidence_N
    shuffled_N = given_N.clone()
    shuffled_N[nodes] = given_N[nodes[torch.randperm(len(nodes), generator=torch.Generator().manual_seed(seed))]]
    return {
        "rounded": given_N.round(),
        "weak": torch.ones_like(given_N),
        "strong": torch.zeros_like(given_N),
        "mean": torch.full_like(given_N, float(given_N[nodes].mean())),
        "shuffled": shuffled_N,
    }
