"""Training: one model alone, Mowst's two experts in turns, Mowst-star's jointly.

Every figure that decides anything (early stopping, the best turn, tuning) is of validation nodes.

Shapes: N nodes, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mowst.graphs import Graph, Split
from mowst.mixture import Mowst, Parts
from mowst.predictions import Prediction, loss, plain, score

Judgement = tuple[float, float]
"""Score and negative loss on validation nodes: a better score is better, and among equal scores the smaller loss."""

WORST: Judgement = (-1.0, float("-inf"))


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        lr: of AdamW.
        dropout: in the experts.
        hidden: width of the experts.
        weight_decay: of AdamW.
        epochs: most epochs of a model, or of one turn of an expert.
        patience: epochs without a better validation score after which a model or a turn ends.
        rounds: most rounds of turns (Mowst); a round is a turn of each expert.
        round_patience: rounds without a better validation score after which the turns end.
    """

    lr: float
    dropout: float
    hidden: int = 32
    weight_decay: float = 5e-4
    epochs: int = 300
    patience: int = 30
    rounds: int = 10
    round_patience: int = 2

    @property
    def tuned(self) -> str:
        """The tuned options, as a name."""
        return f"lr{self.lr:g}-dropout{self.dropout:g}"

    def as_json(self) -> dict[str, Any]:
        """All options."""
        return asdict(self)


def judge(predictions: list[Prediction], graph: Graph, nodes: Tensor) -> Judgement:
    """Score and negative loss on some nodes."""
    found = float(loss(predictions, graph.labels_N, nodes))
    return score(predictions, graph.labels_N, nodes, graph.metric), -found


def improve(
    modules: Iterable[nn.Module],
    predict: Callable[[], list[Prediction]],
    graph: Graph,
    split: Split,
    recipe: Recipe,
    best: Judgement = WORST,
) -> Judgement:
    """Train modules until their validation score has stood still for `patience` epochs; leave them at their best.

    Args:
        modules: that are trained; whatever else `predict` uses is left alone.
        predict: gives the predictions of all nodes in the modules' present mode.
        graph: what is learned.
        split: whose training nodes are learned from, and whose validation nodes decide.
        recipe: options.
        best: what the modules reach as they are; without something better they stay as they are.

    Returns:
        The best judgement.
    """
    trained = nn.ModuleList(modules)
    parameters = list(trained.parameters())
    optimizer = torch.optim.AdamW(parameters, recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    kept = _snapshot(trained)
    waited = 0
    for _ in range(recipe.epochs):
        trained.train()
        optimizer.zero_grad()
        loss(predict(), graph.labels_N, split.train).backward()
        optimizer.step()
        trained.eval()
        with torch.no_grad():
            now = judge(predict(), graph, split.validation)
        waited += 1
        if now > best:
            best, kept, waited = now, _snapshot(trained), 0
        if waited >= recipe.patience:
            break
    trained.load_state_dict(kept)
    return best


def fit(model: nn.Module, graph: Graph, split: Split, recipe: Recipe) -> Judgement:
    """Train one model that gives logits; it is left at its best and in evaluation mode."""
    return improve([model], lambda: plain(model(graph)), graph, split, recipe)


def fit_in_turns(mowst: Mowst, graph: Graph, split: Split, recipe: Recipe) -> Judgement:
    """Train the weak expert with the gate, then the strong expert, and again, until rounds bring nothing.

    Source: arXiv:2311.05185, training of Mowst. The expert that stands still answers as it would at inference (the
    published code leaves its dropout on), and the gate is taken back together with the experts when a turn was in vain (the
    published code takes back the experts alone).
    """
    mowst.eval()
    with torch.no_grad():
        best = judge(mowst.combine(mowst.parts(graph)), graph, split.validation)
    waited = 0
    for _ in range(recipe.rounds):
        before = best
        with torch.no_grad():
            strong_NC = mowst.strong_side(graph)

        def weak_turn(strong_NC: Tensor = strong_NC) -> list[Prediction]:
            weak_NC, confidence_N = mowst.weak_side(graph)
            return mowst.combine(Parts(weak_NC, strong_NC, confidence_N))

        best = improve([mowst.weak, mowst.gate], weak_turn, graph, split, recipe, best)
        with torch.no_grad():
            weak_NC, confidence_N = mowst.weak_side(graph)

        def strong_turn(weak_NC: Tensor = weak_NC, confidence_N: Tensor = confidence_N) -> list[Prediction]:
            return mowst.combine(Parts(weak_NC, mowst.strong_side(graph), confidence_N))

        best = improve([mowst.strong], strong_turn, graph, split, recipe, best)
        waited = 0 if best > before else waited + 1
        if waited >= recipe.round_patience:
            break
    return best


def fit_jointly(mowst: Mowst, graph: Graph, split: Split, recipe: Recipe) -> Judgement:
    """Train both experts and the gate together, as Mowst-star is."""
    return improve([mowst], lambda: mowst.combine(mowst.parts(graph)), graph, split, recipe)


def _snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
